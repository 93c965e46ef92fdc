"""Signals are answered at once, stop a run between steps, and a second one exits at once."""

import os
import signal
import subprocess
import sys
import time

import pytest

import runs
from jaxtrain.distributed.preemption import StopListener, end_at_signals, exit_status_of
from jaxtrain.errors import INTERRUPTED, PREEMPTED

COMPILED = "hashlib.pbkdf2_hmac('sha256', b'', b'', 2**31 - 1)"  # minutes of C code
PROGRAMS = {
    "running": f"""
with StopListener() as stop:
    stop.defer_signals("saving after this step, then stopping")
    print("ready", flush=True)
    {COMPILED}
""",
    "starting": f"""
with StopListener() as stop:
    stop.set_activity("compiling the step")
    print("ready", flush=True)
    {COMPILED}
""",
    "command": f"""
with interruptible():
    print("ready", flush=True)
    {COMPILED}
""",
}


class Program:
    """A program in a process of its own, whose output the test reads while it runs."""

    def __init__(self, name):
        head = "import hashlib\nfrom jaxtrain.distributed.preemption import *\n"
        argv = [sys.executable, "-c", head + PROGRAMS[name]]
        pipe = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        self.process = subprocess.Popen(argv, cwd=runs.ROOT, text=True, **pipe)
        self.read_until("ready")
        time.sleep(0.2)  # until it is in compiled code

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        self.process.kill()
        self.process.communicate()

    def read_until(self, text):
        """Returns the line with `text`, and the seconds until it was printed."""
        started_s = time.monotonic()
        for line in self.process.stdout:
            if text in line:
                return line, time.monotonic() - started_s
        raise AssertionError(f"no line with {text!r}; it ended with {self.process.wait()}")

    def ends_in_s(self):
        started_s = time.monotonic()
        self.process.wait(runs.DEADLINE_S)
        return time.monotonic() - started_s


@pytest.mark.parametrize(
    ("number", "status"),
    [(signal.SIGTERM, 143), (signal.SIGINT, INTERRUPTED)],
    ids=["SIGTERM", "SIGINT"],
)
def test_a_signal_during_compiled_code_is_answered_and_a_second_one_exits(number, status):
    with Program("running") as program:
        program.process.send_signal(number)
        line, after_s = program.read_until(number.name)
        assert "saving after this step, then stopping (again: end now without saving)" in line
        assert after_s < 2 and program.process.poll() is None
        time.sleep(0.2)
        program.process.send_signal(number)
        assert program.ends_in_s() < 2 and program.process.returncode == status


@pytest.mark.parametrize(
    ("number", "status"),
    [(signal.SIGTERM, PREEMPTED), (signal.SIGINT, INTERRUPTED)],
    ids=["SIGTERM", "SIGINT"],
)
def test_a_signal_before_the_first_step_exits_at_once(number, status):
    with Program("starting") as program:
        program.process.send_signal(number)
        line, _ = program.read_until(number.name)
        assert "while compiling the step: ended before the first step" in line
        assert program.ends_in_s() < 2 and program.process.returncode == status


def test_ctrl_c_during_compiled_code_of_a_command_is_answered_and_a_second_one_exits():
    with Program("command") as program:
        program.process.send_signal(signal.SIGINT)
        assert "ending when the compiled code returns" in program.read_until("SIGINT")[0]
        program.process.send_signal(signal.SIGINT)
        assert program.ends_in_s() < 2 and program.process.returncode == INTERRUPTED


def wait_for(condition):
    deadline = time.monotonic() + 10
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.005)
    assert condition()


def test_two_equal_signals_at_once_count_as_one():
    """`timeout` signals its child, and then the process group that the child is in."""
    formers = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    with StopListener() as stop:
        stop.defer_signals("saving")
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)
        wait_for(lambda: stop.signal)
        time.sleep(0.1)  # a second request would have ended this process
        assert stop.agreed_signal() == signal.SIGTERM
    assert formers == [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]


def test_signals_end_a_process_that_has_nothing_left_to_save():
    numbers = (signal.SIGTERM, signal.SIGINT)
    formers = [signal.getsignal(number) for number in numbers]
    with StopListener() as stop:
        stop.defer_signals("saving")
        end_at_signals()
        assert [signal.getsignal(number) for number in numbers] == [signal.SIG_DFL] * 2
    assert formers == [signal.getsignal(number) for number in numbers]


def test_repeated_sighups_do_not_exit_and_a_sigterm_after_them_counts_as_the_first_signal():
    """The kernel, the shell and the session manager may each send a SIGHUP, at any time."""
    with StopListener() as stop:
        stop.defer_signals("saving")
        signal.raise_signal(signal.SIGHUP)
        wait_for(lambda: stop.signal == signal.SIGHUP)
        assert exit_status_of(stop.agreed_signal()) == PREEMPTED
        for _ in range(2):
            time.sleep(0.1)  # longer than the window in which two signals are one
            signal.raise_signal(signal.SIGHUP)
        time.sleep(0.1)
        signal.raise_signal(signal.SIGTERM)
        wait_for(lambda: stop.signal == signal.SIGTERM)
        signal.raise_signal(signal.SIGHUP)
        time.sleep(0.1)
        assert stop.agreed_signal() == signal.SIGTERM


def test_sighup_before_the_first_step_ends_the_process_with_status_75():
    with Program("starting") as program:
        program.process.send_signal(signal.SIGHUP)
        line, _ = program.read_until("SIGHUP")
        assert "while compiling the step: ended before the first step" in line
        assert program.ends_in_s() < 2 and program.process.returncode == PREEMPTED


def test_sighup_is_ignored_if_it_was_ignored_at_the_start_as_nohup_does():
    former = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopListener() as stop:
            stop.defer_signals("saving")
            signal.raise_signal(signal.SIGHUP)
            time.sleep(0.1)
            assert stop.signal is None
            assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, former)


def test_printing_after_the_terminal_is_gone_does_not_end_the_process(tmp_path):
    program = f"""
import time
from jaxtrain.distributed.preemption import StopListener, exit_status_of
with StopListener() as stop:
    stop.defer_signals("saving")
    print("ready", flush=True)
    while not stop.signal:
        time.sleep(0.01)
    print("saved", flush=True)  # would raise OSError
    open({str(tmp_path / "saved")!r}, "w").close()
raise SystemExit(exit_status_of(stop.signal))
"""
    master, slave = os.openpty()
    # SIGHUP of a terminal goes to the session leader that has opened it.
    open_terminal = f"import os\nfd = os.open({os.ttyname(slave)!r}, os.O_RDWR)\n"
    open_terminal += "os.dup2(fd, 1), os.dup2(fd, 2), os.close(fd)\n"
    argv = [sys.executable, "-c", open_terminal + program]
    process = subprocess.Popen(argv, cwd=runs.ROOT, start_new_session=True)
    output = b""
    while b"ready\r\n" not in output:  # else the write may not have ended yet
        output += os.read(master, 1000)
    os.close(slave)
    os.close(master)
    assert process.wait(runs.DEADLINE_S) == PREEMPTED
    assert (tmp_path / "saved").exists()


def test_a_signal_to_a_forked_child_does_not_reach_the_parent():
    program = """
import os, signal, time
from jaxtrain.distributed.preemption import StopListener
with StopListener() as stop:
    stop.defer_signals("saving")
    child = os.fork()
    if not child:
        time.sleep(60)
    time.sleep(0.3)
    os.kill(child, signal.SIGTERM)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGTERM
    time.sleep(0.1)
    assert stop.signal is None
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=runs.ROOT, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()


def test_ctrl_c_while_a_run_compiles_exits_at_once_without_a_traceback(tmp_path, monkeypatch):
    beats = tmp_path / "beats"
    monkeypatch.setenv("JAXTRAIN_BEAT", str(beats))
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")  # a step that is not compiled elsewhere
    process = runs.start(tmp_path / "run", runs.write_text(tmp_path), "--config.compile_cache=")
    while runs.phase_of(beats) != "compile":
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.005)
    time.sleep(0.3)
    process.send_signal(signal.SIGINT)
    started_s = time.monotonic()
    out = runs.finish(process, INTERRUPTED)
    assert time.monotonic() - started_s < 1
    assert "SIGINT while compiling the step: ended before the first step" in out
    assert "Traceback" not in out and "compiled in" not in out
    assert not (tmp_path / "run" / "checkpoints").exists()
