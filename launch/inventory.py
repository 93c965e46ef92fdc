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
site_address = "203.0.113.7"  # how hosts of another site reach this one; by default its address
site_port = 7301              # where it listens for them; by default launch chooses one
"""

import collections
import dataclasses
import difflib
import ipaddress
import re
import tomllib
import unicodedata
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from launch.places import Places


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
    site: str = ""  # all hosts of an inventory are at one
    site_address: str = ""  # at which hosts of other sites reach this one; "": its address
    site_port: int = 0  # of the host's first process, the next ones follow; 0: launch chooses

    @property
    def target(self) -> str:
        return self.ssh or self.name


FIELD_TYPES = {field.name: type(field.default) for field in dataclasses.fields(Host)}
FIELD_TYPES |= {"name": str, "address": str}  # they have no default
TYPE_NAMES = {str: "a string", int: "an integer", list: "a list", dict: "a table"}

# key -> (what its text must match, what the user reads if it does not). "" is the default of most.
PATTERNS = {
    "name": (
        r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}",
        "begin with a letter or digit and consist of at most 64 ASCII letters, digits and . _ -",
    ),
    "ssh": (
        # ssh divides at the last @, as the users of some directory services contain one.
        r"((?!-)[^\s/\"'\\]+@)?(?!-|[^:]*:[^:]*$)[^\s/\"'\\@]+|",
        "be a host name or an alias of ssh's configuration, such as h0 or root@h0, not a URL; a "
        "port belongs in the key port",
    ),
    "user": (r"(?!-)[^\s/\"':]*", "be a user name"),
    "workdir": (r"(/|~/)[^:]+", "be an absolute path, or begin with ~/, and have no colon"),
    "python": (r"(?![-\s]|~(?!/)).+", "be a program's name or path, of which only ~/ is expanded"),
    "chip": (r"[A-Za-z0-9._-]*", "consist of ASCII letters, digits and . _ -"),
    "interface": (r"[A-Za-z0-9][A-Za-z0-9._:@-]{0,14}|", "be a name of at most 15 characters"),
}
# keys that all hosts of a job share -> why, or what to do instead
EQUAL = {
    "gpus": "Leave out the hosts that have fewer.",
    "site": "With 150 ms between hosts, a step is over 100 times slower: write an inventory for "
    "each site, and name them in --sites.",
}
RANGES = {"port": (0, 65_535), "gpus": (0, 1_024), "site_port": (0, 65_535)}


@dataclasses.dataclass(frozen=True)
class Inventory:
    """The hosts of one job."""

    hosts: tuple[Host, ...]
    ranks: str = "host"

    @property
    def ranks_per_host(self) -> int:
        return self.hosts[0].gpus if self.ranks == "gpu" else 1


def read_inventory(path: str | Path, flag: str = "--hosts") -> Inventory:
    """Returns the inventory in a TOML file.

    Args:
        flag: the flag that gave the path, for the error.

    Raises:
        ValueError: the inventory is invalid. The text names the file, line, host and key, and what
            to write.
    """
    return parse_inventory(_read_text(path, flag), str(path))


def read_toml(path: str | Path, flag: str) -> dict[str, Any]:
    """Returns the content of a TOML file.

    Args:
        flag: the flag that gave the path, for the error.

    Raises:
        ValueError: the path is no file that can be read, or it is not TOML.
    """
    return _parse_toml(_read_text(path, flag), f"{flag} must be TOML; got {path}")


def _read_text(path: str | Path, flag: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8-sig")  # Windows' editors write a mark first
    except OSError as error:
        raise ValueError(f"{flag} must name a file; got {path}: {error.strerror}.") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{flag} must be UTF-8; got byte {error.start} of {path}.") from None


def _parse_toml(text: str, source: str) -> dict[str, Any]:
    try:
        return tomllib.loads(text)
    except RecursionError:
        raise ValueError(f"{source}: its brackets are nested too deeply.") from None
    except ValueError as error:  # TOMLDecodeError, or an integer of thousands of digits
        raise ValueError(f"{source}: {error}.") from None


def parse_inventory(text: str, source: str) -> Inventory:
    """Returns the inventory in the text of a file; its errors name the file as `source`."""
    content, places = _parse_toml(text, source), Places(text, source)
    for key in content:
        _check_key(key, ("ranks", "defaults", "hosts"), places.find(key=key))
    defaults, entries = content.get("defaults", {}), content.get("hosts")
    if not isinstance(defaults, dict):
        raise ValueError(
            f"{places.find(key='defaults')}: defaults must be a table; got {defaults}."
        )
    if not isinstance(entries, list) or not entries:
        raise ValueError(
            f"{places.find(key='hosts')}: hosts must be listed as [[hosts]]; got {entries!r}."
        )
    for key, value in defaults.items():
        _check_value(key, value, f"{places.find('defaults', key)}: defaults")
    hosts = [_parse_host(i, defaults, entry, places) for i, entry in enumerate(entries)]
    if content.get("ranks", "host") not in ("host", "gpu"):
        raise ValueError(
            f'{places.find(key="ranks")}: ranks must be "host" or "gpu"; got {content["ranks"]!r}.'
        )
    inventory = Inventory(tuple(hosts), content.get("ranks", "host"))
    _check_together(inventory, places)
    return inventory


def _parse_host(index: int, defaults: dict[str, Any], entry: Any, places: Places) -> Host:
    if not isinstance(entry, dict):
        raise ValueError(
            f"{places.find(key='hosts')}: each host must be a table, [[hosts]] with name and "
            f"address; got {entry!r}."
        )
    values = defaults | entry
    name = values.get("name", "")
    place = lambda key="": places.find_host(index, name if isinstance(name, str) else "", key)
    for key, value in values.items():
        _check_value(key, value, place(key))
    if missing := [key for key in ("name", "address") if not values.get(key)]:
        raise ValueError(f"{place()} must have {' and '.join(missing)}.")
    host = Host(**values)
    if host.user and "@" in host.ssh:
        raise ValueError(
            f"{place('ssh')}: the user must be given once; got user {host.user!r} and "
            f"ssh {host.ssh!r}."
        )
    site_address = str(_ip(host.site_address)) if host.site_address else ""
    return dataclasses.replace(host, address=str(_ip(host.address)), site_address=site_address)


def _check_key(key: str, known: Iterable[str], place: str) -> None:
    if key not in known:
        nearest = difflib.get_close_matches(key, known, 1, cutoff=0.0)[0]
        raise ValueError(f"{place}: no key {ascii(key)}. Did you mean {nearest!r}?")


def _check_value(key: str, value: Any, place: str) -> None:
    """Raises ValueError unless a host has such a key and can have the value."""
    _check_key(key, FIELD_TYPES, place)
    if fault := _find_fault(key, value):
        raise ValueError(f"{place}: {key} must {fault}; got {ascii(value)}.")


def _find_fault(key: str, value: Any) -> str:
    """Returns what the value of a host's key must be, or "" if it is valid."""
    if type(value) is not FIELD_TYPES[key]:
        return f"be {TYPE_NAMES[FIELD_TYPES[key]]}"
    if key in RANGES:
        low, high = RANGES[key]
        return "" if low <= value <= high else f"be from {low} to {high}"
    if hidden := next((letter for letter in value if not letter.isprintable()), ""):
        name = unicodedata.name(hidden, "a control character")
        return f"contain visible characters only, and not U+{ord(hidden):04X} ({name})"
    pattern, meaning = PATTERNS.get(key, (".*", ""))
    if not re.fullmatch(pattern, value):
        return meaning
    is_address = key == "address" or (key == "site_address" and value)
    return _find_fault_of_address(value) if is_address else ""


def _find_fault_of_address(text: str) -> str:
    try:
        address = _ip(text)
    except ValueError:
        return "be an IP address"
    reserved = address.is_reserved and not address.is_loopback  # ::1 is both
    if address.is_multicast or address.is_unspecified or reserved:
        return "be the IP address of one host on the training network"
    if address.version == 6 and (address.is_link_local or address.scope_id):
        return "be an IP address that is valid on every link, which fe80:: and a %scope are not"
    return ""


def _ip(text: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address:
    address = ipaddress.ip_address(text)
    return getattr(address, "ipv4_mapped", None) or address


def _check_together(inventory: Inventory, places: Places) -> None:
    """Checks that names and addresses are unique, and that the hosts' gpus and site are equal."""
    hosts = inventory.hosts
    for key in ("name", "address"):
        first: dict[str, Host] = {}
        for i, host in enumerate(hosts):
            other = first.setdefault(getattr(host, key), host)
            if other is not host:
                raise ValueError(
                    f"{places.find_host(i, host.name, key)}: each host's {key} must be unique; got "
                    f"{getattr(host, key)!r}, which host {other.name!r} has already."
                )
    for i, host in enumerate(hosts):
        if ipaddress.ip_address(host.address).is_loopback and len(hosts) > 1:
            raise ValueError(
                f"{places.find_host(i, host.name, 'address')}: address must be reachable from the "
                f"other hosts; got {host.address}. Set it to its IP on the training network."
            )
        if inventory.ranks == "gpu" and not host.gpus:
            raise ValueError(
                f"{places.find_host(i, host.name, 'gpus')}: gpus must be at least 1 if ranks is "
                '"gpu"; got 0.'
            )
    for key, reason in EQUAL.items():
        usual = collections.Counter(getattr(host, key) for host in hosts).most_common(1)[0][0]
        other = next(host.name for host in hosts if getattr(host, key) == usual)
        for i, host in enumerate(hosts):
            if (value := getattr(host, key)) != usual:
                raise ValueError(
                    f"{places.find_host(i, host.name, key)}: {key} must be equal on all hosts; got "
                    f"{value!r}, and {usual!r} for host {other!r}. {reason}"
                )
