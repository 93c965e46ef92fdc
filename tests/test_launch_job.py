"""Records of jobs and flags that cannot be used."""

import pytest
from local_client import begin_job

from launch import run


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


@pytest.mark.parametrize("flag", ["--stall_s=nan", "--restarts=-1", "--lost_s=x", "--restarts=1.5"])
def test_a_number_of_the_policy_that_is_no_number_from_0_on_is_refused(flag, capsys):
    with pytest.raises(SystemExit):
        run.parse(["--hosts=x", flag])
    assert flag.partition("=")[0] in capsys.readouterr().err
    assert run.parse(["--hosts=x", "--restarts=0"])[0].restarts == 0
