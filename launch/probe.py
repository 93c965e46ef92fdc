"""Measures the network between a job's hosts, and writes the result as a file for baselines.

    python -m launch.probe --hosts=hosts.toml --out=network.json
    python -m launch.probe --hosts=hosts.toml --seconds=5 --pings=1000
    python -m launch.probe --hosts=hosts.toml --no_jax
    python -m launch.probe --sites=new_york.toml,asuncion.toml --out=sites.json

It measures the round trips of every pair of hosts on an idle network; TCP throughput with
1, 4 and 8 streams, in one direction and in both; and, unless --no_jax, JAX's all-reduce, all-gather
and reduce-scatter over all hosts, by size. `wire_bytes` is what the interface counted, before it
cut the data into segments; `header_share` is the share of headers that the segments add.
With --sites it measures TCP between hosts of different sites, at the addresses and ports that the
inventories give; `jaxtrain plan --network` reads the file.
"""

import argparse
import json
import os
import re
import secrets
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from launch import run
from launch.answers import COUNT, SECONDS, Range, mismatch
from launch.arguments import Parser, bounded
from launch.host.files import write_json
from launch.inventory import Host, read_inventory
from launch.job import PORTS
from launch.network import NetworkAgents, Pair
from launch.preflight import preflight
from launch.prepare import print_findings
from launch.sites import build_sites_file, read_sites
from launch.ssh import HostError, SshClient, raise_errors
from launch.terminal import note, show, warn

STREAMS = (1, 4, 8)
SHARE = {"all_reduce": 2.0, "all_gather": 1.0, "reduce_scatter": 1.0}  # busbw/algbw/((n-1)/n)
LARGEST_MIB = 1 << 16
PERCENTILES = (1, 50, 90, 99, 100)
POSITIVE = Range(float, 1e-12, 1e18)
ROW = {  # what launch.collectives prints
    "collective": re.compile("|".join(SHARE)),
    **dict.fromkeys(("bytes", "processes", "devices"), COUNT),
    "seconds": POSITIVE,
    "spread_s": [SECONDS, 2],
    "algbw_bytes_per_s": POSITIVE,
    **dict.fromkeys(
        ("busbw_bytes_per_s", "wire_sent_bytes", "ideal_sent_bytes"), Range(float, 0, 1e18)
    ),
    "interface": str,
}
ETHERNET_BYTES = 14  # header of a frame
TCP_BYTES = 52  # headers of IPv4 and of TCP with timestamps, which count towards the MTU


def header_share(mtu: int) -> float:
    """Returns bytes of headers per byte of payload in full segments.

    The interface's counters do not show them when the card does the segmentation (offload).
    """
    return (mtu + ETHERNET_BYTES) / (mtu - TCP_BYTES) - 1


def percentile(sorted_values: Sequence[float], share: float) -> float:
    """Returns the value at a share, from 0 to 1, of the sorted values."""
    return sorted_values[min(len(sorted_values) - 1, round(share * (len(sorted_values) - 1)))]


def measure_tcp(
    client: SshClient,
    seconds: float,
    pings: int,
    places: Mapping[Host, tuple[str, int]] | None = None,
) -> list[Pair]:
    """Returns a dict per directed pair, number of streams and direction.

    Args:
        places: {host: where it listens for other sites}; only pairs between sites are measured.

    Raises:
        HostError: a host does not answer, or a pair could not be measured.
    """
    rows = []
    with NetworkAgents(client) as agents:
        raise_errors(agents.first_answers)
        listening = [(host, *place) for host, place in (places or {}).items()]
        for (host, address, port), reason in agents.listen(listening).items():
            raise HostError(f"{host.name} cannot listen at {address} port {port}: {reason}")
        idle = _require_all(agents.measure(1, 0.0, pings, places=places))
        rtt_s = {(pair["from"], pair["to"]): pair["rtt_s"] for pair in idle}
        for streams in STREAMS:
            for both in (False, True):
                for pair in _require_all(agents.measure(streams, seconds, 1, both, places=places)):
                    del pair["rtt_s"]  # measured under load; the idle one is reported
                    times = rtt_s[pair["from"], pair["to"]]
                    pair |= {f"rtt_p{p}_s": percentile(times, p / 100) for p in PERCENTILES}
                    if pair["mtu"]:
                        pair["header_share"] = header_share(pair["mtu"])
                    rows.append(pair)
    return rows


def _require_all(pairs: list[Pair]) -> list[Pair]:
    for pair in pairs:
        if "error" in pair:
            raise HostError(f"{pair['from']} to {pair['to']}: {pair['error']}")
    return pairs


def add_case_flags(parser: Parser) -> None:
    """Adds --mib and --cases, whose values say what launch.collectives measures."""

    def check_sizes(text: str) -> str:
        for size in text.split(","):
            bounded(float, 1e-5, LARGEST_MIB)(size)
        return text

    def check_cases(text: str) -> str:
        for case in filter(None, text.split(",")):
            kind, _, size = case.partition(":")
            if kind not in SHARE:
                raise argparse.ArgumentTypeError(f"must name one of {[*SHARE]}; got {case}")
            bounded(int, 4, LARGEST_MIB << 20)(size)
        return text

    parser.add_argument(
        "--mib", type=check_sizes, default="1,16,64", help="sizes of the collectives, MiB"
    )
    parser.add_argument(
        "--cases",
        type=check_cases,
        default="",
        metavar="KIND:BYTES,...",
        help="collectives and sizes to measure in place of --mib",
    )


def measure_collectives(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Runs launch.collectives as a job; returns the JSON objects that it prints.

    Raises:
        HostError: the job failed.
    """
    hosts = read_inventory(args.hosts).hosts
    flags = [f"--mib={args.mib}", f"--cases={args.cases}", f"--interface={hosts[0].interface}"]
    options = [f"--hosts={args.hosts}", f"--ssh_config={args.ssh_config}", "--restarts=0"]
    [job], code = run.start(*run.parse([*options, "--module=launch.collectives", "--", *flags]))
    logs = f"`python -m launch.run logs {job.id}`"  # it escapes what a host printed
    if code:
        raise HostError(f"the collectives ended with {code}. {logs} shows why.")
    rows = read_rows(job.log(job.hosts[0]).read_text(errors="replace"))
    wanted = len(args.cases.split(",")) if args.cases else len(SHARE) * len(args.mib.split(","))
    if len(rows) != wanted:
        raise HostError(
            f"the first host's log must have a valid line for each of {wanted} collectives; it has "
            f"{len(rows)}. {logs} shows what it has."
        )
    return rows


def read_rows(log: str) -> list[dict[str, Any]]:
    """Returns what launch.collectives printed. Where a host has several ranks, "[0] " precedes."""
    found = re.findall(r'^(?:\[\d+\] )?(\{"collective".*)', log, re.MULTILINE)
    rows = []
    for line in found:
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if not mismatch(row, ROW, "row"):
            rows.append({key: row[key] for key in ROW})
    return rows


def measure_hosts(args: argparse.Namespace) -> dict[str, Any]:
    """Returns the measurements between the hosts of --hosts."""
    hosts = read_inventory(args.hosts).hosts
    client = SshClient(hosts, args.ssh_config)
    print_findings(preflight(client, secrets.choice(PORTS), burst_s=0))
    tcp = measure_tcp(client, args.seconds, args.pings) if len(hosts) > 1 else []
    collectives = [] if args.no_jax else measure_collectives(args)
    return {"hosts": [host.name for host in hosts], "tcp": tcp, "collectives": collectives}


def measure_sites(args: argparse.Namespace) -> dict[str, Any]:
    """Returns the measurements between the hosts of different sites."""
    sites = read_sites(args.sites)
    content = build_sites_file("probe", sites)
    for inventory in sites.values():
        client = SshClient(inventory.hosts, args.ssh_config)
        print_findings(preflight(client, secrets.choice(PORTS), burst_s=0))
    places = {
        host: (place["address"], place["port"])
        for site, inventory in zip(content["sites"], sites.values(), strict=True)
        for host, place in zip(
            inventory.hosts, site["processes"][:: inventory.ranks_per_host], strict=True
        )
    }
    tcp = measure_tcp(SshClient(list(places), args.ssh_config), args.seconds, args.pings, places)
    sites_of = {host.name: host.site for host in places}
    return {"hosts": list(sites_of), "sites": sites_of, "tcp": tcp, "collectives": []}


def format_result(result: dict[str, Any]) -> str:
    """Returns the measurements as two tables."""
    lines = ["from -> to      streams   ways   RTT p50 ms   p99 ms     Mbit/s"]
    for pair in result["tcp"]:
        ways = "both" if pair["both"] else "one"
        rate = pair["bytes_per_s"] * 8e-6
        lines.append(
            f"{pair['from']} -> {pair['to']:10} {pair['streams']:3}  {ways:>7}"
            f"  {pair['rtt_p50_s'] * 1e3:10.2f} {pair['rtt_p99_s'] * 1e3:9.2f} {rate:10,.0f}"
        )
    if not result["collectives"]:
        return "\n".join(lines)
    lines.append("collective            bytes       ms   algbw MB/s   busbw MB/s   wire/ideal")
    for row in result["collectives"]:
        ideal_bytes = row["ideal_sent_bytes"] or float("nan")  # a single host sends nothing
        lines.append(
            f"{row['collective']:15} {row['bytes']:11,} {row['seconds'] * 1e3:8.1f}"
            f" {row['algbw_bytes_per_s'] * 1e-6:12,.1f} {row['busbw_bytes_per_s'] * 1e-6:12,.1f}"
            f" {row['wire_sent_bytes'] / ideal_bytes:12.3f}"
        )
    return "\n".join(lines)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parses the command line; exits with status 2 if it is wrong."""
    parser = Parser("python -m launch.probe", __doc__ or "")
    parser.add_argument("--hosts", default="", metavar="FILE", help="the inventory, TOML")
    parser.add_argument("--sites", default="", metavar="A,B", help="the inventories of sites")
    parser.add_argument("--ssh_config", default="", metavar="FILE", help="file for `ssh -F`")
    parser.add_argument("--out", default="network.json", metavar="FILE", help="file to write")
    parser.add_argument(
        "--seconds", type=bounded(float, 0.1, 600), default=2.0, help="seconds of each transfer"
    )
    parser.add_argument(
        "--pings", type=bounded(int, 1, 100_000), default=100, help="round trips of each pair"
    )
    add_case_flags(parser)
    parser.add_argument("--no_jax", action="store_true", help="skip the collectives")
    args = parser.parse_args(argv)
    if bool(args.hosts) == bool(args.sites):
        parser.error("--hosts or --sites must be given" + (", and not both" if args.hosts else ""))
    return args


def main() -> int:
    """Runs the command; returns its exit status."""
    args = parse(None)
    out = Path(args.out)
    try:
        if out.is_dir() or not os.access(out.parent, os.W_OK):
            raise ValueError(f"--out must be a file in a writable folder; got {out}.")
        measure = measure_sites if args.sites else measure_hosts
        result = {"time": time.time()} | measure(args)
        show(format_result(result))
        write_json(out, result)
    except (ValueError, HostError, OSError) as error:  # OSError: such as a full disk here
        warn(f"error: {error}")
        return 1
    note(f"wrote {out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
