"""Hosts whose status of a job is odd or hostile."""

import json

import pytest
from local_client import LocalClient, begin_job

from launch import log_copy, operate

RANK = {"rank": 1, "step": 40, "phase": "train", "ratios": {"data": 1.95}, "slow": ["data"]}
STEP_40 = {"report": {"ranks": [{"rank": 1, "step": 40, "phase": "train"}]}}
ENDED = {"code": 0, "why": "done"}


@pytest.fixture
def job(tmp_path, monkeypatch):
    return begin_job(tmp_path, monkeypatch)


@pytest.mark.parametrize(
    "status",
    [
        [],
        {"outcome": "done"},
        {"outcome": {"code": 0}},
        {"outcome": {"code": "\x1b]0;title\x07", "why": "done"}},
        {"outcome": {"code": 10**400, "why": "done"}},
        {"outcome": {"code": 0, "why": "done", "attempts": "3\n"}},
    ],
)
def test_an_outcome_that_is_no_exit_status_is_refused(job, capsys, monkeypatch, status):
    with pytest.raises(ValueError, match="no meaning"):
        log_copy.read_header(json.dumps({"status": status, "alive": False, "known": True}).encode())

    class Hostile(LocalClient):
        def call(self, host, request, timeout_s=60.0):
            return status | {"processes": []} if isinstance(status, dict) else status

    monkeypatch.setattr(operate, "connect", lambda job: Hostile(job.hosts))
    assert operate.status([job], as_json=False) == 0
    assert "sent a status that has no meaning" in capsys.readouterr().out


def test_a_header_that_is_nested_too_deeply_has_no_meaning():
    with pytest.raises(ValueError, match="no meaning"):
        log_copy.read_header(b"[" * 100_000)


@pytest.mark.parametrize(
    ("found", "shown"),
    [
        ({"outcome": {"code": 0, "why": "x\nb  attempt 1"}}, "x\n    b  attempt 1"),
        ({"report": {"ranks": [{}]}}, "no meaning"),
        ({"alive": True, "age_s": "old"}, "no meaning"),
        ({"alive": True, "age_s": 10**400}, "no meaning"),
        ({"report": [], "attempt": 10**400}, "no meaning"),
        ({"report": {"ranks": [RANK | {"ratios": {"data": 10**400}}]}}, "no meaning"),
        ({"alive": True, "age_s": 7.0}, "supervised     idle (7 s ago)"),
        (
            {"alive": False, "age_s": 7.2e3, **STEP_40},
            "no supervisor  rank 1 step 40 train (2 h ago)",
        ),
        ({"alive": False, "age_s": 300, **STEP_40}, "train (5 min ago)\n"),
        ({"alive": False, "age_s": 5.0, **STEP_40}, "no supervisor  rank 1 step 40 train\n"),
        ({"alive": False, "age_s": 7.2e3, "outcome": ENDED}, "no supervisor  done\n"),
        ({"alive": False, "processes": [12, 34]}, "idle; STILL ALIVE: pids 12 34\n"),
        ({"alive": False, "processes": [*range(9)]}, "pids 0 1 2 3 4 5 6 7 ...\n"),
        ({"outcome": ENDED, "processes": [12]}, "done; STILL ALIVE: pids 12\n"),
        ({"alive": True, "processes": [12], **STEP_40}, "supervised     rank 1 step 40 train\n"),
        ({"alive": True, "age_s": 16.0}, "SILENT         its supervisor hangs and will be"),
        ({"report": {"ranks": [RANK]}}, "rank 1 step 40 train (STRAGGLER in data; data 1.95x)"),
        ({"report": {"ranks": [RANK | {"slow": []}]}}, "rank 1 step 40 train (data 1.95x)"),
        ({"report": {"ranks": [RANK | {"ratios": {"data": "x"}}]}}, "no meaning"),
        ({"report": {"ranks": [RANK | {"slow": 3}]}}, "no meaning"),
        (
            {"report": {"ranks": [RANK | {"sites": "without asuncion since round 12"}]}},
            "rank 1 step 40 train (without asuncion since round 12; STRAGGLER in data; data 1.95x)",
        ),
        ({"report": {"ranks": [RANK | {"sites": "x\nb  attempt 1"}]}}, "no meaning"),
        ({"report": {"ranks": [RANK | {"sites": "\x1b]0;title\x07"}]}}, "no meaning"),
        ({"report": {"ranks": [RANK | {"sites": "x" * 201}]}}, "no meaning"),
    ],
)
def test_a_hosts_status_takes_one_line_or_is_indented(job, capsys, monkeypatch, found, shown):
    class Odd(LocalClient):
        def call(self, host, request, timeout_s=60.0):
            return {"processes": []} | found

    monkeypatch.setattr(operate, "connect", lambda job: Odd(job.hosts))
    assert operate.status([job], as_json=False) == 0
    assert shown in capsys.readouterr().out


def test_a_host_cannot_give_the_status_of_another(job, capsys, monkeypatch):
    class Forger(LocalClient):
        def call(self, host, request, timeout_s=60.0):
            return {"host": "b", "processes": []}

    monkeypatch.setattr(operate, "connect", lambda job: Forger(job.hosts))
    assert operate.status([job], as_json=True) == 0
    assert json.loads(capsys.readouterr().out) == {"host": "a", "processes": []}


def test_processes_that_outlive_their_job_are_named_with_the_command_that_ends_them(
    job, capsys, monkeypatch
):
    class Alive(LocalClient):
        def call(self, host, request, timeout_s=60.0):
            return {"processes": [12, 34]}

    monkeypatch.setattr(operate, "GONE_S", 0.1)
    operate.conclude(Alive(job.hosts), job, {"code": 1, "why": "x"})
    said = f"STILL ALIVE, a: pids 12 34. To kill them: python -m launch.run stop {job.id} --now\n"
    assert said in capsys.readouterr().err


def test_what_a_host_says_of_the_end_cannot_look_like_a_line_of_the_launcher(job, capsys):
    class Quiet(LocalClient):
        def call(self, host, request, timeout_s=60.0):
            return {"processes": []}

    operate.conclude(Quiet(job.hosts), job, {"code": 0, "why": "x\nlaunch: all is well"})
    assert "\nlaunch: all" not in capsys.readouterr().err
