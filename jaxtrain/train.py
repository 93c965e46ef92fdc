"""Trains the model that a config names, resuming from its workdir.

    python -m jaxtrain.train --config=configs/quickstart.py
    python -m jaxtrain.train --config=configs/quickstart.py --config.data.text=PATH
    python -m jaxtrain.train --config=configs/gpt_124m.py --config.data.shards=DIR

The same command resumes a run that was stopped. Ctrl-C and SIGTERM save at the next step; exit
status 75 says "preempted: start me again", 78 "the same start would fail again". Several processes
find each other by --coordinator, --processes, --process, or by what started them (launch.run,
SLURM's srun, mpirun, JAX_* variables).
"""

import os
import signal
import socket
import time
from pathlib import Path

import jax
from absl import flags
from ml_collections import config_flags

import jaxtrain.config as config_lib
from jaxtrain.about import header, measured, stored_config, versions
from jaxtrain.agree import from_process_0, of_all, on_all
from jaxtrain.beat import beat
from jaxtrain.checkpoint import CheckpointError, Checkpoints
from jaxtrain.data.corpus import open_corpus
from jaxtrain.data.loader import build_batches
from jaxtrain.data.tokenizer import build_tokenizer
from jaxtrain.disk import naming
from jaxtrain.engine import World, detect
from jaxtrain.generate import complete, fit_positions
from jaxtrain.interop.start import check_model, check_resumed, load_params
from jaxtrain.knobs import describe
from jaxtrain.loop import Diverged, Loop
from jaxtrain.measure import Measure, open_wire
from jaxtrain.mesh import param_sharding
from jaxtrain.moved import check_not_moved
from jaxtrain.optim.accelerated import evaluated
from jaxtrain.report import Report, set_up_logging
from jaxtrain.run import build_run, compile_diagnosis, compile_step, run_main
from jaxtrain.runtime import fit_world, same_everywhere, start_runtime
from jaxtrain.step import abstract_state, init_state
from jaxtrain.steplog import StepLog
from jaxtrain.stop import Stop
from jaxtrain.work import build_work, find_device_chip
from jaxtrain.workdir import hold, is_finished

PREEMPTED = 75  # EX_TEMPFAIL: start me again
INTERRUPTED = 130  # 128 + SIGINT, as shells have it
PROMPT_TOKENS = 64  # of held-out text, where sample.prompt is empty


def print_sample(loop, corpus):
    """Prints text from the trained weights, and how fast it came."""
    cfg = loop.cfg.sample
    if not cfg.tokens:
        return
    if corpus.tokenizer_name is None:
        loop.report.note("no sample: the shards do not name their tokenizer")
        return
    tokenizer = build_tokenizer(corpus.tokenizer_name)
    ids = loop.held_out.read(0, 1, 1 + PROMPT_TOKENS)
    if cfg.prompt:
        ids = tokenizer.encode(cfg.prompt)
    prompt_tokens, tokens = fit_positions(loop.cfg.model, len(ids), cfg.tokens)
    if (prompt_tokens, tokens) != (len(ids), cfg.tokens):
        loop.report.note(
            f"the sample is {tokens} of sample.tokens={cfg.tokens} after {prompt_tokens} of "
            f"{len(ids)} prompt tokens: model.positions={loop.cfg.model.positions}"
        )
    if not tokens:
        return
    ids = ids[len(ids) - prompt_tokens :]
    with loop.measure.pause("sample"):
        texts, tokens_per_s = complete(
            loop.run, loop.state, tokenizer, [ids], tokens, cfg.temperature, cfg.top_k
        )
    rule, prompt = "-" * 80, tokenizer.decode(ids)
    loop.report.note(f"sample, {tokens_per_s:,.0f} tokens/s; what follows the bar is the model's")
    loop.report.note(f"{rule}\n{prompt}|{texts[0]}\n{rule}")


def train(cfg, devices=None, quiet=False) -> int:
    """Trains up to cfg.steps, resuming from cfg.workdir if it holds a checkpoint.

    Returns:
        the exit status: 0, or PREEMPTED or INTERRUPTED after the save that a signal asked for.

    Raises:
        RunLocked: another run writes to cfg.workdir.
    """
    started_s = time.perf_counter()
    run = build_run(cfg, devices)
    workdir = Path(cfg.workdir)
    with hold(cfg) as lock:
        corpus, held_out = on_all(lambda: open_data(cfg, workdir))
        same_everywhere("the data", corpus.fingerprint)
        with (
            build_batches(cfg.data, corpus, run.mesh, cfg.seed) as batches,
            Checkpoints(
                workdir / "checkpoints",
                cfg.keep_last,
                cfg.keep_every,
                storage=cfg.checkpoint.storage,
                before_save=lock.check,
            ) as checkpoints,
        ):
            data = batches, corpus, held_out
            return train_on(run, data, checkpoints, lock, quiet, started_s)


def train_on(run, data, checkpoints, lock, quiet, started_s) -> int:
    """As train(), of a run whose directory, data and checkpoints are open."""
    cfg, workdir, (batches, corpus, held_out) = run.cfg, Path(run.cfg.workdir), data
    state, restored = start_state(run, checkpoints, batches)
    if restored is None and cfg.checkpoint.storage == "host0":
        check_not_moved(workdir, checkpoints.steps())
    first = int(state.step)
    active = jax.process_index() == 0
    if from_process_0(lambda: is_finished(workdir, cfg.steps, first)):
        if active:
            print(f"nothing left to train: {workdir} is at step {first} of {cfg.steps}")
        return 0
    title = f"{workdir.name}\n{run.parameters:,} parameters"
    about = (workdir, cfg.steps, first, quiet, active, title, cfg.export)
    with checkpoints.naming_newest(), Report(*about) as report, Stop() as stop:
        hosts = of_all(socket.gethostname())
        report.header(header(run, corpus, checkpoints, restored))
        report.header(("lock", line) for line in lock.describe())
        report.write_config(stored_config(run, corpus, hosts))
        log = on_all(lambda: StepLog(workdir, jax.process_index(), first))
        beat("compile", first)
        step, diagnosis = compile_all(run, report, first)
        work = build_work(run, step.compiled, hosts)
        report.write_config(stored_config(run, corpus, hosts, work))
        with open_measure(run, work, hosts, log, checkpoints) as measure:
            report.header(measured(run, work, measure))
            loop = Loop(
                run, state, step, diagnosis, batches, held_out, checkpoints, report, measure
            )
            del state  # the loop donates it
            measure.start(before_s(step, diagnosis, report, started_s))
            return finish(loop, corpus, loop.run_to_end(stop))


def open_data(cfg, workdir):
    """Returns the corpora that a run trains and is evaluated on."""
    with naming(cfg.data.text or cfg.data.shards):
        return [open_corpus(cfg.data, split, cfg.model.V, workdir) for split in ("train", "val")]


def compile_all(run, report, first):
    """(step, diagnosis or None), compiled; how long that took is reported."""
    step = compile_step(run)
    report.note(f"compiled in {step.compile_s:.1f} s")
    report.write(first, {"perf/compile_time_s": step.compile_s})
    diagnosis = compile_diagnosis(run) if run.cfg.diagnose_every else None
    if diagnosis:
        report.note(f"diagnosis compiled in {diagnosis.compile_s:.1f} s")
    return step, diagnosis


def open_measure(run, work, hosts, log, checkpoints) -> Measure:
    """The Measure of this process."""
    chip = find_device_chip(run.mesh.devices.flat[0])
    return Measure(work, chip, log, open_wire(hosts), checkpoints.is_saving)


def before_s(step, diagnosis, report, started_s) -> dict:
    """{cause: seconds} of a run before its first step, and of steps that it has to make again."""
    compile_s = step.compile_s + (diagnosis.compile_s if diagnosis else 0.0)
    start_s = time.perf_counter() - started_s - compile_s
    return {"start": start_s, "compile": compile_s, "restart": report.removed_s}


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
    """(TrainState, the Restored that it is from or None), with `batches` at the same step.

    Raises:
        ValueError: the checkpoint is of other data or another model, or past the last step.
    """
    stored = from_process_0(lambda: newest_config(checkpoints))
    check_resumed(run.cfg.model, stored)
    try:
        restored = checkpoints.restore(abstract_state(run.model, run.optimizer, run.mesh))
    except ValueError as error:
        changed = config_lib.changes(stored, run.cfg) if stored else []
        changed = "; ".join(change for change in changed if change.startswith("optim."))
        raise ValueError(f"{error}{changed and f' Changed: {changed}.'}") from error
    if restored is None:
        return first_state(run), None
    batches.restore(restored.meta["data"])
    if restored.step > run.cfg.steps:
        raise ValueError(
            f"steps must be at least the checkpoint's step {restored.step}; got "
            f"steps={run.cfg.steps}. Set --config.steps or another --config.workdir."
        )
    return restored.state, restored._replace(state=None)  # the loop donates it


def newest_config(checkpoints) -> dict:
    """Returns the config of the newest checkpoint, by the names of flags; {} if there is none."""
    try:
        meta = checkpoints.read_meta()
    except CheckpointError:  # restore() says more of it
        return {}
    return meta["config"] if meta else {}


def finish(loop, corpus, told) -> int:
    """Evaluates, samples and sums up a run that is through; says how to resume one that is not."""
    cfg, report = loop.cfg, loop.report
    beat("end")
    if told is None:
        loop.evaluate(cfg.steps)
        print_sample(loop, corpus)
    with loop.measure.pause("save"):
        loop.checkpoints.wait()
    ended = {"stopped_by": told and told.name, "versions": versions()}
    ended["eval_at"] = f"eval_params: {evaluated(loop.state.opt_state)}"
    report.finish(loop.measure.total() | ended)
    if told is None:
        return 0
    saved = f"saved step {loop.saved_step}" if loop.saved_step else "saved no step"
    report.note(f"{saved} of {cfg.steps}; the same command resumes it")
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
    same_everywhere("the config", config_lib.start_hash(cfg))
    return train(cfg)


__doc__ += "\n" + describe(config_lib.TrainConfig)  # what --help shows

if __name__ == "__main__":
    config_flags.DEFINE_config_file("config", None, "config file; --config.NAME=VALUE overrides")
    flags.mark_flag_as_required("config")
    flags.DEFINE_string("coordinator", "", "host:port of process 0, with several processes")
    flags.DEFINE_integer("processes", 1, "processes of this run, over all hosts", lower_bound=1)
    flags.DEFINE_integer("process", 0, "which of them this is", lower_bound=0)
    run_main(main, (Diverged,))
