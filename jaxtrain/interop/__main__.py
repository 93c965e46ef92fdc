"""Weights in and out: `python -m jaxtrain.interop --help`."""

import argparse
import shutil
import sys
from pathlib import Path

import jax
import numpy as np
from absl import app, flags

from jaxtrain import config as config_lib
from jaxtrain.about import stored_config
from jaxtrain.checkpoint import CheckpointError, Checkpoints
from jaxtrain.data.corpus import open_corpus
from jaxtrain.data.loader import build_batches
from jaxtrain.disk import ends_in_one_line
from jaxtrain.files import strict_json, write_atomic
from jaxtrain.interop import InteropError
from jaxtrain.interop.hf import DTYPES, read_config, read_weights, write_folder
from jaxtrain.optim.accelerated import eval_params
from jaxtrain.report import set_up_logging
from jaxtrain.run import build_run, read_stored, restore_run
from jaxtrain.run_lock import FILE as LOCK
from jaxtrain.run_lock import RunLock
from jaxtrain.runtime import start_runtime
from jaxtrain.train import start_state
from jaxtrain.trees import named_leaves

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
EVAL_BATCH = 8  # an import's, to evaluate it
CHECK_TOKENS = 32  # of a random sequence that an export is computed with


def import_weights(source, workdir, text="", shards="", tokenizer="") -> None:
    """Makes a run at step 0 of a Hugging Face folder or an llm.c file.

    Args:
        text, shards: what the run is evaluated on, as data.text and data.shards.
        tokenizer: as data.tokenizer; empty is the folder's tokenizer.json.

    Raises:
        InteropError: the weights are damaged, of no known family, or `workdir` holds a run.
    """
    folder, out = Path(source), Path(workdir)
    if out.is_dir() and any(path.name != LOCK for path in out.iterdir()):
        raise InteropError(f"an import must go to a new folder; {out} is not empty. Set --run.")
    own = (folder.parent if folder.is_file() else folder) / "tokenizer.json"
    tokenizer = tokenizer or (str(own.resolve()) if own.exists() else "")
    if not tokenizer and not shards:
        raise InteropError(
            f"text needs the model's tokenizer; {own} is not there. Set --tokenizer."
        )
    model = read_config(folder)
    data = {"text": text, "shards": shards, "tokenizer": tokenizer or "bytes"}
    data |= {"batch": EVAL_BATCH, "seq_len": min(model.positions, 1_024)}
    cfg = config_lib.TrainConfig(
        workdir=str(out),
        weights=str(folder.resolve()),
        model=model,
        data=config_lib.DataConfig(**data),
        mesh=config_lib.MeshConfig(1, 1, 1),
    )
    start_runtime(cfg)
    run = build_run(cfg, jax.local_devices()[:1])
    with RunLock(out, "--run"):
        corpus = open_corpus(cfg.data, "train", model.V, out)
        with (
            build_batches(cfg.data, corpus, run.mesh, cfg.seed) as batches,
            Checkpoints(out / "checkpoints", 1) as checkpoints,
        ):
            state, _ = start_state(run, checkpoints, batches)
            checkpoints.save(0, state, {"data": batches.state(), "config": config_lib.flatten(cfg)})
            checkpoints.wait()
        write_atomic(out / "config.json", strict_json(stored_config(run, corpus), indent=2) + "\n")
    print(f"{run.parameters:,} parameters of {folder} are step 0 of {out}")


def export_weights(workdir, to, dtype="float32", step=None) -> None:
    """Writes a run's weights, those that evaluation sees, as a Hugging Face folder or llm.c file.

    Raises:
        InteropError: no family computes the model, or what was written computes something else.
    """
    run, state = restore_run(workdir, step)
    params = eval_params(state.opt_state, state.params)
    axes, named, cfg = named_leaves(run.model.axes), named_leaves(params), run.cfg.model

    def verify(folder):
        back = read_weights(folder, cfg, axes, named_leaves(run.model.shapes))
        read = jax.tree.unflatten(jax.tree.structure(params), [back[name]() for name in named])
        kept = jax.tree.map(lambda x: np.asarray(x).astype(DTYPES[dtype]).astype(x.dtype), params)
        tokens = np.random.default_rng(0).integers(0, cfg.V, (1, min(CHECK_TOKENS, cfg.positions)))
        logits = jax.jit(lambda p: run.model.logits(p, run.model.apply(p, tokens)))
        ours, theirs = np.asarray(logits(kept)), np.asarray(logits(read))
        if not np.array_equal(ours, theirs):
            off = float(np.max(np.abs(ours - theirs)))
            raise InteropError(
                f"an export must compute what the run does; logits are {off:.3g} off."
            )

    write_folder(to, cfg, axes, named, dtype, verify)
    name = read_stored(workdir)["data"].get("tokenizer") or ""
    if Path(name).is_file() and Path(to).is_dir():
        shutil.copyfile(name, Path(to) / "tokenizer.json")
    print(f"step {int(state.step)} of {workdir} is in {to}, {dtype}, read back: the same logits")


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
    return parser.parse_args(argv[1:])


@ends_in_one_line()
def main(args) -> None:
    set_up_logging()
    try:
        if args.command == "import":
            import_weights(args.source, args.run, args.text, args.shards, args.tokenizer)
        else:
            export_weights(args.run, args.to, args.dtype, args.step)
    except (ValueError, CheckpointError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    app.run(main, flags_parser=_parse)
