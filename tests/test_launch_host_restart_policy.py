"""The leader's course: reports in, wishes out, no process and no clock but the test's own."""

import pytest

from launch.host.restart_policy import JobController, Policy

NAMES = ["h0", "h1", "h2"]


class Play:
    """A job of three hosts whose reports the test writes."""

    def __init__(self, **policy):
        ports = iter(range(7000, 8000))
        self.said, self.now, self.silent = [], 0.0, set()
        self.leader = JobController(
            Policy(**policy), NAMES, lambda: f"a:{next(ports)}", self.said.append
        )
        self.ranks = {i: {} for i in range(3)}
        self.attempt, self.extra = 0, {i: {} for i in range(3)}

    def rank(self, host, **values):
        base = {"rank": host, "pid": 1, "stopped_s": 0.0, "code": None, "ended_at": None}
        beat = {"beats": 2 * self.step, "step": self.step, "phase": "train", "step_s": 0.1}
        return base | beat | {"age_s": 0.1, "lines": []} | values

    step = 5

    def go(self, seconds=1.0):
        """Turns of half a second, as the supervisors make them."""
        for _ in range(round(2 * seconds)):
            self.now += 0.5
            running = self.attempt > 0
            for host in set(range(3)) - self.silent:
                ranks = [self.rank(host, **self.ranks[host])] if running else []
                report = {"host": host, "attempt": self.attempt, "ranks": ranks}
                report |= {"clean": not running, "lease_age_s": 0.0, "stop": None, "time": 0}
                self.leader.take_report(report | self.extra[host], self.now)
            self.wish = self.leader.next_target(self.now)
            if self.wish["do"] == "run":
                self.attempt = self.wish["attempt"]
            if self.wish["do"] in ("kill", "end") and self.leader.state != "run":
                self.attempt = 0
        return self.wish

    def causes(self):
        return [line.splitlines()[0] for line in self.said if line.startswith("ROOT CAUSE")]


def test_a_job_starts_only_when_every_host_is_there_and_clean():
    play = Play()
    play.silent = {2}
    assert play.go(20)["do"] == "kill"
    play.silent, play.extra[1] = set(), {"clean": False}
    assert play.go(20)["do"] == "kill"
    play.extra[1] = {}
    assert play.go()["world"] == {"members": [0, 1, 2], "coordinator": "a:7000"}


def test_the_killed_rank_is_blamed_and_not_the_one_that_noticed_first():
    play = Play()
    play.go(2)
    play.ranks[0] = {"code": 1, "lines": ["Gloo all-reduce failed: Connection closed by peer"]}
    play.go(0.5)
    play.ranks[1] = {"code": 137}
    play.go(2)
    assert play.causes() == ["ROOT CAUSE h1 rank 1 at step 5: ended by SIGKILL"]
    play.ranks = {i: {} for i in range(3)}
    assert play.go(4)["world"]["coordinator"] == "a:7001"  # a new port for each attempt


def test_a_silent_host_is_blamed_once_it_is_lost_even_if_all_others_have_failed():
    play = Play(lost_s=12)
    play.go(2)
    play.silent = {2}
    for host in (0, 1):
        play.ranks[host] = {"code": 134, "lines": ["heartbeat timeout of task 2"]}
    play.go(9)
    assert play.causes() == []
    play.go(6)
    assert play.causes()[0].startswith("ROOT CAUSE h2: unreachable")


def test_silence_that_ends_in_time_disturbs_nothing():
    play = Play(lost_s=12)
    play.go(2)
    play.silent = {2}
    play.go(8)
    play.silent = set()
    assert play.go(5)["do"] == "run" and play.causes() == []


def test_the_rank_with_the_fewest_beats_is_the_one_that_is_stuck():
    play = Play(stall_s=20)
    play.go(2)
    for host in range(3):
        play.ranks[host] = {"age_s": 21.0, "beats": 9 if host == 1 else 10}
    assert play.go(1)["do"] == "dump"
    play.go(3)
    assert "h1 rank 1" in play.causes()[0] and "stuck" in play.causes()[0]


@pytest.mark.parametrize(("step_s", "stuck"), [(0.1, True), (30.0, False)])
def test_a_slow_step_is_no_stuck_one(step_s, stuck):
    play = Play(stall_s=20)
    play.go(2)
    play.ranks = {i: {"age_s": 40.0, "step_s": step_s} for i in range(3)}
    play.go(5)
    assert bool(play.causes()) == stuck


def test_restarts_are_bounded_and_their_pauses_grow():
    play = Play(restarts=2, backoff_s=4.0)
    for step in (5, 6, 7):
        play.step = step
        play.ranks[1] = {}
        play.go(40)
        play.ranks[1] = {"code": 137}
        play.go(4)
    assert [line for line in play.said if line.startswith("restart")] == [
        "restart 1 of 2 in 4 s: h1 rank 1 at step 5: ended by SIGKILL",
        "restart 2 of 2 in 8 s: h1 rank 1 at step 6: ended by SIGKILL",
    ]
    assert play.wish["do"] == "end" and play.wish["outcome"]["code"] == 137


def test_an_error_that_comes_back_at_the_same_step_is_not_tried_a_third_time():
    play = Play(restarts=9)
    for _ in range(2):
        play.ranks[1] = {}
        play.go(20)
        play.ranks[1] = {"code": 1, "lines": ["ZeroDivisionError: division by zero"]}
        play.go(4)
    assert play.wish["outcome"]["why"].startswith("the same failure at the same step twice")


def test_a_program_that_refuses_to_go_on_is_not_started_again():
    play = Play()
    play.go(2)
    play.ranks[0] = {"code": 78, "lines": ["error: data.batch must be positive"]}
    play.go(3)
    assert play.wish["outcome"]["code"] == 78 and "data.batch" in play.wish["outcome"]["why"]


def test_of_many_that_refuse_with_one_text_the_process_that_it_names_is_blamed():
    play = Play()
    play.go(2)
    for host in range(3):
        lines = ["error: checkpoint 10 was not saved: process 2: No space left on device"]
        play.ranks[host] = {"code": 78, "lines": lines}
    play.go(3)
    assert play.causes()[0].startswith("ROOT CAUSE h2 rank 2")


def test_a_stop_saves_where_there_is_something_to_save_and_kills_where_not():
    for step, do in ((5, "term"), (0, "kill")):
        play = Play()
        play.step = step
        play.go(2)
        play.extra[0] = {"stop": "the operator asked"}
        assert play.go(1)["do"] == do
        play.ranks = {i: {"code": 75 if step else 137} for i in range(3)}
        play.go(1)
        assert play.wish["outcome"]["code"] == (75 if step else 143)


def test_a_stop_that_does_not_end_is_a_kill_after_its_grace():
    play = Play(grace_s=10, stall_s=1000)
    play.go(2)
    play.extra[0] = {"stop": "the operator asked"}
    assert play.go(9)["do"] == "term"
    assert play.go(3)["do"] == "end" and play.wish["outcome"]["code"] == 143


def test_an_interactive_job_ends_when_no_host_hears_its_operator():
    play = Play(lease_s=30)
    play.go(2)
    play.extra = {i: {"lease_age_s": 40.0} for i in range(3)} | {1: {"lease_age_s": 3.0}}
    assert play.go(2)["do"] == "run"  # one host's link to the operator is enough
    play.extra[1] = {"lease_age_s": 31.0}
    assert play.go(2)["do"] == "term"


@pytest.mark.parametrize("on_loss", ["fewer", "wait", "stop"])
def test_a_lost_host_is_waited_for_left_behind_or_the_end(on_loss):
    play = Play(on_loss=on_loss, lost_s=12)
    play.go(2)
    play.silent = {2}
    wish = play.go(60)
    expected = {"fewer": "run", "wait": "kill", "stop": "end"}
    assert wish["do"] == expected[on_loss]
    if on_loss == "fewer":
        assert wish["world"]["members"] == [0, 1]


def test_a_host_with_a_process_that_cannot_be_killed_is_waited_for_as_one_that_is_away():
    for on_loss, do in (("fewer", "run"), ("wait", "end")):
        play = Play(on_loss=on_loss, wait_s=60, lost_s=12)
        play.go(2)
        play.ranks[1], play.extra[1] = {"code": 137}, {}
        play.go(3)
        play.ranks[1], play.extra[1] = {}, {"clean": False}
        wish = play.go(70)
        assert wish["do"] == do
        if do == "run":
            assert wish["world"]["members"] == [0, 2]
        else:
            assert wish["outcome"]["why"] == "nothing could kill what runs on h1 within 60 s"


def test_preemptions_that_no_one_asked_for_are_bounded_as_failures_are():
    play = Play(restarts=2, backoff_s=0.0)
    for _ in range(4):
        play.ranks = {i: {} for i in range(3)}
        play.go(3)
        play.ranks = {i: {"code": 75} for i in range(3)}
        play.go(1)
    assert play.leader.restarts == 2
    assert play.wish["do"] == "end" and play.wish["outcome"]["code"] == 75


def test_a_rank_that_hangs_before_its_first_beat_is_stuck_after_the_time_for_a_start():
    play = Play(start_s=100, stall_s=20)
    play.go(2)
    play.ranks = {i: {"age_s": 90.0, "phase": "compile"} for i in range(3)}
    play.ranks[1] = {"beats": None, "step": None, "phase": "start", "age_s": 90.0}
    assert play.go(2)["do"] == "run"
    play.ranks[1]["age_s"] = 101.0
    play.go(4)
    assert "h1 rank 1" in play.causes()[0] and "first sign of life" in play.causes()[0]


def test_a_supervisor_that_was_killed_is_named():
    play = Play()
    play.go(2)
    play.extra[1] = {"orphaned": True, "ranks": []}
    play.go(3)
    assert play.causes() == ["ROOT CAUSE h1: its supervisor was killed"]


def test_a_stop_that_shall_not_save_overtakes_one_that_shall():
    play = Play(grace_s=600, stall_s=1000)
    play.go(2)
    play.extra[0] = {"stop": "the operator asked"}
    assert play.go(2)["do"] == "term"
    play.extra[1] = {"stop": "now"}
    assert play.go(1)["do"] == "kill"
    play.extra[1] = {}
    assert play.go(1)["do"] == "kill"  # and is not overtaken by it
