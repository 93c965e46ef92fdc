"""Every collective of a compiled program: kind, payload, mesh axes, whether it leaves a host."""

import itertools
import math
import re
from collections import Counter
from typing import NamedTuple

import numpy as np

from pallas_kernels.hlo import Program, bytes_of

KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
_LISTED = re.compile(r"(?:replica_groups|source_target_pairs)=\{(\{[\d,{}]*\})\}")
_IOTA = re.compile(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?")
_MESH = re.compile(
    r"replica_groups=mesh\[([^\]]*)\](?:(?:, device_ids=)?\(\[([\d,]+)\](?:T\(([\d,]+)\))?\))? "
    r"\{([^}]*)\}"
)
_AXIS = re.compile(r"'(\w+)'(?:=(\d+))?(?::\((\d+)\)(\d+))?")


class Collective(NamedTuple):
    kind: str  # of KINDS
    payload_bytes: int  # a device's whole array: what it gathers, reduces or sends, one time
    axes: tuple[str, ...]  # of the mesh, along which it goes
    size: int  # devices of a group
    crosses_hosts: bool
    times: int  # a run of the program
    rings: int = 1  # most groups of one host that hold devices of other hosts too

    @property
    def host_bytes(self) -> float:
        """What such a host sends to others in all: each ring leaves it once."""
        return self.rings * self.wire_bytes if self.crosses_hosts else 0.0

    @property
    def wire_bytes(self) -> float:
        """What a device sends in all, by the ring's count; a permute sends its payload."""
        share = (self.size - 1) / self.size
        passes = {"all-reduce": 2 * share, "collective-permute": 1}.get(self.kind, share)
        return self.times * passes * self.payload_bytes


def _numbers(text):
    return [int(x) for x in text.split(",") if x]


def _iota(sizes, turned=None):
    """The devices in order, reshaped, axes turned."""
    devices = np.arange(math.prod(sizes)).reshape(sizes)
    return devices.transpose(turned) if turned else devices


def _along(listed, mesh_text, shape, turned):
    """Groups along named axes of a mesh, or parts of them: 'x':(2)4 is 4 after the first 2."""
    names = [(name, int(size)) for name, size, *_ in _AXIS.findall(mesh_text)]
    sizes = [size for _, size in names]
    devices = _iota(_numbers(shape), _numbers(turned or "")) if shape else _iota(sizes)
    wanted = {
        name: (int(before or 1), int(part)) if part else (1, dict(names)[name])
        for name, _, before, part in _AXIS.findall(listed)
    }
    split, moving = [], []
    for name, size in names:
        before, part = wanted.get(name, (1, 1))
        moving.append(len(split) + 1)
        split += [before, part, size // before // part]
    devices = np.moveaxis(devices.reshape(split), moving, range(-len(moving), 0))
    return devices.reshape(-1, math.prod(part for _, part in wanted.values()))


def parse_groups(attributes: str, devices: int) -> list[list[int]]:
    """Groups of an instruction's attributes, in any of XLA's three forms; none named is all.

    Raises:
        ValueError: they are in no form that is known.
    """
    if found := _LISTED.search(attributes):
        return [_numbers(group) for group in re.findall(r"\{([\d,]*)\}", found[1])]
    if found := _IOTA.search(attributes):
        groups = _iota(_numbers(found[2]), _numbers(found[3] or ""))
        return groups.reshape(_numbers(found[1])).tolist()
    if found := _MESH.search(attributes):
        return _along(found[4], found[1], found[2], found[3]).tolist()
    if "replica_groups={}" in attributes or "replica_groups" not in attributes:
        return [list(range(devices))]
    raise ValueError(f"a collective's groups must be in a known form; got {attributes[:200]!r}")


def _axes(groups, mesh) -> tuple[str, ...]:
    """Mesh axes along which the devices of a group differ."""
    places = np.stack(np.unravel_index(np.arange(mesh.size), mesh.devices.shape), -1)
    moves = np.zeros(len(mesh.axis_names), bool)
    for group in groups:
        moves |= (places[group] != places[group[0]]).any(0)
    return tuple(itertools.compress(mesh.axis_names, moves))


def _hosts(mesh, names):
    processes = [device.process_index for device in mesh.devices.flat]
    return np.array([names[i] for i in processes] if names else processes)


def _rings(groups, hosts) -> int:
    """Most groups that one host shares with others."""
    shared = [set(hosts[group]) for group in groups]
    counts = Counter(host for members in shared if len(members) > 1 for host in members)
    return max(counts.values(), default=0)


def find_collectives(program: Program, mesh, names=None) -> list[Collective]:
    """Those of more than one device, in the order they run in; loops turned.

    Args:
        program: compiled for `mesh`, devices in its order.
        names: of each process's host; None: each process is on one of its own.
    """
    found, hosts = [], _hosts(mesh, names)
    for i, types, times in program.executed():
        kind = i.op.removesuffix("-start")
        if kind not in KINDS or i.op.endswith("-done"):
            continue
        groups = parse_groups(i.rest, mesh.size)
        size = 2 if kind == "collective-permute" else len(groups[0])
        if size < 2:
            continue
        given = sum(bytes_of(types[name]) for name in i.operands)
        # Gathered is what all give; reduced, scattered and exchanged is what each gives.
        payload = given * size if kind == "all-gather" else given
        rings, axes = _rings(groups, hosts), _axes(groups, mesh)
        found.append(Collective(kind, payload, axes, size, rings > 0, times, rings))
    return found
