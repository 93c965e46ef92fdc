import dataclasses
import threading
from contextlib import nullcontext
from types import SimpleNamespace

import jax
import numpy as np
import optax
import pytest
from sites_in_memory import Hub, Site, arrive_in_time, build, replace_batch, train_together
from sites_scene import wait_until

import runs
from jaxtrain.sites import start
from jaxtrain.sites.codec import NonFiniteDelta
from jaxtrain.sites.errors import Disagreement
from jaxtrain.sites.ledger import DECIDED, read_ledger
from jaxtrain.sites.outer_state import _read_ends, add_outer_state
from jaxtrain.sites.start import finish
from jaxtrain.training.loop import Loop

STEPS = 8
DELAYED = {"delay": 1, "fragments": 2}


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return runs.write_text(tmp_path_factory.mktemp("text"))


@pytest.fixture(scope="module")
def accelerated(text):
    """A run whose gradients are taken ahead of the iterate, for all parameters."""
    values = dict(optim__name="accelerated_lmo", optim__accelerate_all=True, optim__ns_steps=1)
    return build(text, **values)


def pair(built, hub=None, **values):
    hub = hub or Hub(2)
    return [Site(built, hub, k, STEPS, **values) for k in range(hub.sites)]


def train_alone(built):
    """Returns the weights of a run without an exchange."""
    site = Site(built, Hub(1), 0, STEPS, period=STEPS)
    site.rounds.finished_step = STEPS
    return site.train().weights()


@pytest.mark.parametrize(
    "values",
    [{}, DELAYED, DELAYED | {"blend": 0.5}],
    ids=["waiting", "delayed fragments", "blend"],
)
def test_one_site_with_rate_1_and_no_momentum_is_bitwise_the_run_without_an_exchange(
    accelerated, values
):
    sites = [Site(accelerated, Hub(1), 0, STEPS, period=2, **values)]
    [site] = train_together(sites, before=arrive_in_time)
    assert (site.weights() == train_alone(accelerated)).all() and len(site.metrics) >= 4


def test_two_sites_that_average_after_each_step_of_sgd_train_as_one_site_with_both_batches(text):
    built = build(text, optax.with_extra_args_support(optax.sgd(0.5)))
    a, b = train_together(pair(built, period=1))
    assert (a.weights() == b.weights()).all()
    start = Site(built, Hub(1), 0, STEPS, period=STEPS).weights()
    both = train_alone(replace_batch(built, 16))
    assert np.abs(both - start).max() > 0.01
    np.testing.assert_allclose(a.weights(), both, rtol=1e-4, atol=2e-6)


@pytest.mark.parametrize("codec", ["bf16", "int2"])
def test_codes_that_arrive_in_another_order_give_the_same_bits(accelerated, codec):
    values = dict(period=4, codec=codec, rate=0.7, momentum=0.6)
    ends = set()
    for backwards in (False, True):
        hub = Hub(3)
        hub.backwards = backwards
        sites = train_together(pair(accelerated, hub, **values))
        ends |= {site.weights().tobytes() for site in sites}
    assert len(ends) == 1


def test_delayed_fragments_hide_the_exchange_and_all_sites_end_with_equal_weights(accelerated):
    values = dict(period=4, fragments=3, delay=2, codec="int4", rate=0.7, momentum=0.6)
    a, b = train_together(pair(accelerated, **values), before=arrive_in_time)
    assert (a.weights() == b.weights()).all()
    for x, y in zip(a.rounds.outer, b.rounds.outer, strict=True):
        assert (x.reference == y.reference).all() and (x.momentum == y.momentum).all()
    ages = sorted(m["sites/age_steps"] for m in a.metrics)  # in any order after the last step
    assert ages[:3] == [0, 0, 0] and set(ages[3:]) == {2}
    assert a.metrics[0]["sites/payload_bytes"] > 0


@pytest.mark.parametrize(
    ("steps", "rounds", "rounds_after_4_more"),
    [(7, [2, 3, 3], [4, 5, 5]), (6, [2, 3, 2], [4, 5, 3]), (4, [1, 2, 2], [2, 4, 4])],
)
def test_a_run_may_end_within_a_period_and_be_extended(
    accelerated, steps, rounds, rounds_after_4_more
):
    """Rounds of the three fragments start after steps 4k, 4k + 1 and 4k + 2, and after the last."""
    values = dict(period=4, fragments=3, delay=2, codec="int4", rate=0.7, momentum=0.6)
    hub = Hub(2)
    first = [Site(accelerated, hub, k, steps, **values) for k in range(2)]
    a, b = train_together(first, before=arrive_in_time, save=(steps,))
    assert (a.weights() == b.weights()).all()
    assert [outer.round for outer in a.rounds.outer] == rounds
    saved = [site.saves[steps] for site in first]
    if steps % 4 == 0:  # as in older checkpoints
        for _, meta, _ in saved:
            meta["finishes"] = len(meta.pop("ends"))
    longer = [Site(accelerated, hub, k, steps + 4, saved[k], **values) for k in range(2)]
    a, b = train_together(longer, before=arrive_in_time)
    assert (a.weights() == b.weights()).all()
    assert [outer.round for outer in a.rounds.outer] == rounds_after_4_more


def test_the_iterate_is_exchanged_and_the_offset_of_the_look_ahead_point_stays(accelerated):
    offsets = {}

    def note_offset(site, step):
        if step == 3:
            weights = jax.tree.leaves(site.state.params)
            ahead = np.concatenate([np.ravel(x) for x in weights]) - site.weights()
            offsets[site.rounds.places.site] = np.abs(ahead).max()

    a, b = train_together(pair(accelerated, period=4), before=note_offset)
    assert min(offsets.values()) > 1e-4
    assert (a.weights() == b.weights()).all()
    # After the last round, the weights that are saved are those that are evaluated.
    params = np.concatenate([np.ravel(x) for x in jax.tree.leaves(a.state.params)])
    assert (params == a.weights()).all()


def test_a_late_round_is_applied_later_and_replayed_at_the_recorded_step(accelerated, tmp_path):
    """Site 1's codes do not arrive before step 6: the run goes on, and looks after each period."""
    values = dict(period=2, delay=1, codec="int8", rate=0.7, momentum=0.6, grace=3)
    hub = Hub(2)
    hub.withheld.add(1)

    def release(site, step):
        if step == 6 and site.rounds.places.site == 0:
            with hub.changed:
                hub.withheld.clear()
                hub.changed.notify_all()
            site.rounds.outer[0].pending.outcome.exception(60)

    def sites(saved=(None, None), hub=hub):
        folders = [tmp_path / str(k) for k in range(2)]
        for folder in folders:
            folder.mkdir(exist_ok=True)
        return [
            Site(accelerated, hub, k, STEPS, saved=saved[k], workdir=folders[k], **values)
            for k in range(2)
        ]

    a, b = train_together(sites(), before=release, save=(4,))
    lines = read_ledger(tmp_path / "0" / "sites.jsonl")
    assert [(line.started_step, line.applied_step) for line in lines] == [
        (2, 7),
        (7, 8),
        (8, 8),
        (8, 8),
    ]
    assert a.rounds.outer[0].round == b.rounds.outer[0].round
    assert (a.weights() == b.weights()).all()
    # Everything has arrived now, but the resumed run waits for the recorded step.
    saved = [a.saves[4], b.saves[4]]
    assert [meta["fragments"][0]["pending"] for _, meta, _ in saved] == [True, True]
    again = train_together(sites(saved), before=arrive_in_time)
    assert [site.crc() for site in again] == [a.crc(), b.crc()]
    decided = lambda lines: [[getattr(line, name) for name in DECIDED] for line in lines]
    assert decided(read_ledger(tmp_path / "0" / "sites.jsonl")) == decided(lines)


@pytest.mark.parametrize(
    "values",
    [{}, DELAYED | {"codec": "int4"}, DELAYED | {"codec": "int4", "blend": 0.5}],
    ids=["waiting", "delayed", "blend"],
)
def test_a_run_that_is_resumed_in_the_middle_of_an_exchange_ends_with_the_same_bits(
    accelerated, values
):
    values = dict(period=4, rate=0.7, momentum=0.6, codec="int2") | values
    whole = train_together(pair(accelerated, **values), before=arrive_in_time)
    hub = Hub(2)
    first = pair(accelerated, hub, **values)
    if "delay" in values:
        train_together(first, until=4, save=(4,), before=arrive_in_time)
    else:  # interrupted while it waits for site 1, which has not started yet
        first[0].train(until=4, stop=lambda: True, save=(4,))
    assert any(x["pending"] for x in first[0].saves[4][1]["fragments"])
    again = [Site(accelerated, hub, k, STEPS, first[k].saves.get(4), **values) for k in range(2)]
    train_together(again, before=arrive_in_time)
    assert [site.crc() for site in again] == [site.crc() for site in whole]


def test_the_sites_compare_their_final_weights_at_the_end_of_the_run_only(accelerated):
    a, b = train_together(pair(accelerated, period=4, fragments=2))
    finish(a.rounds), finish(b.rounds)
    a.rounds.outer[1].reference[0] += 1  # as if its last outer step had been wrong
    with pytest.raises(Disagreement, match="fragment 1 those of site site1 have .* those of this"):
        finish(a.rounds)
    a.rounds.finished_step = STEPS // 2  # the run was extended, and stopped before its new end
    finish(a.rounds)


def test_at_the_end_a_site_waits_for_the_others_without_a_limit_unless_it_may_go_on_with_fewer(
    accelerated, monkeypatch
):
    a, b = train_together(pair(accelerated, period=4))
    lines, beats = [], []
    monkeypatch.setattr(start.logging, "warning", lambda text, *args: lines.append(text % args))
    monkeypatch.setattr(start, "beat", beats.append)
    monkeypatch.setattr(start, "end_at_signals", lambda: beats.append("a signal ends it"))
    a.hub.withheld.add(1)
    a.rounds.cfg = dataclasses.replace(a.rounds.cfg, on_loss="fewer")
    finish(a.rounds, timeout_s=0.1, remind_s=0.05)
    assert "could not be compared with those of site1" in lines[-1]
    a.rounds.cfg = dataclasses.replace(a.rounds.cfg, on_loss="wait")
    lines.clear(), beats.clear()
    thread = threading.Thread(target=finish, args=(a.rounds, 0.1, 0.05))
    thread.start()
    assert wait_until(lambda: len(lines) >= 4) and beats[:2] == ["a signal ends it", "sites"]
    assert "checksum of site1 has not arrived" in lines[-1]
    a.hub.withheld.clear()
    thread.join(10)
    assert not thread.is_alive()


def test_a_code_that_is_not_finite_is_not_used_and_its_site_is_named(accelerated):
    hub = Hub(2)
    get = hub.get

    def damaged(sender, kind, fragment, round_):
        message = get(sender, kind, fragment, round_)
        if message is None or (sender, kind) != (1, "code"):
            return message
        numbers = np.frombuffer(message[0], np.float32).copy()
        numbers[5] = np.nan
        return (numbers.tobytes(), *message[1:])

    hub.get = damaged
    with pytest.raises(Disagreement, match="codes of round 1 of fragment 0 .* that of site site1"):
        train_together(pair(accelerated, hub, period=4))


@pytest.mark.parametrize("finished_step", [None, 4])
def test_the_oldest_checkpoints_are_refused_only_if_their_run_had_ended(finished_step):
    meta = {"finished_step": finished_step}
    assert _read_ends(meta | {"ends": [7]}) == [7] and _read_ends(meta | {"finishes": 1}) == [0]
    if finished_step is None:
        assert _read_ends(meta) == []
    else:
        with pytest.raises(ValueError, match="must list the steps .* finished_step=4. Set --weig"):
            _read_ends(meta)


def test_codes_are_kept_for_the_newest_checkpoints_and_not_for_those_of_keep_every(accelerated):
    site = Site(accelerated, Hub(2), 0, STEPS, period=2)
    with site.rounds as rounds:
        rounds.applied = {2: [1], 5: [2], 6: [3]}
        add_outer_state(rounds, site.state, 7, [2, 5, 6], 2)
        assert rounds.exchange.oldest == {0: 3}  # the checkpoint of step 5 needs round 3


@pytest.mark.parametrize("took_over", [True, False])
def test_a_checkpoint_is_saved_after_a_state_was_taken_over_also_at_the_same_step(took_over):
    saved, log = [], SimpleNamespace(take_metrics=list)
    rounds = SimpleNamespace(after_step=lambda *_: (None, 5), took_over=took_over, log=log)
    Loop._exchange(
        SimpleNamespace(rounds=rounds, state=None, _pause=nullcontext, _save=saved.append), 5
    )
    assert saved == [5] * took_over


def test_weights_that_are_not_finite_are_not_sent_and_the_site_is_named(accelerated):
    hub = Hub(2)
    site = Site(accelerated, hub, 1, STEPS, period=4)

    def break_weights(site, step):
        if step == 4:
            site.state = site.state._replace(
                params=jax.tree.map(lambda x: x.at[..., 0].set(np.nan), site.state.params)
            )

    with pytest.raises(NonFiniteDelta, match="weights of site site1 .* after step 4 .* nan"):
        site.train(before=break_weights)
    assert not hub.messages
