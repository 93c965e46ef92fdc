"""Weights in and out: `jaxtrain export --help` and `jaxtrain import --help`."""

import sys

from absl import app, flags

from jaxtrain.config.commands import rewrite_commands
from jaxtrain.distributed.program import exit_refused
from jaxtrain.errors import CheckpointError
from jaxtrain.interop.hf import DTYPES
from jaxtrain.interop.runs import export_weights, import_weights
from jaxtrain.reporting.terminal import set_up_logging
from pallas_kernels.arguments import Parser

ABOUT = """\
What is missing, left over or mis-shaped is listed before anything is written. To train on from
weights without a run of their own, give --weights=HF_DIR beside any config of the same model."""
IMPORT_HELP = f"""\
Makes a run at step 0 of a Hugging Face folder (GPT-2, Llama or Qwen3: config.json, and
model.safetensors or its indexed parts), or of llm.c's GPT-2 file (.bin, versions 3 and 5).

    jaxtrain import --from=runs/quickstart_hf --run=runs/imported
    jaxtrain import --from=runs/quickstart_hf --run=runs/imported_docs --text=docs --tokenizer=bytes
    jaxtrain evaluate --run=runs/imported

{ABOUT}
"""
EXPORT_HELP = f"""\
Writes a run's weights, those that evaluation sees, as a Hugging Face folder or as llm.c's file.

    jaxtrain export --run=runs/quickstart --to=runs/quickstart_hf
    jaxtrain export --run=runs/quickstart --to=runs/quickstart_bf16 --dtype=bfloat16
    jaxtrain export --run=runs/gpt_124m --to=runs/gpt_124m.bin

An export is read back and computed with before it is called done. {ABOUT}
"""
HELP = """\
Takes weights from Hugging Face and llm.c, and gives them back.

    jaxtrain export --run=runs/quickstart --to=runs/quickstart_hf
    jaxtrain import --from=runs/quickstart_hf --run=runs/imported
    jaxtrain evaluate --run=runs/imported
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
    prog = argv[0]
    doc = lambda text: rewrite_commands(text, f"{prog} COMMAND")
    parser = Parser(prog, doc(HELP))
    commands = parser.add_subparsers(dest="command", required=True)
    add = lambda name, help, text: commands.add_parser(name, help=help, doc=doc(text)).add_argument
    add_import = add("import", "a Hugging Face folder to a run", IMPORT_HELP)
    add_export = add("export", "a run to a Hugging Face folder", EXPORT_HELP)
    add = add_import
    add("--from", dest="source", required=True, help="Hugging Face folder, or llm.c file")
    add("--run", required=True, help="new folder of the run")
    add("--text", default="", help="text to evaluate on; default: Python's standard library")
    add("--shards", default="", help="token shards instead")
    add("--tokenizer", default="", help="of the text; default: the folder's tokenizer.json")
    add = add_export
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
        exit_refused(_by_own_flags(str(error)) if args.command == "import" else error)
    except OSError as error:
        found = str(error.filename or args.run)
        to = "--to" if args.command == "export" else "--run"
        flag = "--from" if found.startswith(getattr(args, "source", "\0")) else to
        exit_refused(f"{found}: {error.strerror or error}. Set {flag}.")


def _by_own_flags(message: str) -> str:
    """Returns an error of training's parts in the flags of import."""
    for field, flag in FLAGS_OF_IMPORT.items():
        message = message.replace(f"--{field}", flag)
        message = message.replace(field, flag) if "." in field else message
    return message


def command(argv=None, prog="python -m jaxtrain.interop") -> None:
    """Runs `export` or `import`, the first of the arguments."""
    argv = sys.argv[1:] if argv is None else argv
    app.run(main, argv=[prog, *argv], flags_parser=_parse)


if __name__ == "__main__":
    command()
