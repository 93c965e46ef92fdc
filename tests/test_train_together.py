"""Several starts in one run directory, and several processes of one run."""

import os
import signal
import socket
import textwrap
import time

import xla_flags

import runs
from jaxtrain.errors import PREEMPTED, REFUSED
from jaxtrain.run_directory.lock import RunLock


def flags(steps):
    return (
        f"--config.steps={steps}",
        "--config.sample.tokens=0",
        "--config.optim.name=adamw",  # compiles fastest
        "--config.model.L=1",
    )


def errors(out):
    return [line for line in out.splitlines() if line.startswith("error: ")]


def test_a_second_start_in_a_run_directory_is_refused_and_the_first_run_goes_on(tmp_path):
    text, workdir = runs.write_text(tmp_path), tmp_path / "run"
    first = runs.fork(workdir, text, *flags(100_000), "--config.save_every=20")
    while not (workdir / ".lock").exists():  # long before its first step
        assert first.poll() is None, first.communicate()[0]
        time.sleep(0.01)
    out = runs.finish(runs.fork(workdir, text, *flags(100_000)), REFUSED)
    assert f"{workdir} is in use by pid {first.pid} on {socket.gethostname()}, started" in out
    assert len(errors(out)) == 1 and "Traceback" not in out
    runs.signal_at(first, workdir, 50, signal.SIGTERM)  # after two saves
    runs.finish(first, PREEMPTED)
    steps = [step for step, _ in runs.losses(workdir)]
    assert steps == list(range(1, len(steps) + 1)) and len(steps) >= 50
    assert not (workdir / ".lock").exists()


def test_an_error_of_one_process_is_one_line_and_status_78_in_all(tmp_path):
    text, workdir = runs.write_text(tmp_path), tmp_path / "run"
    (workdir / "hosts").mkdir(parents=True)
    damaged = workdir / "hosts/1.jsonl"  # only process 1 reads it
    damaged.write_text("[]\n[]\n")
    pair = [runs.fork(workdir, text, *flags(3), *own) for own in runs.flags_of_processes(2)]
    outs = [runs.finish(process, REFUSED) for process in pair]
    lines = {line for out in outs for line in errors(out)}
    assert len(lines) == 1 and str(damaged) in lines.pop(), outs
    assert not any("Traceback" in out for out in outs)
    assert not (workdir / ".lock").exists()


# Joins two processes once, and starts a run in each of the given folders.
TRAIN_IN_EACH = """
    import sys
    from jaxtrain.distributed.cluster import World
    from jaxtrain.distributed.runtime import exit_together, start_runtime
    from jaxtrain.train import train
    import runs

    address, process, text, *folders = sys.argv[1:]
    cfg = runs.debug_config(folders[0], text)
    start_runtime(cfg, World("flags", address, 2, int(process), None, 2))
    for folder in folders:
        try:
            train(runs.debug_config(folder, text, steps=3, sample__tokens=0))
        except ValueError as error:
            print("error:", error, flush=True)
    exit_together(0)
"""


def test_an_error_of_process_0_is_raised_in_every_process(tmp_path):
    """The lock of another run, and a damaged file that only process 0 reads."""
    text, locked, damaged = runs.write_text(tmp_path), tmp_path / "locked", tmp_path / "damaged"
    damaged.mkdir()
    (damaged / "metrics.jsonl").write_text("[]\n[]\n")
    address = f"127.0.0.1:{runs.free_port()}"
    env = os.environ | {"XLA_FLAGS": xla_flags.flags(1)}
    with RunLock(locked):
        pair = [
            runs.fork_program(
                textwrap.dedent(TRAIN_IN_EACH), address, i, text, locked, damaged, env=env
            )
            for i in range(2)
        ]
        outs = [runs.finish(process) for process in pair]
    for out in outs:
        in_use, broken = errors(out)
        assert f"in use by pid {os.getpid()} on" in in_use
        assert str(damaged / "metrics.jsonl") in broken
    assert not (damaged / ".lock").exists()
