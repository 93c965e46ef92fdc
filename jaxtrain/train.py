"""Trains the model that a config names, resuming from its workdir.

    python -m jaxtrain.train --config=configs/quickstart.py
    python -m jaxtrain.train --config=configs/quickstart.py --config.data.text=PATH
    python -m jaxtrain.train --config=configs/gpt_124m.py --config.data.shards=DIR

The same command resumes a run that was stopped. Ctrl-C and SIGTERM save at the next step; exit
status 75 says "preempted: start me again", 78 "the same start would fail again". Several processes
find each other by --coordinator, --processes, --process, or by what started them (launch.run,
SLURM's srun, mpirun, JAX_* variables).
"""

import json
import os
import platform
import signal
import sys
from pathlib import Path

import jax
from absl import flags
from ml_collections import config_flags

import jaxtrain.config as config_lib
from jaxtrain import tuning
from jaxtrain.agree import from_process_0
from jaxtrain.beat import beat
from jaxtrain.checkpoint import Checkpoints
from jaxtrain.data.corpus import open_corpus
from jaxtrain.data.loader import build_batches
from jaxtrain.data.tokenizer import build_tokenizer
from jaxtrain.engine import World, detect
from jaxtrain.generate import complete
from jaxtrain.interop.start import check_model, load_params
from jaxtrain.kernels import chip_of
from jaxtrain.knobs import describe
from jaxtrain.loop import Diverged, Loop
from jaxtrain.mesh import param_sharding
from jaxtrain.optim.accelerated import evaluated
from jaxtrain.optim.groups import format_group_table, group_table
from jaxtrain.optim.owners import work_share
from jaxtrain.report import Report, set_up_logging
from jaxtrain.run import build_run, compile_diagnosis, compile_step, run_main
from jaxtrain.runtime import fit_world, same_everywhere, start_runtime
from jaxtrain.step import abstract_state, init_state
from jaxtrain.stop import Stop

PREEMPTED = 75  # EX_TEMPFAIL: start me again
INTERRUPTED = 130  # 128 + SIGINT, as shells have it
PROMPT_TOKENS = 64  # of held-out text, where sample.prompt is empty


def header(run, corpus, checkpoints, resumed):
    """What the run will do, as (name, value) pairs for Report.header."""
    cfg = run.cfg
    tokens = cfg.steps * cfg.data.batch * cfg.data.seq_len
    letters = "  ".join(f"{letter} {getattr(cfg.model, letter)}" for letter in "LDHGKFV")
    shape = "  ".join(f"{name} {size}" for name, size in run.mesh.shape.items())
    yield "model", f"{run.parameters:,} parameters  {letters}  {cfg.model.dtype}"
    yield "data", corpus.describe()
    yield "tokens", f"{tokens:,} = {cfg.steps} steps x {cfg.data.batch} x {cfg.data.seq_len}"
    yield "mesh", f"{shape}  of {run.mesh.size} x {run.mesh.devices.flat[0].device_kind}"
    for route in run.routes.values():
        yield "route", str(route)
    for choice in _tuning(run):
        yield "tuning", choice
    if jax.process_count() > 1:
        where = {"shared": "a folder that all share", "host0": "process 0 gathers and feeds"}
        storage = cfg.checkpoint.storage
        yield "route", f"checkpoint.storage {storage}: {where[storage]}"
    if run.mesh.size > 1 and cfg.optim.name != "adamw" and cfg.optim.geometry == "spectral":
        share = work_share(run.model.axes, run.model.shapes, run.mesh)
        yield "owners", f"whole matrices on each device, {share:.3f} of an even share of the work"
    for line in format_group_table(group_table(cfg.optim, run.model.axes, run.model.shapes)).split(
        "\n"
    ):
        yield "optim", line
    yield "run", f"{Path(cfg.workdir).resolve()}  config {config_lib.config_hash(cfg)}"
    for step, reason in checkpoints.rejected:
        yield "rejected", f"checkpoint {step}: {reason}"
    if resumed is not None:
        yield "resume", f"step {resumed}"
    elif cfg.weights:
        yield "weights", f"{Path(cfg.weights).resolve()}"


def _tuning(run) -> list[str]:
    device = run.mesh.devices.flat[0]
    return tuning.describe(device.platform, chip_of(device))


def versions() -> dict:
    """Versions that a result depends on."""
    from importlib.metadata import version

    names = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")
    return {"python": platform.python_version()} | {name: version(name) for name in names}


def stored_config(run, corpus) -> dict:
    """What config.json holds: all that names this run."""
    return {
        "config": config_lib.to_dict(run.cfg),
        "config_hash": config_lib.config_hash(run.cfg),
        "versions": versions(),
        "command": sys.argv,
        "device": run.mesh.devices.flat[0].device_kind,
        "devices": run.mesh.size,
        "routes": {name: str(route) for name, route in run.routes.items()},
        "tuning": _tuning(run),
        "data": {
            "fingerprint": corpus.fingerprint,
            "tokens": corpus.tokens,
            "tokenizer": corpus.tokenizer_name,
        },
    }


def print_sample(loop, corpus):
    """Prints text from the trained weights, and how fast it came."""
    cfg = loop.cfg.sample
    if not cfg.tokens:
        return
    if corpus.tokenizer_name is None:
        loop.report.note("no sample: the shards do not name their tokenizer")
        return
    tokenizer = build_tokenizer(corpus.tokenizer_name)
    prompt = cfg.prompt or tokenizer.decode(loop.held_out.read(0, 1, 1 + PROMPT_TOKENS))
    with loop.clock.pause("sample"):
        texts, tokens_per_s = complete(
            loop.run, loop.state, tokenizer, [prompt], cfg.tokens, cfg.temperature, cfg.top_k
        )
    rule = "-" * 80
    loop.report.note(f"sample, {tokens_per_s:,.0f} tokens/s; what follows the bar is the model's")
    loop.report.note(f"{rule}\n{prompt}|{texts[0]}\n{rule}")


def train(cfg, devices=None, quiet=False) -> int:
    """Trains up to cfg.steps, resuming from cfg.workdir if it holds a checkpoint.

    Returns:
        the exit status: 0, or PREEMPTED or INTERRUPTED after the save that a signal asked for.
    """
    run = build_run(cfg, devices)
    workdir = Path(cfg.workdir)
    corpus = open_corpus(cfg.data, "train", cfg.model.V, workdir)
    held_out = open_corpus(cfg.data, "val", cfg.model.V, workdir)
    same_everywhere("the data", corpus.fingerprint)
    title = f"{workdir.name}\n{run.parameters:,} parameters"
    with (
        build_batches(cfg.data, corpus, run.mesh, cfg.seed) as batches,
        Checkpoints(
            workdir / "checkpoints",
            cfg.keep_last,
            cfg.keep_every,
            storage=cfg.checkpoint.storage,
        ) as checkpoints,
    ):
        state, resumed = start_state(run, checkpoints, batches)
        first = int(state.step)
        active = jax.process_index() == 0
        if from_process_0(lambda: is_finished(workdir, cfg.steps, first)):
            if active:
                print(f"nothing left to train: {workdir} is at step {first} of {cfg.steps}")
            return 0
        with Report(workdir, cfg.steps, first, quiet, active, title) as report, Stop() as stop:
            report.header(header(run, corpus, checkpoints, resumed))
            report.write_config(stored_config(run, corpus))
            beat("compile", first)
            step = compile_step(run)
            report.note(f"compiled in {step.compile_s:.1f} s")
            report.write(first, {"perf/compile_time_s": step.compile_s})
            diagnosis = compile_diagnosis(run) if cfg.diagnose_every else None
            if diagnosis:
                report.note(f"diagnosis compiled in {diagnosis.compile_s:.1f} s")
            loop = Loop(run, state, step, diagnosis, batches, held_out, checkpoints, report)
            del state  # the loop donates it
            return finish(loop, corpus, loop.run_to_end(stop))


def is_finished(workdir, steps, first) -> bool:
    """Whether the last step is saved, evaluated and summed up."""
    try:
        summary = json.loads((workdir / "summary.json").read_text())
    except FileNotFoundError:
        return False
    ended = summary["stopped_by"] is None and "eval/loss_nats" in summary
    return ended and first == steps == summary["step"]


def first_state(run):
    """Step 0: parameters drawn, or those of cfg.weights.

    Raises:
        InteropError: the weights are damaged, or of another model.
    """
    source, model = run.cfg.weights, run.model
    if source:
        check_model(run.cfg.model, source)  # before memory is taken
    state = init_state(model, run.optimizer, run.mesh, run.cfg.seed)
    if not source:
        return state
    place = lambda axes, x: param_sharding(axes, x.shape, run.mesh)
    at = jax.tree.map(place, model.axes, model.shapes)
    return state._replace(params=load_params(source, run.cfg.model, model.axes, model.shapes, at))


def start_state(run, checkpoints, batches):
    """(TrainState, step it was restored from or None), with `batches` at the same step."""
    restored = checkpoints.restore(abstract_state(run.model, run.optimizer, run.mesh))
    if restored is None:
        return first_state(run), None
    batches.restore(restored.meta["data"])
    if restored.step > run.cfg.steps:
        raise ValueError(
            f"steps must be at least the checkpoint's step {restored.step}; got "
            f"steps={run.cfg.steps}. Set --config.steps or another --config.workdir."
        )
    return restored.state, restored.step


def finish(loop, corpus, told) -> int:
    """Evaluates, samples and sums up a run that is through; says how to resume one that is not."""
    cfg, report = loop.cfg, loop.report
    beat("end")
    if told is None:
        loop.evaluate(cfg.steps)
        print_sample(loop, corpus)
    with loop.clock.pause("save"):
        loop.checkpoints.wait()
    ended = {"stopped_by": told and told.name, "versions": versions()}
    ended["eval_at"] = f"eval_params: {evaluated(loop.state.opt_state)}"
    report.finish(loop.clock.total() | ended)
    if told is None:
        return 0
    report.note(f"saved step {loop.saved_step} of {cfg.steps}; the same command resumes it")
    return PREEMPTED if told == signal.SIGTERM else INTERRUPTED


def main() -> int:
    args = flags.FLAGS
    cfg = config_lib.freeze(args.config)
    beat("start")
    by_hand = args.coordinator, args.processes, args.process, None, args.processes
    world = World("flags", *by_hand) if args.processes > 1 else detect(os.environ)
    start_runtime(cfg, world)
    set_up_logging(jax.process_index())
    cfg = fit_world(cfg, world)
    same_everywhere("the config", config_lib.config_hash(cfg))
    return train(cfg)


__doc__ += "\n" + describe(config_lib.TrainConfig)  # what --help shows

if __name__ == "__main__":
    config_flags.DEFINE_config_file("config", None, "config file; --config.NAME=VALUE overrides")
    flags.mark_flag_as_required("config")
    flags.DEFINE_string("coordinator", "", "host:port of process 0, with several processes")
    flags.DEFINE_integer("processes", 1, "processes of this run, over all hosts", lower_bound=1)
    flags.DEFINE_integer("process", 0, "which of them this is", lower_bound=0)
    run_main(main, (Diverged,))
