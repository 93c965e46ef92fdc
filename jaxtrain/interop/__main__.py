"""Weights in and out: `python -m jaxtrain.interop --help`."""

import argparse
import dataclasses
import difflib
import json
import shlex
import shutil
from pathlib import Path

import jax
from absl import app, flags

from jaxtrain import config as config_lib
from jaxtrain.about import stored_config
from jaxtrain.checkpoint import CheckpointError, Checkpoints
from jaxtrain.data.corpus import open_corpus
from jaxtrain.data.loader import build_batches
from jaxtrain.data.tokenizer import build_tokenizer
from jaxtrain.files import strict_json, write_atomic
from jaxtrain.interop import InteropError
from jaxtrain.interop.hf import DTYPES, json_of, read_config, write_folder
from jaxtrain.interop.tokenizer import (
    FILE,
    declared_tokens,
    special_tokens,
    write_generation_config,
    write_tokenizer,
)
from jaxtrain.interop.verify import check_finite, check_reading, check_transformers
from jaxtrain.invocation import command, python
from jaxtrain.optim.accelerated import eval_params
from jaxtrain.report import set_up_logging
from jaxtrain.run import build_run, read_stored, refuse, restore_run
from jaxtrain.runtime import start_runtime
from jaxtrain.train import start_state
from jaxtrain.trees import named_leaves

EXAMPLES = """\
  python -m jaxtrain.interop export --run=runs/quickstart --to=hf/quickstart
  python -m jaxtrain.interop import --from=HF_DIR --run=runs/imported --text=PATH
  python -m jaxtrain.interop export --run=runs/gpt_124m --to=gpt.bin --dtype=bfloat16
"""
HELP = f"""\
{EXAMPLES}
export writes a run's weights, config and tokenizer as a Hugging Face folder that transformers'
AutoModelForCausalLM, AutoTokenizer and pipeline load (Llama; Qwen3 with model.qk_norm; GPT-2), or
as llm.c's .bin file (GPT-2). import makes a run at step 0 of such a folder (config.json,
model.safetensors or its indexed parts) or file (versions 3 and 5), to evaluate or to sample.

To train on from weights without a run of their own: --config.weights=HF_DIR beside any config of
the same model. What is missing, left over or mis-shaped is listed before anything is written. An
export is read back and its logits are compared, with transformers too where it is installed, before
the folder appears.
"""
EVAL_BATCH = 8  # an import's, to evaluate it
# Flags of training that an error may name -> import's flags for the same values.
FLAGS_OF_IMPORT = {
    "--config.data.text": "--text",
    "--config.data.shards": "--shards",
    "--config.data.tokenizer": "--tokenizer",
    "--config.weights": "--from",
    "--config.workdir": "--run",
}


def import_weights(source, workdir, text="", shards="", tokenizer="") -> None:
    """Makes a run at step 0 of a Hugging Face folder or an llm.c file.

    Args:
        text, shards: what the run is evaluated on, as data.text and data.shards.
        tokenizer: as data.tokenizer; empty is the folder's tokenizer.json.

    Raises:
        InteropError: the weights are damaged, of no known family, or `workdir` holds a run.
    """
    folder, out = Path(source), Path(workdir)
    if not folder.exists():
        raise InteropError(
            f"--from must be a Hugging Face folder or an llm.c file; {folder} does not exist."
        )
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        found = "is not empty" if out.is_dir() else "is a file"
        raise InteropError(f"an import must go to a new folder; {out} {found}. Set --run.")
    model = read_config(folder)
    home = folder.parent if folder.is_file() else folder
    own = home / FILE
    tokenizer = tokenizer or (str(own.resolve()) if own.exists() else "")
    if not tokenizer and not shards:
        raise InteropError(
            f"text needs the model's tokenizer; {own} is not there. Set --tokenizer to 'bytes', "
            "'gpt2' or the path of a tokenizer.json."
        )
    data = {"text": text, "shards": shards, "tokenizer": tokenizer or "bytes"}
    data |= {"batch": EVAL_BATCH, "seq_len": min(model.positions, 1_024)}
    data |= {"eot": _declared_eot(home, tokenizer)}
    cfg = config_lib.TrainConfig(
        workdir=str(out),
        weights=str(folder.resolve()),
        model=model,
        data=config_lib.DataConfig(**data),
        mesh=config_lib.MeshConfig(1, 1, 1),
    )
    start_runtime(cfg)
    run = build_run(cfg, jax.local_devices()[:1])
    out.mkdir(parents=True, exist_ok=True)
    try:
        _store_step_0(run, out)
    except BaseException:  # an import that fails leaves no half of a run, only the folder
        for path in out.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        raise
    print(f"{run.parameters:,} parameters of {folder} are step 0 of {out}")
    print(f"next: {command('evaluate', f'--run={out}')}")
    print(f"      {command('generate', f'--run={out}', '--prompt=def main(')}")


def _store_step_0(run, out) -> None:
    corpus = open_corpus(run.cfg.data, "train", run.cfg.model.V, out)
    with (
        build_batches(run.cfg.data, corpus, run.mesh, run.cfg.seed) as batches,
        Checkpoints(out / "checkpoints", 1) as checkpoints,
    ):
        state, _ = start_state(run, checkpoints, batches)
        meta = {"data": batches.state(), "config": config_lib.flatten(run.cfg)}
        checkpoints.save(0, state, meta)
        checkpoints.wait()
    write_atomic(out / "config.json", strict_json(stored_config(run, corpus), indent=2) + "\n")


def _declared_eot(folder, tokenizer) -> int:
    """Returns data.eot of an import: -1 where the tokenizer says it, else what the folder names.

    Prints a line where the tokenizer's choice is none of the folder's special tokens.
    """
    if not (folder / "config.json").is_file():
        return -1
    declared = declared_tokens(folder)
    named = [token for token in (declared.bos, *declared.eos) if isinstance(token, int)]
    if not tokenizer:
        return named[0] if named else -1
    chosen = build_tokenizer(tokenizer).eot
    if named and chosen not in named:
        print(
            f"documents start with token {chosen} of {tokenizer}, but {folder} names "
            f"bos_token_id {declared.bos} and eos_token_id {list(declared.eos)}"
        )
    return -1


def export_weights(workdir, to, dtype="float32", step=None, tokenizer="") -> None:
    """Writes a run's weights, those that evaluation sees, as a Hugging Face folder or llm.c file.

    Args:
        tokenizer: as data.tokenizer; empty is the run's, "none" writes no tokenizer files.

    Raises:
        InteropError: no family computes the model, or what was written computes something else.
    """
    read_stored(workdir)  # a folder that is no run is refused first
    to = Path(to)
    if to.exists():
        raise InteropError(f"an export must go to a new path; {to} exists. Set --to.")
    reader = None if to.suffix == ".bin" else _tokenizer_of(workdir, tokenizer)
    run, state = restore_run(workdir, step)
    params, data = eval_params(state.opt_state, state.params), run.cfg.data
    cfg = run.cfg.model
    if cfg.position == "rope" and not run.cfg.weights:  # known only of imported weights
        cfg = dataclasses.replace(cfg, positions=data.seq_len)
    axes, named = named_leaves(run.model.axes), named_leaves(params)
    special, checks = special_tokens(reader, data.eot, _homes(run.cfg)), []

    def finish(hidden):
        if hidden.is_dir():
            write_generation_config(hidden, special, reader, cfg.V)
            if reader is not None:
                write_tokenizer(hidden, reader, special, cfg.positions)
        logits = check_reading(hidden, cfg, axes, named, dtype)
        checks.append("read back: the same weights and logits")
        if hidden.is_dir():
            checks.append(check_transformers(hidden, cfg, logits, reader))

    check_finite(named, dtype)
    write_folder(to, cfg, axes, named, dtype, finish, special=special.fields())
    kind = json_of(to / "config.json")["architectures"][0] if to.is_dir() else "llm.c's GPT-2"
    print(f"step {int(state.step)} of {workdir} is in {to}: {kind}, {dtype}")
    for line in checks:
        print(f"checked: {line}")
    _describe(to, reader, special, cfg.dtype)


def _tokenizer_of(workdir, name):
    """Returns the tokenizer of a run, or of --tokenizer; None where there is none.

    Raises:
        InteropError: the run's tokenizer.json is gone.
    """
    own = read_stored(workdir)["data"].get("tokenizer") or "none"
    if not name and Path(own).name == FILE and not Path(own).is_file():
        own = str(Path(workdir, *Path(own).parts[-3:]))  # data/KEY/tokenizer.json of a moved run
    name = name or own
    if name == "none":
        return None
    try:
        return build_tokenizer(name)
    except ValueError as error:
        reason = str(error).replace("--config.data.tokenizer", "--tokenizer")
        raise InteropError(f"{reason} --tokenizer=none exports without one.") from error


def _homes(cfg) -> list[Path]:
    """Returns the folders that a run's tokenizer and weights came from."""
    named = [Path(name) for name in (cfg.data.tokenizer, cfg.weights) if name]
    return [path.parent if path.is_file() else path for path in named if path.exists()]


def _describe(to, tokenizer, special, dtype) -> None:
    """Prints what an export does with text, and the command that uses it next."""
    if to.is_file():
        return
    path = json.dumps(str(to))
    if tokenizer is None:
        ids = f"data.eot={special.bos}" if special.eos else "null"
        print(f"no tokenizer files: no tokenizer is known. bos and eos are {ids}. See --tokenizer")
        code = "from transformers import AutoModelForCausalLM; "
        code += f"print(AutoModelForCausalLM.from_pretrained({path}))"
    else:
        ends = ", ".join(map(str, special.eos))
        print(
            f"text: AutoTokenizer puts token {special.bos} first, as training did, and generation"
        )
        print(f"      stops at token {ends}")
        code = "from transformers import pipeline; "
        code += f'print(pipeline("text-generation", {path})("def main(", max_new_tokens=100)'
        code += '[0]["generated_text"])'
    if dtype == "bfloat16":
        print("note: the run computed in bfloat16; in float32, another token may be the likeliest")
    print(f"next: {python()} -c {shlex.quote(code)}")


class _Parser(argparse.ArgumentParser):
    """Bad usage ends in one line and the status of other bad input; examples come first."""

    def error(self, message):
        known = [name for action in self._actions for name in action.option_strings]
        unknown = message.removeprefix("unrecognized arguments: ").split()[0].partition("=")[0]
        near = difflib.get_close_matches(unknown, known, 1) if unknown.startswith("-") else ()
        refuse(f"{message}.{f' Did you mean {near[0]}?' if near else ''} See {self.prog} --help.")

    def format_help(self):
        self.usage = argparse.SUPPRESS
        return super().format_help()


def _parse(argv):
    flags.FLAGS(argv[:1])  # absl's own, for its logging
    form = {"formatter_class": argparse.RawDescriptionHelpFormatter}
    parser = _Parser("python -m jaxtrain.interop", description=HELP, **form)
    commands = parser.add_subparsers(dest="command", required=True, parser_class=_Parser)
    form["description"] = EXAMPLES
    add = commands.add_parser("import", help="a Hugging Face folder to a run", **form).add_argument
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
    add = commands.add_parser("export", help="a run to a Hugging Face folder", **form).add_argument
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
        message = str(error)
        for theirs, ours in FLAGS_OF_IMPORT.items() if args.command == "import" else ():
            message = message.replace(theirs, ours)
        refuse(message)
    except OSError as error:
        refuse(f"{error.filename or args.run}: {error.strerror or error}")


if __name__ == "__main__":
    app.run(main, flags_parser=_parse)
