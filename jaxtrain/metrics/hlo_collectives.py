"""Lists a compiled program's collectives: kind, payload, mesh axes, whether they cross hosts.

Source: XLA's text form of HLO, https://openxla.org/xla/operation_semantics
"""

import itertools
import math
import re
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jax.sharding import Mesh

from pallas_kernels.hlo import Program, bytes_of

KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
# XLA writes the groups of devices in one of three forms:
#   replica_groups={{0,2},{1,3}}        listed
#   replica_groups=[4,2]<=[2,4]T(1,0)   iota: reshape arange(8) to [2,4], transpose, cut into [4,2]
#   replica_groups=mesh['a'=2,'b'=4] {'b'}   all devices along the named axes of a mesh
_LISTED = re.compile(r"(?:replica_groups|source_target_pairs)=\{(\{[\d,{}]*\})\}")
_IOTA = re.compile(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?")
_MESH = re.compile(
    r"replica_groups=mesh\[([^\]]*)\](?:(?:, device_ids=)?\(\[([\d,]+)\](?:T\(([\d,]+)\))?\))? "
    r"\{([^}]*)\}"
)
_AXIS = re.compile(r"'(\w+)'(?:=(\d+))?(?::\((\d+)\)(\d+))?")


class Collective(NamedTuple):
    """A collective operation between the devices of each group."""

    kind: str  # one of KINDS
    payload_bytes: int  # of the array that a device gathers, reduces or sends per execution
    axes: tuple[str, ...]  # mesh axes along which the devices of a group differ
    size: int  # devices of a group
    crosses_hosts: bool
    times: int  # executions in one run of the program
    rings: int = 1  # the most groups across hosts that any one host takes part in

    @property
    def host_bytes(self) -> float:
        """Bytes that one host sends to others in all executions: each ring leaves a host once."""
        return self.rings * self.wire_bytes if self.crosses_hosts else 0.0

    @property
    def wire_bytes(self) -> float:
        """Bytes that one device sends in all executions with a ring algorithm.

        In a ring of n devices each pass moves (n - 1) / n of the array over every link. An
        all-reduce takes two passes (reduce-scatter, all-gather); a permute sends its payload once.
        """
        share = (self.size - 1) / self.size
        passes = {"all-reduce": 2 * share, "collective-permute": 1}.get(self.kind, share)
        return self.times * passes * self.payload_bytes


def _parse_numbers(text: str) -> list[int]:
    return [int(x) for x in text.split(",") if x]


def _iota(sizes: list[int], permutation: list[int] | None = None) -> np.ndarray:
    """Returns the device numbers in order, reshaped and then transposed."""
    devices = np.arange(math.prod(sizes)).reshape(sizes)
    return devices.transpose(permutation) if permutation else devices


def _groups_along_axes(listed: str, mesh_text: str, shape: str, permutation: str) -> np.ndarray:
    """Returns the groups along named mesh axes or parts of them, one group per row.

    'x':(2)4 is a part: x is split into (2, 4, the rest), and the group goes along the 4.
    """
    names = [(name, int(size)) for name, size, *_ in _AXIS.findall(mesh_text)]
    sizes = [size for _, size in names]
    order = _parse_numbers(permutation or "")
    devices = _iota(_parse_numbers(shape), order) if shape else _iota(sizes)
    wanted = {
        name: (int(before or 1), int(part)) if part else (1, dict(names)[name])
        for name, _, before, part in _AXIS.findall(listed)
    }
    # Split every axis in three, then move the middle parts, which span the groups, to the end.
    split, middles = [], []
    for name, size in names:
        before, part = wanted.get(name, (1, 1))
        middles.append(len(split) + 1)
        split += [before, part, size // before // part]
    devices = np.moveaxis(devices.reshape(split), middles, range(-len(middles), 0))
    return devices.reshape(-1, math.prod(part for _, part in wanted.values()))


def parse_groups(attributes: str, devices: int) -> list[list[int]]:
    """Returns the groups of devices in an instruction's attributes; all devices if none are named.

    Raises:
        ValueError: the groups are written in an unknown form.
    """
    if match := _LISTED.search(attributes):
        return [_parse_numbers(group) for group in re.findall(r"\{([\d,]*)\}", match[1])]
    if match := _IOTA.search(attributes):
        groups = _iota(_parse_numbers(match[2]), _parse_numbers(match[3] or ""))
        return groups.reshape(_parse_numbers(match[1])).tolist()
    if match := _MESH.search(attributes):
        return _groups_along_axes(match[4], match[1], match[2], match[3]).tolist()
    if "replica_groups={}" in attributes or "replica_groups" not in attributes:
        return [list(range(devices))]
    raise ValueError(f"a collective's groups must be in a known form; got {attributes[:200]!r}")


def _axes_of(groups: list[list[int]], mesh: Mesh) -> tuple[str, ...]:
    """Returns the mesh axes along which the devices of a group differ."""
    coordinates = np.stack(np.unravel_index(np.arange(mesh.size), mesh.devices.shape), -1)
    differs = np.zeros(len(mesh.axis_names), bool)
    for group in groups:
        differs |= (coordinates[group] != coordinates[group[0]]).any(0)
    return tuple(itertools.compress(mesh.axis_names, differs))


def _hosts_of(mesh: Mesh, names: Sequence[str] | None) -> np.ndarray:
    """Returns the host of each device of the mesh."""
    processes = [device.process_index for device in mesh.devices.flat]
    return np.array([names[i] for i in processes] if names else processes)


def _count_rings(groups: list[list[int]], hosts: np.ndarray) -> int:
    """Returns the most groups across hosts that any one host takes part in."""
    shared = [set(hosts[group]) for group in groups]
    counts = Counter(host for members in shared if len(members) > 1 for host in members)
    return max(counts.values(), default=0)


def find_collectives(
    program: Program, mesh: Mesh, names: Sequence[str] | None = None
) -> list[Collective]:
    """Returns the collectives between devices in execution order; `times` counts loop iterations.

    Args:
        program: compiled for `mesh`, with devices in the mesh's order.
        names: name of each process's host; None: every process has its own host.
    """
    collectives, hosts = [], _hosts_of(mesh, names)
    for i, types, times in program.executed():
        kind = i.op.removesuffix("-start")
        if kind not in KINDS or i.op.endswith("-done"):
            continue
        groups = parse_groups(i.rest, mesh.size)
        size = 2 if kind == "collective-permute" else len(groups[0])
        if size < 2:
            continue
        operand_bytes = sum(bytes_of(types[name]) for name in i.operands)
        # An all-gather's operand is one shard of the payload; that of the others is all of it.
        payload = operand_bytes * size if kind == "all-gather" else operand_bytes
        rings, axes = _count_rings(groups, hosts), _axes_of(groups, mesh)
        collectives.append(Collective(kind, payload, axes, size, rings > 0, times, rings))
    return collectives
