"""Sites go on without one that is lost, as the first site decides, and take it back."""

import concurrent.futures
import contextlib
import time
from concurrent.futures import Future
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sites_in_memory import Hub, Site, arrive_in_time, build
from sites_scene import Proxy, Scene, wait_until

import runs
from jaxtrain.config.run_sections import SitesConfig
from jaxtrain.distributed.broadcast import MESSAGE_BYTES
from jaxtrain.distributed.heartbeat import beat
from jaxtrain.optim.noise import NoiseState
from jaxtrain.sites.decisions import Decider, Decision, View, decide
from jaxtrain.sites.ends import compare_ends
from jaxtrain.sites.errors import SiteLeftOut
from jaxtrain.sites.ledger import DECIDED, read_ledger
from jaxtrain.sites.rejoin import Return, _advance_counts, find_admission
from jaxtrain.sites.round import Outcome, Outer, Pending, describe_part
from jaxtrain.training.step import TrainState

STEPS, PERIOD = 24, 4
BOTH, ONE = ("site0", "site1"), ("site0",)
VALUES = dict(period=PERIOD, rate=0.7, momentum=0.6, on_loss="fewer", lost_s=1.0)


def view(complete=(), lost=(), requests=()):
    return View(tuple(complete), tuple(lost), tuple(requests))


def test_a_round_is_open_until_each_site_has_sent_its_code_or_is_lost_at_a_process():
    given = lambda *views, before=None: decide(3, views, before, set(), set())
    assert given(view([1, 2]), view([1, 2])) == Decision((0, 1, 2))
    assert given(view([1, 2]), view([1])) is None  # a process lacks a part of site 2's code
    assert given(view([1, 2]), view([1], [2])) == Decision((0, 1))
    assert given(view([2]), view([2], [1])) == Decision((0, 2))
    # A code that is complete counts, even if its site has been lost since.
    assert given(view([1, 2], [2]), view([1, 2], [2])) == Decision((0, 1, 2))


def test_a_site_is_not_waited_for_from_when_it_is_left_out_or_asks_until_it_has_all_states(
    tmp_path,
):
    """A site without the states of all fragments sends no code, so waiting for it has no end."""
    left_out, admitted = Decision((0,)), Decision((0,), (1,))
    assert decide(2, [view()], left_out, set(), set()) == left_out
    decider = Decider(2, tmp_path, 0, 1, None, 0.1)
    given = lambda f, round_, *places: decider.decide(
        f, round_, view(requests=[(1, *place) for place in places])
    )
    asks = [(0, 13), (1, 13)]
    assert given(0, 13, *asks) == given(1, 13, *asks) == admitted
    assert given(0, 14, *asks) is None  # it has all states: its code is waited for
    asks += [(0, 14)]  # it was left out again, of fragment 0, and its other request is under way
    assert given(1, 14, *asks) is None  # the other request should be here soon
    time.sleep(0.1)
    assert given(1, 14, *asks) == left_out and given(0, 14, *asks) == admitted
    asks += [(1, 14)]
    assert given(1, 15, *asks) == admitted and given(1, 16, *asks) is None
    decider.close()


def test_the_leader_learns_from_one_of_its_processes_who_asks_for_a_state(tmp_path):
    store = Store()
    first, second = (Decider(2, tmp_path, process, 2, store, 60.0) for process in range(2))
    assert second.decide(0, 1, view(requests=[(1, 0, 1)])) is None
    assert first.decide(0, 1, view()) == Decision((0,), (1,))
    first.close()


class Store(dict):
    """The store of several processes, in memory."""

    write = dict.__setitem__

    def read(self, folder):
        return {key: text for key, text in self.items() if key.startswith(f"{folder}/")}


def test_the_leaders_processes_agree_and_decide_the_same_after_a_restart(tmp_path):
    def start():
        store = Store()
        return [Decider(3, tmp_path, process, 2, store, 60.0) for process in range(2)]

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


def test_a_site_that_skips_steps_keeps_the_seed_of_its_noise():
    noise = NoiseState(jnp.int32(3), jnp.int32(7), {})
    state = TrainState(jnp.int32(5), {}, (noise,), jnp.int32(0), None)
    later = _advance_counts(state, 10, None)
    assert later.step == 15 and later.bad_steps == 0
    assert (later.opt_state[0].count, later.opt_state[0].seed) == (13, 7)


@contextlib.contextmanager
def sites_after(folder, decisions):
    """Yields a scene and its two sites, of which the leader has taken these decisions before."""
    with Scene(folder) as scene:
        (folder / "a").mkdir()
        (folder / "a" / "decisions.jsonl").write_text(decisions)
        yield scene, *(scene.start(name, lost_s=60.0, streams=1) for name in "ab")


def test_a_site_that_lost_its_folder_after_a_return_is_admitted_again(tmp_path):
    with sites_after(tmp_path, "[0, 12, [0], []]\n[0, 13, [0], [1]]\n") as (_, a, b):
        a.send(0, 14, {0: b"a"}, 1, {})
        b.send(0, 11, {0: b"b"}, 1, {})  # its checkpoint is older than its return
        with pytest.raises(SiteLeftOut):
            b.wait(0, 11, 10)
        outer = [
            Outer(*[np.zeros(0, np.float32)] * 3, round=11, pending=Pending(Future(), Future()))
        ]
        way = Return(SitesConfig(), SimpleNamespace(site=1), b, outer)
        assert way.find_states() is None
        assert a.wait(0, 14, 10).admitted == (1,)
        a.durable({0: 20})  # requests outlive checkpoints: one may still be open
        assert a.posted("request") == [(1, 0, 14)]


def test_a_site_that_is_away_until_its_round_is_forgotten_learns_that_it_was_left_out(tmp_path):
    with sites_after(tmp_path, "[0, 2, [0], []]\n[0, 6, [0], []]\n") as (scene, a, b):
        a.send(0, 6, {0: b"a"}, 1, {})
        assert a.wait(0, 6, 10)
        a.durable({0: 5})  # no checkpoint needs the round in which b was lost
        b.send(0, 2, {0: b"b"}, 1, {})
        with pytest.raises(SiteLeftOut):
            b.wait(0, 2, 10)
        assert b.finish(5) and not any(path.startswith("sent-") for path in scene.files("b"))
        assert not [note for note in scene.notes["a"] if "refused" in note]


def test_a_resumed_site_replays_its_rounds_before_the_one_that_went_on_without_it(tmp_path):
    with sites_after(tmp_path, "[0, 1, [0, 1], []]\n[0, 2, [0], []]\n") as (scene, a, b):
        a.send(0, 1, {0: b"a"}, 1, {})
        b.send(0, 1, {0: b"b"}, 1, {})
        assert a.wait(0, 1, 10).participants == b.wait(0, 1, 10).participants == (0, 1)
        a.send(0, 2, {0: b"a"}, 1, {})
        assert a.wait(0, 2, 10) and wait_until(lambda: 2 in b.decisions(0))
        b.close()
        b = scene.start("b", lost_s=60.0, streams=1)
        b.send(0, 1, {0: b"b"}, 1, {})
        assert b.wait(0, 1, 10).codes == {0: {0: b"a"}}
        with pytest.raises(SiteLeftOut):
            b.wait(0, 2, 10)


def test_the_part_of_a_line_of_many_sites_with_long_names_fits_a_gathered_text():
    size = 1 << 40
    arrived = SimpleNamespace(payload_bytes=(size, size), wire_bytes=(size, size), seconds=1 / 3)
    codes = {f"{k:064}": np.full(9, k, np.uint8) for k in range(48)}
    outcome = Outcome(*[np.zeros(9, np.float32)] * 3, codes, dict.fromkeys(codes, size), arrived)
    assert len(describe_part(outcome)) <= MESSAGE_BYTES


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    text = runs.write_text(tmp_path_factory.mktemp("text"))
    return build(text, optim__name="accelerated_lmo", optim__accelerate_all=True, optim__ns_steps=1)


@pytest.fixture
def shown(monkeypatch):
    """What the heartbeats of all sites show about sites."""
    texts = set()
    monkeypatch.setattr(beat, "describe_sites", texts.add)
    return texts


class Pair:
    """Two sites, or more, with real connections, whose training runs in threads."""

    def __init__(self, built, folder, sites=2, **values):
        self.built, self.values, self.folder = built, VALUES | values, folder
        self.scene, self.exchanges = Scene(folder, sites=sites), {}
        self.pool = concurrent.futures.ThreadPoolExecutor(sites)

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        for exchange in self.exchanges.values():
            exchange.fail(RuntimeError("the test is over"))
        self.pool.shutdown()
        self.scene.__exit__(*exc)

    def start(self, name, saved=None, ports=None, **train):
        """Returns a site, and the future of its training."""
        index, hub = self.scene.names.index(name), Hub(len(self.scene.names))

        def open_exchange(blocks):
            self.scene.blocks = tuple(blocks)
            lost_s = {"lost_s": self.values["lost_s"]}
            self.exchanges[name] = self.scene.start(name, ports, **lost_s)
            return self.exchanges[name]

        workdir = self.folder / f"run_{name}"
        workdir.mkdir(exist_ok=True)
        site = Site(self.built, hub, index, STEPS, saved, workdir, open_exchange, **self.values)
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


def test_a_lost_site_is_left_out_and_returns_with_the_same_weights(built, tmp_path, shown):
    with Pair(built, tmp_path, codec="int4") as pair:
        step = [2 * PERIOD]
        # At step 12 only the checkpoint of step 8 counts: it needs no code of that time.
        a, training_a = pair.start("a", before=pace(lambda: step[0]), save=(2 * PERIOD, 12, 20))
        b, training_b = pair.start("b", until=PERIOD, save=(PERIOD,))
        training_b.result(60)
        pair.exchanges["b"].close()  # it is lost after its first round, and a goes on
        assert wait_until(lambda: len(pair.ledger("a")) == 2, 60)
        step[0] = 3 * PERIOD
        assert wait_until(lambda: pair.exchanges["a"].mailbox.oldest == {0: 3}, 60)
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
        assert again.taken == [16]
        for rounds in (a.rounds, again.rounds):
            ends = rounds.exchange, rounds.layouts, rounds.outer, rounds.places.names
            assert compare_ends(*ends, 10.0) == []
            assert rounds.exchange.finish(10.0)
        taken = pair.ledger("b")[1]
        assert (taken.round, taken.started_step, taken.applied_step) == (4, 8, 16)
        of_a = pair.ledger("a")[3]
        assert taken.reference_checksum == of_a.reference_checksum and taken.tokens == {}
        assert any("goes on without it, from round 2 on" in note for note in a.notes)
        assert any("back: it gets the weights after round 4" in note for note in a.notes)
        assert any("after step 16 instead of 8" in note for note in again.notes)
        assert {"without site1 since round 2", ""} < shown
        assert "left out, waits for the weights of site0" in shown

        # The leader resumes from before the loss: it decides and computes the same again.
        pair.exchanges["a"].close()
        lines, crc = pair.ledger("a"), a.crc()
        a, training_a = pair.start("a", a.saves[2 * PERIOD])
        training_a.result(60)
        decided = lambda lines: [[getattr(line, name) for name in DECIDED] for line in lines]
        assert a.crc() == crc and decided(pair.ledger("a")) == decided(lines)


def test_a_site_returns_to_delayed_fragments(built, tmp_path):
    with Pair(built, tmp_path, codec="int4", fragments=2, delay=1, blend=0.5) as pair:
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


def test_two_sites_without_a_link_between_them_return_again_and_again_until_it_works(
    built, tmp_path
):
    """Each leaves the rounds that lack the other's code, and asks for the states of fragments."""
    values = dict(sites=3, fragments=2, codec="int4", lost_s=2.0)
    with Pair(built, tmp_path, **values) as trio:
        proxy, limit = Proxy(trio.scene.ports["b"]), [0]  # it does not pass anything on yet
        a, training_a = trio.start("a", before=pace(lambda: limit[0]))
        b, training_b = trio.start("b")
        c, training_c = trio.start("c", ports={"b": proxy.port})
        returns = lambda site: sum("took over" in note for note in site.notes)
        limit[0] = STEPS - 2 * PERIOD
        assert wait_until(lambda: min(returns(b), returns(c)) >= 2, 60)
        with proxy:
            assert wait_until(lambda: trio.exchanges["b"].silent_s()[2] < 1, 30)
            limit[0] = STEPS
            training_a.result(60), training_b.result(60), training_c.result(60)
        assert (a.weights() == b.weights()).all() and (a.weights() == c.weights()).all()


def test_the_second_site_waits_if_it_does_not_hear_the_first_and_so_never_continues_alone(
    built, tmp_path, shown
):
    with Pair(built, tmp_path) as pair:
        stop = time.monotonic() + 2.0
        b, training_b = pair.start("b", until=PERIOD, stop=lambda: time.monotonic() > stop)
        training_b.result(60)
        assert not pair.ledger("b") and b.rounds.outer[0].pending
    assert shown == {"waits for round 1 of site0", ""}
