"""Trains the model that a config describes, resuming from its workdir.

    jaxtrain train quickstart
    jaxtrain train quickstart --steps=300 --data.text=docs --workdir=runs/docs
    jaxtrain train debug --optim.name=adamw --optim.adam_learning_rate=0.01 --workdir=runs/adamw

The same command resumes a run that was stopped. Ctrl-C, SIGTERM and SIGHUP (a lost connection) save
after the current step or evaluation batch, then stop; a second Ctrl-C or SIGTERM ends the process
at once. Exit status 75 means "preempted: start again", 78 means "the same start would fail again".
Several processes find each other by --coordinator, --processes and --process, or by the environment
variables of their launcher (launch.run, SLURM's srun, mpirun, JAX_*). Several sites, each with its
own processes, exchange their changes of the weights if --sites.period, --sites_file and --site are
set.
"""

import contextlib
import os
import socket
import time
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path

import jax
from absl import flags

import jaxtrain.config.train_config as config_lib
from jaxtrain.checkpoint.manager import Checkpoints
from jaxtrain.checkpoint.relocation import check_not_moved
from jaxtrain.checkpoint.zarr import check_path
from jaxtrain.config.command_line import CommandForm
from jaxtrain.config.help_text import describe_flags
from jaxtrain.config.shell_commands import current_command
from jaxtrain.data.loader import build_batches
from jaxtrain.data.sources import AnyCorpus, open_splits
from jaxtrain.data.tasks.open_tasks import open_tasks
from jaxtrain.data.vocabulary import check_source
from jaxtrain.distributed.broadcast import (
    broadcast_from_process_0,
    check_same_on_all_processes,
    gather_texts,
    run_on_all_processes,
)
from jaxtrain.distributed.cluster import World, detect_world
from jaxtrain.distributed.heartbeat import beat
from jaxtrain.distributed.preemption import StopListener
from jaxtrain.distributed.program import run_main
from jaxtrain.distributed.runtime import fit_config_to_world, start_runtime
from jaxtrain.interop.initial_state import check_weights, initial_state
from jaxtrain.metrics.collector import Collector
from jaxtrain.metrics.mfu import find_device_chip
from jaxtrain.metrics.network import open_network_counters
from jaxtrain.metrics.step_log import StepLog
from jaxtrain.ops.precision import resolve_dtype
from jaxtrain.reporting.run_logger import RunLogger
from jaxtrain.reporting.terminal import set_up_logging
from jaxtrain.run_directory.contents import is_finished
from jaxtrain.run_directory.lock import RunLock
from jaxtrain.sites.rounds import Rounds
from jaxtrain.sites.start import (
    Membership,
    check_sites_flags,
    describe_rounds,
    open_rounds,
    read_membership,
)
from jaxtrain.training.evaluation import Evaluator
from jaxtrain.training.finish import SAMPLE_FLAG, finish_run
from jaxtrain.training.loop import Diverged, Loop
from jaxtrain.training.mixture_report import mixture_lines
from jaxtrain.training.programs import Programs, compile_programs
from jaxtrain.training.reports import open_logger, open_tracker, open_webhook
from jaxtrain.training.resume import start_state
from jaxtrain.training.run import Run, build_run
from jaxtrain.training.sampling import decode_shell_text
from jaxtrain.training.startup import (
    build_config_json,
    describe_program,
    measurement_lines,
    startup_lines,
)
from jaxtrain.training.step import state_sharding_tree


def train(
    cfg: config_lib.TrainConfig,
    devices: Sequence | None = None,
    quiet: bool = False,
    stop: StopListener | None = None,
    member: Membership | None = None,
) -> int:
    """Trains up to cfg.steps, resuming from cfg.workdir if it has a checkpoint.

    Args:
        devices: the devices to train on; None takes all.
        quiet: prints no progress.
        stop: an entered StopListener, which ends the process if a signal comes before the first
            step; None leaves such signals to their current handlers.
        member: the run's place among the sites of its job; None trains on this site only.

    Returns:
        the exit status: 0, or the one for the signal that stopped the run.

    Raises:
        RunLocked: another run writes to cfg.workdir.
    """
    started_s = time.perf_counter()
    stop = stop or StopListener(jax.process_count() > 1)
    workdir = Path(cfg.workdir)

    # Config: settle the dtype, and refuse now what would otherwise fail at the first save or later.
    check_path(workdir)
    cfg, reason = resolve_dtype(cfg, (devices or jax.devices())[0], cfg.workdir)
    check_source(cfg.data, cfg.model.V)
    decode_shell_text(cfg.sample.prompt, SAMPLE_FLAG)
    webhook, tracker = open_webhook(cfg, quiet), open_tracker(cfg)

    # Mesh, kernel routes, model, loss and optimizer; no array is allocated yet.
    run = build_run(cfg, devices)

    with contextlib.ExitStack() as stack:  # closes what is entered below, last in first out
        # The folder is locked first. Wrong weights are refused before the data take their time.
        lock = stack.enter_context(lock_workdir(cfg))
        storage = {"storage": cfg.checkpoint.storage, "before_save": lock.check}
        checkpoints = Checkpoints(workdir / "checkpoints", cfg.keep_last, cfg.keep_every, **storage)
        if cfg.weights and not broadcast_from_process_0(checkpoints.steps):
            check_weights(cfg.model, cfg.weights)

        # Data.
        stop.set_activity("reading the data")
        corpus, evaluator = run_on_all_processes(lambda: open_data(run))
        check_same_on_all_processes("the data", corpus.fingerprint + evaluator.fingerprint())
        site = (member.site, len(member.file.sites)) if member else (0, 1)
        batches = stack.enter_context(build_batches(cfg.data, corpus, run.mesh, cfg.seed, site))

        # State: the newest checkpoint, or step 0.
        stack.enter_context(checkpoints)
        rounds = join_sites(stack, member, run, corpus)
        stop.set_activity("creating or restoring the weights")
        run, state, restored = start_state(run, checkpoints, batches, initial_state, rounds)
        if restored is None and cfg.checkpoint.storage == "host0":
            check_not_moved(workdir, checkpoints.steps())
        first = int(state.step)
        if broadcast_from_process_0(lambda: is_finished(workdir, cfg.steps, first)):
            if jax.process_index() == 0:
                print(f"nothing left to train: {workdir} is at step {first}; --steps={cfg.steps}")
            return 0

        # Logging: the start-up lines, config.json and the metrics files.
        stack.enter_context(checkpoints.add_newest_step_to_errors())
        logger = stack.enter_context(open_logger(run, first, quiet, webhook, tracker))
        hosts = gather_texts(socket.gethostname())
        lines = startup_lines(run, corpus, checkpoints, restored, reason, evaluator)
        logger.print_header([*lines, *mixture_lines(corpus, batches)])
        if rounds:
            rounds.log.open(workdir, rounds.applied_rounds(), logger.note)
            logger.print_header(("sites", line) for line in describe_rounds(rounds))
        logger.print_header(("lock", line) for line in lock.describe())
        place = member.describe() if member else None
        logger.write_config(build_config_json(run, corpus, hosts, site=place))
        log = run_on_all_processes(lambda: StepLog(workdir, jax.process_index(), first))

        # Steps: compiled ahead of time; a call with other shapes is an error, not a recompile.
        programs = compile_steps(run, logger, stop, first, hosts)

        # Measurements: what a step computes and moves, and the counters of this process.
        work = programs.at(first + 1).work
        chip = find_device_chip(run.mesh.devices.flat[0])
        counters, tokens_of = open_network_counters(hosts), cfg.data.tokens_of
        collector = Collector(work, chip, log, counters, checkpoints.is_saving, tokens_of)
        stack.enter_context(collector)
        collector.watch_ranks(cfg.measure, hosts, first)
        logger.write_config(build_config_json(run, corpus, hosts, work, collector, place))
        logger.print_header(measurement_lines(run, work, collector))

        # Loop: batch, step, log, evaluate, save; then a last evaluation, a sample, the summary.
        parts = programs, batches, evaluator, checkpoints, logger, collector, rounds
        loop = Loop(run, state, *parts)
        del state  # the first step donates its buffers
        stack.enter_context(stop)
        start_s = time.perf_counter() - started_s - programs.compile_s
        before_s = {"start": start_s, "compile": programs.compile_s}
        collector.start(before_s | {"restart": logger.removed_s})
        return finish_run(loop, corpus, loop.run_to_end(stop))


def join_sites(
    stack: contextlib.ExitStack,
    member: Membership | None,
    run: Run,
    corpus: AnyCorpus,
) -> Rounds | None:
    """Connects to the other sites until `stack` is closed; returns None without several sites.

    Raises:
        ValueError: sites.period is set, but the run has no place among sites.
    """
    if member is None:
        check_sites_flags(run.cfg.sites.period, "", "")
        return None
    shardings = state_sharding_tree(run.model, run.optimizer, run.mesh)
    identity = {"the data": corpus.fingerprint, "the program": describe_program()}
    return stack.enter_context(
        open_rounds(run.cfg, member, run.model.shapes, shardings, run.mesh, identity)
    )


def compile_steps(
    run: Run, logger: RunLogger, stop: StopListener, first: int, hosts: Sequence[str]
) -> Programs:
    """Compiles the step for each batch size, and the diagnosis if the config asks for one."""
    beat("compile", first)
    stop.set_activity("compiling the step")
    programs = compile_programs(run, first, hosts, logger.note)
    logger.write(first, {"perf/compile_time_s": programs.steps_compile_s})
    return programs


@contextlib.contextmanager
def lock_workdir(cfg: config_lib.TrainConfig) -> Iterator[RunLock]:
    """Locks cfg.workdir against other runs. Enter it before anything in the folder is touched.

    Process 0 takes the lock; if every host has its own folder, every process does.

    Raises:
        RunLocked: another run has locked it; of several processes, each raises a ValueError.
    """
    run_id, takes_lock = None, jax.process_index() == 0
    if cfg.checkpoint.storage == "host0" and jax.process_count() > 1:
        run_id, takes_lock = broadcast_from_process_0(lambda: uuid.uuid4().hex), True
    lock = RunLock(cfg.workdir, run_id=run_id)
    with contextlib.ExitStack() as stack:
        run_on_all_processes(lambda: stack.enter_context(lock) if takes_lock else None)
        yield lock


def open_data(run: Run) -> tuple[AnyCorpus, Evaluator]:
    """Returns what to train on, and what the weights are evaluated on."""
    cfg, workdir = run.cfg, run.cfg.workdir
    train, held_out = open_splits(cfg.data, cfg.model.V, workdir, cfg.steps)
    tasks = open_tasks(cfg.eval, cfg.data, held_out.tokenizer_name, cfg.model.V, workdir)
    return train, Evaluator(run, held_out, tasks)


def main() -> int:
    """Joins this run's other processes, if any, and trains; returns the exit status."""
    args = flags.FLAGS
    cfg = config_lib.freeze(args.config)
    beat("start")
    if args.processes > 1:
        world = World("flags", args.coordinator, args.processes, args.process, None, args.processes)
    else:
        world = detect_world(os.environ)
    set_up_logging()  # until its index is known, every process logs that it joins
    with StopListener(world.processes > 1) as stop:
        start_runtime(cfg, world)
        set_up_logging(world.process)
        cfg = fit_config_to_world(cfg, world)
        check_same_on_all_processes("the config", config_lib.start_hash(cfg))
        if world.processes > 1:
            check_same_on_all_processes("the code and its libraries", describe_program())
        status = train(cfg, stop=stop, member=read_membership(cfg, args.sites_file, args.site))
        if stop.signal and status and world.engine == "alone":  # a launcher restarts the run itself
            print(f"resume with:\n  {current_command()}", flush=True)
        return status


def define_flags() -> None:
    """Defines the flags of a run of several processes."""
    flags.DEFINE_string("coordinator", "", "host:port of process 0, with several processes")
    flags.DEFINE_integer("processes", 1, "processes of this run, over all hosts", lower_bound=1)
    flags.DEFINE_integer("process", 0, "index of this process", lower_bound=0)
    flags.DEFINE_string("sites_file", "", "file that lists the sites of the job, with its key")
    flags.DEFINE_string("site", "", "name of this site in --sites_file")


def command(argv: list[str] | None = None, prog: str = "python -m jaxtrain.train") -> None:
    """Runs the train command with these arguments, by default those of the process."""
    tables = describe_flags(config_lib.TrainConfig)
    form = CommandForm("train", __doc__ or "", define_flags, config="must", tables=tables)
    run_main(main, (Diverged,), form, argv, prog)


if __name__ == "__main__":
    command()
