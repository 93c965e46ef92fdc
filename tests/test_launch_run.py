"""Jobs on three real hosts (namespaces with sshd), with a program of the standard library."""

import json
import os
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

ROOT = Path(__file__).parent.parent
PROGRAM = """
import json, os, signal, sys, time
rank, steps, fault = int(os.environ["JAX_PROCESS_ID"]), int(sys.argv[1]), sys.argv[2]
print(json.dumps({"argv": sys.argv[1:], "env": os.environ.get("HOSTILE")}))
signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
if os.fork() == 0:
    os.setsid()
    time.sleep(1000)
for step in range(1, steps + 1):
    time.sleep(0.02)
    beat = {"beats": step, "step": step, "phase": "train", "time": time.time(), "step_s": 0.02}
    with open(os.environ["JAXTRAIN_BEAT"] + ".new", "w") as file:
        json.dump(beat, file)
    os.replace(os.environ["JAXTRAIN_BEAT"] + ".new", os.environ["JAXTRAIN_BEAT"])
    print(f"rank {rank} step {step}")
    if rank == 1 and step == 10 and fault and not os.path.exists("/tmp/once"):
        open("/tmp/once", "w").close()
        time.sleep(1000)
"""
HOSTILE = "--json -- a b;$(touch /tmp/bad) `id` \"x\" 'y' * \\ \n-é"
reason = beds.available()
pytestmark = pytest.mark.skipif(bool(reason), reason=reason)


@pytest.fixture(scope="module")
def bed():
    with beds.Bed(3) as made:
        made.inventory(made.folder / "hosts.toml")
        git_trees.commit_program(made.folder / "code", PROGRAM)
        yield made


def launch(bed, *argv, **env):
    env |= {"JAXTRAIN_JOBS": str(bed.folder / "jobs"), "PYTHONPATH": str(ROOT)}
    env = os.environ | {"XDG_RUNTIME_DIR": str(bed.folder)} | env
    argv = [sys.executable, "-m", "launch.run", *argv]
    pipe = subprocess.PIPE
    return subprocess.Popen(
        argv, cwd=ROOT, env=env, stdout=pipe, stderr=pipe, stdin=subprocess.DEVNULL, text=True
    )


def start(bed, *options, steps=20, fault="", hostile="", **env):
    common = [f"--hosts={bed.folder / 'hosts.toml'}", f"--ssh_config={bed.ssh_config}"]
    common += [f"--code={bed.folder / 'code'}", "--module=program", "--backoff_s=0", "--stall_s=2"]
    return launch(bed, *common, *options, "--", str(steps), fault, hostile, **env)


def finish(process, code=0):
    out, err = process.communicate(timeout=100)
    assert process.returncode == code, out + err
    return out, err


def job_of(err):
    return re.search(r"job (\d{4}-\d{6}-\w{4}):", err)[1]


def left(bed):
    """Of jobs: the program and the supervisors; a connection may close a moment later."""
    found = [line for name in bed.names for line in bed.processes(name).values()]
    return [line for line in found if "program" in line or "launch.host" in line]


def test_hostile_words_arrive_intact_and_nothing_is_left(bed):
    workdir = '/root/it\'s "a" $(touch /tmp/bad) `id` é'
    hosts = bed.inventory(bed.folder / "hostile.toml", workdir=workdir)
    out, err = finish(start(bed, f"--hosts={hosts}", f"--env=HOSTILE={HOSTILE}", hostile=HOSTILE))
    for name in bed.names:
        said = [line.partition(" | ")[2] for line in out.splitlines() if line.startswith(name)]
        assert json.loads(said[1 if name == "h0" else 0]) == {
            "argv": ["20", "", HOSTILE],
            "env": HOSTILE,
        }
        assert sum("step" in line for line in said) == 20
        assert "/tmp/bad" not in bed.run(name, "ls", "/tmp")
        assert bed.run(name, "stat", "-c", "%a", workdir).strip() == "700"
    assert "no process of it is left on any host" in err and left(bed) == []


def test_a_rank_that_hangs_is_named_and_the_job_goes_on_without_what_it_left(bed):
    out, err = finish(start(bed, fault="hang"))
    [cause] = re.findall("ROOT CAUSE (.*)", out)
    assert cause.startswith("h1 rank 1 at step 10: stuck for")
    assert "exit 0 after 2 attempts" in err and left(bed) == []


def check_privacy(bed, job, secret):
    """Of a job that runs: its token and a secret are in no command line, all is the user's own."""
    token = json.loads((bed.folder / "jobs" / job / "job.json").read_text())["token"]
    here = subprocess.run(
        ["ps", "-eo", "args="], capture_output=True, text=True
    ).stdout.splitlines()
    for name in bed.names:
        lines = [*bed.processes(name).values(), *here]
        assert any("program" in line for line in lines)
        assert not [line for line in lines if token in line or secret in line]
        open_to_others = ["find", f"/root/jaxtrain/jobs/{job}", "-perm", "/077"]
        assert bed.run(name, *open_to_others) == ""
        ports = [line.split()[3] for line in bed.run(name, "ss", "-Hltn").splitlines()]
        assert {port.rpartition(":")[0] for port in ports} == {bed.address[name]}
        assert token not in bed.run(name, "bash", "-c", f"cat /root/jaxtrain/jobs/{job}/log/*")


def test_a_detached_job_outlives_its_operator_and_ends_whole_when_told_to(bed):
    secret = "not-for-ps"
    started = start(bed, "--detach", "--env=SECRET", steps=10_000, SECRET=secret)
    job = job_of(finish(started)[1])
    first = launch(bed, "attach", job)
    time.sleep(1.5)
    check_privacy(bed, job, secret)
    first.send_signal(signal.SIGKILL)
    first.communicate()
    bed.cut("h1")
    second = launch(bed, "attach", job)
    time.sleep(1.0)
    bed.heal("h1")
    finish(launch(bed, "stop", job))
    _, err = finish(second, 75)
    assert "the operator asked" in err and left(bed) == []
    for name in bed.names:
        there = bed.run(name, "bash", "-c", f"cat /root/jaxtrain/jobs/{job}/log/*")
        assert (bed.folder / "jobs" / job / f"{name}.log").read_text() == there
        steps = [int(step) for step in re.findall(r"step (\d+)\n", there)]
        assert steps == list(range(1, len(steps) + 1)) and len(steps) > 50
    out, _ = finish(launch(bed, "status", job))
    assert out.count("the operator asked") == 3


def test_a_host_that_is_not_what_the_inventory_says_stops_all_before_anything_starts(bed):
    hosts = bed.folder / "hosts.toml"
    wrong = bed.folder / "wrong.toml"
    wrong.write_text(
        hosts.read_text().replace('name = "h1"', 'name = "h1"\ngpus = 0\nchip = "a40"')
    )
    text = wrong.read_text().replace(bed.address["h2"], "10.255.255.1")
    wrong.write_text(text)
    _, err = finish(start(bed, f"--hosts={wrong}"), 1)
    assert "h2: no such address on it: correct the inventory" in err
    assert "h1: the inventory says 0 a40" not in err  # no GPU is wanted, and none is there
    assert "nothing was started" in err and left(bed) == []


def test_an_unknown_host_key_is_refused_even_where_the_configuration_would_take_it(bed):
    config = bed.folder / "no_keys"
    text = bed.ssh_config.read_text().replace("known_hosts", "known_nobody")
    config.write_text(text.replace("StrictHostKeyChecking yes", "StrictHostKeyChecking no"))
    elsewhere = tempfile.mkdtemp(dir=bed.folder)  # no connection that stands already
    _, err = finish(start(bed, f"--ssh_config={config}", XDG_RUNTIME_DIR=elsewhere), 1)
    assert "Host key verification failed" in err and left(bed) == []
