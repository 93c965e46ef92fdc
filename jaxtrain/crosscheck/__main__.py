r"""Compares training in jaxtrain and in PyTorch step by step, and names the first difference.

    jaxtrain crosscheck run crosscheck_gpt2 --steps=50 --precision=float64
    jaxtrain crosscheck record --weights=HF_FOLDER --batches=theirs.jsonl --out=ours.jsonl \
        --optim.name=adamw --optim.adam_learning_rate=3e-4
    jaxtrain crosscheck compare ours.jsonl theirs.jsonl
    jaxtrain crosscheck optimizer --theirs=my_muon.py:Muon --arguments="lr=0.01" --ours=muon

`run` trains a config twice, in jaxtrain and in a separate PyTorch implementation (its own model,
schedule and data reader, torch.optim's optimizers), from the same weights on the same shards.

To check a PyTorch loop of your own, copy jaxtrain/crosscheck/recorder.py and model_hooks.py beside
it and add the three lines that recorder.py shows. Your loop then writes a trace with its batches.
`record` trains jaxtrain on these batches from the same weights and writes a second trace. Without a
config, the model is that of --weights, a Hugging Face folder, and the optimizer is AdamW at a
constant rate, without decay or clipping. Flags change it: every field that `jaxtrain train --help`
lists is one, as in --optim.weight_decay=0.1. `compare` compares the two.

`optimizer` compares an optimizer of your own, a class like torch.optim's, with one of ours
(--ours=adamw, muon, ...). Both step random tensors with equal gradients, then train a small GPT.
Our settings are those of the class; flags such as --optim.momentum=0.9 replace them. A table shows
both. --theirs=torch.optim:AdamW takes a class of an installed package.

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

import sys
from pathlib import Path

from absl import flags

from jaxtrain.config.command_line import CommandForm
from jaxtrain.crosscheck import jax_train, optimizer_check, sides
from jaxtrain.crosscheck.comparison import compare_traces
from jaxtrain.crosscheck.optimizer_check import build_config
from jaxtrain.crosscheck.record_config import build_record_config
from jaxtrain.crosscheck.sides import SIDES
from jaxtrain.crosscheck.tensor_names import STYLES
from jaxtrain.crosscheck.trace import PRECISIONS, read_trace
from jaxtrain.distributed.program import run_main
from jaxtrain.reporting.terminal import set_up_logging

FLAGS = flags.FLAGS


def main(verb: str, paths: list[str]) -> int:
    """Runs one of VERBS; returns the exit status."""
    set_up_logging()
    if verb == "compare":
        if len(paths) != 2:
            raise ValueError(f"compare needs two traces, as in compare A B; got {paths}.")
        if FLAGS.truth:
            return sides.report_bfloat16(FLAGS.truth, *paths)
        comparison = compare_traces(*map(read_trace, paths))
        png = FLAGS.out or f"{Path(paths[0]).with_suffix('')}_compare.png"
        return sides.report(comparison, png)
    if verb == "llmc":
        return sides.compare_llmc(FLAGS.weights, FLAGS.state, FLAGS.workdir)
    if verb == "run":
        return sides.run(FLAGS.config, FLAGS.steps, FLAGS.precision, FLAGS.measure_rounding)
    if verb == "record":
        batches = read_trace(FLAGS.batches) if FLAGS.batches else None
        steps, precision = FLAGS.steps, FLAGS.precision
        if batches:
            steps = steps or sum(record["step"] > 0 for record in batches.steps)
            precision = precision or batches.header["precision"]
        cfg = sides.resolve_config(FLAGS.config, steps, precision)
        if FLAGS.side == "pytorch":
            sides.check_torch_side(cfg, reads_data=batches is None)
        out = FLAGS.out or str(Path(cfg.workdir) / f"{FLAGS.side}_{cfg.model.dtype}.jsonl")
        start = jax_train.build_start(cfg, read_data=batches is None)
        options = (FLAGS.names, FLAGS.keep_batches, FLAGS.measure_rounding)
        sides.record_side(FLAGS.side, start, out, batches, *options)
        return 0
    if verb == "optimizer":
        settings = FLAGS.theirs, FLAGS.arguments, FLAGS.steps, FLAGS.precision, FLAGS.gpt
        return optimizer_check.check_optimizer(FLAGS.config, *settings)
    raise ValueError(
        "the command must be `run CONFIG`, `record CONFIG`, `compare TRACE TRACE`, "
        "`optimizer --theirs=FILE.py:Class --ours=NAME` or `llmc --weights=FILE --state=FILE`; "
        f"got {verb or 'none'}. See --help."
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


def _define_optimizer() -> None:
    flags.DEFINE_string("theirs", "", "the class, FILE.py:Class or module:Class")
    flags.DEFINE_string("arguments", "", 'of its constructor, as "lr=0.02, betas=(0.9, 0.95)"')
    flags.DEFINE_string("ours", "", "the optim.name to compare it with")
    flags.DEFINE_integer("steps", 50, "steps", lower_bound=1)
    flags.DEFINE_enum("precision", "float64", ("float64", "float32"), "type to compute in")
    flags.DEFINE_bool("gpt", True, "also train a small GPT, if they agree on random tensors")


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
    "optimizer": CommandForm(
        "crosscheck",
        DOC,
        _define_optimizer,
        config="may",
        default=lambda _: build_config(FLAGS.theirs, FLAGS.arguments, FLAGS.ours),
    ),
    "llmc": CommandForm("crosscheck", DOC, _define_llmc),
}
HELP = f"""{DOC}
`run`, `record`, `compare`, `optimizer` and `llmc` take different flags; see
`jaxtrain crosscheck run --help`.
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
