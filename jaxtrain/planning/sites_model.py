"""Predicts what it costs several sites to train one model together, before anything runs.

An exchange of `n` bytes over a link takes n / rate + 2 round trips. In one period a site computes
`period` steps. If it waits for each exchange (delay 0), the time of an exchange is added to that of
the steps. With a delay it trains on meanwhile, and nothing is added while the exchange takes no
longer than `delay` steps. docs/sites.md derives the formulas and compares them with measurements.
"""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

ROUND_TRIPS = 2  # of an exchange, besides the transfer
UTILISATION = 0.8  # of a link's nominal rate; a measured rate is used as it is
FLOAT_BYTES = 4


class SitesLink(NamedTuple):
    """The link between two sites."""

    bytes_per_s: float  # of payload in one direction, all streams of all hosts together
    round_trip_s: float
    source: str  # where the two numbers come from

    @property
    def fixed_s(self) -> float:
        return ROUND_TRIPS * self.round_trip_s


class Schedule(NamedTuple):
    """When fragments are exchanged: section `sites` of the config."""

    period: int  # steps between two rounds of a fragment
    delay: int  # steps from a round's start to its application; 0: the site waits
    fragments: Sequence[float]  # each one's share of the parameters
    blend: bool = False  # whether sites keep a share of their differences


def nominal_link(mbit_per_s: float, round_trip_ms: float) -> SitesLink:
    """Returns a link of which a transfer reaches UTILISATION of the nominal rate.

    Raises:
        ValueError: a number is not positive, or not finite.
    """
    for flag, value in (("link_mbit", mbit_per_s), ("link_rtt_ms", round_trip_ms)):
        if not 0 < value < math.inf:
            raise ValueError(f"the link must have a positive {flag}; got {value}. Set --{flag}.")
    text = f"{mbit_per_s:g} Mbit/s at {UTILISATION:.0%}, round trip {round_trip_ms:g} ms"
    return SitesLink(UTILISATION * mbit_per_s * 1e6 / 8, round_trip_ms / 1e3, text)


def read_link(path: str | Path) -> SitesLink:
    """Returns the link that `python -m launch.probe --sites=... --out=FILE` measured.

    Its rate is that of the slower direction while both are used, with the best number of streams.
    A host's rate is the mean over the hosts that it was measured to, and the rates of the hosts at
    the smaller site are added.

    Raises:
        ValueError: the file is not of this form, or has no pair of hosts at different sites.
    """
    try:
        found = json.loads(Path(path).read_text())
        site_of = found["sites"]
        rows = [row for row in found["tcp"] if site_of[row["from"]] != site_of[row["to"]]]
        rows = [row for row in rows if row["both"]]
        rates: dict[tuple[str, str, int], dict[str, list[float]]] = {}
        for row in rows:
            way = site_of[row["from"]], site_of[row["to"]]
            small = min(way, key=lambda site: (list(site_of.values()).count(site), site))
            host = row["from"] if way[0] == small else row["to"]
            by_host = rates.setdefault((*way, row["streams"]), {})
            by_host.setdefault(host, []).append(row["bytes_per_s"] / 2)  # both directions
        totals: dict[tuple[str, str], float] = {}
        for (start, end, _), by_host in rates.items():
            total = sum(map(fmean, by_host.values()))
            totals[start, end] = max(total, totals.get((start, end), 0.0))
        rate, round_trip_s = min(totals.values()), max(row["rtt_p50_s"] for row in rows)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            "--network must be a file of `python -m launch.probe --sites=A.toml,B.toml`; got "
            f"{path}: {type(error).__name__}: {error}."
        ) from None
    text = f"{rate * 8e-6:,.0f} Mbit/s, round trip {round_trip_s * 1e3:.0f} ms, measured: {path}"
    return SitesLink(rate, round_trip_s, text)


def exchange_s(code_bytes: float, link: SitesLink) -> float:
    """Returns the seconds of one exchange of a code of this size."""
    return code_bytes / link.bytes_per_s + link.fixed_s


def waiting_share(step_s: Sequence[float], periods: Sequence[int], waited_s: float) -> list[float]:
    """Returns the share of its time in which each site computes, if each round waits for waited_s.

    Args:
        step_s: seconds of a step at each site.
        periods: steps of a round at each site. Every site waits for the slowest one.
    """
    computing_s = [step * period for step, period in zip(step_s, periods, strict=True)]
    round_s = max(computing_s) + waited_s
    return [seconds / round_s for seconds in computing_s]


def blocked_s(code_bytes: float, schedule: Schedule, link: SitesLink) -> float:
    """Returns the seconds of a period that a site waits if it waits for every exchange."""
    return sum(exchange_s(code_bytes * share, link) for share in schedule.fragments)


def visible_s(code_bytes: float, schedule: Schedule, link: SitesLink, step_s: float) -> float:
    """Returns the seconds of a period that remain of the exchanges while the site trains on.

    An exchange is hidden for `delay` steps. All fragments share the link, so the exchanges of a
    period also take at least as long as their transfers one after another.

    Args:
        step_s: seconds of the slowest site's step, for which the others wait anyway.
    """
    hidden_s = schedule.delay * step_s
    late_s = sum(
        max(0.0, exchange_s(code_bytes * share, link) - hidden_s) for share in schedule.fragments
    )
    return max(late_s, code_bytes / link.bytes_per_s - schedule.period * step_s, 0.0)


def hiding_bytes_per_s(
    code_bytes: float, schedule: Schedule, round_trip_s: float, step_s: float
) -> float:
    """Returns the smallest rate of payload at which `visible_s` is 0; infinite if there is none."""
    window_s = schedule.delay * step_s - ROUND_TRIPS * round_trip_s
    if window_s <= 0:
        return math.inf
    largest = code_bytes * max(schedule.fragments)
    return max(largest / window_s, code_bytes / (schedule.period * step_s))


def equal_periods(step_s: Sequence[float], period: int, fragments: int) -> list[int]:
    """Returns for each site the steps of a round that take as long as `period` of the slowest's.

    They are multiples of the number of fragments, so that these start at equal shares of a round.
    """
    units = [period * max(step_s) / seconds / fragments for seconds in step_s]
    return [fragments * max(1, round(unit)) for unit in units]


def disk_bytes(
    code_bytes: float, sites: int, period: int, save_every: int, keep_last: int
) -> float:
    """Returns the most bytes of codes on one site's disks, over all its hosts together.

    A save removes the received codes that none of the `keep_last` checkpoints before it needs. So
    just before it there are, for each other site, the codes of keep_last + 1 intervals and of a
    pending round, and a copy of this site's code of one round. Source: add_outer_state in
    jaxtrain/sites/outer_state.py.
    """
    rounds = math.ceil((keep_last + 1) * save_every / period) + 1
    return (sites - 1) * (rounds + 1) * code_bytes


def outer_bytes(
    parameters: int, schedule: Schedule, code_bytes: float, sites: int, lossless: bool
) -> float:
    """Returns the host memory of one site's outer state, over all its hosts together.

    Each parameter has a reference, a momentum and, with a lossy code, an error, all in float32.
    While a fragment is exchanged, these three exist twice, together with the weights that it
    started from, what is encoded of them, with sites.blend what the site keeps of its difference
    from the mean, the codes of all sites, and a second copy of this site's code for sending.
    Source: run_round in jaxtrain/sites/round.py.
    """
    gap = schedule.period / len(schedule.fragments)
    at_once = min(len(schedule.fragments), max(1, math.ceil(schedule.delay / gap)))
    share = min(1.0, max(schedule.fragments) * at_once)
    kept, exchanged = (2, 3) if lossless else (3, 5)
    vectors = kept + share * (exchanged + schedule.blend)
    return FLOAT_BYTES * parameters * vectors + share * (sites + 1) * code_bytes
