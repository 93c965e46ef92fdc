"""Types an operator's commands for a running job at a real terminal, on a one-host test bed."""

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
from quick_hosts import quick_hosts

from launch import run
from launch.host.exit_codes import PREEMPTED

ROOT = Path(__file__).parent.parent
PROGRAM = f"""{git_trees.HEARTBEAT}
for step in range(1, int(sys.argv[1]) + 1):
    make_step(step, 0.05)
"""
reason = beds.available()
pytestmark = pytest.mark.skipif(bool(reason), reason=reason)


@pytest.fixture(scope="module")
def bed():
    with beds.Bed(1) as bed, quick_hosts():
        bed.inventory(bed.folder / "hosts.toml")
        git_trees.commit_program(bed.folder / "code", PROGRAM)
        yield bed


class Terminal:
    """launch.run in a separate terminal; `output` is what it has printed so far."""

    def __init__(self, bed, *argv):
        env = {"JAXTRAIN_JOBS": str(bed.folder / "jobs"), "PYTHONPATH": str(ROOT)}
        env = os.environ | {"XDG_RUNTIME_DIR": str(bed.folder)} | env
        self._ours, theirs = os.openpty()
        argv = ["setsid", "--ctty", sys.executable, "-m", "tests.quick_hosts", *argv]
        streams = dict(stdin=theirs, stdout=theirs, stderr=theirs)
        self.process = subprocess.Popen(argv, cwd=bed.folder, env=env, **streams)
        os.close(theirs)
        os.set_blocking(self._ours, False)
        self.output = ""

    def _read(self):
        try:
            self.output += os.read(self._ours, 1 << 16).decode(errors="replace")
        except BlockingIOError:
            time.sleep(0.02)
        except OSError:  # EIO: the command has ended
            return False
        return True

    def wait_for(self, text, limit_s=60):
        deadline = time.monotonic() + limit_s
        while text not in self.output:
            assert time.monotonic() < deadline and self._read(), self.output
        return self

    def type(self, keys):
        os.write(self._ours, keys.encode())

    def end(self):
        while self._read():
            pass
        os.close(self._ours)
        return self.process.wait(60)

    def finish(self, code):
        assert self.end() == code, self.output
        return self.output


def command(bed, *options):
    common = [f"--hosts={bed.folder / 'hosts.toml'}", f"--ssh_config={bed.ssh_config}"]
    common += [f"--code={bed.folder / 'code'}", "--module=program", "--backoff_s=0"]
    return [*common, *options, "--", "10000"]


def test_the_lease_is_renewed_during_the_ctrl_c_prompt_and_a_detached_job_goes_on(bed):
    terminal = Terminal(bed, *command(bed)).wait_for(" step 3")
    terminal.type("\x03")
    terminal.wait_for("[d]etach")
    job = git_trees.job_id(terminal.output)
    folder = f"/root/jaxtrain/jobs/{job}"
    asked, renewed, deadline = time.time(), 0.0, time.monotonic() + 20
    while renewed < asked + 1:  # it is renewed twice or more while the prompt waits
        assert time.monotonic() < deadline
        renewed = float(bed.run("h0", "stat", "-c", "%.3Y", f"{folder}/lease"))
        time.sleep(0.1)
    terminal.type("d\n")
    assert "the job goes on" in terminal.finish(0)
    assert bed.run("h0", "find", folder, "-name", "lease") == ""
    assert json.loads(bed.run("h0", "cat", f"{folder}/status.json"))["outcome"] is None
    Terminal(bed, "stop", job).finish(0)


@pytest.mark.long
def test_resume_needs_an_ended_job_and_takes_the_current_code(bed, monkeypatch, capsys):
    monkeypatch.setenv("JAXTRAIN_JOBS", str(bed.folder / "jobs"))
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(bed.folder))
    (bed.folder / "jobs" / "1231-235959-last").mkdir(parents=True)  # not what `start` returns
    [job], code = run.start(*run.parse(command(bed, "--detach")))
    assert code == 0 and job.id == git_trees.job_id(capsys.readouterr().err)
    assert run.main(["resume", job.id]) == 1
    output = capsys.readouterr().err
    assert "h0: the job is still running there" in output and f"launch.run stop {job.id}" in output
    assert run.main(["stop", job.id]) == 0 and run.main(["attach", job.id]) == PREEMPTED
    assert " step 1\n" in job.log(job.hosts[0]).read_text()
    with open(bed.folder / "code" / "program.py", "a") as program:
        program.write("# changed\n")
    terminals = [Terminal(bed, "resume", job.id) for _ in range(2)]  # at once: one of them wins
    outputs = {terminal.end(): terminal.output for terminal in terminals}
    assert outputs.keys() == {0, 1}
    resumed = git_trees.job_id(outputs[0])
    assert re.search(f"job {job.id} was resumed as {resumed}|is still running there", outputs[1])
    assert "+# changed" in (bed.folder / "jobs" / resumed / "code.patch").read_text()
    assert run.main(["stop", resumed]) == 0 and run.main(["attach", resumed]) == PREEMPTED
    assert "attempts" in capsys.readouterr().err


@pytest.mark.parametrize("verb", ["attach", "status", "logs", "stop", "resume"])
def test_a_verb_refuses_flags_that_it_would_ignore(verb, capsys):
    with pytest.raises(SystemExit):
        run.parse([verb, "1125-142201-9f3c", "--", "--config.steps=20000"])
    assert f"{verb} takes no flags of the program" in capsys.readouterr().err
