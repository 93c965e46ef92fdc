"""Trains the model that a config names, resuming from its workdir.

    jaxtrain train quickstart
    jaxtrain train quickstart --steps=300 --data.text=docs --workdir=runs/docs
    jaxtrain train debug --optim.name=adamw --optim.adam_learning_rate=0.01 --workdir=runs/adamw

The same command resumes a run that was stopped. Ctrl-C, SIGTERM and SIGHUP (a lost connection) save
after the step, or the evaluation batch, that is under way; a second Ctrl-C or SIGTERM ends the
process at once. Exit status 75 says "preempted: start me again", 78 "the same start would fail
again". Several processes find each other by --coordinator, --processes, --process, or by what
started them (launch.run, SLURM's srun, mpirun, JAX_* variables).
"""

import os
import socket
import time
from pathlib import Path

import jax
from absl import flags

import jaxtrain.config.train_config as config_lib
from jaxtrain.checkpoint.manager import Checkpoints
from jaxtrain.checkpoint.relocation import check_not_moved
from jaxtrain.config.command_line import CommandForm
from jaxtrain.config.fields import describe_flags
from jaxtrain.config.shell_commands import current_command
from jaxtrain.data.corpus import open_corpus
from jaxtrain.data.loader import build_batches
from jaxtrain.data.vocabulary import check_source
from jaxtrain.distributed.broadcast import (
    broadcast_from_process_0,
    gather_texts,
    run_on_all_processes,
)
from jaxtrain.distributed.cluster import World, detect_world
from jaxtrain.distributed.heartbeat import beat
from jaxtrain.distributed.preemption import StopListener, exit_status_of
from jaxtrain.distributed.program import run_main
from jaxtrain.distributed.runtime import (
    check_same_on_all_processes,
    fit_config_to_world,
    start_runtime,
)
from jaxtrain.file_errors import add_path_to_errors
from jaxtrain.interop.start import first_state
from jaxtrain.metrics.collector import Collector, open_network_counters
from jaxtrain.metrics.mfu import build_work, find_device_chip
from jaxtrain.metrics.step_log import StepLog
from jaxtrain.ops.precision import resolve_dtype
from jaxtrain.optim.acceleration import describe_evaluated_weights
from jaxtrain.reporting.run_logger import RunLogger, set_up_logging
from jaxtrain.training.closing import SAMPLE_FLAG, next_commands, print_sample
from jaxtrain.training.loop import Diverged, Loop
from jaxtrain.training.resume import start_state
from jaxtrain.training.run import build_run, compile_diagnosis, compile_step
from jaxtrain.training.sampling import from_shell
from jaxtrain.training.startup import header, measured, stored_config, versions
from jaxtrain.training.workdir import hold, is_finished


def train(cfg, devices=None, quiet=False, stop=None) -> int:
    """Trains up to cfg.steps, resuming from cfg.workdir if it holds a checkpoint.

    Args:
        stop: an entered StopListener, which ends the process if a signal comes before the first
            step; None leaves signals alone until then.

    Returns:
        the exit status: 0, or that of the signal that asked for a save.

    Raises:
        RunLocked: another run writes to cfg.workdir.
    """
    started_s = time.perf_counter()
    stop = stop or StopListener(jax.process_count() > 1)
    cfg, dtype_reason = resolve_dtype(cfg, (devices or jax.devices())[0], cfg.workdir)
    check_source(cfg.data, cfg.model.V)
    from_shell(cfg.sample.prompt, SAMPLE_FLAG)  # refused now and not after the last step
    run = build_run(cfg, devices)
    workdir = Path(cfg.workdir)
    stop.set_activity("reading the data")
    with hold(cfg) as lock:
        corpus, held_out = run_on_all_processes(lambda: open_data(cfg, workdir))
        check_same_on_all_processes("the data", corpus.fingerprint)
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
            about = quiet, started_s, dtype_reason
            return train_on(run, data, checkpoints, lock, stop, *about)


def train_on(run, data, checkpoints, lock, stop, quiet, started_s, dtype_reason) -> int:
    """Trains a run whose directory, data and checkpoints are open; returns as train() does."""
    cfg, workdir, (batches, corpus, held_out) = run.cfg, Path(run.cfg.workdir), data
    stop.set_activity("making or restoring the weights")
    state, restored = start_state(run, checkpoints, batches, first_state)
    if restored is None and cfg.checkpoint.storage == "host0":
        check_not_moved(workdir, checkpoints.steps())
    first = int(state.step)
    active = jax.process_index() == 0
    if broadcast_from_process_0(lambda: is_finished(workdir, cfg.steps, first)):
        if active:
            print(f"nothing left to train: {workdir} is at step {first} of {cfg.steps}")
        return 0
    title = f"{workdir.name}\n{run.parameters:,} parameters"
    about = (workdir, cfg.steps, first, quiet, active, title, cfg.export)
    with checkpoints.naming_newest(), RunLogger(*about) as report:
        hosts = gather_texts(socket.gethostname())
        report.print_header(header(run, corpus, checkpoints, restored, dtype_reason))
        report.print_header(("lock", line) for line in lock.describe())
        report.write_config(stored_config(run, corpus, hosts))
        log = run_on_all_processes(lambda: StepLog(workdir, jax.process_index(), first))
        beat("compile", first)
        stop.set_activity("compiling the step")
        step, diagnosis = compile_all(run, report, first)
        work = build_work(run, step.compiled, hosts)
        with open_measure(run, work, hosts, log, checkpoints) as measure:
            report.write_config(stored_config(run, corpus, hosts, work, measure))
            report.print_header(measured(run, work, measure))
            loop = Loop(
                run, state, step, diagnosis, batches, held_out, checkpoints, report, measure
            )
            del state  # the loop donates it
            with stop:
                measure.start(before_s(step, diagnosis, report, started_s))
                return finish(loop, corpus, loop.run_to_end(stop))


def open_data(cfg, workdir):
    """Returns the corpora that a run trains and is evaluated on."""
    with add_path_to_errors(cfg.data.text or cfg.data.shards):
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


def open_measure(run, work, hosts, log, checkpoints) -> Collector:
    """The Collector of this process."""
    chip = find_device_chip(run.mesh.devices.flat[0])
    return Collector(work, chip, log, open_network_counters(hosts), checkpoints.is_saving)


def before_s(step, diagnosis, report, started_s) -> dict:
    """{cause: seconds} of a run before its first step, and of steps that it has to make again."""
    compile_s = step.compile_s + (diagnosis.compile_s if diagnosis else 0.0)
    start_s = time.perf_counter() - started_s - compile_s
    return {"start": start_s, "compile": compile_s, "restart": report.removed_s}


def finish(loop, corpus, told) -> int:
    """Evaluates, samples and sums up a run that is through; says how to resume one that is not."""
    cfg, report = loop.cfg, loop.report
    beat("end")
    if told is None and loop.evaluate(cfg.steps) is None:
        told = loop.stop.signal
    if told is None:
        loop.stop.defer_signals("ending after the sample")
        print_sample(loop, corpus)
    with loop.measure.pause("save"):
        loop.checkpoints.wait()
    ended = {"stopped_by": told and told.name, "versions": versions()}
    ended["eval_at"] = describe_evaluated_weights(loop.state.opt_state)
    report.finish(loop.measure.total() | ended)
    if told is None:
        for line in next_commands(cfg.workdir):
            report.note(line)
        return 0
    saved = f"saved step {loop.saved_step}" if loop.saved_step else "saved no step"
    report.note(f"{saved} of {cfg.steps}; the same command resumes it")
    return exit_status_of(told)


def main() -> int:
    args = flags.FLAGS
    cfg = config_lib.freeze(args.config)
    beat("start")
    by_hand = args.coordinator, args.processes, args.process, None, args.processes
    world = World("flags", *by_hand) if args.processes > 1 else detect_world(os.environ)
    set_up_logging()  # every process says where it joins
    with StopListener(world.processes > 1) as stop:
        start_runtime(cfg, world)
        set_up_logging(world.process)
        cfg = fit_config_to_world(cfg, world)
        check_same_on_all_processes("the config", config_lib.start_hash(cfg))
        status = train(cfg, stop=stop)
        if stop.signal and status and world.engine == "alone":  # else a launcher starts it again
            print(f"resume with:\n  {current_command()}", flush=True)
        return status


def define_flags() -> None:
    flags.DEFINE_string("coordinator", "", "host:port of process 0, with several processes")
    flags.DEFINE_integer("processes", 1, "processes of this run, over all hosts", lower_bound=1)
    flags.DEFINE_integer("process", 0, "which of them this is", lower_bound=0)


def command(argv=None, prog="python -m jaxtrain.train") -> None:
    tables = describe_flags(config_lib.TrainConfig)
    form = CommandForm("train", __doc__, define_flags, config="must", tables=tables)
    run_main(main, (Diverged,), form, argv, prog)


if __name__ == "__main__":
    command()
