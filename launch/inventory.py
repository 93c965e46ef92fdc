"""Reads the hosts of a job from a TOML file.

ranks = "host"                # one process per "host" (with all its GPUs) or per "gpu"
[defaults]                    # any key of a host
workdir = "~/jaxtrain"        # on the host's local disk: code, logs, job status
python = "~/venv/bin/python"  # 3.11 or newer, with the project's dependencies
[[hosts]]
name = "a40-1"                # prefix of its log lines
ssh = "a40-1.asu"             # the destination for `ssh`; by default the name
address = "10.0.0.11"         # on the training network
gpus = 8
chip = "a40"
"""

import dataclasses
import difflib
import ipaddress
import tomllib
from collections.abc import Iterable
from pathlib import Path
from typing import Any


@dataclasses.dataclass(frozen=True)
class Host:
    """One host. `ssh`, `user` and `port` go to OpenSSH, which also reads its own configuration."""

    name: str
    address: str  # IP on the training network; a loopback address only for a single host
    ssh: str = ""
    user: str = ""
    port: int = 0  # 0: from ssh's configuration
    workdir: str = "~/jaxtrain"
    python: str = "python3"
    gpus: int = 0
    chip: str = ""
    interface: str = ""  # for NCCL and the byte counters; "": the one that has the address
    site: str = ""

    @property
    def target(self) -> str:
        return self.ssh or self.name


FIELD_TYPES = {field.name: type(field.default) for field in dataclasses.fields(Host)}
FIELD_TYPES |= {"name": str, "address": str}  # they have no default


@dataclasses.dataclass(frozen=True)
class Inventory:
    """The hosts of one job."""

    hosts: tuple[Host, ...]
    ranks: str = "host"

    @property
    def ranks_per_host(self) -> int:
        return self.hosts[0].gpus if self.ranks == "gpu" else 1


def read_inventory(path: str | Path) -> Inventory:
    """Returns the inventory in a TOML file.

    Raises:
        ValueError: the inventory is invalid. The text names the host, the key and what to write.
    """
    return parse_inventory(read_toml(path, "--hosts"), str(path))


def read_toml(path: str | Path, flag: str) -> dict[str, Any]:
    """Returns the content of a TOML file.

    Args:
        flag: the flag that gave the path, for the error.

    Raises:
        ValueError: there is no such file, or it is not TOML.
    """
    try:
        return tomllib.loads(Path(path).read_text())
    except FileNotFoundError:
        raise ValueError(f"{flag} must name a file; got {path}.") from None
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"{flag} must be TOML; got {path}: {error}.") from None


def parse_inventory(content: dict[str, Any], source: str) -> Inventory:
    """Returns the inventory in a parsed file; its errors name the file as `source`."""
    _check_keys(content, ("ranks", "defaults", "hosts"), source)
    defaults, entries = content.get("defaults", {}), content.get("hosts")
    if not isinstance(entries, list) or not entries:
        raise ValueError(f"{source} must list its hosts as [[hosts]]; got {entries!r}.")
    hosts = []
    for i, entry in enumerate(entries):
        values = defaults | entry
        name = f"{source}: host {values.get('name', i)}"
        _check_keys(values, FIELD_TYPES, name)
        for key, value in values.items():
            if type(value) is not FIELD_TYPES[key]:
                kind = FIELD_TYPES[key].__name__
                raise ValueError(f"{name}: {key} must be of type {kind}; got {value!r}.")
        missing = [key for key in ("name", "address") if not values.get(key)]
        if missing:
            raise ValueError(f"{name} must have {' and '.join(missing)}.")
        hosts.append(Host(**values))
    inventory = Inventory(tuple(hosts), content.get("ranks", "host"))
    for host in hosts:
        _check_host(host, len(hosts), f"{source}: host {host.name!r}")
    _check_together(inventory, source)
    return inventory


def _check_keys(values: dict[str, Any], known: Iterable[str], source: str) -> None:
    for key in values:
        if key not in known:
            nearest = difflib.get_close_matches(key, known, 1, cutoff=0.0)[0]
            raise ValueError(f"{source}: no key {key!r}. Did you mean {nearest!r}?")


def _check_host(host: Host, count: int, source: str) -> None:
    for key in ("name", "ssh", "user", "python", "workdir"):
        value = getattr(host, key)
        if value.startswith("-") or not value.isprintable():  # ssh would read it as an option
            raise ValueError(
                f"{source}: {key} must be printable and must not begin with '-'; got {value!r}."
            )
    if not all(letter.isalnum() or letter in "._-" for letter in host.name):
        raise ValueError(f"{source}: name must consist of letters, digits and . _ - only.")
    try:
        address = ipaddress.ip_address(host.address)
    except ValueError:
        raise ValueError(f"{source}: address must be an IP; got {host.address!r}.") from None
    if address.is_unspecified or (address.is_loopback and count > 1):
        raise ValueError(
            f"{source}: address must be reachable from the other hosts; got {host.address}. "
            "Set it to this host's IP on the training network."
        )


def _check_together(inventory: Inventory, source: str) -> None:
    """Checks that names and addresses are unique, and that the hosts' gpus and site are equal."""
    hosts = inventory.hosts
    for key in ("name", "address"):
        values = [getattr(host, key) for host in hosts]
        repeated = sorted({value for value in values if values.count(value) > 1})
        if repeated:
            raise ValueError(f"{source}: each host's {key} must be unique; got {repeated} twice.")
    if inventory.ranks not in ("host", "gpu"):
        raise ValueError(f'{source}: ranks must be "host" or "gpu"; got {inventory.ranks!r}.')
    counts = {host.name: host.gpus for host in hosts}
    if len(set(counts.values())) > 1 or (inventory.ranks == "gpu" and not any(counts.values())):
        raise ValueError(
            f"{source}: every host must have as many gpus as the others, and at least 1 if ranks "
            f'is "gpu"; got {counts}.'
        )
    sites = {host.site for host in hosts}
    if len(sites) > 1:
        raise ValueError(
            f"{source}: a job's hosts must be at one site; got {sorted(sites)}. With 150 ms "
            "between hosts, a step is 60 times slower: start one job per site."
        )
