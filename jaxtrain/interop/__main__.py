"""Weights in and out: `python -m jaxtrain.interop --help`."""

import argparse

from absl import app, flags

from jaxtrain.checkpoint import CheckpointError
from jaxtrain.interop.hf import DTYPES
from jaxtrain.interop.runs import export_weights, import_weights
from jaxtrain.report import set_up_logging
from jaxtrain.run import refuse

HELP = """\
Takes weights of GPT-2 and Llama models from Hugging Face folders (config.json, model.safetensors
or its indexed parts) and GPT-2 from llm.c's .bin files (versions 3 and 5), and gives them back:

  python -m jaxtrain.interop import --from=HF_DIR --run=DIR     a run at step 0
  python -m jaxtrain.evaluate --run=DIR
  python -m jaxtrain.generate --run=DIR --prompt="def main("
  python -m jaxtrain.interop export --run=DIR --to=NEW_HF_DIR
  python -m jaxtrain.interop export --run=DIR --to=NEW_FILE.bin     for llm.c

To train on from weights without a run of their own: --config.weights=HF_DIR beside any config of
the same model. What is missing, left over or mis-shaped is listed before anything is written, and
an export is read back and computed with before it is called done.
"""
# Config fields that an error may name, and import's flags for the same values.
FLAGS_OF_IMPORT = {
    "data.text": "--text",
    "data.shards": "--shards",
    "data.tokenizer": "--tokenizer",
    "weights": "--from",
    "workdir": "--run",
}


def _parse(argv):
    flags.FLAGS(argv[:1])  # absl's own, for its logging
    parser = argparse.ArgumentParser(
        "python -m jaxtrain.interop",
        description=HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    add = commands.add_parser("import", help="a Hugging Face folder to a run").add_argument
    add(
        "--from",
        dest="source",
        required=True,
        help="folder with config.json and weights, or llm.c file",
    )
    add("--run", required=True, help="new folder of the run")
    add("--text", default="", help="text to evaluate on; default: Python's standard library")
    add("--shards", default="", help="token shards instead")
    add("--tokenizer", default="", help="of the text; default: the folder's tokenizer.json")
    add = commands.add_parser("export", help="a run to a Hugging Face folder").add_argument
    add("--run", required=True, help="folder of the run")
    add("--to", required=True, help="new folder, or new .bin file")
    add("--dtype", default="float32", choices=tuple(DTYPES), help="default: %(default)s")
    add("--step", type=int, help="checkpoint; default: the newest good one")
    add("--tokenizer", default="", help="default: the run's; 'none' writes no tokenizer files")
    return parser.parse_args(argv[1:])


def main(args) -> None:
    set_up_logging()
    try:
        if args.command == "import":
            import_weights(args.source, args.run, args.text, args.shards, args.tokenizer)
        else:
            export_weights(args.run, args.to, args.dtype, args.step, args.tokenizer)
    except (ValueError, CheckpointError) as error:
        refuse(_by_own_flags(str(error)) if args.command == "import" else error)
    except OSError as error:
        found = str(error.filename or args.run)
        to = "--to" if args.command == "export" else "--run"
        flag = "--from" if found.startswith(getattr(args, "source", "\0")) else to
        refuse(f"{found}: {error.strerror or error}. Set {flag}.")


def _by_own_flags(message: str) -> str:
    """Returns an error of training's parts in the flags of import."""
    for field, flag in FLAGS_OF_IMPORT.items():
        message = message.replace(f"--config.{field}", flag)
        message = message.replace(field, flag) if "." in field else message
    return message


if __name__ == "__main__":
    app.run(main, flags_parser=_parse)
