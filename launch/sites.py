"""A job at several sites: an ordinary job at each site, started together and named together.

The job ID has the jobs ID.SITE. Its record on this machine, the folder ID in jobs_folder(), names
them; each of them is a whole job, with its own hosts, supervisors and restarts. Their programs
exchange updates over the addresses and with the key of the sites file, see docs/sites.md.
"""

import collections
import dataclasses
import re
import secrets
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from launch.answers import mismatch
from launch.inventory import PATTERNS, Host, Inventory, read_inventory
from launch.network import MEASURED, NetworkAgents
from launch.preflight import Finding
from launch.ssh import SshClient, raise_errors

VERSION = 1  # of the sites file
SITE = r"[A-Za-z0-9][A-Za-z0-9_-]{0,31}"
SITE_PORTS = range(30_000, 32_000)  # below Linux' ports of outgoing connections; see job.PORTS
OUR_FLAGS = ("sites_file", "site")  # of the program; the supervisor adds them


def read_sites(paths: str) -> dict[str, Inventory]:
    """Returns {site: its inventory} for the files that --sites lists.

    A site's name is its inventory's key `site` or the file's stem. Each host is renamed to
    SITE.HOST, so that every line and every error says where a host is.

    Raises:
        ValueError: an inventory is invalid, two have one name, or there is only one.
    """
    sites: dict[str, Inventory] = {}
    for path in paths.split(","):
        inventory = read_inventory(path, "--sites")
        site = inventory.hosts[0].site or Path(path).stem
        if not re.fullmatch(SITE, site):
            raise ValueError(
                f"{path}: a site's name must begin with a letter or digit and consist of at most "
                f"32 ASCII letters, digits, - and _; got {site!r}. Set the key site."
            )
        if site in sites:
            raise ValueError(
                f"--sites must name different sites; got {site!r} twice. Set the key site of "
                f"{path}."
            )
        hosts = [_at_site(host, site, path) for host in inventory.hosts]
        sites[site] = dataclasses.replace(inventory, hosts=tuple(hosts))
    if len(sites) < 2:
        raise ValueError(f"--sites must list at least two inventories, A.toml,B.toml; got {paths}.")
    return sites


def _at_site(host: Host, site: str, path: str) -> Host:
    name, (pattern, meaning) = f"{site}.{host.name}", PATTERNS["name"]
    if not re.fullmatch(pattern, name):
        raise ValueError(f"{path}: a host's name with its site must {meaning}; got {name!r}.")
    return dataclasses.replace(host, name=name, ssh=host.target, site=site)


def split_flags(
    flags: Sequence[str], for_site: Iterable[str], sites: Iterable[str]
) -> dict[str, list[str]]:
    """Returns {site: the program's flags there}.

    Args:
        flags: those of all sites.
        for_site: values of --for, SITE:--FLAG=VALUE. They come last, so they take precedence.

    Raises:
        ValueError: a value of --for has another form or an unknown site, or a flag is one that the
            launcher sets.
    """
    flags_of = {site: list(flags) for site in sites}
    for value in for_site:
        site, _, flag = value.partition(":")
        if site not in flags_of or not flag.startswith("-"):
            raise ValueError(
                f"--for must be SITE:--FLAG=VALUE with a SITE among {', '.join(flags_of)}; "
                f"got {value!r}."
            )
        flags_of[site].append(flag)
    for flag in (flag for flags in flags_of.values() for flag in flags):
        if flag.lstrip("-").partition("=")[0] in OUR_FLAGS:
            raise ValueError(
                f"--sites sets the program's flag {flag.partition('=')[0]}; got {flag}."
            )
    return flags_of


def build_sites_file(job_id: str, sites: Mapping[str, Inventory]) -> dict[str, Any]:
    """Returns the content of a new job's sites file, with a new key.

    `processes` of a site are in the order of their JAX process indices.

    Raises:
        ValueError: two processes would listen on one address and port.
    """
    base, chosen = secrets.choice(SITE_PORTS), collections.Counter()
    owner_of: dict[tuple[str, int], str] = {}
    entries = []
    for site, inventory in sites.items():
        processes = []
        for host in inventory.hosts:
            address = host.site_address or host.address
            for rank in range(inventory.ranks_per_host):
                port = host.site_port + rank if host.site_port else base + chosen[address]
                chosen[address] += 1
                owner = owner_of.setdefault((address, port), f"{host.name}, rank {rank}")
                if port > 65_535 or owner != f"{host.name}, rank {rank}":
                    raise ValueError(
                        "each process of each site needs its own port, up to 65535, at its "
                        f"site_address; got {address} port {port} for {host.name}, rank {rank}, "
                        f"and for {owner}. Set site_port."
                    )
                processes.append({"address": address, "port": port})
        entries.append({"name": site, "processes": processes})
    return {"version": VERSION, "job": job_id, "key": secrets.token_hex(32), "sites": entries}


class Link(NamedTuple):
    """Two processes of different sites that exchange a part of the model."""

    listener: Host
    connector: Host
    address: str  # of the listener
    port: int


def find_links(sites_file: Mapping[str, Any], hosts_of: Mapping[str, Sequence[Host]]) -> list[Link]:
    """Returns all links. The process of the site that comes first listens.

    Process p of P owns the share [p/P, (p+1)/P) of the model. Two processes are linked where their
    shares overlap; see jaxtrain/sites/layout.py.

    Args:
        hosts_of: {site: its hosts}.
    """

    def host(entry: Mapping[str, Any], process: int) -> Host:
        hosts = hosts_of[entry["name"]]
        return hosts[process * len(hosts) // len(entry["processes"])]

    links = []
    entries = sites_file["sites"]
    for i, first in enumerate(entries):
        for second in entries[i + 1 :]:
            P, Q = len(first["processes"]), len(second["processes"])
            for p, place in enumerate(first["processes"]):
                for q in range(Q):
                    if p * Q < (q + 1) * P and q * P < (p + 1) * Q:
                        ends = host(first, p), host(second, q)
                        links.append(Link(*ends, place["address"], place["port"]))
    return links


def check_links(client: SshClient, links: Sequence[Link]) -> list[Finding]:
    """Connects every link, as the programs will; returns a finding for each.

    Args:
        client: of the hosts of all sites.

    Raises:
        HostError: a host does not answer.
    """
    with NetworkAgents(client) as agents:
        raise_errors(agents.first_answers)
        places = {(link.listener, link.address, link.port) for link in links}
        busy = agents.listen(places)
        options = {"streams": 1, "seconds": 0.0, "pings": 3, "both": False, "least_trips": 0}
        measure = lambda link: {"do": "measure", "peer": [link.address, link.port]} | options
        pairs = agents.execute([(link.connector, measure(link)) for link in links])
    return [
        _judge_link(link, busy.get((link.listener, link.address, link.port), ""), pair)
        for link, pair in zip(links, pairs, strict=True)
    ]


def _judge_link(link: Link, busy: str, pair: Mapping[str, Any]) -> Finding:
    listener, connector = link.listener.name, link.connector.name
    place, check = f"{link.address} port {link.port}", f"to {listener}"
    if busy:
        problem = f"{listener} cannot listen at {place}: {busy}. Set site_port of {listener}"
        return Finding(connector, check, "", problem)
    if error := pair.get("error") or mismatch(pair, MEASURED, "its answer"):
        problem = f"{connector} cannot connect to {listener} at {place}: {error}. Open the "
        problem += f"port between the sites, or set site_address and site_port of {listener}"
        return Finding(connector, check, "", problem)
    return Finding(connector, check, f"{statistics.median(pair['rtt_s']) * 1e3:.2f} ms, {place}")
