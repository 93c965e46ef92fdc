"""Checks the restart policy (reports in, targets out) with a simulated clock and no processes."""

import pytest

from launch.host.channel import CLOSED, RUNNING, UNKNOWN
from launch.host.exit_codes import KILLED, PREEMPTED, REFUSED, STOPPED
from launch.host.restart_policy import JobController, Policy

NAMES = ["h0", "h1", "h2"]


class Scenario:
    """A job of three hosts with simulated reports.

    Attributes:
        ranks: {host: values that replace those of its rank}.
        extra: {host: values that replace those of its report}.
        silent: hosts that send no report.
    """

    step = 5

    def __init__(self, **policy):
        ports = iter(range(7000, 8000))
        self.log, self.now, self.silent = [], 0.0, set()
        self.controller = JobController(
            Policy(**policy), NAMES, lambda: f"a:{next(ports)}", self.log.append
        )
        self.ranks = {i: {} for i in range(3)}
        self.attempt, self.extra = 0, {i: {} for i in range(3)}

    def rank(self, host, **values):
        base = {"rank": host, "pid": 1, "stopped_s": 0.0, "code": None}
        beat = {"beats": 2 * self.step, "step": self.step, "phase": "train", "step_s": 0.1}
        return base | beat | {"age_s": 0.1, "lines": []} | values

    def advance(self, seconds=1.0):
        """Advances the clock, with a report per host every half second; returns the target."""
        for _ in range(round(2 * seconds)):
            self.now += 0.5
            running = self.attempt > 0
            for host in set(range(3)) - self.silent:
                ranks = [self.rank(host, **self.ranks[host])] if running else []
                report = {"host": host, "attempt": self.attempt, "ranks": ranks}
                report |= {"clean": not running, "lease_age_s": 0.0, "stop": None}
                self.controller.take_report(report | self.extra[host], self.now)
            self.target = self.controller.next_target(self.now)
            if self.target["do"] == "run":
                self.attempt = self.target["attempt"]
            if self.target["do"] in ("kill", "end") and self.controller.state != "run":
                self.attempt = 0
        return self.target

    def causes(self):
        return [line.splitlines()[0] for line in self.log if line.startswith("ROOT CAUSE")]


def test_a_job_starts_only_when_every_host_is_present_and_clean():
    scenario = Scenario()
    scenario.silent = {2}
    assert scenario.advance(20)["do"] == "kill"
    scenario.silent, scenario.extra[1] = set(), {"clean": False}
    assert scenario.advance(20)["do"] == "kill"
    scenario.extra[1] = {}
    assert scenario.advance()["world"] == {"members": [0, 1, 2], "coordinator": "a:7000"}


def test_the_cause_is_the_killed_rank_and_not_the_one_that_noticed_first():
    scenario = Scenario()
    scenario.advance(2)
    scenario.ranks[0] = {"code": 1, "lines": ["Gloo all-reduce failed: Connection closed by peer"]}
    scenario.advance(0.5)
    scenario.ranks[1] = {"code": KILLED}
    scenario.advance(2)
    assert scenario.causes() == ["ROOT CAUSE h1 rank 1 at step 5: ended by SIGKILL"]
    scenario.ranks = {i: {} for i in range(3)}
    assert scenario.advance(4)["world"]["coordinator"] == "a:7001"  # a new port for each attempt


def test_the_cause_is_a_lost_host_even_if_all_others_failed_before_it_counts_as_lost():
    scenario = Scenario(lost_s=12)
    scenario.advance(2)
    scenario.silent = {2}
    for host in (0, 1):
        scenario.ranks[host] = {"code": 134, "lines": ["heartbeat timeout of task 2"]}
    scenario.advance(9)
    assert scenario.causes() == []
    scenario.advance(6)
    assert scenario.causes()[0].startswith("ROOT CAUSE h2: unreachable")


def test_a_short_silence_has_no_effect():
    scenario = Scenario(lost_s=12)
    scenario.advance(2)
    scenario.silent = {2}
    scenario.advance(8)
    scenario.silent = set()
    assert scenario.advance(5)["do"] == "run" and scenario.causes() == []


def test_the_stuck_rank_is_the_one_with_the_fewest_beats():
    scenario = Scenario(stall_s=20)
    scenario.advance(2)
    for host in range(3):
        scenario.ranks[host] = {"age_s": 21.0, "beats": 9 if host == 1 else 10}
    assert scenario.advance(1)["do"] == "dump"
    scenario.advance(3)
    assert "h1 rank 1" in scenario.causes()[0] and "stuck" in scenario.causes()[0]


def test_a_host_that_has_moved_is_the_cause_only_if_something_else_is_wrong():
    scenario = Scenario(stall_s=20)
    scenario.extra[1] = {"has_address": False}
    assert scenario.advance(4)["do"] == "run" and not scenario.causes()
    for host in range(3):
        scenario.ranks[host] = {"age_s": 21.0}
    scenario.advance(4)
    assert scenario.causes() == ["ROOT CAUSE h1: no longer has its address of the inventory"]


@pytest.mark.parametrize("moved, cause", [(0, "h0: no longer has"), (1, "h2: unreachable")])
def test_a_first_host_that_has_moved_explains_why_the_others_are_silent(moved, cause):
    scenario = Scenario(lost_s=12)
    scenario.advance(2)
    scenario.extra[moved] = {"has_address": False}
    scenario.silent = {2} if moved else {1, 2}
    scenario.advance(15)
    assert scenario.causes()[0].startswith(f"ROOT CAUSE {cause}")


@pytest.mark.parametrize(("step_s", "stuck"), [(0.1, True), (30.0, False)])
def test_a_rank_is_stuck_only_if_it_takes_much_longer_than_its_usual_step(step_s, stuck):
    scenario = Scenario(stall_s=20)
    scenario.advance(2)
    scenario.ranks = {i: {"age_s": 40.0, "step_s": step_s} for i in range(3)}
    scenario.advance(5)
    assert bool(scenario.causes()) == stuck


def test_restarts_are_limited_and_their_pauses_grow():
    scenario = Scenario(restarts=2, backoff_s=4.0)
    for step in (5, 6, 7):
        scenario.step = step
        scenario.ranks[1] = {}
        scenario.advance(40)
        scenario.ranks[1] = {"code": KILLED}
        scenario.advance(4)
    assert [line for line in scenario.log if line.startswith("restart")] == [
        "restart 1 of 2 in 4 s: h1 rank 1 at step 5: ended by SIGKILL",
        "restart 2 of 2 in 8 s: h1 rank 1 at step 6: ended by SIGKILL",
    ]
    assert scenario.target["do"] == "end" and scenario.target["outcome"]["code"] == KILLED


def test_an_error_that_repeats_at_the_same_step_ends_the_job():
    scenario = Scenario(restarts=9)
    for _ in range(2):
        scenario.ranks[1] = {}
        scenario.advance(20)
        scenario.ranks[1] = {"code": 1, "lines": ["ZeroDivisionError: division by zero"]}
        scenario.advance(4)
    assert scenario.target["outcome"]["why"].startswith("the same failure at the same step twice")


def test_a_program_that_refuses_to_go_on_is_not_restarted():
    scenario = Scenario()
    scenario.advance(2)
    scenario.ranks[0] = {"code": REFUSED, "lines": ["error: data.batch must be positive"]}
    scenario.advance(3)
    outcome = scenario.target["outcome"]
    assert outcome["code"] == REFUSED and "data.batch" in outcome["why"]


def test_if_all_ranks_report_the_same_error_the_cause_is_the_process_that_it_names():
    scenario = Scenario()
    scenario.advance(2)
    for host in range(3):
        lines = ["error: checkpoint 10 was not saved: process 2: No space left on device"]
        scenario.ranks[host] = {"code": REFUSED, "lines": lines}
    scenario.advance(3)
    assert scenario.causes()[0].startswith("ROOT CAUSE h2 rank 2")


def test_a_stop_saves_if_there_is_something_to_save_and_kills_otherwise():
    for step, do in ((5, "term"), (0, "end")):
        scenario = Scenario()
        scenario.step = step
        scenario.advance(2)
        scenario.extra[0] = {"stop": "the operator asked"}
        assert scenario.advance(1)["do"] == do
        scenario.ranks = {i: {"code": PREEMPTED if step else KILLED} for i in range(3)}
        scenario.advance(1)
        assert scenario.target["outcome"]["code"] == (PREEMPTED if step else STOPPED)


def test_a_stop_becomes_a_kill_after_grace_s():
    scenario = Scenario(grace_s=10, stall_s=1000)
    scenario.advance(2)
    scenario.extra[0] = {"stop": "the operator asked"}
    assert scenario.advance(9)["do"] == "term"
    assert scenario.advance(3)["do"] == "end" and scenario.target["outcome"]["code"] == STOPPED


def test_an_interactive_job_ends_when_no_host_has_a_fresh_lease():
    scenario = Scenario(lease_s=30)
    scenario.advance(2)
    scenario.extra = {i: {"lease_age_s": 40.0} for i in range(3)} | {1: {"lease_age_s": 3.0}}
    assert scenario.advance(2)["do"] == "run"  # one host that the operator reaches is enough
    scenario.extra[1] = {"lease_age_s": 31.0}
    assert scenario.advance(2)["do"] == "term"


@pytest.mark.parametrize("on_loss", ["fewer", "wait", "stop"])
def test_on_loss_waits_for_a_lost_host_or_goes_on_without_it_or_stops(on_loss):
    scenario = Scenario(on_loss=on_loss, lost_s=12)
    scenario.advance(2)
    scenario.silent = {2}
    target = scenario.advance(60)
    expected = {"fewer": "run", "wait": "kill", "stop": "end"}
    assert target["do"] == expected[on_loss]
    if on_loss == "fewer":
        assert target["world"]["members"] == [0, 1]


def test_a_host_with_an_unkillable_process_is_treated_as_unreachable():
    for on_loss, do in (("fewer", "run"), ("wait", "end")):
        scenario = Scenario(on_loss=on_loss, wait_s=60, lost_s=12)
        scenario.advance(2)
        scenario.ranks[1], scenario.extra[1] = {"code": KILLED}, {}
        scenario.advance(3)
        scenario.ranks[1], scenario.extra[1] = {}, {"clean": False}
        target = scenario.advance(70)
        assert target["do"] == do
        if do == "run":
            assert target["world"]["members"] == [0, 2]
        else:
            assert target["outcome"]["why"] == "nothing could kill what runs on h1 within 60 s"


def test_preemptions_count_as_restarts():
    scenario = Scenario(restarts=2, backoff_s=0.0)
    for _ in range(4):
        scenario.ranks = {i: {} for i in range(3)}
        scenario.advance(3)
        scenario.ranks = {i: {"code": PREEMPTED} for i in range(3)}
        scenario.advance(1)
    assert scenario.controller.restarts == 2
    assert scenario.target["do"] == "end" and scenario.target["outcome"]["code"] == PREEMPTED


def test_a_rank_without_a_heartbeat_is_stuck_after_start_s():
    scenario = Scenario(start_s=100, stall_s=20)
    scenario.advance(2)
    scenario.ranks = {i: {"age_s": 90.0, "phase": "compile"} for i in range(3)}
    scenario.ranks[1] = {"beats": None, "step": None, "phase": "start", "age_s": 90.0}
    assert scenario.advance(2)["do"] == "run"
    scenario.ranks[1]["age_s"] = 101.0
    scenario.advance(4)
    assert "h1 rank 1" in scenario.causes()[0] and "first sign of life" in scenario.causes()[0]


def test_a_killed_supervisor_is_the_cause():
    scenario = Scenario()
    scenario.advance(2)
    scenario.extra[1] = {"orphaned": "was killed", "ranks": []}
    scenario.advance(3)
    assert scenario.causes() == ["ROOT CAUSE h1: its supervisor was killed"]


def test_a_stop_without_a_save_overrides_one_with_a_save_but_not_vice_versa():
    scenario = Scenario(grace_s=600, stall_s=1000)
    scenario.advance(2)
    scenario.extra[0] = {"stop": "the operator asked"}
    assert scenario.advance(2)["do"] == "term"
    scenario.extra[1] = {"stop": "now"}
    assert scenario.advance(1)["do"] == "end"
    scenario.ranks[0] = {"code": KILLED}  # as all others are soon
    assert scenario.advance(3)["outcome"]["code"] == STOPPED and not scenario.causes()


def test_a_cause_includes_the_decisive_lines_and_advice():
    scenario = Scenario()
    scenario.advance(2)
    scenario.ranks[1] = {"code": 1, "lines": ["ValueError: no"]}
    scenario.advance(3)
    [cause] = [text for text in scenario.log if text.startswith("ROOT CAUSE")]
    headline, output, advice = cause.splitlines()
    assert headline == "ROOT CAUSE h1 rank 1 at step 5: exit 1"
    assert output == "    ValueError: no" and advice.startswith("    What to do: ")


@pytest.mark.parametrize("frozen_s", [1, 19, 25])
def test_a_short_stop_by_a_signal_is_waited_for_and_a_long_one_is_the_cause(frozen_s):
    scenario = Scenario(stopped_s=20.0, stall_s=10.0)
    scenario.advance(2)
    for second in range(1, frozen_s + 1):  # all others wait for the stopped rank
        scenario.ranks = {i: {"age_s": float(second)} for i in range(3)}
        scenario.ranks[1]["stopped_s"] = float(second)
        scenario.advance()
    first = next(line for line in scenario.log if "state T" in line)
    assert (
        first == "h1 rank 1 is stopped by a signal (state T): waiting for it for 20 s (--stopped_s)"
    )
    if frozen_s > 20:
        scenario.advance(4)
        cause = "stopped by a signal (state T) for over 20 s (--stopped_s)"
        assert set(scenario.causes()) == {f"ROOT CAUSE h1 rank 1 at step 5: {cause}"}
        scenario.ranks = {i: {} for i in range(3)}
        assert scenario.advance(8)["do"] == "run"  # its rank is another process
        assert not [line for line in scenario.log if "goes on" in line]
        return
    for second in (1, 2, 3):  # the first step after it takes some time
        scenario.ranks = {i: {"age_s": float(frozen_s + second)} for i in range(3)}
        assert scenario.advance()["do"] == "run"
    assert f"h1 rank 1 was stopped for {frozen_s} s and goes on" in scenario.log
    for second in range(12):  # and if no step follows at all, that is noticed
        scenario.ranks = {i: {"age_s": float(frozen_s + 3 + second)} for i in range(3)}
        scenario.advance()
    assert any(line.startswith("noticed: ") and "stuck" in line for line in scenario.log)


@pytest.mark.parametrize(
    ("state", "headline", "advice"),
    [
        (RUNNING, "its supervisor sent nothing for 12 s; the host is up", "`kill -STOP`"),
        (CLOSED, "its supervisor ended and is not back after 12 s (killed, or the host", "reboot"),
        (UNKNOWN, "unreachable for 12 s (power, network or sleep)", "power and network"),
    ],
)
def test_a_silent_or_ended_supervisor_is_not_called_an_unreachable_host(state, headline, advice):
    scenario = Scenario(lost_s=12.0)
    scenario.advance(2)
    scenario.silent = {2}
    asked = set()  # the kernel is asked only about a silent host
    scenario.controller.kernel_state = lambda host, silent_s: asked.add((host, silent_s)) or state
    scenario.advance(20)
    cause = next(text for text in scenario.log if text.startswith("ROOT CAUSE"))
    assert cause.startswith(f"ROOT CAUSE h2: {headline}") and advice in cause
    assert asked == {(2, 6.0)}
