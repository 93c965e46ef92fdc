"""Sites go on without one that is lost, as the first site decides, and take it back."""

import concurrent.futures
import time

import jax
import numpy as np
import pytest
from sites_in_memory import Hub, Site, arrive_in_time, build
from sites_scene import Scene, wait_until

import runs
from jaxtrain.sites.decisions import NEVER, Decider, Decision, View, decide
from jaxtrain.sites.ledger import DECIDED, read_ledger
from jaxtrain.sites.rejoin import find_admission
from jaxtrain.sites.round import Outer

STEPS, PERIOD = 24, 4
BOTH, ONE = ("site0", "site1"), ("site0",)
VALUES = dict(period=PERIOD, rate=0.7, momentum=0.6, on_loss="fewer", lost_s=1.0)


def view(complete=(), lost=(), asking=None):
    return View(tuple(complete), tuple(lost), asking or {})


def test_a_round_is_open_until_each_site_has_sent_its_code_or_is_lost_at_a_process():
    nobody = {1: NEVER, 2: NEVER}
    given = lambda *views, before=None: decide(3, views, before, nobody)
    assert given(view([1, 2]), view([1, 2])) == Decision((0, 1, 2))
    assert given(view([1, 2]), view([1])) is None  # a process lacks a part of site 2's code
    assert given(view([1, 2]), view([1], [2])) == Decision((0, 1))
    assert given(view([2]), view([2], [1])) == Decision((0, 2))
    # A code that is complete counts, even if its site has been lost since.
    assert given(view([1, 2], [2]), view([1, 2], [2])) == Decision((0, 1, 2))


def test_a_site_that_was_left_out_is_not_waited_for_until_it_asks_and_is_admitted_once():
    before, admitted_at = Decision((0,)), {1: NEVER}
    assert decide(2, [view()], before, admitted_at) == Decision((0,))
    # One of the leader's processes is enough to know that it asks.
    asking = [view(), view(asking={1: 3})]
    assert decide(2, asking, before, admitted_at) == Decision((0,), (1,))
    assert decide(2, asking, Decision((0,), (1,)), {1: 4}) is None  # its code is waited for
    assert decide(2, [view([1], asking={1: 3})], Decision((0,), (1,)), {1: 4}) == Decision((0, 1))


class Store(dict):
    """The store of several processes, in memory."""

    write = dict.__setitem__

    def read(self, folder):
        return {key: text for key, text in self.items() if key.startswith(f"{folder}/")}


def test_the_leaders_processes_agree_and_decide_the_same_after_a_restart(tmp_path):
    def start():
        store = Store()
        return [Decider(3, tmp_path, process, 2, store) for process in range(2)]

    first, second = start()
    assert first.decide(0, 1, view([1, 2])) is None  # the other process has not reported
    assert second.decide(0, 1, view([1], [2])) is None
    assert first.decide(0, 1, view([1, 2])) == Decision((0, 1))
    assert second.decide(0, 1, view([1, 2])) == Decision((0, 1))
    first.close()
    with open(tmp_path / "decisions.jsonl", "a") as file:
        file.write("[0, 2, [0")  # a power loss
    first, second = start()
    assert first.decide(0, 1, view([1, 2])) == second.decide(0, 1, view()) == Decision((0, 1))
    assert first.decide(0, 2, view([1])) is None
    second.decide(0, 2, view([1]))
    assert first.decide(0, 2, view([1])) == Decision((0, 1))  # site 2 was left out before
    first.close()
    assert (tmp_path / "decisions.jsonl").read_text().count("\n") == 2


def test_only_an_admission_after_the_newest_known_round_counts():
    outer = Outer(*[np.zeros(0, np.float32)] * 3, round=5)
    left_out, admitted, with_us = Decision((0,)), Decision((0,), (1,)), Decision((0, 1))
    assert find_admission({5: admitted}, outer, 1) is None  # of the time before
    assert find_admission({6: left_out, 7: admitted, 8: with_us}, outer, 1) == 7
    assert find_admission({6: admitted, 7: left_out}, outer, 1) is None


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    text = runs.write_text(tmp_path_factory.mktemp("text"))
    return build(text, optim__name="accelerated_lmo", optim__accelerate_all=True, optim__ns_steps=1)


class Pair:
    """Two sites with real connections, whose training runs in threads."""

    def __init__(self, built, folder, **values):
        self.built, self.values, self.folder = built, VALUES | values, folder
        self.scene, self.exchanges = Scene(folder), {}
        self.pool = concurrent.futures.ThreadPoolExecutor(2)

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        for exchange in self.exchanges.values():
            exchange.fail(RuntimeError("the test is over"))
        self.pool.shutdown()
        self.scene.__exit__(*exc)

    def start(self, name, saved=None, **train):
        """Returns a site, and the future of its training."""
        index = self.scene.names.index(name)

        def open_exchange(blocks):
            self.scene.blocks = tuple(blocks)
            lost_s = {"lost_s": self.values["lost_s"]}
            self.exchanges[name] = self.scene.start(name, **lost_s)
            return self.exchanges[name]

        workdir = self.folder / f"run_{name}"
        workdir.mkdir(exist_ok=True)
        site = Site(self.built, Hub(2), index, STEPS, saved, workdir, open_exchange, **self.values)
        return site, self.pool.submit(site.train, **train)

    def ledger(self, name):
        return read_ledger(self.folder / f"run_{name}" / "sites.jsonl")


def counts(site):
    """Returns the step of a site and the counts of its optimizer."""
    return [int(x) for x in jax.tree.leaves(site.state) if x.dtype == np.int32]


def pace(limit):
    """Returns what keeps a site from training past a step before `limit()` allows it."""

    def before(site, step):
        assert wait_until(lambda: step <= limit(), 60)

    return before


def test_a_lost_site_is_left_out_and_returns_with_the_same_weights(built, tmp_path):
    with Pair(built, tmp_path, codec="int4") as pair:
        step = [2 * PERIOD]
        a, training_a = pair.start("a", before=pace(lambda: step[0]), save=(2 * PERIOD, 20))
        b, training_b = pair.start("b", until=PERIOD, save=(PERIOD,))
        training_b.result(60)
        pair.exchanges["b"].close()  # it is lost after its first round, and a goes on
        assert wait_until(lambda: len(pair.ledger("a")) == 2, 60)
        step[0] = 3 * PERIOD
        assert wait_until(lambda: len(pair.ledger("a")) == 3, 60)
        again, training_b = pair.start("b", b.saves[PERIOD], save=(STEPS,))
        assert wait_until(lambda: pair.exchanges["a"].posted("request"), 60)
        step[0] = STEPS
        training_a.result(60), training_b.result(60)
        present = [line.participants for line in pair.ledger("a")]
        assert present == [BOTH, ONE, ONE, ONE, BOTH, BOTH]
        assert (a.weights() == again.weights()).all()
        for x, y in zip(a.rounds.outer, again.rounds.outer, strict=True):
            assert (x.reference == y.reference).all() and (x.momentum == y.momentum).all()
        assert counts(a) == counts(again)  # the schedule of the learning rate depends on them
        taken = pair.ledger("b")[1]
        assert (taken.round, taken.started_step, taken.applied_step) == (4, 8, 16)
        of_a = pair.ledger("a")[3]
        assert taken.reference_checksum == of_a.reference_checksum and taken.tokens == {}
        assert any("goes on without it, from round 2 on" in note for note in a.notes)
        assert any("back: it gets the weights after round 4" in note for note in a.notes)
        assert any("after step 16 instead of 8" in note for note in again.notes)

        # The leader resumes from before the loss: it decides and computes the same again.
        pair.exchanges["a"].close()
        lines, crc = pair.ledger("a"), a.crc()
        a, training_a = pair.start("a", a.saves[2 * PERIOD])
        training_a.result(60)
        decided = lambda lines: [[getattr(line, name) for name in DECIDED] for line in lines]
        assert a.crc() == crc and decided(pair.ledger("a")) == decided(lines)


def test_a_site_returns_to_delayed_fragments(built, tmp_path):
    with Pair(built, tmp_path, codec="int4", fragments=2, delay=1) as pair:
        step = [2 * PERIOD]
        pass_limit = pace(lambda: step[0])

        def wait_for_b(site, now):
            if now <= 2 * PERIOD + 1:  # else the steps of later rounds depend on a race
                arrive_in_time(site, now)
            pass_limit(site, now)

        a, training_a = pair.start("a", before=wait_for_b)
        b, training_b = pair.start("b", until=PERIOD, save=(PERIOD,))
        training_b.result(60)
        assert wait_until(lambda: len(pair.ledger("a")) == 2, 60)
        pair.exchanges["b"].close()
        step[0] = 4 * PERIOD
        left_out = lambda: {line.fragment for line in pair.ledger("a") if line.participants == ONE}
        assert wait_until(lambda: len(left_out()) == 2, 60)
        b, training_b = pair.start("b", b.saves[PERIOD])
        assert wait_until(lambda: len(pair.exchanges["a"].posted("request")) == 2, 60)
        step[0] = STEPS
        training_a.result(60), training_b.result(60)
        assert (a.weights() == b.weights()).all()
        assert [note for note in b.notes if "took over the weights" in note]
        assert pair.ledger("a")[-1].participants == pair.ledger("b")[-1].participants == BOTH


def test_the_second_site_waits_if_it_does_not_hear_the_first_and_so_never_continues_alone(
    built, tmp_path
):
    with Pair(built, tmp_path) as pair:
        stop = time.monotonic() + 2.0
        b, training_b = pair.start("b", until=PERIOD, stop=lambda: time.monotonic() > stop)
        training_b.result(60)
        assert not pair.ledger("b") and b.rounds.outer[0].pending
