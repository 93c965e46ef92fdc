"""What a collective costs on a named link, by nominal figures: bytes over bandwidth, latency."""

import re
from typing import NamedTuple

from jaxtrain.metrics.hlo_collectives import Collective


class Link(NamedTuple):
    name: str
    bytes_per_s: float  # one way, nominal
    latency_s: float  # of one message


# Nominal: PCIe 16 lanes one way (PCI-SIG), Ethernet and InfiniBand by their names. Latencies are
# of the order that NCCL reaches on each; only small messages feel them.
LINKS = {
    link.name: link
    for link in (
        Link("pcie4", 32e9, 10e-6),
        Link("pcie5", 64e9, 10e-6),
        Link("ethernet1", 0.125e9, 50e-6),
        Link("ethernet10", 1.25e9, 50e-6),
        Link("ethernet25", 3.125e9, 40e-6),
        Link("ethernet100", 12.5e9, 20e-6),
        Link("infiniband400", 50e9, 5e-6),
    )
}
_WAN = re.compile(r"wan:([\d.]+)ms,([\d.]+)(g|m)bps")


SWITCHED = 600e9  # NVLink that joins all devices of a host, not a bridge between two of them


def usual_link(chip) -> str:
    """How a host's devices of a chip are joined as it is sold: NVLink, or PCIe."""
    if chip.nvlink_bytes_per_s >= SWITCHED and "PCIe" not in chip.kind:
        return "nvlink"
    return "pcie5" if chip.pcie_bytes_per_s > LINKS["pcie4"].bytes_per_s else "pcie4"


def parse_link(text: str, chip) -> Link:
    """A key of LINKS, "nvlink" (half of the chip's two ways), as "wan:150ms,1gbps"; "" is usual.

    Raises:
        ValueError: it is none of them, or the chip has no NVLink.
    """
    text = text or usual_link(chip)
    if text in LINKS:
        return LINKS[text]
    if text == "nvlink" and chip.nvlink_bytes_per_s:
        return Link("nvlink", chip.nvlink_bytes_per_s / 2, 5e-6)
    if found := _WAN.fullmatch(text):
        delay, rate, unit = found.groups()
        bits = float(rate) * {"g": 1e9, "m": 1e6}[unit]
        if bits > 0:
            return Link(text, bits / 8, float(delay) / 2_000)  # a round trip is two ways
    raise ValueError(
        f"a link must be nvlink, {', '.join(LINKS)} or as wan:150ms,1gbps; got {text!r} for "
        f"{chip.name}. Set --link, --host-link."
    )


def seconds_of(collective: Collective, inside: Link, between: Link) -> float:
    """Of all its turns, none hidden behind computation: a ring as slow as its slowest link."""
    link = between if collective.crosses_hosts else inside
    rounds = {"all-reduce": 2 * (collective.size - 1), "collective-permute": 1}
    messages = rounds.get(collective.kind, collective.size - 1) * collective.times
    return collective.wire_bytes / link.bytes_per_s + messages * link.latency_s
