"""Measures the exchange between two sites on a simulated link of 150 ms; prints a table.

    python tests/sites_link.py [--streams=N] [--cut_s=S] [--congestion=NAME]
                                [--idle_s=S] [RATE_MBIT ...]

Both sites send codes of one size at the same time, for three rounds; by default over 20, 100 and
1,000 Mbit/s. "of the rate" is the payload of the last two rounds, per direction, as a share of what
the link can carry in the seconds of these rounds. Bytes on the wire are counted twice: by the
kernel's counters of the connections, and by the simulated link. With --cut_s the link drops all
packets for so long in the middle of the second round. Rounds begin --idle_s after the one before.
Needs root.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from bed import Bed

from jaxtrain.sites.exchange import Exchange
from jaxtrain.sites.layout import Address, Site, SitesFile

ROUNDS, PORT, SECONDS = 3, 7301, 6  # a round takes so long at the link's rate,
LARGEST = 200_000_000  # but sends at most so many bytes


def run_site(name: str, folder: str, size: int, streams: int, idle_s: float, a, b) -> None:
    """Runs one site; prints {round: [seconds, sent bytes, sent bytes on the wire]}."""
    sites = tuple(Site(n, (Address(ip, PORT),)) for n, ip in (("a", a), ("b", b)))
    sites_file = SitesFile("j-1", bytes(32), sites)
    note = lambda text: print(name, text, file=sys.stderr, flush=True)
    blocks = [size // 4096]
    with Exchange(
        sites_file, name, 0, blocks, {}, Path(folder) / name, note=note, streams=streams
    ) as exchange:
        code, rows = os.urandom(size), []
        exchange.send(0, 0, {0: b""}, 1, {})  # both are connected once this has arrived
        assert exchange.wait(0, 0, 60)
        time.sleep(idle_s)
        for round_ in range(1, ROUNDS + 1):
            exchange.send(0, round_, {0: code}, 1, {})
            arrived = exchange.wait(0, round_, 200)
            assert arrived and len(arrived.codes[1 if name == "a" else 0][0]) == size
            assert exchange.finish(200)
            rows.append([arrived.seconds, *arrived.payload_bytes, *arrived.wire_bytes])
            time.sleep(idle_s)
            if name == "a":
                print("round", round_, flush=True)
        usage = resource.getrusage(resource.RUSAGE_SELF)
        print(json.dumps([rows, usage.ru_utime + usage.ru_stime, usage.ru_maxrss]), flush=True)


def measure(bed: Bed, rate_mbit: int, options: argparse.Namespace) -> None:
    """Prints a line of the table for one rate."""
    bed.link("h0", "h1", delay_ms=75, rate_mbit=rate_mbit)
    size = min(rate_mbit * 125_000 * SECONDS, LARGEST) // 4096 * 4096
    before = bed.traffic()["h0 > h1"]
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, __file__, "--site"]
        rest = [folder, size, options.streams, options.idle_s, bed.address["h0"], bed.address["h1"]]
        sites = [
            subprocess.Popen(
                bed.inside(host, "env", f"PYTHONPATH={os.getcwd()}", *command, name, *rest),
                stdout=subprocess.PIPE,
                text=True,
            )
            for host, name in (("h0", "a"), ("h1", "b"))
        ]
        if options.cut_s:
            assert sites[0].stdout.readline().startswith("round 1")
            time.sleep(options.idle_s + SECONDS / 2)
            bed.link("h0", "h1", up=False)
            time.sleep(options.cut_s)
            bed.link("h0", "h1", up=True)
        outputs = [site.communicate()[0].splitlines() for site in sites]
    after = bed.traffic()["h0 > h1"]
    rows, cpu_s, memory_kb = json.loads(outputs[0][-1])
    payload = sum(row[1] for row in rows)
    wire = sum(row[3] for row in rows)
    link = after["bytes"] - before["bytes"]
    share = [row[1] / (row[0] * rate_mbit * 125_000) for row in rows]
    print(
        f"| {rate_mbit} | {size / 1e6:.0f} MB | {' '.join(f'{row[0]:.1f}' for row in rows)} | "
        f"{100 * sum(share[1:]) / len(share[1:]):.0f} % | {wire / payload:.3f} | "
        f"{link / payload:.3f} | {cpu_s:.1f} | {memory_kb / 1024:.0f} MB |",
        flush=True,
    )


def main() -> None:
    if sys.argv[1:2] == ["--site"]:
        name, folder, size, streams, idle_s, a, b = sys.argv[2:]
        return run_site(name, folder, int(size), int(streams), float(idle_s), a, b)
    parser = argparse.ArgumentParser()
    parser.add_argument("rates", nargs="*", type=int, default=[20, 100, 1000])
    parser.add_argument("--streams", type=int, default=0)
    parser.add_argument("--cut_s", type=float, default=0)
    parser.add_argument("--congestion", default="bbr")
    parser.add_argument("--idle_s", type=float, default=1)
    options = parser.parse_args()
    print("| Mbit/s | code | s a round | of the rate | wire/payload | on the link | CPU s | RSS |")
    with Bed(2, relayed=True) as bed:
        for host in bed.names:
            bed.run(host, "sysctl", "-qw", f"net.ipv4.tcp_congestion_control={options.congestion}")
        for rate in options.rates:
            measure(bed, rate, options)


if __name__ == "__main__":
    main()
