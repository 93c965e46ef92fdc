"""Launches small programs at two sites: two hosts and one host of a test bed."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import bed as beds
import git_trees
import pytest
from local_client import LocalClient
from quick_hosts import quick_hosts
from run_directories import series, write_run

from launch import compare, pull, run, slo, summary
from launch.host.exit_codes import PREEMPTED
from launch.host.restart_policy import Policy
from launch.inventory import Host
from launch.job import Job, read_jobs, write_parent
from launch.sites import build_sites_file, find_links, read_sites

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
# In place of jaxtrain.data.quick_fingerprint: the last flag is the data.
FINGERPRINT = """
import json, sys
found = {"files": 1, "bytes": 1, "fingerprint": sys.argv[-1], "workdir": "/root/run", "owner": {}}
print(json.dumps(found))
"""
needs_bed = pytest.mark.skipif(bool(beds.available()), reason=beds.available())


@pytest.fixture(scope="module")
def bed():
    with beds.Bed(3) as bed, pytest.MonkeyPatch.context() as patch, quick_hosts():
        patch.setenv("JAXTRAIN_JOBS", str(bed.folder / "jobs"))
        patch.setenv("XDG_RUNTIME_DIR", str(bed.folder))
        git_trees.commit_program(bed.folder / "code", PROGRAM)
        yield bed


def command(bed, *options, steps=20, west=("h0",), east=(), **fields):
    """Returns arguments of launch.run that start a job at `west` (by default h0) and `east` (h2).

    Args:
        east, fields: of the inventories of east and west.
    """
    west = bed.inventory(bed.folder / "west.toml", only=west, **fields)
    east = bed.inventory(bed.folder / "east.toml", only=["h2"], **dict(east))
    common = [f"--sites={west},{east}", f"--ssh_config={bed.ssh_config}", "--module=program"]
    return [*common, f"--code={bed.folder / 'code'}", *options, "--", str(steps)]


def living(bed):
    lines = [line for name in bed.names for line in bed.processes(name).values()]
    return [line for line in lines if "program" in line or "launch.host" in line]


@needs_bed
@pytest.mark.long
def test_one_command_runs_a_job_at_each_site_and_its_name_stands_for_all(bed, capfd):
    west = {"west": ("h0", "h1"), "site": "new_york"}
    arguments = command(bed, "--for=east:--batch=64", east={"site_port": 7_301}, **west)
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
@pytest.mark.long
def test_status_stop_resume_and_attach_act_on_all_sites_or_on_one(bed, capfd):
    assert run.main(command(bed, "--detach", steps=10_000)) == 0
    parent = git_trees.job_id(capfd.readouterr().err)
    west, east = (f"{parent}.{site}" for site in ("west", "east"))
    keys = {Job(job).record["sites"]["key"] for job in (west, east)}
    ps = subprocess.run(["ps", "-eo", "args="], capture_output=True, text=True).stdout
    assert len(keys) == 1 and keys.isdisjoint(ps.split())
    assert run.main(["status", parent]) == 0
    assert re.findall("(?m)^(west|east): job|^(west.h0|east.h2) +attempt", capfd.readouterr().out)
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
    assert run.main(arguments) == 1
    err = capfd.readouterr().err
    assert re.search(message, err) and "nothing was started" in err and not living(bed)


@needs_bed
def test_a_start_that_fails_at_one_site_leaves_nothing_running_at_the_other(bed, capfd):
    away = "cd /root/jaxtrain && mkdir -p jobs && mv jobs away && touch jobs"
    bed.run("h2", "bash", "-c", f"mkdir -p /root/jaxtrain && {away}")
    try:
        assert run.main(command(bed, steps=10_000)) == 1
    finally:
        bed.run("h2", "bash", "-c", "cd /root/jaxtrain && rm jobs && mv away jobs")
    out, err = capfd.readouterr()
    assert "east.h2: " in err and not living(bed)
    for job in read_jobs(git_trees.job_id(err)):
        assert job.record["outcome"]["why"].startswith("not all hosts started")


@needs_bed
def test_sites_with_different_data_are_refused_before_the_start(bed, capfd):
    package = bed.folder / "trainer" / "jaxtrain"
    (package / "data").mkdir(parents=True)
    for name in ("__init__.py", "train.py", "data/__init__.py"):
        (package / name).touch()
    (package / "data" / "quick_fingerprint.py").write_text(FINGERPRINT)
    git_trees.commit_program(package.parent, "")
    arguments = command(bed, "--for=east:--data=b", f"--code={package.parent}")
    arguments[arguments.index("--module=program")] = "--module=jaxtrain.train"
    assert run.main(arguments) == 1
    err = capfd.readouterr().err
    assert "east.h2: differs from the data of west.h0: copy it from there" in err
    assert "nothing was started" in err and not living(bed)


def write_rounds(folder, *participants):
    """Appends rounds with these participants to a run's sites.jsonl."""
    with open(folder / "sites.jsonl", "a") as file:
        for names in participants:
            tokens = dict.fromkeys(names, 1_024)
            file.write(json.dumps({"participants": names, "tokens": tokens}) + "\n")


def record_runs(tmp_path, monkeypatch, **west):
    """Records the job `two` of two sites with a run each; `west` changes west's config.json."""
    monkeypatch.setenv("JAXTRAIN_JOBS", str(tmp_path / "jobs"))
    monkeypatch.setattr(pull, "SshClient", LocalClient)
    for site in ("west", "east"):
        place = {"name": site, "sites": ["west", "east"]}
        times_s = series(60, median_s=1.0 if site == "west" else 2.0)
        fields = {"site": place} | (west if site == "west" else {})
        folder = write_run(tmp_path / site, times_s, **fields)
        write_rounds(folder, ["west", "east"], ["east"], ["west", "east"])
        host = Host("h", "127.0.0.1", python=sys.executable, workdir=str(tmp_path / f"on_{site}"))
        record = {"argv": [f"--config.workdir={folder}"], "env": {}, "site": site, "parent": "two"}
        Job.create([host], Policy(), "", f"two.{site}", **record, folders={})
    write_parent("two", {"west": "two.west", "east": "two.east"})


def test_reports_show_a_run_per_site_and_check_each(tmp_path, monkeypatch, capsys):
    record_runs(tmp_path, monkeypatch)
    assert summary.main(["two", "--json"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [Path(line["run"]).name for line in lines] == ["west", "east"]
    assert summary.main(["two.east"]) == 0
    assert "east" in (out := capsys.readouterr().out) and "west: loss" not in out
    assert re.search(r"rounds of sites +3, 1 without west\n", out)
    write_rounds(tmp_path / "east", ["east"])
    with open(tmp_path / "east" / "sites.jsonl", "a") as file:  # east takes over a state
        file.write(json.dumps({"participants": ["west"], "tokens": {}}) + "\n")
    assert summary.main(["two.east"]) == 0
    assert "4, 2 without west, also the newest" in capsys.readouterr().out
    with open(tmp_path / "east" / "sites.jsonl", "a") as file:
        file.write("no JSON\n")
    assert summary.main(["two.east"]) == 0
    assert "sites.jsonl is damaged" in capsys.readouterr().out
    for sides in (["two"], ["two.west", str(tmp_path / "east")]):
        assert compare.main(sides) == 0
        assert re.search("A  west: .*\nB  east: .*\n.*the same work", capsys.readouterr().out)
    base = str(tmp_path / "base.json")
    assert slo.main(["record", "two", f"--out={base}"]) == slo.REFUSED
    assert "one site, JOB.SITE" in capsys.readouterr().err
    assert slo.main(["record", "two.west", "--provisional", f"--out={base}"]) == 0
    capsys.readouterr()
    assert slo.main(["check", "two", f"--against={base}"]) == slo.BREACH
    out = capsys.readouterr().out
    assert out.count("against") == 2 and out.index("all bounds are met") < out.index("BREACH")


def test_a_site_whose_run_cannot_be_read_does_not_hide_another(tmp_path, monkeypatch, capsys):
    record_runs(tmp_path, monkeypatch)
    shutil.rmtree(tmp_path / "west")
    for options in ((), ("--follow", "--every=0.01")):
        if options:  # the job has ended without a run: nothing is left to wait for
            monkeypatch.setattr(summary, "is_over", lambda source: True)
        assert summary.main(["two", *options]) == 1
        out, err = capsys.readouterr()
        assert "east: loss" in out and "west: loss" not in out and "two.west" in err
    shutil.rmtree(tmp_path / "east")
    shutil.rmtree(tmp_path / "jobs" / "two.east" / "run")
    assert summary.main(["two"]) == 1 and not capsys.readouterr().out
    assert summary.main([str(tmp_path / "east"), "two"]) == 1


def test_a_site_that_is_not_comparable_does_not_keep_another_from_being_checked(
    tmp_path, monkeypatch, capsys
):
    record_runs(tmp_path, monkeypatch, devices=4)
    base = str(tmp_path / "base.json")
    assert slo.main(["record", "two.east", "--provisional", f"--out={base}"]) == 0
    capsys.readouterr()
    assert slo.main(["check", "two", f"--against={base}", "--json"]) == slo.REFUSED
    out, err = capsys.readouterr()
    assert "two.west: the run is not comparable" in err and "devices: the baseline has 8" in err
    assert {row["state"] for row in json.loads(out)} >= {"ok"}
    shutil.rmtree(tmp_path / "west")  # nor does one that cannot be read
    shutil.rmtree(tmp_path / "jobs" / "two.west" / "run")
    assert slo.main(["check", "two", f"--against={base}"]) == slo.REFUSED
    out, err = capsys.readouterr()
    assert "two.west: " in err and "all bounds are met" in out


def write_inventories(folder, west="", east=""):
    """Writes a.toml with two hosts and b.toml with one; returns the value of --sites."""
    host = '[[hosts]]\nname = "{0}"\naddress = "10.0.{1}"\n{2}\n'.format
    (folder / "a.toml").write_text(host("h0", "0.1", west) + host("h1", "0.2", west))
    (folder / "b.toml").write_text(host("h0", "1.1", east))
    return f"{folder / 'a.toml'},{folder / 'b.toml'}"


@pytest.mark.parametrize(
    ("west", "east", "message"),
    [
        ('site = "x"', 'site = "x"', "--sites must name different sites; got 'x' twice"),
        ('site = "New York"', "", "a site's name must begin .*got 'New York'. Set the key site"),
        ('site = "a.b"', "", "a site's name must .*got 'a.b'"),
        ('site_address = "h9"', "", "a.toml:4: host 'h0': site_address must be an IP address"),
        ("site_port = 70000", "", "site_port must be from 0 to 65535; got 70000"),
        (
            'site_address = "203.0.113.1"\nsite_port = 7301',
            "",
            "203.0.113.1 port 7301 for a.h1, rank 0, and for a.h0, rank 0. Set site_port",
        ),
    ],
)
def test_sites_that_cannot_work_are_refused_by_name(tmp_path, west, east, message):
    with pytest.raises(ValueError, match=message):
        build_sites_file("j", read_sites(write_inventories(tmp_path, west, east)))


def test_each_process_has_its_port_and_is_linked_to_the_processes_with_its_share(tmp_path):
    names = write_inventories(tmp_path, 'site_address = "203.0.113.1"\ngpus = 2', "gpus = 3")
    for path in names.split(","):
        Path(path).write_text('ranks = "gpu"\n' + Path(path).read_text())
    found = read_sites(names)
    assert [host.name for host in found["a"].hosts] == ["a.h0", "a.h1"]
    assert found["a"].hosts[0].target == "h0"
    content = build_sites_file("j", found)
    first, second = content["sites"]
    ports = [process["port"] for process in first["processes"]]
    assert ports == list(range(ports[0], ports[0] + 4))  # four ranks behind one address
    hosts_of = {site: inventory.hosts for site, inventory in found.items()}
    links = find_links(content, hosts_of)
    pairs = [(link.port - ports[0], link.listener.name) for link in links]
    # Shares of 1/4 against shares of 1/3: the borders differ, so there are 4 + 3 - 1 links.
    assert pairs == [(0, "a.h0"), (1, "a.h0"), (1, "a.h0"), (2, "a.h1"), (2, "a.h1"), (3, "a.h1")]
    assert len(second["processes"]) == 3
    assert content["key"] != build_sites_file("j", found)["key"]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--hosts=x", "--sites=a,b"], "--hosts or --sites must be given, and not both"),
        ([], "--hosts or --sites must be given"),
        (["--hosts=x", "--for=a:--b=1"], "--for needs --sites; got --for=a:--b=1"),
        (["--sites=a,b", "--on_loss=fewer"], "--on_loss must be wait or stop with --sites"),
    ],
)
def test_flags_that_contradict_each_other_are_refused(argv, message, capsys):
    with pytest.raises(SystemExit):
        run.parse(argv)
    assert message in capsys.readouterr().err


def test_flags_that_the_launcher_sets_are_refused(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("JAXTRAIN_JOBS", str(tmp_path / "jobs"))
    names = write_inventories(tmp_path)
    assert run.main([f"--sites={names}", "--", "debug", "--sites_file=x"]) == 1
    assert "--sites sets the program's flag --sites_file; got --sites_file=x" in (
        capsys.readouterr().err
    )
    assert run.main([f"--sites={tmp_path / 'a.toml'}", "--", "debug"]) == 1
    assert "at least two inventories" in capsys.readouterr().err
