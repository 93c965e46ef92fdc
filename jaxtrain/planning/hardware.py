"""GPUs to plan for, the links between them, and the time of a collective on a link."""

import re
from typing import NamedTuple

from jaxtrain.config.train_config import TrainConfig
from jaxtrain.distributed import memory
from jaxtrain.metrics.hlo_collectives import Collective
from jaxtrain.ops.precision import resolve_dtype_for_chip
from jaxtrain.training.remat import AUTO, choose_remat
from pallas_kernels.chip import Chip


class Link(NamedTuple):
    name: str
    bytes_per_s: float  # in one direction, nominal
    latency_s: float  # of one message


# Nominal bandwidths in one direction: PCIe with 16 lanes (PCI-SIG); the others by their names.
# Latencies are of the order that NCCL reaches; they matter only for small messages.
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


class Hardware(NamedTuple):
    """GPUs of one kind on one or more hosts."""

    chip: Chip
    gpus: int  # on each host
    hosts: int
    link: Link  # between the GPUs of a host
    host_link: Link  # between hosts

    @property
    def devices(self) -> int:
        return self.gpus * self.hosts

    @property
    def peak_flops(self) -> float:
        """Returns the peak bfloat16 FLOP/s of all devices together."""
        return self.chip.peak_flops["bfloat16"] * self.devices

    @property
    def usable_bytes(self) -> int:
        """Returns the memory of one device that training may allocate."""
        return memory.usable_bytes(self.chip.hbm_bytes)


def parse_link(text: str, chip: Chip) -> Link:
    """Parses a name in LINKS, "nvlink" or "wan:150ms,1gbps"; "" is what hosts with the chip have.

    Raises:
        ValueError: the text is none of these, or the chip has no NVLink.
    """
    if not text:
        text = "pcie5" if chip.pcie_bytes_per_s > LINKS["pcie4"].bytes_per_s else "pcie4"
        text = "nvlink" if chip.nvlink_switched else text
    if text in LINKS:
        return LINKS[text]
    if text == "nvlink" and chip.nvlink_bytes_per_s:
        # The chip table has the sum of both directions.
        return Link("nvlink", chip.nvlink_bytes_per_s / 2, 5e-6)
    if match := _WAN.fullmatch(text):
        round_trip_ms, rate, unit = match.groups()
        bits_per_s = float(rate) * {"g": 1e9, "m": 1e6}[unit]
        if bits_per_s > 0:
            return Link(text, bits_per_s / 8, float(round_trip_ms) / 2_000)
    raise ValueError(
        f"a link must be nvlink, {', '.join(LINKS)} or of the form wan:150ms,1gbps; got {text!r} "
        f"for {chip.name}. Set --link, --host_link."
    )


def build_hardware(chip: Chip, gpus: int, hosts: int, link: str, host_link: str) -> Hardware:
    """Builds Hardware from names of links, as parse_link accepts them."""
    return Hardware(chip, gpus, hosts, parse_link(link, chip), parse_link(host_link, chip))


def collective_seconds(collective: Collective, hardware: Hardware) -> float:
    """Returns the time of all executions of a collective in a step, with nothing overlapped.

    Assumes NCCL's ring algorithm, which runs at the speed of the slowest link in the ring.
    """
    link = hardware.host_link if collective.crosses_hosts else hardware.link
    rounds = {"all-reduce": 2 * (collective.size - 1), "collective-permute": 1}
    messages = rounds.get(collective.kind, collective.size - 1) * collective.times
    return collective.wire_bytes / link.bytes_per_s + messages * link.latency_s


def resolve_remat_for(cfg: TrainConfig, hardware: Hardware) -> tuple[TrainConfig, str]:
    """Returns (cfg with model.remat=auto replaced as a run would, the reason; "" if not auto)."""
    if cfg.model.remat != AUTO:
        return cfg, ""
    chip = hardware.chip
    return choose_remat(cfg, hardware.devices, hardware.usable_bytes, chip.arch, chip.name)


def resolve_for(cfg: TrainConfig, hardware: Hardware) -> TrainConfig:
    """Returns cfg with model.dtype=auto and model.remat=auto replaced as a run would."""
    return resolve_remat_for(resolve_dtype_for_chip(cfg, hardware.chip), hardware)[0]
