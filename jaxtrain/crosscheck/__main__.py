r"""Proves a PyTorch result in JAX, step by step, or names the first tensor at which the two part.

    jaxtrain crosscheck run crosscheck_gpt2 --steps=50 --precision=float64
    jaxtrain crosscheck run crosscheck_llama --precision=float32 --optim.name=adamw
    jaxtrain crosscheck record crosscheck_gpt2 --keep_batches --out=runs/jax_train.jsonl

`run` trains both sides, ours and a PyTorch twin, from the same weights, shards and config.

A PyTorch loop of your own. Copy jaxtrain/crosscheck/recorder.py beside it, add the three lines
that it shows, then train ours on the batches that it wrote, and compare:

    jaxtrain crosscheck record FILE --weights=HF_FOLDER --names=hf --batches=theirs.jsonl \
        --steps=20 --out=jax_train.jsonl
    jaxtrain crosscheck compare jax_train.jsonl theirs.jsonl

llm.c's own check, of a model file and the debug state that was made with it:

    jaxtrain crosscheck llmc --weights=gpt2_124M.bin --state=gpt2_124M_debug_state.bin

float64 proves the algorithm: 1e-10 throughout. float32 has room for rounding, which grows with the
steps. bfloat16 passes if our error against float32 is at most 1.1 times PyTorch's. Exit status: 0
agree, 1 part or bad input. Needs the extra `crosscheck` for what runs PyTorch.
"""

import dataclasses
import importlib
import sys
import time
from pathlib import Path

import jax
from absl import flags

import jaxtrain.config.train_config as config_lib
from jaxtrain.config.command_line import CommandForm
from jaxtrain.crosscheck import comparison as judge
from jaxtrain.crosscheck import explanation, jax_train, llmc_state, loss_plot
from jaxtrain.crosscheck.tensor_names import STYLES
from jaxtrain.crosscheck.trace import PRECISIONS, batches_of, read_trace
from jaxtrain.distributed.program import run_main
from jaxtrain.distributed.runtime import start_runtime
from jaxtrain.files import write_atomic
from jaxtrain.interop.hf import read_config
from jaxtrain.ops.precision import resolve_dtype
from jaxtrain.reporting.terminal import set_up_logging

FLAGS = flags.FLAGS
_SIDES = ("jaxtrain", "pytorch")


def say(text) -> None:
    print(text, flush=True)


def resolve(config, steps, precision):
    """The TrainConfig of a run's ConfigDict at another length and precision."""
    if steps:
        config.steps = steps
    if precision:
        config.model.dtype = config.optim.ns_dtype = precision
    cfg = config_lib.freeze(config)
    start_runtime(cfg)
    cfg, _ = resolve_dtype(cfg, jax.devices()[0])
    Path(cfg.workdir).mkdir(parents=True, exist_ok=True)
    return cfg


def record_side(side, start, path, batches, style="jaxtrain", keep_batches=False) -> None:
    """Writes one side's trace and says how long it took; batches: a Trace, or None for the data."""
    began, cfg = time.perf_counter(), start.run.cfg
    given = batches_of(batches) if batches else None
    if side == "jaxtrain":
        jax_train.record(start, cfg.steps, path, style, given, keep_batches)
    else:
        from jaxtrain.crosscheck import torch_data, torch_train

        if given is None:
            paths, data = [shard.path for shard in start.corpus.shards], cfg.data
            given = torch_data.shard_batches(paths, data.batch, data.seq_len, cfg.seed)
        torch_train.record(cfg, cfg.steps, path, start.weights, given)
    seconds = time.perf_counter() - began
    say(f"{side:10} {cfg.model.dtype}, {cfg.steps} steps in {seconds:.1f} s -> {path}")


def check_twin(cfg, reads_data=True) -> None:
    """Raises, before anything is trained, where the PyTorch twin cannot follow a TrainConfig.

    Raises:
        ImportError: torch is missing.
        ValueError: torch.optim lacks the optimizer, or the twin cannot make the batches.
    """
    importlib.import_module("jaxtrain.crosscheck.torch_model")  # says what to install without torch
    from jaxtrain.crosscheck.torch_train import check_optimizer

    check_optimizer(cfg.optim)
    if reads_data and (cfg.data.pack or cfg.data.document_mask):
        raise ValueError(
            "the twin reads windows of the shards; got data.pack or data.document_mask. Record "
            "ours with --keep_batches, then the twin with --batches=TRACE."
        )


def report(comparison, png) -> int:
    """Prints a comparison and draws its curves; the exit status."""
    say(explanation.table(comparison))
    write_atomic(png, loss_plot.draw(comparison))
    say(f"loss curves: {png}")
    say(explanation.explain(comparison))
    return 1 if comparison.divergence else 0


def run(config, steps, precision) -> int:
    """Records both sides of a config and compares them; the exit status."""
    cfg = resolve(config, steps, precision)
    check_twin(cfg)
    folder, start = Path(cfg.workdir), jax_train.start(cfg)
    say(f"model      {start.run.parameters:,} parameters, {cfg.optim.name}, seed {cfg.seed}")
    say(f"data       {start.corpus.describe()}")
    for route in start.run.routes.values():
        say(f"route      {route}")
    paths = {side: folder / f"{side}_{cfg.model.dtype}.jsonl" for side in _SIDES}
    for side, path in paths.items():
        record_side(side, start, path, None)
    if cfg.model.dtype != "bfloat16":
        traces = (read_trace(path) for path in paths.values())
        return report(judge.compare(*traces), folder / f"compare_{cfg.model.dtype}.png")
    truth = folder / "pytorch_float32.jsonl"
    wide = dataclasses.replace(cfg.model, dtype="float32")
    exact = dataclasses.replace(
        cfg, model=wide, optim=dataclasses.replace(cfg.optim, ns_dtype="float32")
    )
    record_side("pytorch", start._replace(run=start.run._replace(cfg=exact)), truth, None)
    return report_narrow(truth, *paths.values())


def report_narrow(truth, first, second) -> int:
    errors = judge.compare_narrow(*map(read_trace, (truth, first, second)))
    text, passed = explanation.narrow_table(errors)
    say(text)
    return 0 if passed else 1


def llmc(weights, state, workdir) -> int:
    """Compares our gradients with those of an llm.c debug state; the exit status."""
    folder = Path(workdir)
    folder.mkdir(parents=True, exist_ok=True)
    model = read_config(weights)
    llmc_state.write_trace(state, model, folder / "llmc.jsonl")
    theirs = read_trace(folder / "llmc.jsonl")
    tokens = next(batches_of(theirs))["tokens"]
    data = config_lib.DataConfig(batch=tokens.shape[0], seq_len=tokens.shape[1] - 1)
    paths = {"weights": str(weights), "workdir": str(folder)}
    config = config_lib.to_config_dict(config_lib.TrainConfig(model=model, data=data, **paths))
    cfg = resolve(config, 1, "float32")
    record_side("jaxtrain", jax_train.start(cfg, False), folder / "jaxtrain.jsonl", theirs, "hf")
    return report(judge.compare(read_trace(folder / "jaxtrain.jsonl"), theirs), folder / "llmc.png")


def main(verb, paths) -> int:
    """Does what the first word of the command line says; the exit status."""
    set_up_logging()
    if verb == "compare":
        if len(paths) != 2:
            raise ValueError(f"compare needs two traces, as in compare A B; got {paths}.")
        if FLAGS.truth:
            return report_narrow(FLAGS.truth, *paths)
        comparison = judge.compare(*map(read_trace, paths))
        return report(comparison, FLAGS.out or f"{Path(paths[0]).with_suffix('')}_compare.png")
    if verb == "llmc":
        return llmc(FLAGS.weights, FLAGS.state, FLAGS.workdir)
    if verb == "run":
        return run(FLAGS.config, FLAGS.steps, FLAGS.precision)
    if verb == "record":
        cfg = resolve(FLAGS.config, FLAGS.steps, FLAGS.precision)
        batches = read_trace(FLAGS.batches) if FLAGS.batches else None
        if FLAGS.side == "pytorch":
            check_twin(cfg, reads_data=batches is None)
        out = FLAGS.out or str(Path(cfg.workdir) / f"{FLAGS.side}_{cfg.model.dtype}.jsonl")
        start = jax_train.start(cfg, read_data=batches is None)
        record_side(FLAGS.side, start, out, batches, FLAGS.names, FLAGS.keep_batches)
        return 0
    raise ValueError(
        "the command must be `run CONFIG`, `record CONFIG`, `compare TRACE TRACE` or "
        f"`llmc --weights=FILE --state=FILE`; got {verb or 'none'}. See --help."
    )


def _define_training() -> None:
    flags.DEFINE_integer("steps", 0, "steps to train; 0 is as the config has", lower_bound=0)
    flags.DEFINE_enum("precision", None, PRECISIONS, "to compute in; default: the config's")


def _define_record() -> None:
    _define_training()
    flags.DEFINE_enum("side", "jaxtrain", _SIDES, "which of the two trains")
    flags.DEFINE_enum("names", "jaxtrain", STYLES, "whose names tensors have")
    flags.DEFINE_string("batches", "", "trace whose batches to train on")
    flags.DEFINE_bool("keep_batches", False, "write the batches beside their hashes")
    flags.DEFINE_string("out", "", "the trace")


def _define_compare() -> None:
    flags.DEFINE_string("truth", "", "float32 trace that two bfloat16 ones are held to")
    flags.DEFINE_string("out", "", "the picture")


def _define_llmc() -> None:
    flags.DEFINE_string("weights", None, "model file", required=True)
    flags.DEFINE_string("state", None, "debug state", required=True)
    flags.DEFINE_string("workdir", "runs/crosscheck_llmc", "folder of the traces")


# A word that is not here has no flags; `main` then says which words there are.
VERBS = {
    "run": CommandForm("crosscheck", __doc__, _define_training, config="must"),
    "record": CommandForm("crosscheck", __doc__, _define_record, config="must"),
    "compare": CommandForm("crosscheck", __doc__, _define_compare, words=2),
    "llmc": CommandForm("crosscheck", __doc__, _define_llmc),
}
HELP = f"""{__doc__}
`run`, `record`, `compare` and `llmc` have flags of their own: see `jaxtrain crosscheck run --help`.
"""


def command(argv=None, prog="python -m jaxtrain.crosscheck") -> None:
    argv = list(sys.argv[1:] if argv is None else argv)
    verb = next((arg for arg in argv if not arg.startswith("-")), "")
    if verb in VERBS:
        argv.remove(verb)
        form, prog = VERBS[verb], f"{prog} {verb}"
    else:
        form = CommandForm("crosscheck", HELP, words=len(argv))
    run_main(lambda *words: main(verb, *words or ([],)), (ImportError,), form, argv, prog)


if __name__ == "__main__":
    command()
