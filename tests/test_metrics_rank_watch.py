import json

import jax
import numpy as np
import pytest

from jaxtrain.config.run_sections import MeasureConfig
from jaxtrain.metrics import rank_watch
from jaxtrain.metrics.names import OWN
from jaxtrain.metrics.rank_watch import RankWatch, build_program, time_program
from jaxtrain.metrics.step_timer import StepTimer
from jaxtrain.metrics.stragglers import WINDOW

HOSTS = ["a", "b", "c"]
STEP_S = 0.1
DEFAULTS = MeasureConfig()


@pytest.fixture
def timer():
    now = iter(np.arange(0, 1e6, STEP_S))
    timer = StepTimer(1, now=lambda: float(next(now)))
    timer.start()
    timer.tick()
    return timer


def watch(monkeypatch, timer, others, cfg=DEFAULTS, first=0):
    """Returns the RankWatch of process 0, which gathers from its own text those of all."""
    gather = lambda text: [json.dumps(json.loads(text) | change) for change in others]
    monkeypatch.setattr(rank_watch, "gather_texts", gather)
    monkeypatch.setattr(rank_watch, "time_program", lambda program: (0.01, 2))
    return RankWatch(cfg, HOSTS, timer, first)


def test_the_program_computes_a_finite_result_on_every_device():
    program = build_program(jax.local_devices()[:2])
    assert np.isfinite(program()).all() and program().shape == (2,)
    seconds, device = time_program(program)
    assert 0 < seconds < 60 and device in (0, 1)


def test_a_probe_comes_after_the_given_steps_or_later_if_it_would_cost_too_much(monkeypatch, timer):
    cfg = MeasureConfig(straggler_every=50, straggler_cost=0.005)
    ranks = watch(monkeypatch, timer, [{"cost_s": 0.01}] * 3, cfg, first=200)
    assert not ranks.is_due(249) and ranks.is_due(250)
    ranks.probe(250)  # 0.01 s every 50 steps of 0.1 s is 0.2 %
    assert not ranks.is_due(299) and ranks.is_due(300)
    ranks = watch(monkeypatch, timer, [{"cost_s": 0.01}, {"cost_s": 0.2}, {}], cfg)
    ranks.probe(50)  # 0.2 s every 400 steps of 0.1 s is 0.5 %
    assert not ranks.is_due(449) and ranks.is_due(450)


def test_a_straggler_is_announced_once_and_once_when_it_ends(monkeypatch, timer):
    changes = [{"own": [1.0, 1.0, 1.0]} for _ in HOSTS]
    ranks = watch(monkeypatch, timer, changes)
    said = {}
    for probe in range(60):
        changes[1]["own"] = [1.4, 1.0, 1.0] if 10 <= probe < 40 else [1.0, 1.0, 1.0]
        if sentences := ranks.probe(probe):
            said[probe] = sentences
    (begin, [first]), (end, [last]) = said.items()
    assert 10 < begin < 10 + WINDOW and 40 < end < 40 + WINDOW
    who = "straggler: rank 1 on b:"
    assert first.startswith(f"{who} a fixed computation takes 1.40 times as long")
    assert first.endswith(f"its device 2 is the slowest, in 10 of the 12 probes by step {begin}")
    assert last == f"{who} compute is like the other ranks' again, by step {end}"
    entry = {"rank": 1, "host": "b", "kind": "compute", "ratio": 1.4}
    assert ranks.found == [entry | {"first_step": begin, "last_step": end}]


@pytest.mark.parametrize("kind", [1, 2])
def test_each_kind_of_work_is_named_by_itself(monkeypatch, timer, kind):
    changes = [{"own": [1.0, 1.0, 1.0]} for _ in HOSTS]
    changes[2]["own"][kind] = 1.9
    ranks = watch(monkeypatch, timer, changes)
    [sentence] = [s for probe in range(WINDOW) for s in ranks.probe(probe)]
    assert "rank 2 on c" in sentence and "1.90 times" in sentence
    assert ranks.slow_kinds(2) == [OWN[kind]] and not ranks.slow_kinds(0)
    assert ranks.ratios[OWN[kind]] == [1.0, 1.0, 1.9]
