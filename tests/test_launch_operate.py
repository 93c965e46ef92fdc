"""What an operator does with a job: on real hosts (namespaces with sshd), at a real terminal."""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import bed as beds
import git_trees
import pytest

from launch import run

ROOT = Path(__file__).parent.parent
PROGRAM = """
import json, os, signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
for step in range(1, int(sys.argv[1]) + 1):
    time.sleep(0.05)
    beat = {"beats": step, "step": step, "phase": "train", "time": time.time(), "step_s": 0.05}
    with open(os.environ["JAXTRAIN_BEAT"] + ".new", "w") as file:
        json.dump(beat, file)
    os.replace(os.environ["JAXTRAIN_BEAT"] + ".new", os.environ["JAXTRAIN_BEAT"])
    print("step", step)
"""
reason = beds.available()
pytestmark = pytest.mark.skipif(bool(reason), reason=reason)


@pytest.fixture(scope="module")
def bed():
    with beds.Bed(1) as made:
        made.inventory(made.folder / "hosts.toml")
        git_trees.commit_program(made.folder / "code", PROGRAM)
        yield made


class Terminal:
    """A command of launch.run at a terminal of its own: `said` grows, `type` answers."""

    def __init__(self, bed, *argv):
        env = {"JAXTRAIN_JOBS": str(bed.folder / "jobs"), "PYTHONPATH": str(ROOT)}
        env = os.environ | {"XDG_RUNTIME_DIR": str(bed.folder)} | env
        self._ours, theirs = os.openpty()
        argv = ["setsid", "--ctty", sys.executable, "-m", "launch.run", *argv]
        ends = dict(stdin=theirs, stdout=theirs, stderr=theirs)
        self.process = subprocess.Popen(argv, cwd=bed.folder, env=env, **ends)
        os.close(theirs)
        os.set_blocking(self._ours, False)
        self.said = ""

    def _read(self):
        try:
            self.said += os.read(self._ours, 1 << 16).decode(errors="replace")
        except BlockingIOError:
            time.sleep(0.02)
        except OSError:  # EIO: the command has ended
            return False
        return True

    def until(self, text, limit_s=60):
        deadline = time.monotonic() + limit_s
        while text not in self.said:
            assert time.monotonic() < deadline and self._read(), self.said
        return self

    def type(self, keys):
        os.write(self._ours, keys.encode())

    def end(self, code):
        while self._read():
            pass
        os.close(self._ours)
        assert self.process.wait(60) == code, self.said
        return self.said


def command(bed, *options, steps=10_000):
    common = [f"--hosts={bed.folder / 'hosts.toml'}", f"--ssh_config={bed.ssh_config}"]
    common += [f"--code={bed.folder / 'code'}", "--module=program", "--backoff_s=0"]
    return [*common, *options, "--", str(steps)]


def start(bed, *options):
    return Terminal(bed, *command(bed, *options))


def job_of(said):
    return re.search(r"job (\d{4}-\d{6}-\w{4}):", said)[1]


def held(bed, job, name):
    """A JSON file of the job's folder on its host."""
    return json.loads(bed.run("h0", "cat", f"/root/jaxtrain/jobs/{job}/{name}"))


def test_a_job_hears_its_operator_while_he_is_asked_what_to_do_and_goes_on_when_let_go(bed):
    terminal = start(bed).until("| step 3")
    terminal.type("\x03")
    terminal.until("[d]etach")
    job = job_of(terminal.said)
    lease = f"/root/jaxtrain/jobs/{job}/lease"
    time.sleep(6.0)  # renewed every 2 s
    age_s = time.time() - float(bed.run("h0", "stat", "-c", "%Y", lease))
    terminal.type("d\n")
    assert "it goes on" in terminal.end(0) and age_s < 4.5
    assert bed.run("h0", "find", lease[:-5], "-name", "lease") == ""
    assert held(bed, job, "status.json")["outcome"] is None
    Terminal(bed, "stop", job).end(0)


def test_a_resumed_job_has_ended_and_takes_its_own_tree_as_it_is_now(bed):
    first = start(bed, "--detach").end(0)
    job = job_of(first)
    said = Terminal(bed, "resume", job).end(1)
    assert "h0: it still runs there" in said and f"launch.run stop {job}" in said
    Terminal(bed, "stop", job).end(0)
    Terminal(bed, "attach", job).end(75)
    with open(bed.folder / "code" / "program.py", "a") as program:
        program.write("# of now\n")
    resumed = job_of(Terminal(bed, "resume", job).end(0))
    assert "+# of now" in (bed.folder / "jobs" / resumed / "code.patch").read_text()
    Terminal(bed, "stop", resumed).end(0)
    assert "attempts" in Terminal(bed, "attach", resumed).end(75)


@pytest.mark.parametrize("verb", ["attach", "status", "logs", "stop", "resume"])
def test_flags_that_a_verb_would_drop_are_refused(verb, capsys):
    with pytest.raises(SystemExit):
        run.parse([verb, "1125-142201-9f3c", "--", "--config.steps=20000"])
    assert f"{verb} takes no flags of the program" in capsys.readouterr().err


def test_a_start_returns_its_own_job_whatever_else_is_on_record(bed, monkeypatch):
    monkeypatch.setenv("JAXTRAIN_JOBS", str(bed.folder / "jobs"))
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(bed.folder))
    (bed.folder / "jobs" / "1231-235959-last").mkdir(parents=True)
    job, code = run.start(*run.parse(command(bed, steps=2)))
    assert code == 0 and "step 2" in job.log(job.hosts[0]).read_text()
