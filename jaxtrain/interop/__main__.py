"""The commands `jaxtrain export` and `jaxtrain import`: weights to and from other formats."""

import argparse
import sys

from absl import app, flags

from jaxtrain.config.commands import rewrite_commands
from jaxtrain.distributed.program import exit_refused
from jaxtrain.errors import CheckpointError
from jaxtrain.interop.families import FAMILIES
from jaxtrain.interop.hf import DTYPES
from jaxtrain.interop.import_export import export_weights, import_weights
from jaxtrain.reporting.terminal import set_up_logging
from pallas_kernels.arguments import Parser

IMPORT_HELP = f"""\
Creates a run at step 0 from a Hugging Face folder (config.json, and model.safetensors or its
indexed parts), an llm.c GPT-2 file (.bin, version 3 or 5) or a nanochat checkpoint (model_STEP.pt
with meta_STEP.json, in the architecture of October 2025). Families that are read:
{", ".join(FAMILIES)}.

    jaxtrain import --from=runs/quickstart_hf --run=runs/imported
    jaxtrain import --from=runs/quickstart_hf --run=runs/imported_docs --text=docs --tokenizer=bytes
    jaxtrain evaluate --run=runs/imported

Before anything is written, all tensors are listed that are missing, unexpected, mis-shaped or not
finite, and all fields of config.json that jaxtrain does not compute. To train from weights
directly, add --weights=HF_DIR to a training command for the same model.
"""
EXPORT_HELP = """\
Writes the weights that evaluation uses as a Hugging Face folder or an llm.c file.

    jaxtrain export --run=runs/quickstart --to=runs/quickstart_hf
    jaxtrain export --run=runs/quickstart --to=runs/quickstart_bf16 --dtype=bfloat16
    jaxtrain export --run=runs/gpt_124m --to=runs/gpt_124m.bin

Rows that only pad the vocabulary are removed. An export is read back, and its logits are compared
with the run's.
"""
HELP = """\
Imports weights from Hugging Face and llm.c, and exports them.

    jaxtrain export --run=runs/quickstart --to=runs/quickstart_hf
    jaxtrain import --from=runs/quickstart_hf --run=runs/imported
    jaxtrain evaluate --run=runs/imported
"""
# Config fields that an error may name -> import's flags for the same values.
FLAGS_OF_IMPORT = {
    "data.text": "--text",
    "data.shards": "--shards",
    "data.tokenizer": "--tokenizer",
    "weights": "--from",
    "workdir": "--run",
}


def _parse(argv: list[str]) -> argparse.Namespace:
    flags.FLAGS(argv[:1])  # absl's logging needs its flags parsed
    prog = argv[0]
    doc = lambda text: rewrite_commands(text, f"{prog} COMMAND")
    parser = Parser(prog, doc(HELP))
    commands = parser.add_subparsers(dest="command", required=True)
    help = "creates a run from a Hugging Face folder"
    add = commands.add_parser("import", help=help, doc=doc(IMPORT_HELP)).add_argument
    add(
        "--from",
        dest="source",
        required=True,
        help="Hugging Face folder, llm.c file or nanochat folder",
    )
    add("--run", required=True, help="new folder for the run")
    add("--text", default="", help="text to evaluate on; default: Python's standard library")
    add("--shards", default="", help="token shards to evaluate on instead")
    add("--tokenizer", default="", help="for the text; default: the folder's tokenizer.json")
    help = "writes a run as a Hugging Face folder"
    add = commands.add_parser("export", help=help, doc=doc(EXPORT_HELP)).add_argument
    add("--run", required=True, help="folder of the run")
    add("--to", required=True, help="new folder, or new .bin file")
    add("--dtype", default="float32", choices=tuple(DTYPES), help="default: %(default)s")
    add("--step", type=int, help="checkpoint to export; default: the newest good one")
    add("--tokenizer", default="", help="default: the run's; 'none' writes no tokenizer files")
    return parser.parse_args(argv[1:])


def main(args: argparse.Namespace) -> None:
    """Runs the parsed command; bad input ends the process with status REFUSED."""
    set_up_logging()
    try:
        if args.command == "import":
            import_weights(args.source, args.run, args.text, args.shards, args.tokenizer)
        else:
            export_weights(args.run, args.to, args.dtype, args.step, args.tokenizer)
    except (ValueError, CheckpointError) as error:
        exit_refused(_with_import_flags(str(error)) if args.command == "import" else error)
    except OSError as error:
        path = str(error.filename or args.run)
        flag = "--to" if args.command == "export" else "--run"
        if args.command == "import" and path.startswith(args.source):
            flag = "--from"
        exit_refused(f"{path}: {error.strerror or error}. Set {flag}.")


def _with_import_flags(message: str) -> str:
    """Returns an error message with import's flags in place of training's config fields."""
    for field, flag in FLAGS_OF_IMPORT.items():
        message = message.replace(f"--{field}", flag)
        message = message.replace(field, flag) if "." in field else message
    return message


def command(argv: list[str] | None = None, prog: str = "python -m jaxtrain.interop") -> None:
    """Runs the command that the first argument names; argv=None takes sys.argv's."""
    argv = sys.argv[1:] if argv is None else argv
    app.run(main, argv=[prog, *argv], flags_parser=_parse)


if __name__ == "__main__":
    command()
