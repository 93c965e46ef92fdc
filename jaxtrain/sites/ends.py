"""Compares the sites' final weights, whose checksums no later code carries."""

import functools
import time
import zlib
from collections.abc import Sequence

import numpy as np

from jaxtrain.sites.errors import Disagreement
from jaxtrain.sites.fragments import DeviceLayout
from jaxtrain.sites.round import Codes, Outer, part_of_link

POLL_S = 0.05


def post_ends(exchange: Codes, layouts: Sequence[DeviceLayout], outer: Sequence[Outer]) -> None:
    """Sends the checksum of the final reference of each fragment to the sites that have it too."""
    away = exchange.away()
    for f, (layout, state) in enumerate(zip(layouts, outer, strict=True)):
        ends = _ends(exchange, layout, f, state.reference)
        contents = {i: end for i, end in ends.items() if exchange.links[i].site not in away}
        exchange.post("end", f, state.round, contents)


def compare_ends(
    exchange: Codes,
    layouts: Sequence[DeviceLayout],
    outer: Sequence[Outer],
    names: Sequence[str],
    timeout_s: float,
) -> list[str]:
    """Returns the names of the sites whose final checksums have not come within a time.

    Raises:
        Disagreement: a site has other final weights.
        SiteError, OSError: the exchange has failed.
    """
    deadline_s, away, late = time.monotonic() + timeout_s, exchange.away(), []
    sites: list[int] = sorted({link.site for link in exchange.links} - away)
    for site in sites:
        places = [("end", f, state.round, site) for f, state in enumerate(outer)]
        while not all(exchange.is_here(*place) for place in places):
            if time.monotonic() > deadline_s:
                late.append(names[site])
                break
            time.sleep(POLL_S)
        else:
            for (f, state), layout, place in zip(enumerate(outer), layouts, places, strict=True):
                own = _ends(exchange, layout, f, state.reference)
                for i, end in exchange.take(*place).items():
                    _check_equal(names[site], f, own[i], end)
    return late


def _ends(exchange: Codes, layout: DeviceLayout, f: int, reference: np.ndarray) -> dict[int, bytes]:
    """Returns {link index: checksum of the link's part of a reference}."""
    cut = functools.partial(part_of_link, layout, f)
    links = enumerate(exchange.links)
    return {i: zlib.crc32(reference[cut(link)].data).to_bytes(4, "big") for i, link in links}


def _check_equal(name: str, f: int, own: bytes, other: bytes) -> None:
    if own != other:
        raise Disagreement(
            f"the sites must end with equal weights; in fragment {f} those of site {name} have the "
            f"checksum {other.hex()}, those of this site {own.hex()}. The memory of one of their "
            "hosts is damaged. Resume all sites from an earlier checkpoint."
        )
