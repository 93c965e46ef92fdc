"""Launches small programs at two sites: two hosts and one host of a test bed."""

import json
import re
import subprocess

import bed as beds
import git_trees
import pytest

from launch import run
from launch.host.exit_codes import PREEMPTED
from launch.job import Job, read_jobs

PROGRAM = f"""{git_trees.HEARTBEAT}
path, site = sys.argv[-2].partition("=")[2], sys.argv[-1].partition("=")[2]
content = json.load(open(path))
key = content.pop("key")
mode = oct(os.stat(path).st_mode & 0o777)
found = {{"argv": sys.argv[1:-2], "site": site, "mode": mode, "digits": len(key)}}
print(json.dumps(found | content))
for step in range(1, int(sys.argv[1]) + 1):
    make_step(step, 0.05)
"""
needs_bed = pytest.mark.skipif(bool(beds.available()), reason=beds.available())


@pytest.fixture(scope="module")
def bed():
    with beds.Bed(3) as bed, pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAXTRAIN_JOBS", str(bed.folder / "jobs"))
        patch.setenv("XDG_RUNTIME_DIR", str(bed.folder))
        git_trees.commit_program(bed.folder / "code", PROGRAM)
        yield bed


def command(bed, *options, steps=20, east=(), **fields):
    """Returns arguments of launch.run that start a job at `west` (h0, h1) and `east` (h2)."""
    west = bed.inventory(bed.folder / "west.toml", only=["h0", "h1"], **fields)
    east = bed.inventory(bed.folder / "east.toml", only=["h2"], **dict(east))
    common = [f"--sites={west},{east}", f"--ssh_config={bed.ssh_config}", "--module=program"]
    return [*common, f"--code={bed.folder / 'code'}", *options, "--", str(steps)]


def living(bed):
    lines = [line for name in bed.names for line in bed.processes(name).values()]
    return [line for line in lines if "program" in line or "launch.host" in line]


@needs_bed
def test_one_command_runs_a_job_at_each_site_and_its_name_stands_for_all(bed, capfd):
    arguments = command(bed, "--for=east:--batch=64", site="new_york", east={"site_port": 7_301})
    assert run.main([a.replace("east:", "asuncion:") for a in arguments]) == 1
    assert "SITE among new_york, east; got 'asuncion:--batch=64'" in capfd.readouterr().err
    assert run.main(arguments) == 0
    out, err = capfd.readouterr()
    parent = re.search(r"job (\S+): stands for (\S+) and (\S+)", err)
    assert parent and parent[2] == f"{parent[1]}.new_york" and parent[3] == f"{parent[1]}.east"
    hosts = {"new_york.h0": 0, "new_york.h1": 1, "east.h2": 0}
    width = max(map(len, hosts))
    for host, rank in hosts.items():
        assert f"{host:{width}} | rank {rank} step 20\n" in out
    found = [line.partition(" | ")[2] for line in out.splitlines()]
    found = [json.loads(line) for line in found if line.startswith("{")]
    assert sorted(f["site"] for f in found) == ["east", "new_york", "new_york"]
    for program in found:
        assert program["argv"] == ["20", *(["--batch=64"] if program["site"] == "east" else [])]
        assert (program["mode"], program["digits"], program["job"]) == ("0o600", 64, parent[1])
        first, second = program["sites"]
        assert [p["address"] for p in first["processes"]] == [bed.address[h] for h in ("h0", "h1")]
        assert second == {
            "name": "east",
            "processes": [{"address": bed.address["h2"], "port": 7301}],
        }
    assert re.search(rf"ok +to new_york.h1 [\d.]+ ms, {bed.address['h1']} port \d+\n", err)
    assert not living(bed)


@needs_bed
def test_status_stop_resume_and_attach_act_on_all_sites_or_on_one(bed, capfd):
    assert run.main(command(bed, "--detach", steps=10_000)) == 0
    parent = git_trees.job_id(capfd.readouterr().err)
    west, east = (f"{parent}.{site}" for site in ("west", "east"))
    keys = {Job(job).record["sites"]["key"] for job in (west, east)}
    ps = subprocess.run(["ps", "-eo", "args="], capture_output=True, text=True).stdout
    assert len(keys) == 1 and keys.isdisjoint(ps.split())
    assert run.main(["status", parent]) == 0
    assert re.findall(
        "(?m)^(west|east): job|^(west.h0|west.h1|east.h2) +attempt", capfd.readouterr().out
    )
    assert run.main(["stop", east]) == 0 and run.main(["attach", east]) == PREEMPTED
    capfd.readouterr()
    assert (
        run.main(["resume", parent]) == 1 and "west.h0: the job is still" in capfd.readouterr().err
    )
    assert run.main(["resume", east]) == 0  # detached, as before
    new = read_jobs(parent)
    assert new[0].id == west and new[1].id not in (west, east) and new[1].id.endswith(".east")
    assert new[1].record["sites"] == new[0].record["sites"]
    assert run.main(["stop", parent]) == 0
    assert run.main(["attach", parent]) == PREEMPTED
    assert run.main(["status"]) == 0 and f"{parent}  stands for {west} {new[1].id}" in (
        capfd.readouterr().out
    )
    assert not living(bed)
    for job in new:
        for host in job.hosts:
            assert not keys & set(re.findall(r"\w+", job.log(host).read_text()))
    assert run.main(["resume", parent]) == 0
    resumed = git_trees.job_id(capfd.readouterr().err)
    assert {job.record["resumes"] for job in read_jobs(resumed)} == {west, new[1].id}
    assert {job.record["sites"]["key"] for job in read_jobs(resumed)}.isdisjoint(keys)
    assert run.main(["stop", resumed, "--now"]) == 0


@needs_bed
@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"site_address": "127.0.0.1", "site_port": 7_302},
            r"east.h2 cannot connect to west.h0 at 127.0.0.1 port 7302: .*refused",
        ),
        ({"site_port": 22}, r"west.h0 cannot listen at 10\.\S+ port 22: .*in use"),
    ],
)
def test_a_pair_of_hosts_that_cannot_connect_aborts_the_launch(bed, capfd, fields, message):
    arguments = command(bed, **fields)
    bed.inventory(bed.folder / "west.toml", only=["h0"], **fields)  # two hosts would need two ports
    assert run.main(arguments) == 1
    err = capfd.readouterr().err
    assert re.search(message, err) and "nothing was started" in err and not living(bed)


@needs_bed
def test_a_start_that_fails_at_one_site_leaves_nothing_running_at_the_other(bed, capfd):
    bed.run("h2", "bash", "-c", "mv /root/jaxtrain/jobs /root/jobs; touch /root/jaxtrain/jobs")
    try:
        assert run.main(command(bed, steps=10_000)) == 1
    finally:
        bed.run("h2", "bash", "-c", "rm /root/jaxtrain/jobs; mv /root/jobs /root/jaxtrain/jobs")
    out, err = capfd.readouterr()
    assert "east.h2: " in err and not living(bed)
    for job in read_jobs(git_trees.job_id(err)):
        assert job.record["outcome"]["why"].startswith("not all hosts started")
