"""Starts of the real command beside each other: in one directory, and as processes of one run."""

import os
import signal
import socket
import time

import runs

from jaxtrain.errors import PREEMPTED, REFUSED
from jaxtrain.run_directory.lock import RunLock


def flags(cache, steps):
    return f"--config.compile_cache={cache}", f"--config.steps={steps}", "--config.sample.tokens=0"


def start_processes(workdir, text, *flags, count=2):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"--coordinator=localhost:{free.getsockname()[1]}"
    world = [(address, f"--processes={count}", f"--process={i}") for i in range(count)]
    return [runs.start(workdir, text, *flags, *each) for each in world]


def errors(out):
    return [line for line in out.splitlines() if line.startswith("error: ")]


def test_a_second_start_in_a_run_directory_is_refused_and_the_first_run_ends_whole(tmp_path):
    text, workdir, cache = runs.write_text(tmp_path), tmp_path / "run", tmp_path / "cache"
    first = runs.start(workdir, text, *flags(cache, 100_000), "--config.save_every=100")
    while not (workdir / ".lock").exists():  # long before its first step
        assert first.poll() is None, first.communicate()[0]
        time.sleep(0.01)
    out = runs.finish(runs.start(workdir, text, *flags(cache, 100_000)), REFUSED)
    assert f"{workdir} is in use by pid {first.pid} on {socket.gethostname()}, started" in out
    assert len(errors(out)) == 1 and "Traceback" not in out
    runs.signal_at(first, workdir, 250, signal.SIGTERM)  # after two saves
    runs.finish(first, PREEMPTED)
    steps = [step for step, _ in runs.losses(workdir)]
    assert steps == list(range(1, len(steps) + 1)) and len(steps) >= 250
    assert not (workdir / ".lock").exists()


def test_processes_of_a_run_are_refused_together_with_the_same_line(tmp_path):
    text, cache = runs.write_text(tmp_path), tmp_path / "cache"
    for name in ("metrics.jsonl", "hosts/1.jsonl"):
        workdir = tmp_path / name.replace("/", "_")
        (workdir / name).parent.mkdir(parents=True)
        (workdir / name).write_text("[]\n[]\n")
        outs = [runs.finish(p, REFUSED) for p in start_processes(workdir, text, *flags(cache, 3))]
        said = {line for out in outs for line in errors(out)}
        assert len(said) == 1 and str(workdir / name) in said.pop(), outs
        assert not any("Traceback" in out for out in outs)
        assert not (workdir / ".lock").exists()
    with RunLock(workdir):
        outs = [runs.finish(p, REFUSED) for p in start_processes(workdir, text, *flags(cache, 3))]
    assert all(f"in use by pid {os.getpid()} on" in "".join(errors(out)) for out in outs), outs
