"""Runs launch.run with a small Python program on a test bed of two hosts."""

import json
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import bed as beds
import git_trees
import pytest
from quick_hosts import quick_hosts

from launch import run
from launch.host.exit_codes import PREEMPTED

ROOT = Path(__file__).parent.parent
PROGRAM = (
    git_trees.HEARTBEAT
    + """
rank, steps, fault = int(os.environ["JAX_PROCESS_ID"]), int(sys.argv[1]), sys.argv[2]
print(json.dumps({"argv": sys.argv[1:], "env": os.environ.get("HOSTILE")}))
if os.fork() == 0:
    os.setsid()
    time.sleep(1000)
for step in range(1, steps + 1):
    make_step(step, 0.02)
    if rank == 1 and step == 10 and fault and not os.path.exists("/tmp/once"):
        open("/tmp/once", "w").close()
        time.sleep(1000)
"""
)
HOSTILE = "--json -- a b;$(touch /tmp/bad) `id` \"x\" 'y' * \\ \n-é"
WORKDIR = '/root/it\'s "a" $(touch /tmp/bad) `id` é'
reason = beds.available()
pytestmark = pytest.mark.skipif(bool(reason), reason=reason)


@pytest.fixture(scope="module")
def bed():
    with beds.Bed(2) as bed, pytest.MonkeyPatch.context() as patch, quick_hosts():
        patch.setenv("JAXTRAIN_JOBS", str(bed.folder / "jobs"))
        patch.setenv("XDG_RUNTIME_DIR", str(bed.folder))
        patch.setenv("PYTHONPATH", str(ROOT))
        bed.inventory(bed.folder / "hosts.toml")
        git_trees.commit_program(bed.folder / "code", PROGRAM)
        yield bed


def launch(*argv):
    """Starts launch.run as a child process."""
    argv, pipe = [sys.executable, "-m", "tests.quick_hosts", *argv], subprocess.PIPE
    return subprocess.Popen(
        argv, cwd=ROOT, stdout=pipe, stderr=pipe, stdin=subprocess.DEVNULL, text=True
    )


def finish(process, code=0):
    out, err = process.communicate(timeout=100)
    assert process.returncode == code, out + err
    return out, err


@pytest.fixture
def call(capfd):
    """Runs launch.run in this process; returns what it prints."""

    def call(*argv, code=0):
        found = run.main([*argv])
        out, err = capfd.readouterr()
        assert found == code, out + err
        return out, err

    return call


def command(bed, *options, steps=20, fault="", hostile=""):
    """Returns the arguments of launch.run that start a job."""
    common = [f"--hosts={bed.folder / 'hosts.toml'}", f"--ssh_config={bed.ssh_config}"]
    common += [f"--code={bed.folder / 'code'}", "--module=program", "--backoff_s=0", "--stall_s=1"]
    return [*common, *options, "--", str(steps), fault, hostile]


def wait_for(condition, limit_s=30.0):
    deadline = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def living(bed):
    """Returns the command lines of programs and supervisors, not of connections, which linger."""
    lines = [line for name in bed.names for line in bed.processes(name).values()]
    return [line for line in lines if "program" in line or "launch.host" in line]


@pytest.fixture(scope="module")
def recovered(bed):
    """The output of a job with special characters, a rank of which hangs in the first attempt."""
    hosts = bed.inventory(bed.folder / "hostile.toml", workdir=WORKDIR)
    options = [f"--hosts={hosts}", f"--env=HOSTILE={HOSTILE}"]
    out, err = finish(launch(*command(bed, *options, fault="hang", hostile=HOSTILE)))
    assert living(bed) == []
    return out, err


@pytest.mark.long
def test_special_characters_reach_the_program_unchanged(bed, recovered):
    for name in bed.names:
        lines = [line.partition(" | ")[2] for line in recovered[0].splitlines()]
        lines = [line for line in lines if line.startswith("{")]
        assert len(lines) == 4  # two hosts, two attempts
        expected = {"argv": ["20", "hang", HOSTILE], "env": HOSTILE}
        assert all(json.loads(line) == expected for line in lines)
        assert "/tmp/bad" not in bed.run(name, "ls", "/tmp")
        assert bed.run(name, "stat", "-c", "%a", WORKDIR).strip() == "700"


@pytest.mark.long
def test_a_hanging_rank_is_reported_and_the_job_restarts_and_leaves_no_process(bed, recovered):
    out, err = recovered
    [cause] = re.findall("ROOT CAUSE (.*)", out)
    assert cause.startswith("h1 rank 1 at step 10: stuck for")
    assert "exit 0 after 2 attempts" in err and "no process of the job is left on any host" in err
    for name in bed.names:
        lines = [line for line in out.splitlines() if line.startswith(name)]
        last_start = max(i for i, line in enumerate(lines) if '"argv"' in line)
        assert sum("step" in line for line in lines[last_start + 1 :]) == 20


def check_privacy(bed, job, secret):
    """Checks that a running job hides its token and a secret, and opens nothing to other users."""
    token = json.loads((bed.folder / "jobs" / job / "job.json").read_text())["token"]
    ps = subprocess.run(["ps", "-eo", "args="], capture_output=True, text=True)
    for name in bed.names:
        lines = [*bed.processes(name).values(), *ps.stdout.splitlines()]
        assert any("program" in line for line in lines)
        assert not [line for line in lines if token in line or secret in line]
        open_to_others = ["find", f"/root/jaxtrain/jobs/{job}", "-perm", "/077"]
        assert bed.run(name, *open_to_others) == ""
        ports = [line.split()[3] for line in bed.run(name, "ss", "-Hltn").splitlines()]
        assert {port.rpartition(":")[0] for port in ports} == {bed.address[name]}
        assert token not in bed.run(name, "bash", "-c", f"cat /root/jaxtrain/jobs/{job}/log/*")


def test_a_detached_job_outlives_its_operator_and_its_complete_log_arrives(bed, call, monkeypatch):
    secret = "not-for-ps"
    monkeypatch.setenv("SECRET", secret)
    job = git_trees.job_id(call(*command(bed, "--detach", "--env=SECRET", steps=10_000))[1])
    first, copy = launch("attach", job), bed.folder / "jobs" / job / "h0.log"
    wait_for(lambda: copy.exists() and "step 9" in copy.read_text())
    check_privacy(bed, job, secret)
    first.send_signal(signal.SIGKILL)
    first.communicate()
    bed.cut("h1")
    second = launch("attach", job)
    copied = len(copy.read_bytes())
    wait_for(lambda: len(copy.read_bytes()) > copied)  # it follows, without the host that is cut
    bed.heal("h1")
    call("stop", job)
    _, err = finish(second, PREEMPTED)
    assert "the operator asked" in err and living(bed) == []
    for name in bed.names:
        on_host = bed.run(name, "bash", "-c", f"cat /root/jaxtrain/jobs/{job}/log/*")
        assert (bed.folder / "jobs" / job / f"{name}.log").read_text() == on_host
        steps = [int(step) for step in re.findall(r"step (\d+)\n", on_host)]
        assert steps == list(range(1, len(steps) + 1)) and len(steps) > 9
    assert call("status", job)[0].count("the operator asked") == 2


def test_a_host_that_differs_from_the_inventory_aborts_the_launch(bed, call):
    text = (bed.folder / "hosts.toml").read_text()
    text = text.replace('name = "h0"', 'name = "h0"\ngpus = 0\nchip = "a40"')
    wrong = bed.folder / "wrong.toml"
    wrong.write_text(text.replace(bed.address["h1"], "10.255.255.1"))
    _, err = call(*command(bed, f"--hosts={wrong}"), code=1)
    assert "h1: the host does not have this address: correct the inventory" in err
    assert "h0: the inventory says 0 a40" not in err  # 0 GPUs are wanted, and 0 are there
    assert "nothing was started" in err and living(bed) == []


def test_an_unknown_host_key_is_refused_even_if_the_users_configuration_accepts_it(
    bed, call, monkeypatch
):
    config = bed.folder / "no_keys"
    text = bed.ssh_config.read_text().replace("known_hosts", "known_nobody")
    config.write_text(text.replace("StrictHostKeyChecking yes", "StrictHostKeyChecking no"))
    new_sockets = tempfile.mkdtemp(dir=bed.folder)  # so that no open connection is reused
    monkeypatch.setenv("XDG_RUNTIME_DIR", new_sockets)
    _, err = call(*command(bed, f"--ssh_config={config}"), code=1)
    assert "Host key verification failed" in err and living(bed) == []


@pytest.mark.long
def test_a_supervisor_and_a_rank_killed_within_a_second_cost_one_restart(bed, call):
    """tests/launch_pairs.py checks this and other pairs of faults with the trainer."""
    job = git_trees.job_id(call(*command(bed, "--detach", steps=100))[1])
    ranks = []
    while not ranks:
        ranks = [pid for pid, line in bed.processes("h0").items() if "-m program 100" in line]
    status = json.loads(bed.run("h1", "cat", f"/root/jaxtrain/jobs/{job}/status.json"))
    bed.run("h1", "kill", "-KILL", status["pid"])
    bed.run("h0", "kill", "-KILL", *ranks)
    out, err = call("attach", job)
    assert re.search("ROOT CAUSE (h1: its supervisor was killed|h0 rank 0 .*SIGKILL)", out)
    assert "exit 0 after 2 attempts" in err and living(bed) == []
