"""Measures the network of a job's hosts, and writes the file that baselines are held against.

    python -m launch.probe --hosts=hosts.toml --out=network.json
    python -m launch.probe --hosts=hosts.toml --seconds=5 --pings=1000
    python -m launch.probe --hosts=hosts.toml --no_jax

Round trips of every pair while nothing else is sent; TCP throughput with 1, 4 and 8 streams, one
way and both; and, unless --no_jax, JAX's all-reduce, all-gather and reduce-scatter over all hosts,
by size, with the bytes that the interface counted beside those that were asked for. The interface
counts before segmentation: `header_share` is what the wire carries on top of the payload.
"""

import json
import secrets
import sys
import time
from pathlib import Path

from launch import run
from launch.arguments import Parser
from launch.follow import note
from launch.host.files import write_json
from launch.inventory import read_inventory
from launch.network import Mesh
from launch.preflight import preflight, table
from launch.ssh import Fleet, HostError

STREAMS = (1, 4, 8)
PERCENTILES = (1, 50, 90, 99, 100)
ETHERNET_BYTES, TCP_BYTES = 14, 52  # header of a frame; of IPv4 and TCP with timestamps, in the MTU


def header_share(mtu: int) -> float:
    """Bytes of headers per byte of payload in full segments; offload hides them from counters."""
    return (mtu + ETHERNET_BYTES) / (mtu - TCP_BYTES) - 1


def percentile(sorted_values, share: float) -> float:
    return sorted_values[min(len(sorted_values) - 1, round(share * (len(sorted_values) - 1)))]


def measure_tcp(fleet, seconds: float, pings: int) -> list[dict]:
    """A dict a directed pair, number of streams and way."""
    mesh, found = Mesh(fleet), []
    try:
        for error in mesh.found.values():
            if isinstance(error, HostError):
                raise error
        idle = {_pair(p): p["rtt_s"] for p in _whole(mesh.measure(1, 0.0, pings))}
        for streams in STREAMS:
            for both in (False, True):
                for pair in _whole(mesh.measure(streams, seconds, pings=1, both=both)):
                    del pair["rtt_s"]
                    rtt = idle[_pair(pair)]
                    pair |= {f"rtt_p{p}_s": percentile(rtt, p / 100) for p in PERCENTILES}
                    if pair["mtu"]:
                        pair["header_share"] = header_share(pair["mtu"])
                    found.append(pair)
    finally:
        mesh.close()
    return found


def _pair(measured: dict) -> tuple[str, str]:
    return measured["from"], measured["to"]


def _whole(measured: list[dict]) -> list[dict]:
    for pair in measured:
        if "error" in pair:
            raise HostError(f"{pair['from']} to {pair['to']}: {pair['error']}")
    return measured


def measure_collectives(args) -> list[dict]:
    """What launch.collectives prints, started as any job is."""
    hosts = read_inventory(args.hosts).hosts
    flags = [f"--mib={args.mib}", f"--cases={args.cases}", f"--interface={hosts[0].interface}"]
    options = [f"--hosts={args.hosts}", f"--ssh_config={args.ssh_config}", "--restarts=0"]
    job, code = run.start(*run.parse([*options, "--module=launch.collectives", "--", *flags]))
    lines = job.log(job.hosts[0]).read_text().splitlines()
    if code:
        raise HostError(f"the collectives ended with {code}: {job.log(job.hosts[0])} says why.")
    return [json.loads(line) for line in lines if line.startswith('{"collective"')]


def show(found: dict) -> str:
    lines = ["from -> to      streams   ways   RTT p50 ms   p99 ms     Mbit/s"]
    for pair in found["tcp"]:
        ways = "both" if pair["both"] else "one"
        rate = pair["bytes_per_s"] * 8e-6
        lines.append(
            f"{pair['from']} -> {pair['to']:10} {pair['streams']:3}  {ways:>7}"
            f"  {pair['rtt_p50_s'] * 1e3:10.2f} {pair['rtt_p99_s'] * 1e3:9.2f} {rate:10,.0f}"
        )
    lines.append("collective            bytes       ms   algbw MB/s   busbw MB/s   wire/ideal")
    for row in found["collectives"]:
        ratio = row["wire_sent_bytes"] / (row["ideal_sent_bytes"] or float("nan"))  # of one: none
        lines.append(
            f"{row['collective']:15} {row['bytes']:11,} {row['seconds'] * 1e3:8.1f}"
            f" {row['algbw_bytes_per_s'] * 1e-6:12,.1f} {row['busbw_bytes_per_s'] * 1e-6:12,.1f}"
            f" {ratio:12.3f}"
        )
    return "\n".join(lines)


def main() -> int:
    parser = Parser("python -m launch.probe", __doc__)
    parser.add_argument("--hosts", required=True, metavar="FILE", help="the inventory, TOML")
    parser.add_argument("--ssh_config", default="", metavar="FILE", help="for ssh -F")
    parser.add_argument("--out", default="network.json", metavar="FILE")
    parser.add_argument("--seconds", type=float, default=2.0, help="of traffic per measurement")
    parser.add_argument("--pings", type=int, default=100, help="round trips of each pair")
    parser.add_argument("--mib", default="1,16,64", help="sizes of the collectives, MiB")
    parser.add_argument(
        "--cases", default="", metavar="KIND:BYTES,...", help="collectives in place of --mib's"
    )
    parser.add_argument("--no_jax", action="store_true", help="no collectives")
    args = parser.parse_args()
    try:
        hosts = read_inventory(args.hosts).hosts
        fleet = Fleet(hosts, args.ssh_config)
        findings = preflight(fleet, secrets.choice(range(20_000, 30_000)), burst_s=0)
        print(table(findings), file=sys.stderr)
        if any(finding.problem and finding.fatal for finding in findings):
            raise HostError("preflight: nothing was measured. What FAILs above says what to do.")
        found = {"time": time.time(), "hosts": [host.name for host in hosts]}
        found["tcp"] = measure_tcp(fleet, args.seconds, args.pings) if len(hosts) > 1 else []
        found["collectives"] = [] if args.no_jax else measure_collectives(args)
        write_json(Path(args.out), found)
    except (ValueError, HostError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(show(found))
    note(f"written to {args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
