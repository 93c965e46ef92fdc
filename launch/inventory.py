"""The hosts of a job, from a TOML file.

ranks = "host"                # one process per "host" (all its GPUs) or per "gpu"
[defaults]                    # any key of a host
workdir = "~/jaxtrain"        # on the host's local disk: code, logs, job status
python = "~/venv/bin/python"  # 3.11 or newer, with the project's dependencies
[[hosts]]
name = "a40-1"                # prefix of its log lines
ssh = "a40-1.asu"             # what `ssh` is given; the name where left out
address = "10.0.0.11"         # on the training network
gpus = 8
chip = "a40"
"""

import dataclasses
import difflib
import ipaddress
import tomllib
from pathlib import Path


@dataclasses.dataclass(frozen=True)
class Host:
    """One host. `ssh`, `user` and `port` go to OpenSSH; its own configuration holds as always."""

    name: str
    address: str  # IP on the training network; 127.0.0.0/8 only with a single host
    ssh: str = ""
    user: str = ""
    port: int = 0  # 0: what ssh's configuration says
    workdir: str = "~/jaxtrain"
    python: str = "python3"
    gpus: int = 0
    chip: str = ""
    interface: str = ""  # for NCCL and the byte counters; "": the one that holds the address
    site: str = ""

    @property
    def target(self) -> str:
        return self.ssh or self.name


@dataclasses.dataclass(frozen=True)
class Inventory:
    hosts: tuple[Host, ...]
    ranks: str = "host"

    @property
    def ranks_per_host(self) -> int:
        return self.hosts[0].gpus if self.ranks == "gpu" else 1


def read_inventory(path) -> Inventory:
    """The inventory in a TOML file.

    Raises:
        ValueError: the file is no inventory; it names the host, the key and what to write.
    """
    return parse_inventory(read_toml(path, "--hosts"), str(path))


def read_toml(path, flag: str) -> dict:
    """The file's value.

    Raises:
        ValueError: there is none, or it is not TOML; names the flag that gave the path.
    """
    try:
        return tomllib.loads(Path(path).read_text())
    except FileNotFoundError:
        raise ValueError(f"{flag} must name a file; got {path}.") from None
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"{flag} must be TOML; got {path}: {error}.") from None


def parse_inventory(found: dict, where: str) -> Inventory:
    """As read_inventory, from the parsed file."""
    _check_keys(found, {"ranks", "defaults", "hosts"}, where)
    fields = {field.name: field.type for field in dataclasses.fields(Host)}
    defaults, hosts = found.get("defaults", {}), []
    entries = found.get("hosts")
    if not isinstance(entries, list) or not entries:
        raise ValueError(f"{where} must list its hosts as [[hosts]]; got {entries!r}.")
    for i, entry in enumerate(entries):
        values = defaults | entry
        name = f"{where}: host {values.get('name', i)}"
        _check_keys(values, fields.keys(), name)
        for key, value in values.items():
            if type(value) is not fields[key]:
                kind = fields[key].__name__
                raise ValueError(f"{name}: {key} must be of type {kind}; got {value!r}.")
        missing = [key for key in ("name", "address") if not values.get(key)]
        if missing:
            raise ValueError(f"{name} must have {' and '.join(missing)}.")
        hosts.append(Host(**values))
    inventory = Inventory(tuple(hosts), found.get("ranks", "host"))
    _check(inventory, where)
    return inventory


def _check_keys(found, known, where):
    for key in found:
        if key not in known:
            near = difflib.get_close_matches(key, known, 1, cutoff=0.0)[0]
            raise ValueError(f"{where}: no key {key!r}. Did you mean {near!r}?")


def _check(inventory: Inventory, where: str):
    hosts = inventory.hosts
    for host in hosts:
        name = f"{where}: host {host.name!r}"
        for key in ("name", "ssh", "user", "python", "workdir"):
            value = getattr(host, key)
            if value.startswith("-") or not value.isprintable():
                raise ValueError(f"{name}: {key} must not begin with '-'; got {value!r}.")
        if not all(letter.isalnum() or letter in "._-" for letter in host.name):
            raise ValueError(f"{name}: a name is letters, digits and . _ -.")
        try:
            address = ipaddress.ip_address(host.address)
        except ValueError:
            raise ValueError(f"{name}: address must be an IP; got {host.address!r}.") from None
        if address.is_unspecified or (address.is_loopback and len(hosts) > 1):
            raise ValueError(
                f"{name}: address must be one that the other hosts reach; got {host.address}. "
                "Set it to this host's IP on the training network."
            )
    for key in ("name", "address"):
        values = [getattr(host, key) for host in hosts]
        twice = sorted({value for value in values if values.count(value) > 1})
        if twice:
            raise ValueError(f"{where}: each host's {key} must be its own; got {twice} twice.")
    if inventory.ranks not in ("host", "gpu"):
        raise ValueError(f'{where}: ranks must be "host" or "gpu"; got {inventory.ranks!r}.')
    if len({host.gpus for host in hosts}) > 1 or (inventory.ranks == "gpu" and not hosts[0].gpus):
        counts = {host.name: host.gpus for host in hosts}
        raise ValueError(f"{where}: every host must have as many gpus as the others; got {counts}.")
    sites = {host.site for host in hosts}
    if len(sites) > 1:
        raise ValueError(
            f"{where}: one job's hosts must be of one site; got {sorted(sites)}. A 150 ms hop in a "
            "mesh makes a step 60 times slower: start one job per site."
        )
