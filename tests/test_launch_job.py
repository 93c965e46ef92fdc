"""Records of jobs and flags that cannot be used."""

import pytest
from local_client import begin_job

from launch import compare, probe, run, slo, summary
from launch.job import Job


@pytest.fixture
def job(tmp_path, monkeypatch):
    return begin_job(tmp_path, monkeypatch)


def test_a_damaged_record_is_named_and_others_are_still_listed(job, capsys, tmp_path):
    folder = tmp_path / "jobs" / "old"
    folder.mkdir()
    (tmp_path / "jobs" / "stray").write_text("no folder")
    for text in ('{"hos', "[1]", '{"hosts": [{"zz": 1}], "policy": {}, "ssh_config": ""}'):
        (folder / "job.json").write_text(text)
        assert run.main(["status"]) == 0 and job.id in capsys.readouterr().out
        assert run.main(["attach", "old"]) == 1
        assert "job.json must be a" in capsys.readouterr().err
    job.change(outcome={"code": 1, "why": ""})
    assert run.main(["status"]) == 0 and "exit 1" in capsys.readouterr().out


def test_a_job_that_cannot_be_read_is_one_line(job, capsys, tmp_path, monkeypatch):
    (tmp_path / "jobs" / "stray").write_text("no folder")
    for name in ("stray", "a" * 300):
        assert run.main(["attach", name]) == 1
        assert "JOB must be one of this machine's jobs" in capsys.readouterr().err
    monkeypatch.setenv("JAXTRAIN_JOBS", str(tmp_path / "jobs" / "stray"))
    assert run.main(["status"]) == 1
    assert "JAXTRAIN_JOBS must be a folder" in capsys.readouterr().err


def test_two_terminals_that_change_a_record_keep_each_others_changes(job):
    other = Job(job.id)
    job.change(folders={"a": "code"})
    other.change(stopped="the operator asked")
    job.change(outcome=None)
    assert Job(job.id).record["folders"] == {"a": "code"} == other.record["folders"]
    assert job.record["stopped"] == job.stop_reason() == "the operator asked"


@pytest.mark.parametrize(
    ("parse", "rest", "flags"),
    [
        (
            run.parse,
            ["--hosts=x"],
            "restarts=-1 restarts=1.5 lost_s=x lost_s=0 lost_s=inf stall_s=nan stall_s=0 start_s=0 "
            "wait_s=0 wait_s=1e300 backoff_s=-1 grace_s=inf stopped_s=nan log_mib=0 log_mib=1e3",
        ),
        (
            probe.parse,
            ["--hosts=x"],
            "seconds=0 seconds=nan seconds=inf pings=0 pings=-1 mib=0 mib=1,x mib=inf mib= "
            "cases=sum:8 cases=all_reduce cases=all_reduce:0 cases=all_reduce:1.5",
        ),
        (summary.parse, ["DIR"], "every=0 every=nan every=inf"),
        (compare.parse, ["A", "B"], "resamples=99 resamples=1000000000000 seed=-1 margin=nan"),
        (
            slo.parse,
            ["price", "--prices=x", "--against=y"],
            "tokens=inf params=0 availability=0 availability=1.5 availability=nan",
        ),
    ],
)
def test_a_number_without_meaning_is_refused_by_its_flag(parse, rest, flags, capsys):
    for flag in flags.split():
        with pytest.raises(SystemExit) as ended:
            parse([*rest, f"--{flag}"])
        assert ended.value.code == 2, flag
        assert f"--{flag.partition('=')[0]}" in capsys.readouterr().err.splitlines()[-1], flag
    parse(rest)  # the defaults are accepted
