"""Reads the sites file, and derives which process sends which blocks to which process.

The sites file names the sites of a job, the addresses of their processes, and the job's key:

    {"version": 1, "job": "j-4f1c", "key": "64 hexadecimal digits",
     "sites": [{"name": "new_york", "processes": [{"address": "10.0.0.1", "port": 7301}]},
               {"name": "asuncion", "processes": [{"address": "10.1.0.1", "port": 7301}]}]}

Sites are ordered as in the file; sums over sites are taken in this order.
"""

import json
import os
import re
import stat
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

VERSION = 1
KEY_BYTES = 32
SITE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")  # names become parts of file names


@dataclass(frozen=True)
class Address:
    """Where a process listens for the processes of other sites."""

    address: str
    port: int

    def __str__(self) -> str:
        return (
            f"[{self.address}]:{self.port}"
            if ":" in self.address
            else f"{self.address}:{self.port}"
        )


@dataclass(frozen=True)
class Site:
    """A site and the addresses of its processes, in the order of their process numbers."""

    name: str
    processes: tuple[Address, ...]


@dataclass(frozen=True)
class SitesFile:
    """The content of a sites file. `key` authenticates and encrypts the job's connections."""

    job: str
    key: bytes = field(repr=False)  # never printed
    sites: tuple[Site, ...]

    @property
    def names(self) -> list[str]:
        return [site.name for site in self.sites]

    def index(self, name: str) -> int:
        """Returns a site's position in the file.

        Raises:
            ValueError: there is no such site.
        """
        if name not in self.names:
            raise ValueError(f"--site must be one of {self.names}; got {name!r}.")
        return self.names.index(name)


@dataclass(frozen=True)
class Link:
    """A process of another site, and the blocks of each fragment that both processes own.

    `ranges[f]` are blocks of fragment f. A range can be empty: such a link still carries the number
    of tokens and the checksum of a round.
    """

    site: int
    process: int
    ranges: tuple[range, ...]


def read_sites_file(path: str | Path) -> SitesFile:
    """Reads and checks a sites file.

    Raises:
        ValueError: other users may read the file, or its content is invalid.
        OSError: the file cannot be read.
    """
    with open(path, "rb") as file:
        mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
        if mode & 0o077:
            raise ValueError(
                f"--sites_file must be readable only by its owner because it contains the job's "
                f"key; got mode {mode:04o} of {path}. Create a new key, then `chmod 600 {path}`."
            )
        text = file.read()
    try:
        content = json.loads(text)
    except ValueError as error:
        raise ValueError(f"--sites_file must be JSON; got {path}: {error}") from None
    try:
        return _parse(content)
    except ValueError as error:
        raise ValueError(f"--sites_file={path}: {error}") from None


def _parse(content: Any) -> SitesFile:
    _check_fields("the file", content, {"version": int, "job": str, "key": str, "sites": list})
    if content["version"] != VERSION:
        raise ValueError(f"version must be {VERSION}; got {content['version']}.")
    if not content["job"]:
        raise ValueError("job must be the name of the job; got an empty string.")
    if not re.fullmatch(rf"[0-9a-fA-F]{{{2 * KEY_BYTES}}}", content["key"]):
        raise ValueError(
            f"key must be {2 * KEY_BYTES} hexadecimal digits; got {len(content['key'])} characters "
            "that are not shown. Create one with `openssl rand -hex 32`."
        )
    sites = tuple(_parse_site(i, site) for i, site in enumerate(content["sites"]))
    if len(sites) < 2:
        raise ValueError(f"sites must list at least two sites; got {len(sites)}.")
    _check_unique("names of sites", [site.name for site in sites])
    _check_unique("addresses of processes", [str(p) for site in sites for p in site.processes])
    return SitesFile(content["job"], bytes.fromhex(content["key"]), sites)


def _parse_site(index: int, site: Any) -> Site:
    _check_fields(f"sites[{index}]", site, {"name": str, "processes": list})
    name = site["name"]
    if not SITE_NAME.fullmatch(name):
        raise ValueError(
            f"sites[{index}].name must be at most 64 letters, digits, '_', '-' and '.', the first "
            f"one a letter or digit; got {name!r}."
        )
    if not site["processes"]:
        raise ValueError(f"processes of site {name} must list at least one process; got [].")
    processes = []
    for number, process in enumerate(site["processes"]):
        where = f"processes[{number}] of site {name}"
        _check_fields(where, process, {"address": str, "port": int})
        if not process["address"]:
            raise ValueError(f"{where}: address must be a host name or IP address; got ''.")
        if not 0 < process["port"] < 1 << 16:
            raise ValueError(f"{where}: port must be in [1, 65535]; got {process['port']}.")
        processes.append(Address(process["address"], process["port"]))
    return Site(name, tuple(processes))


def _check_fields(where: str, value: Any, types: dict[str, type]) -> None:
    """Raises ValueError unless `value` is an object with exactly these fields, of these types."""
    if not isinstance(value, dict):
        raise ValueError(f"{where} must be an object with {sorted(types)}; got {value!r}.")
    if value.keys() != types.keys():
        raise ValueError(f"{where} must have the fields {sorted(types)}; got {sorted(value)}.")
    for name, wanted in types.items():
        if type(value[name]) is not wanted:  # a bool is no port
            shown = "another type" if name == "key" else repr(value[name])
            raise ValueError(f"{where}: {name} must be of type {wanted.__name__}; got {shown}.")


def _check_unique(what: str, values: list[str]) -> None:
    if repeated := [value for value, count in Counter(values).items() if count > 1]:
        raise ValueError(f"{what} must be unique; got {repeated[0]} more than once.")


def owned_blocks(blocks: int, processes: int, process: int) -> range:
    """Returns the blocks of a fragment that a process of a site owns.

    The ranges of a site's processes are contiguous, disjoint and cover range(blocks); their lengths
    differ by at most one.
    """
    return range(blocks * process // processes, blocks * (process + 1) // processes)


def links(
    blocks_of_fragments: Sequence[int], sites_file: SitesFile, site: int, process: int
) -> list[Link]:
    """Returns a process's links in the order of (site, process).

    Two processes are linked if their shares of a site's work, as intervals of [0, 1], overlap. This
    depends on the numbers of processes alone, so every process has a link to every other site, even
    where a fragment has fewer blocks than a site has processes. Blocks that both processes own
    always belong to a link, because rounding the limits of the intervals down keeps their order.
    """
    own = len(sites_file.sites[site].processes)
    found = []
    for other_site, other in enumerate(sites_file.sites):
        theirs = len(other.processes)
        for other_process in range(theirs if other_site != site else 0):
            starts_before = process * theirs < (other_process + 1) * own
            if starts_before and other_process * own < (process + 1) * theirs:
                ranges = tuple(
                    _overlap(
                        owned_blocks(blocks, own, process),
                        owned_blocks(blocks, theirs, other_process),
                    )
                    for blocks in blocks_of_fragments
                )
                found.append(Link(other_site, other_process, ranges))
    return found


def _overlap(a: range, b: range) -> range:
    start = max(a.start, b.start)
    return range(start, max(start, min(a.stop, b.stop)))
