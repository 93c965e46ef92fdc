import json
import sys
import time

import pytest
from local_client import Here

from launch import follow as watch
from launch import operate
from launch.host import log
from launch.host import processes as tree
from launch.host.restart_policy import Policy
from launch.inventory import Host
from launch.job import PYTHON, Job
from launch.ssh import HostError

ENDED = {"outcome": {"code": 0, "why": "done", "attempts": 1}}


@pytest.fixture
def job(tmp_path, monkeypatch):
    monkeypatch.setenv("JAXTRAIN_JOBS", str(tmp_path / "jobs"))
    host = Host("a", "127.0.0.1", python=sys.executable, workdir=str(tmp_path / "host"))
    record = {"argv": [PYTHON, "-c", "print('it ran')"], "ranks_per_host": 1, "env": {}}
    made = Job.create([host], Policy(), "", **record, folders={"a": str(tmp_path)})
    made.change(begun=time.time())
    return made


@pytest.fixture
def there(job, tmp_path):
    """The job's folder on its host."""
    folder = tmp_path / "host" / "jobs" / job.id
    folder.mkdir(parents=True)
    spec = job.request(job.hosts[0])["spec"]
    (folder / "job.json").write_text(json.dumps(spec))
    return folder


def follow(job, whole=False, fleet=Here):
    with watch.JobMonitor(fleet(job.hosts), job, read_only=whole) as watching:
        return watching.run()


def test_a_log_that_a_host_lost_the_end_of_is_followed_on_and_the_loss_is_said(job, there, capsys):
    kept = log.Log(there / "log")
    kept.write(b"".join(b"line %d\n" % i for i in range(9)))
    held = job.log(job.hosts[0])
    held.write_bytes(log.read(there / "log", 0)[1] + b"it came here\n")
    log.Log(there / "log").write(b"after the power was back, far more than what was lost\n")
    (there / "status.json").write_text(json.dumps(ENDED))
    assert follow(job)["code"] == 0
    said = capsys.readouterr().out.splitlines()
    lost = "launch: the host lost the last 13 bytes copied from its log; its log goes on below"
    after = "after the power was back, far more than what was lost"
    assert said == [f"a | {lost}", f"a | {after}"]
    assert held.read_text().splitlines()[-3:] == ["it came here", lost, after]
    follow(job)
    assert capsys.readouterr().out == ""  # the offset is the host's again
    follow(job, whole=True)
    assert "line 0" in capsys.readouterr().out


def test_bytes_that_a_host_no_longer_keeps_are_counted(job, there, capsys):
    kept = log.Log(there / "log", 100, 3)
    for i in range(50):
        kept.write(b"line %d\n" % (100 + i))
    (there / "status.json").write_text(json.dumps(ENDED))
    follow(job)
    gone, first, *_ = capsys.readouterr().out.splitlines()
    bytes_gone = log.starts(there / "log")[0]
    assert f"{bytes_gone} bytes of this log were deleted" in gone
    assert first == f"a | line {100 + bytes_gone // 9}"


def test_nothing_is_started_for_a_job_that_its_host_no_longer_knows(job, tmp_path):
    with pytest.raises(HostError, match="no host knows how job .* ended"):
        follow(job)
    job.change(outcome=ENDED["outcome"])
    assert follow(job)["why"] == "done"  # as this machine has it on record
    assert not (tmp_path / "host" / "jobs").exists()


@pytest.mark.parametrize("how", ["as a reader", "after its end"])
def test_a_supervisor_that_is_gone_stays_so_for_a_reader_and_after_the_end(job, there, how):
    (there / "status.json").write_text(json.dumps({"outcome": None}))
    if how == "after its end":
        job.change(outcome=ENDED["outcome"])
        assert follow(job)["code"] == 0
    else:
        with pytest.raises(HostError, match="no host knows"):
            follow(job, whole=True)
    assert not (there / "log").exists() and not tree.marked(job.id)


def test_a_host_that_came_back_gets_its_supervisor_back(job, there, capsys):
    (there / "status.json").write_text(json.dumps({"outcome": None, "attempt": 1}))
    assert follow(job) | {"causes": []} == ENDED["outcome"] | {"attempts": 2, "causes": []}
    said = capsys.readouterr()
    assert "a | it ran" in said.out and "a: its supervisor is gone" in said.err


def test_a_job_that_was_killed_at_its_start_is_not_started_by_a_later_request(job):
    fleet, [host] = Here(job.hosts), job.hosts
    job.record["argv"] = ["sleep", "60"]
    assert fleet.call(host, job.request(host)) == {"started": True}
    assert fleet.call(host, job.request(host)) == {"started": False}
    stop = {"op": "stop", "job": job.id, "why": "not all hosts started", "kill": True}
    assert fleet.call(host, stop) == {"known": True, "left": []}
    assert fleet.call(host, job.request(host)) == {"started": False}
    assert follow(job)["why"] == "not all hosts started" and not tree.marked(job.id)


def test_two_jobs_that_live_on_a_host_do_not_write_to_one_run_directory(job, tmp_path):
    [host] = job.hosts
    sleeping = [PYTHON, "-c", "import time; time.sleep(60)"]
    (tmp_path / "link").symlink_to(tmp_path)
    record = {"ranks_per_host": 1, "env": {}, "folders": {"a": str(tmp_path)}}

    def start(workdir):
        argv = [*sleeping, "--config.workdir", workdir]
        request = Job.create([host], Policy(), "", **record, argv=argv).request(host)
        return request["job"], fleet.call(host, request)

    fleet = Here(job.hosts)
    first, _ = start("runs/a")
    with pytest.raises(HostError, match=f"job {first} is running and writes to .*/runs/a"):
        start(str(tmp_path / "link" / "runs" / "a"))
    second, answer = start("runs/b")
    assert answer == {"started": True}
    kill = {"op": "stop", "why": "", "kill": True}
    fleet.call(host, kill | {"job": first})
    third, answer = start("runs/a")
    assert answer == {"started": True}
    for name in (second, third):
        fleet.call(host, kill | {"job": name})


def test_a_program_that_exits_as_a_broken_supervisor_would_is_run_once(job, capsys):
    job.record["argv"] = [PYTHON, "-c", "print('it ran'); raise SystemExit(71)"]
    job.record["policy"]["restarts"] = 0
    [host] = job.hosts
    Here(job.hosts).call(host, job.request(host))
    outcome = follow(job)
    assert (outcome["code"], outcome["attempts"]) == (71, 1)
    assert capsys.readouterr().out.count("a | it ran") == 1


def test_a_trainer_that_hangs_in_its_imports_is_stuck_after_the_time_for_a_start(job, tmp_path):
    (tmp_path / "jaxtrain").mkdir()
    (tmp_path / "jaxtrain" / "train.py").write_text("import time\ntime.sleep(100)\n")
    job.record["argv"] = [PYTHON, "-m", "jaxtrain.train"]
    job.record["policy"] |= {"restarts": 0, "start_s": 1.0}
    [host] = job.hosts
    Here(job.hosts).call(host, job.request(host))
    outcome = follow(job)
    assert outcome["code"] == 124 and "before its first sign of life" in outcome["why"]


def test_a_job_that_never_started_is_refused_and_not_waited_for(job):
    job.change(begun=None)
    with pytest.raises(ValueError, match=f"job {job.id} never started"):
        operate.follow(job, False)


def test_a_host_whose_every_answer_is_an_error_is_spoken_of(job, monkeypatch, capsys):
    monkeypatch.setattr(watch, "AWAY_S", 1.9)  # more than the first pause between two tries

    class Failing(Here):
        command = """echo '{"error": "no such thing"}'"""

    with watch.JobMonitor(Failing(job.hosts), job) as watching:
        time.sleep(2.5)
        watching.report_absent_hosts()
    assert "a: no such thing" in capsys.readouterr().err


def test_a_follower_that_dies_ends_the_watch(job):
    class Nonsense(Here):
        command = "echo '{}'"

    with pytest.raises(HostError, match="a: cannot be followed: KeyError"):
        follow(job, fleet=Nonsense)
