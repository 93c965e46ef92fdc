"""The plan for several sites against published arithmetic, and its own limits."""

import json
import math

import pytest

from jaxtrain.planning import sites_model as sites
from jaxtrain.planning.sites_model import Schedule, nominal_link

N = 1.378e9  # parameters of llama_1400m
BITS = {"bf16": 16, "int8": 8, "int4": 4, "int2": 2}
WHOLE = (1.0,)  # one fragment
# Percent of the time computing at 150 ms, with the exchange blocking: the columns are bf16 every
# step, then 30 steps with bf16, int8, 4 bits, 2 bits, and 100 steps with 4 bits.
TABLE = {
    (8.3, 100): (3, 47, 64, 78, 88, 92),
    (8.3, 1_000): (23, 90, 95, 97, 99, 99),
    (8.3, 10_000): (73, 99, 99, 100, 100, 100),
    (1.3, 100): (0, 12, 22, 36, 53, 65),
    (1.3, 1_000): (4, 58, 73, 84, 91, 95),
    (1.3, 10_000): (30, 93, 96, 98, 98, 99),
}
CASES = ((1, 16), (30, 16), (30, 8), (30, 4), (30, 2), (100, 4))  # period, bits


@pytest.mark.parametrize("step_s", [8.3, 1.3])
@pytest.mark.parametrize("mbit", [100, 1_000, 10_000])
def test_the_model_reproduces_the_shares_of_llama_1400m_on_eight_gpus(step_s, mbit):
    link = nominal_link(mbit, 150)
    for (period, bits), percent in zip(CASES, TABLE[step_s, mbit], strict=True):
        waited_s = sites.blocked_s(N * bits / 8, Schedule(period, 0, WHOLE), link)
        [share] = sites.waiting_share([step_s], [period], waited_s)
        # The table's step times are rounded: 8.3 s may be 8.25, and 1.3 s may be 1.25.
        low, high = (
            100 * sites.waiting_share([step_s + error], [period], waited_s)[0]
            for error in (-0.05, 0.05)
        )
        assert math.floor(low + 0.5) <= percent <= math.floor(high + 0.5), (period, bits, share)


def test_the_model_reproduces_the_seconds_of_an_exchange_and_the_links_that_hide_it():
    for bits, seconds in ((8, (138, 14, 1.7)), (4, (69, 7.2, 1.0))):
        for mbit, expected in zip((100, 1_000, 10_000), seconds, strict=True):
            found = sites.exchange_s(N * bits / 8, nominal_link(mbit, 150))
            assert found == pytest.approx(expected, abs=0.05 if expected < 10 else 0.5)
    for step_s, rates in ((8.3, (44, 22, 11)), (1.3, (284, 142, 71))):
        for bits, mbit in zip((8, 4, 2), rates, strict=True):
            whole = Schedule(30, 30, WHOLE)
            found = sites.hiding_bytes_per_s(N * bits / 8, whole, 0.15, step_s) * 8e-6
            rounding = 0.05 / step_s + 0.5 / mbit
            assert found == pytest.approx(mbit, rel=rounding)
    thirds = Schedule(30, 5, (1 / 3,) * 3)
    ratio = sites.hiding_bytes_per_s(N / 2, thirds, 0.0, 8.3) / sites.hiding_bytes_per_s(
        N / 2, Schedule(30, 30, WHOLE), 0.0, 8.3
    )
    assert ratio == pytest.approx(2)  # three fragments in 5 steps each


@pytest.mark.parametrize("schedule", [Schedule(30, 30, WHOLE), Schedule(30, 5, (0.5, 0.3, 0.2))])
def test_from_the_smallest_hiding_link_on_nothing_is_waited_for(schedule):
    rate = sites.hiding_bytes_per_s(N, schedule, 0.15, 1.3)
    waited = lambda factor: sites.visible_s(
        N, schedule, sites.SitesLink(factor * rate, 0.15, ""), 1.3
    )
    assert waited(1.0001) == 0 < waited(0.99)
    slow = sites.SitesLink(rate / 10, 0.15, "")
    assert waited(0.1) < sites.blocked_s(N, schedule, slow)
    assert sites.hiding_bytes_per_s(N, Schedule(30, 1, WHOLE), 0.15, 0.2) == math.inf


def test_unequal_sites_wait_for_the_slower_one_unless_their_rounds_take_equally_long():
    assert sites.waiting_share([8.0, 2.0], [30, 30], 0.0) == [1.0, 0.25]
    assert sites.equal_periods([8.0, 2.0], 30, 1) == [30, 120]
    assert sites.waiting_share([8.0, 2.0], [30, 120], 60.0) == [0.8, 0.8]


def test_the_link_is_read_from_a_file_of_the_probe(tmp_path):
    def row(start, end, streams, both, rate):
        names = {"from": start, "to": end, "streams": streams, "both": both}
        return names | {"bytes_per_s": rate, "rtt_p50_s": 0.15}

    pairs = [("a0", "b0"), ("b0", "a0"), ("a1", "b1"), ("b1", "a1")]
    rows = [row(*pair, 1, False, 9e9) for pair in pairs] + [row("a0", "a1", 8, True, 9e9)]
    rows += [row(*pair, streams, True, streams * 1e6) for pair in pairs for streams in (1, 8)]
    path = tmp_path / "network.json"
    site_of = {"a0": "a", "a1": "a", "b0": "b", "b1": "b"}
    path.write_text(json.dumps({"sites": site_of, "tcp": rows}))
    link = sites.read_link(path)
    # Two hosts, each with 8e6 bytes a second in both directions together.
    assert link.bytes_per_s == pytest.approx(8e6) and link.round_trip_s == 0.15
    path.write_text(json.dumps({"tcp": rows}))
    with pytest.raises(ValueError, match="--network must be a file of .*probe --sites"):
        sites.read_link(path)
    with pytest.raises(ValueError, match="positive link_mbit; got 0. Set --link_mbit"):
        nominal_link(0, 150)
