r"""Compares training in jaxtrain and in PyTorch step by step, and names the first difference.

    jaxtrain crosscheck run crosscheck_gpt2 --steps=50 --precision=float64
    jaxtrain crosscheck record --weights=HF_FOLDER --batches=theirs.jsonl --out=ours.jsonl \
        --optim.name=adamw --optim.adam_learning_rate=3e-4
    jaxtrain crosscheck compare ours.jsonl theirs.jsonl

`run` trains a config twice, in jaxtrain and in a separate PyTorch implementation (its own model,
schedule and data reader, torch.optim's optimizers), from the same weights on the same shards.

To check a PyTorch loop of your own, copy jaxtrain/crosscheck/recorder.py and model_hooks.py beside
it and add the three lines that recorder.py shows. Your loop then writes a trace with its batches.
`record` trains jaxtrain on these batches from the same weights and writes a second trace. Without a
config, the model is that of --weights, a Hugging Face folder, and the optimizer is AdamW at a
constant rate, without decay or clipping. Flags change it: every field that `jaxtrain train --help`
lists is one, as in --optim.weight_decay=0.1. `compare` compares the two.

`llmc` compares gradients with llm.c's, from a model file and llm.c's debug state of that model
(--weights=gpt2_124M.bin --state=gpt2_124M_debug_state.bin).

How to read the table: one row per step, with both losses, their difference in nats, and the largest
relative difference of any tensor among the activations, gradients, updates and parameters. A "!"
marks a difference above the tolerance. The line below the table starts with AGREE, or with DIFFER
and the first step, the stage (batch, forward, loss, gradient or optimizer) and the tensors, with
the likely cause where the numbers show it.

What a precision can show:
    float64    that the algorithms are the same: everything agrees up to rounding, to about 1e-12
    float32    the same, up to its larger rounding
    bfloat16   that our error against float32 is at most 1.1 times PyTorch's

Our side measures the rounding while it trains: each tensor's tolerance is what two copies of the
run, whose gradients are moved by rounding errors, differ from it.

Exit status: 0 if the traces agree, 1 if they differ. Commands that run PyTorch need the extra
`crosscheck`.
"""

import dataclasses
import functools
import importlib
import sys
import time
from pathlib import Path
from typing import Any

import jax
from absl import flags

import jaxtrain.config.train_config as config_lib
from jaxtrain.config.command_line import CommandForm
from jaxtrain.config.train_config import TrainConfig
from jaxtrain.crosscheck import explanation, jax_train, llmc_state, loss_plot
from jaxtrain.crosscheck.comparison import Comparison, compare_bfloat16, compare_traces
from jaxtrain.crosscheck.jax_train import Start
from jaxtrain.crosscheck.record_config import build_record_config
from jaxtrain.crosscheck.tensor_names import STYLES, style_of
from jaxtrain.crosscheck.trace import PRECISIONS, Trace, batches_of, read_trace
from jaxtrain.distributed.program import run_main
from jaxtrain.distributed.runtime import start_runtime
from jaxtrain.files import write_atomic
from jaxtrain.interop.hf import read_config
from jaxtrain.ops.precision import resolve_dtype
from jaxtrain.reporting.terminal import set_up_logging

FLAGS = flags.FLAGS
SIDES = ("jaxtrain", "pytorch")
print_now = functools.partial(print, flush=True)


def resolve_config(config: Any, steps: int, precision: str | None) -> TrainConfig:
    """Freezes a config with the flags' steps and precision; sets up JAX and the run's folder."""
    if steps:
        config.steps = steps
    if precision:
        config.model.dtype = precision
        if config.optim.ns_form != "torch":  # torch.optim.Muon's type does not follow the model's
            config.optim.ns_dtype = precision
    cfg = config_lib.freeze(config)
    start_runtime(cfg)
    cfg, _ = resolve_dtype(cfg, jax.devices()[0])
    Path(cfg.workdir).mkdir(parents=True, exist_ok=True)
    return cfg


def record_side(
    side: str,
    start: Start,
    path: str | Path,
    batches: Trace | None = None,
    style: str = "auto",
    keep_batches: bool = False,
    measure_rounding: bool = True,
) -> None:
    """Trains one side, writes its trace and prints how long that took.

    Args:
        batches: the trace whose batches to train on; None reads the config's data.
        style: of tensor_names.STYLES, or "auto": the style of `batches`, else "jaxtrain".
    """
    began, cfg = time.perf_counter(), start.run.cfg
    given = batches_of(batches) if batches else None
    if side == "jaxtrain":
        style = style_of(batches) if style == "auto" else style
        options = (style, given, keep_batches, measure_rounding, batches)
        jax_train.record(start, cfg.steps, path, *options)
    else:
        from jaxtrain.crosscheck import torch_data, torch_train

        if given is None:
            assert start.corpus is not None  # build_start has read it
            paths, data = [shard.path for shard in start.corpus.shards], cfg.data
            given = torch_data.shard_batches(paths, data.batch, data.seq_len, cfg.seed)
        torch_train.record(cfg, cfg.steps, path, start.weights, given)
    seconds = time.perf_counter() - began
    print_now(f"{side:10} {cfg.model.dtype}, {cfg.steps} steps in {seconds:.1f} s -> {path}")


def check_torch_side(cfg: TrainConfig, reads_data: bool = True) -> None:
    """Checks that the PyTorch side can train a config.

    Raises:
        ImportError: torch is missing.
        ValueError: torch.optim lacks the optimizer, or the PyTorch side cannot read the data.
    """
    importlib.import_module("jaxtrain.crosscheck.torch_model")  # its error names the extra
    from jaxtrain.crosscheck.torch_train import check_optimizer

    check_optimizer(cfg.optim)
    if reads_data and (cfg.data.pack or cfg.data.document_mask):
        raise ValueError(
            "the PyTorch side cannot pack or mask documents; got data.pack or data.document_mask. "
            "Record the jaxtrain side with --keep_batches, then set --side=pytorch --batches=TRACE."
        )


def report(comparison: Comparison, png: str | Path) -> int:
    """Prints a comparison and plots its losses; returns the exit status."""
    print_now(explanation.steps_table(comparison))
    write_atomic(Path(png), loss_plot.plot_losses(comparison))
    print_now(f"Loss curves: {png}")
    print_now(explanation.explain(comparison))
    return 1 if comparison.divergence else 0


def report_bfloat16(truth: str | Path, first: str | Path, second: str | Path) -> int:
    """Prints the errors of two bfloat16 traces against a float32 trace; returns the exit status."""
    errors = compare_bfloat16(*map(read_trace, (truth, first, second)))
    text, passed = explanation.bfloat16_table(errors)
    print_now(text)
    return 0 if passed else 1


def run(config: Any, steps: int, precision: str | None) -> int:
    """Records both sides of a config and compares them; returns the exit status."""
    cfg = resolve_config(config, steps, precision)
    check_torch_side(cfg)
    folder, start = Path(cfg.workdir), jax_train.build_start(cfg)
    assert start.corpus is not None  # build_start has read it
    print_now(f"model      {start.run.parameters:,} parameters, {cfg.optim.name}, seed {cfg.seed}")
    print_now(f"data       {start.corpus.describe()}")
    for route in start.run.routes.values():
        print_now(f"route      {route}")
    paths = [folder / f"{side}_{cfg.model.dtype}.jsonl" for side in SIDES]
    for side, path in zip(SIDES, paths, strict=True):
        record_side(side, start, path, measure_rounding=FLAGS.measure_rounding)
    if cfg.model.dtype != "bfloat16":
        comparison = compare_traces(*map(read_trace, paths))
        return report(comparison, folder / f"compare_{cfg.model.dtype}.png")
    truth = folder / "pytorch_float32.jsonl"
    float32_cfg = dataclasses.replace(
        cfg,
        model=dataclasses.replace(cfg.model, dtype="float32"),
        optim=dataclasses.replace(cfg.optim, ns_dtype="float32"),
    )
    record_side("pytorch", start._replace(run=start.run._replace(cfg=float32_cfg)), truth)
    return report_bfloat16(truth, *paths)


def compare_llmc(weights: str | Path, state: str | Path, workdir: str | Path) -> int:
    """Compares our gradients with those of an llm.c debug state; returns the exit status."""
    folder = Path(workdir)
    folder.mkdir(parents=True, exist_ok=True)
    model = read_config(weights)
    llmc_state.write_trace(state, model, folder / "llmc.jsonl")
    theirs = read_trace(folder / "llmc.jsonl")
    tokens = next(batches_of(theirs))["tokens"]
    data = config_lib.DataConfig(batch=tokens.shape[0], seq_len=tokens.shape[1] - 1)
    config = config_lib.to_config_dict(
        TrainConfig(model=model, data=data, weights=str(weights), workdir=str(folder))
    )
    cfg = resolve_config(config, 1, "float32")
    start = jax_train.build_start(cfg, read_data=False)
    record_side("jaxtrain", start, folder / "jaxtrain.jsonl", theirs, "hf")
    comparison = compare_traces(read_trace(folder / "jaxtrain.jsonl"), theirs)
    return report(comparison, folder / "llmc.png")


def main(verb: str, paths: list[str]) -> int:
    """Runs one of VERBS; returns the exit status."""
    set_up_logging()
    if verb == "compare":
        if len(paths) != 2:
            raise ValueError(f"compare needs two traces, as in compare A B; got {paths}.")
        if FLAGS.truth:
            return report_bfloat16(FLAGS.truth, *paths)
        comparison = compare_traces(*map(read_trace, paths))
        return report(comparison, FLAGS.out or f"{Path(paths[0]).with_suffix('')}_compare.png")
    if verb == "llmc":
        return compare_llmc(FLAGS.weights, FLAGS.state, FLAGS.workdir)
    if verb == "run":
        return run(FLAGS.config, FLAGS.steps, FLAGS.precision)
    if verb == "record":
        batches = read_trace(FLAGS.batches) if FLAGS.batches else None
        steps, precision = FLAGS.steps, FLAGS.precision
        if batches:
            steps = steps or sum(record["step"] > 0 for record in batches.steps)
            precision = precision or batches.header["precision"]
        cfg = resolve_config(FLAGS.config, steps, precision)
        if FLAGS.side == "pytorch":
            check_torch_side(cfg, reads_data=batches is None)
        out = FLAGS.out or str(Path(cfg.workdir) / f"{FLAGS.side}_{cfg.model.dtype}.jsonl")
        start = jax_train.build_start(cfg, read_data=batches is None)
        options = (FLAGS.names, FLAGS.keep_batches, FLAGS.measure_rounding)
        record_side(FLAGS.side, start, out, batches, *options)
        return 0
    raise ValueError(
        "the command must be `run CONFIG`, `record CONFIG`, `compare TRACE TRACE` or "
        f"`llmc --weights=FILE --state=FILE`; got {verb or 'none'}. See --help."
    )


def _define_training() -> None:
    text = "default: that of --batches, else the config's"
    flags.DEFINE_integer("steps", 0, f"steps to train; {text}", lower_bound=0)
    flags.DEFINE_enum("precision", None, PRECISIONS, f"type to compute in; {text}")
    flags.DEFINE_bool(
        "measure_rounding",
        True,
        "measure the tolerances of float32 and float64; the jaxtrain side takes five times as long "
        "and stores three training states",
    )


def _define_record() -> None:
    _define_training()
    flags.DEFINE_enum("side", "jaxtrain", SIDES, "which implementation trains")
    text = "tensor names: ours or Hugging Face's; auto takes those of --batches, else ours"
    flags.DEFINE_enum("names", "auto", ("auto", *STYLES), text)
    flags.DEFINE_string("batches", "", "train on this trace's batches, not on the config's data")
    flags.DEFINE_bool("keep_batches", False, "store batches in the trace, not only their hashes")
    flags.DEFINE_string("out", "", "the trace to write; default: in the config's workdir")


def _define_compare() -> None:
    flags.DEFINE_string("truth", "", "float32 trace; both bfloat16 traces are compared with it")
    flags.DEFINE_string("out", "", "PNG file for the loss curves")


def _define_llmc() -> None:
    flags.DEFINE_string("weights", None, "llm.c model file", required=True)
    flags.DEFINE_string("state", None, "llm.c debug state of that model", required=True)
    flags.DEFINE_string("workdir", "runs/crosscheck_llmc", "folder for the traces")


DOC = __doc__ or ""
VERBS = {
    "run": CommandForm("crosscheck", DOC, _define_training, config="must"),
    "record": CommandForm(
        "crosscheck",
        DOC,
        _define_record,
        config="may",
        default=lambda fields: build_record_config(fields.get("weights", ""), FLAGS.batches),
    ),
    "compare": CommandForm("crosscheck", DOC, _define_compare, words=2),
    "llmc": CommandForm("crosscheck", DOC, _define_llmc),
}
HELP = f"""{DOC}
`run`, `record`, `compare` and `llmc` take different flags; see `jaxtrain crosscheck run --help`.
"""


def command(argv: list[str] | None = None, prog: str = "python -m jaxtrain.crosscheck") -> None:
    argv = list(sys.argv[1:] if argv is None else argv)
    verb = next((arg for arg in argv if not arg.startswith("-")), "")
    if verb in VERBS:
        argv.remove(verb)
        form, prog = VERBS[verb], f"{prog} {verb}"
    else:  # accepts no flags; main's error lists the verbs
        form = CommandForm("crosscheck", HELP, words=len(argv))
    # run_main passes the words only if the form takes some.
    run_main(lambda *words: main(verb, *words or ([],)), (ImportError,), form, argv, prog)


if __name__ == "__main__":
    command()
