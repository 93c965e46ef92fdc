"""Follows jobs whose only host is this machine, without sshd."""

import json
import shlex
import sys
import time

import pytest
from local_client import LocalClient
from quick_hosts import quick_hosts

from launch import follow as follow_lib
from launch import follower, operate
from launch.host import log, processes
from launch.host.restart_policy import Policy
from launch.inventory import Host
from launch.job import PYTHON, Job
from launch.ssh import HostError
from launch.stop import stop_request

pytestmark = pytest.mark.usefixtures("quick")
ENDED = {"outcome": {"code": 0, "why": "done", "attempts": 1}}


@pytest.fixture(scope="module")
def quick():
    with quick_hosts():
        yield


@pytest.fixture
def job(tmp_path, monkeypatch):
    monkeypatch.setenv("JAXTRAIN_JOBS", str(tmp_path / "jobs"))
    host = Host("a", "127.0.0.1", python=sys.executable, workdir=str(tmp_path / "host"))
    record = {"argv": [PYTHON, "-c", "print('it ran')"], "ranks_per_host": 1, "env": {}}
    job = Job.create([host], Policy(), "", **record, folders={"a": str(tmp_path)})
    job.change(begun=time.time())
    return job


@pytest.fixture
def host_folder(job, tmp_path):
    """The job's folder on its host."""
    folder = tmp_path / "host" / "jobs" / job.id
    folder.mkdir(parents=True)
    spec = job.request(job.hosts[0])["spec"]
    (folder / "job.json").write_text(json.dumps(spec))
    return folder


def follow(job, read_only=False, client=LocalClient):
    with follow_lib.JobMonitor(client(job.hosts), job, read_only=read_only) as monitor:
        return monitor.run()


RELAY = """
import os, subprocess, sys, time
left, host = {most}, subprocess.Popen(sys.argv[1], shell=True, stdout=subprocess.PIPE)
while left and (data := os.read(host.stdout.fileno(), min(left, {size}))):
    time.sleep({pause_s})
    os.write(1, data)
    left -= len(data)
time.sleep(0 if left else 60)
"""


def slow_link(size=1 << 16, pause_s=0.0, most=1 << 30):
    """Returns a client whose host sends `size` bytes every pause_s, and is silent after `most`."""
    relay = shlex.quote(RELAY.format(size=size, pause_s=pause_s, most=most))
    return type("Slow", (LocalClient,), {"command": f'exec python3 -c {relay} "$2"'})


def end_with_log(host_folder, size):
    """Writes a log of this size for a job that has ended; returns it."""
    text = b"".join(b"%d %s\n" % (i, b"x" * 9_000) for i in range(size // 9_000))
    log.Log(host_folder / "log").write(text)
    (host_folder / "status.json").write_text(json.dumps(ENDED))
    return text


def start(job, **policy):
    [host] = job.hosts
    job.record["policy"] |= policy
    return LocalClient(job.hosts).call(host, job.request(host))


def test_log_bytes_that_a_host_lost_are_counted_in_a_line_before_the_rest(job, host_folder, capsys):
    writer = log.Log(host_folder / "log")
    writer.write(b"".join(b"line %d\n" % i for i in range(9)))
    copy = job.log(job.hosts[0])
    copy.write_bytes(log.read(host_folder / "log", 0)[1] + b"it came here\n")
    after = "after the power was back, far more than what was lost"
    log.Log(host_folder / "log").write(f"{after}\n".encode())
    (host_folder / "status.json").write_text(json.dumps(ENDED))
    assert follow(job)["code"] == 0
    lost = "launch: the host lost the last 13 bytes copied from its log; its log goes on below"
    assert capsys.readouterr().out.splitlines() == [f"a # {lost}", f"a | {after}"]
    assert copy.read_text().split("\n")[-4:] == ["it came here", f"\x1e{lost}", after, ""]
    follow(job)
    assert capsys.readouterr().out == ""  # the offset is the host's again
    follow(job, read_only=True)
    assert "line 0" in capsys.readouterr().out


def test_log_bytes_that_the_host_has_deleted_are_counted(job, host_folder, capsys):
    writer = log.Log(host_folder / "log", 100, 3)
    for i in range(50):
        writer.write(b"line %d\n" % (100 + i))
    (host_folder / "status.json").write_text(json.dumps(ENDED))
    follow(job)
    gap, first, *_ = capsys.readouterr().out.splitlines()
    deleted = log.starts(host_folder / "log")[0]
    assert f"{deleted} bytes of this log were deleted" in gap
    assert first == f"a | line {100 + deleted // 9}"


def test_following_a_job_that_its_host_no_longer_has_starts_nothing(job, tmp_path):
    with pytest.raises(HostError, match="no host knows how job .* `cat -v .*/\\*.log` shows"):
        follow(job)
    job.change(outcome=ENDED["outcome"])
    assert follow(job)["why"] == "done"  # from this machine's record
    assert not (tmp_path / "host" / "jobs").exists()


@pytest.mark.parametrize("how", ["as a reader", "after its end"])
def test_a_dead_supervisor_is_not_restarted_for_a_reader_or_an_ended_job(job, host_folder, how):
    (host_folder / "status.json").write_text(json.dumps({"outcome": None}))
    if how == "after its end":
        job.change(outcome=ENDED["outcome"])
        assert follow(job)["code"] == 0
    else:
        with pytest.raises(HostError, match="no host knows"):
            follow(job, read_only=True)
    assert not (host_folder / "log").exists() and not processes.marked(job.id)


def test_a_host_that_lost_its_power_gets_a_new_supervisor(job, host_folder, capsys):
    (host_folder / "status.json").write_text(json.dumps({"outcome": None, "attempt": 1}))
    assert follow(job) | {"causes": []} == ENDED["outcome"] | {"attempts": 2, "causes": []}
    printed = capsys.readouterr()
    assert "a | it ran" in printed.out and "a: its supervisor is gone" in printed.err


def test_a_job_that_was_killed_at_its_start_cannot_be_started_again(job):
    client, [host] = LocalClient(job.hosts), job.hosts
    job.record["argv"] = ["sleep", "60"]
    assert start(job) == {"started": True}
    assert start(job) == {"started": False}
    stop = stop_request(job, "not all hosts started", kill=True)
    assert client.call(host, stop) == {"known": True, "left": []}
    assert start(job) == {"started": False}
    assert follow(job)["why"] == "not all hosts started" and not processes.marked(job.id)


def test_a_host_refuses_a_second_job_that_writes_to_the_same_run_directory(job, tmp_path):
    client, [host] = LocalClient(job.hosts), job.hosts
    (tmp_path / "link").symlink_to(tmp_path)
    record = {"ranks_per_host": 1, "env": {}, "folders": {"a": str(tmp_path)}}

    def start_in(workdir):
        argv = [PYTHON, "-c", "import time; time.sleep(60)", "--config.workdir", workdir]
        job = Job.create([host], Policy(), "", **record, argv=argv)
        return job, client.call(host, job.request(host))

    first, _ = start_in("runs/a")
    refused = rf"job {first.id} \(pid \d+ on .*\) is running and writes to .*/runs/a"
    with pytest.raises(HostError, match=refused):
        start_in(str(tmp_path / "link" / "runs" / "a"))
    second, answer = start_in("runs/b")
    assert answer == {"started": True}
    client.call(host, stop_request(first, "", kill=True))
    third, answer = start_in("runs/a")
    assert answer == {"started": True}
    for running in (second, third):
        client.call(host, stop_request(running, "", kill=True))


def test_a_program_whose_exit_status_is_that_of_a_failed_worker_runs_once(job, capsys):
    job.record["argv"] = [PYTHON, "-c", "print('it ran'); raise SystemExit(71)"]
    start(job, restarts=0)
    outcome = follow(job)
    assert (outcome["code"], outcome["attempts"]) == (71, 1)
    assert capsys.readouterr().out.count("a | it ran") == 1


def test_a_trainer_that_hangs_in_its_imports_is_stuck_after_start_s(job, tmp_path):
    (tmp_path / "jaxtrain").mkdir()
    (tmp_path / "jaxtrain" / "train.py").write_text("import time\ntime.sleep(100)\n")
    job.record["argv"] = [PYTHON, "-m", "jaxtrain.train"]
    start(job, restarts=0, start_s=1.0)
    outcome = follow(job)
    assert outcome["code"] == 124 and "before its first sign of life" in outcome["why"]


def test_a_job_that_never_started_cannot_be_followed(job):
    job.change(begun=None)
    with pytest.raises(ValueError, match=f"job {job.id} never started"):
        operate.follow([job], False)


@pytest.mark.parametrize("lease_s, end", [(30.0, "ends 30 s after all"), (0.0, "runs on")])
def test_a_host_that_answers_only_errors_is_reported_as_unreachable(
    job, tmp_path, monkeypatch, capsys, lease_s, end
):
    job.policy = Policy(lease_s=lease_s)
    monkeypatch.setattr(follow_lib, "AWAY_S", 1.1)  # more than the first pause between two tries
    (tmp_path / "host").write_text("a file where the host needs its folder")
    with follow_lib.JobMonitor(LocalClient(job.hosts), job) as monitor:
        deadline, err = time.monotonic() + 10, ""
        while f"offline. The job {end}" not in err:
            assert time.monotonic() < deadline
            time.sleep(0.05)
            monitor.report_absent_hosts()
            err += capsys.readouterr().err
    assert "a: FileExistsError" in err


def test_a_bug_in_a_follower_ends_the_monitor(job, host_folder, monkeypatch):
    monkeypatch.setattr(follower, "read_header", lambda line: {}["a bug"])
    with pytest.raises(HostError, match="a: cannot be followed: KeyError"):
        follow(job)


def test_output_can_neither_steer_the_terminal_nor_forge_a_line_of_the_launcher(job, capsys):
    forged = "launch: ROOT CAUSE h9: forged"
    attacks = [
        forged,
        f"50 %\r{forged}",
        f"\x1e{forged}",
        f"\u2028{forged}",
        f"\x85{forged}",
        "\x1b]0;title\x07",
        "\x1b]52;c;cm0gLXJm\x07",
        "\x1b[2J\x1b[1;1H",
        "\x9b2J",
        "\u202eflipped",
        "\x1b[8mhidden",
        "\x1b[31mred\x1b[0m and \tplain",
        f"ValueError: \u2028{forged}\x1b[2J",
    ]
    program = f"import sys; sys.stdout.write({chr(10).join(attacks)!r}); sys.exit(3)"
    job.change(argv=[PYTHON, "-X", "utf8", "-c", program])
    start(job, restarts=0)
    outcome = follow(job)
    assert operate.conclude(LocalClient(job.hosts), job, outcome) == 3
    out, err = capsys.readouterr()
    assert [cause.startswith("a rank 0") for cause in outcome["causes"]] == [True]
    shown = out.split("\n")[:-1]
    assert all(line.startswith(("a | ", "a # ")) for line in shown)
    own = [line for line in shown if line.startswith("a # ")]
    assert not any(line.startswith(f"a # {forged}") for line in own)
    assert f"a | {forged}" in shown and f"a | \\x1e{forged}" in shown and "a | 50 %" in shown
    red = "\x1b[31mred\x1b[0m and \tplain\x1b[0m"
    assert f"a | {red}" in shown
    rest = (out + err).replace(red, "").replace("\n", "")
    assert rest.isprintable(), ascii(rest)
    assert r"\x1b]52;c" in out and r"\x1b[2J" in err  # the cause quotes the last line
    with follow_lib.JobMonitor(LocalClient(job.hosts), job, read_only=True, raw=True) as monitor:
        monitor.run()
    assert "a | \x1b]52;c;cm0gLXJm\x07" in capsys.readouterr().out
    with follow_lib.JobMonitor(LocalClient(job.hosts), job, True, read_only=True) as monitor:
        monitor.run()
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert {(line["from"], line["line"]) for line in lines} >= {("program", forged)}
    assert not any(line["from"] == "launch" and line["line"] == forged for line in lines)


def test_a_stray_file_among_a_hosts_jobs_does_not_keep_a_job_from_starting(job, host_folder):
    (host_folder.parent / "stray").write_text("no folder")
    job.record["argv"].append("--workdir=x")
    assert start(job)["started"]
    assert follow(job)["code"] == 0


def test_the_whole_log_of_an_ended_job_arrives_over_a_link_slower_than_printing(
    job, host_folder, capsys
):
    text = end_with_log(host_folder, 3 << 20)
    assert follow(job, client=slow_link(1 << 16, 0.02))["code"] == 0
    assert job.log(job.hosts[0]).read_bytes() == text
    assert capsys.readouterr().out == "".join(
        f"a | {line}\n" for line in text.decode().split("\n")[:-1]
    )


def test_a_link_that_takes_longer_than_the_limit_for_a_part_of_the_log_is_not_silent(
    job, host_folder, monkeypatch
):
    text = end_with_log(host_folder, log.READ_BYTES)
    monkeypatch.setattr(follower, "SILENT_S", 1.5)
    assert follow(job, client=slow_link(4096, 0.15))["code"] == 0
    assert job.log(job.hosts[0]).read_bytes() == text


def test_a_host_that_stops_within_a_part_of_the_log_is_reported(
    job, host_folder, monkeypatch, capsys
):
    end_with_log(host_folder, 1 << 17)
    monkeypatch.setattr(follower, "SILENT_S", 1.0)
    monkeypatch.setattr(follow_lib, "AWAY_S", 1.1)
    with follow_lib.JobMonitor(slow_link(most=30_000)(job.hosts), job) as monitor:
        deadline, err = time.monotonic() + 15, ""
        while "a: unreachable from here" not in err:
            assert time.monotonic() < deadline
            assert monitor.print_new(0.1) is None
            err += capsys.readouterr().err


def test_a_log_that_nobody_prints_takes_little_memory_and_its_lease_is_renewed(
    job, host_folder, monkeypatch, capsys
):
    text, lease = end_with_log(host_folder, 2 << 20), host_folder / "lease"
    lease.touch()
    monkeypatch.setattr(follow_lib, "EVENTS", 2)
    monkeypatch.setattr(follower, "RENEW_S", 0.1)
    monkeypatch.setattr(follower, "SILENT_S", 1.0)
    with follow_lib.JobMonitor(LocalClient(job.hosts), job) as monitor:
        [host], deadline = monitor.followers, time.monotonic() + 20
        while not monitor.events.full():
            assert time.monotonic() < deadline
            time.sleep(0.02)
        stream, since = host._process, time.time()
        while lease.stat().st_mtime < since + 1.5:
            assert time.monotonic() < deadline
            time.sleep(0.1)
        assert monitor.events.qsize() == 2 and host._process is stream
        assert monitor.run()["code"] == 0 and host._process is stream
    assert capsys.readouterr().out.count("\n") == text.count(b"\n")


def test_lines_that_ctrl_c_keeps_from_being_printed_are_printed_after_it(
    job, host_folder, monkeypatch, capsys
):
    end_with_log(host_folder, 90_000)
    print_text, shown = follow_lib.print_text, []

    def print_or_interrupt(text):
        shown.append(text)
        if len(shown) == 4:
            raise KeyboardInterrupt
        print_text(text)

    monkeypatch.setattr(follow_lib, "print_text", print_or_interrupt)
    with follow_lib.JobMonitor(LocalClient(job.hosts), job) as monitor:
        with pytest.raises(KeyboardInterrupt):
            monitor.run()
        monitor.run()
    printed = [line.split()[2] for line in capsys.readouterr().out.splitlines()]
    assert printed == [str(i) for i in range(10)]
