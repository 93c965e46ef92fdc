"""Bandwidth as a run reports it, against a link of known speed and bytes counted by hand.

    python tests/bandwidth_acceptance.py [--hosts=2] [--mbit=100]        as root; 4 minutes

Hosts of a bed train copies of one model over links of --mbit Mbit/s, so that a step is little but
its gradients' all-reduce. The payload must be the parameters' bytes; the wire's counters those of
the bridge's side of each cable; and what went through the wire a second, while the step did nothing
else and when the exchange ran alone, by the run's own figures, the link's rate within 5 %. Prints a
row of figures and one of what held; exits nonzero unless all.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import bed as beds  # noqa: E402

import runs  # noqa: E402
from jaxtrain.metrics.jsonl import read_metrics  # noqa: E402

TOLERANCE = 0.05
# Of a full packet at MTU 1500: Ethernet, IP and TCP with timestamps, and as much for the
# acknowledgement of every second one, where none rides on data of the other direction.
HEADERS = 66 / 1448 * 1.5
CONGESTION = "/proc/sys/net/ipv4/tcp_congestion_control"
SCALARS_BYTES = 256  # most of what a step reduces beside its gradients: losses, counts
STEPS, LOG_EVERY, PHASES_AT = 21, 2, 20


def command(hosts, bed, text, count, shared):
    """A launcher of the run: AdamW on copies of 53 MB of parameters, a row of 8 tokens a host.

    One layer, so that no copy takes a part of the moments: then all is one all-reduce.
    """
    values = dict(steps=STEPS, log_every=LOG_EVERY, save_every=1_000, sample__tokens=0)
    values |= dict(model__L=1, model__D=768, model__F=4608, model__H=12, model__G=12, model__K=64)
    values |= dict(data__batch=count, data__seq_len=8, mesh__replica=-1, mesh__fsdp=1)
    values |= dict(optim__name="adamw", measure__phases="true", compile_cache="/tmp/xla")
    values |= dict(data__text=text, workdir=shared / "run", checkpoint__storage="shared")
    flags = [f"--config.{name.replace('__', '.')}={value}" for name, value in values.items()]
    argv = [sys.executable, "-m", "launch.run", f"--hosts={hosts}"]
    argv += [f"--ssh_config={bed.ssh_config}", "--restarts=0", "--"]
    return [*argv, "--config=configs/debug.py", *flags]


def bridge_bytes(bed, name) -> int:
    """What a host has sent, as the bridge's side of its cable counts it."""
    cable = f"jv{bed.tag}{bed.names.index(name)}"
    return int(Path(f"/sys/class/net/{cable}/statistics/rx_bytes").read_text())


class Outside:
    """Looks at the bridge once in 50 ms, in a thread: (UTC s, bytes sent by the first host)."""

    def __init__(self, bed):
        self._bed, self._ended = bed, threading.Event()
        self.seen = []
        self._thread = threading.Thread(target=self._look, daemon=True)

    def _look(self):
        while not self._ended.wait(0.05):
            self.seen.append((time.time(), bridge_bytes(self._bed, self._bed.names[0])))

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *exc):
        self._ended.set()
        self._thread.join()

    def between(self, start_s, end_s) -> int:
        at = lambda when: min(self.seen, key=lambda seen: abs(seen[0] - when))[1]
        return at(end_s) - at(start_s)


def examine(workdir, outside, count, mbit) -> tuple[dict, dict]:
    """(figures, what held)"""
    stored = json.loads((workdir / "config.json").read_text())
    records = [r for r in read_metrics(workdir / "metrics.jsonl") if "comm/overhead" in r]
    steady = [r for r in records if LOG_EVERY < r["step"] <= PHASES_AT]
    phases = [r for r in read_metrics(workdir / "metrics.jsonl") if "perf/phase_exchange_s" in r]
    middle = lambda name: statistics.median(r[name] for r in steady)
    by_hand = 4 * stored["work"]["params"]
    ring = 2 * (count - 1) / count * by_hand
    link = mbit * 1e6 / 8
    effective, overhead = middle("comm/effective_bytes_per_s"), middle("comm/overhead")
    sent = [json.loads(line) for line in (workdir / "hosts" / "0.jsonl").read_text().splitlines()]
    sent = {r["step"]: r for r in sent if "event" not in r}
    first, last = sent[steady[0]["step"]], sent[steady[-1]["step"]]
    inside = sum(
        r["comm/wire_sent_bytes"] for n, r in sent.items() if first["step"] < n <= last["step"]
    )
    figures = {
        "hosts": stored["hosts"],
        "link_bytes_per_s": link,
        "step_s": middle("perf/step_time_s"),
        "payload_bytes": middle("comm/all_reduce_bytes"),
        "payload_by_hand_bytes": by_hand,
        "wire_sent_bytes": middle("comm/wire_sent_bytes"),
        "ring_by_hand_bytes": ring,
        "overhead": overhead,
        "effective_bytes_per_s": effective,
        "wire_bytes_per_s": effective * (1 + overhead),
        "counted_inside_bytes": inside,
        "counted_outside_bytes": outside.between(first["time"], last["time"]),
        "exchange_alone": {k: v for k, v in phases[-1].items() if k not in ("step", "time")},
    }
    near = lambda a, b: abs(a / b - 1) <= TOLERANCE
    alone = phases[-1]["comm/busbw_bytes_per_s"] * (1 + overhead)
    exposed = figures["wire_sent_bytes"] / phases[-1]["perf/phase_exposed_s"]
    figures["exposed_wire_bytes_per_s"], figures["alone_wire_bytes_per_s"] = exposed, alone
    held = {
        "payload is by hand": 0 <= figures["payload_bytes"] - by_hand <= SCALARS_BYTES,
        "nothing else is sent": {c["kind"] for c in stored["work"]["collectives"]}
        == {"all-reduce"},
        "all of it between hosts": all(c["inter_host"] for c in stored["work"]["collectives"]),
        "overhead is the headers'": 0 <= overhead <= HEADERS,
        "counters agree with the bridge": near(inside, figures["counted_outside_bytes"]),
        "the rate of what is exposed in a step is the link's": near(exposed, link),
        "the rate of the exchange alone is the link's": near(alone, link),
    }
    return figures, held


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--hosts", type=int, default=2, choices=(2, 3))
    parser.add_argument("--mbit", type=int, default=100, help="of each host's cable, each way")
    args = parser.parse_args()
    if reason := beds.available():
        sys.exit(f"error: {reason}")
    folder = Path(tempfile.mkdtemp(prefix="jaxtrain-bandwidth-"))
    (folder / "shared").mkdir()
    with beds.Bed(args.hosts, folder / "shared") as bed:
        text, hosts = runs.write_text(folder), bed.inventory(folder / "hosts.toml")
        for name in bed.names:
            bed.rate(name, args.mbit)
            bed.run(name, "sh", "-c", f"echo reno > {CONGESTION}")  # bbr leaves some of a link idle
        env = os.environ | {"JAXTRAIN_JOBS": str(folder / "jobs"), "PYTHONPATH": str(ROOT)}
        argv = command(hosts, bed, text, args.hosts, Path("/mnt/shared"))
        with Outside(bed) as outside, open(folder / "out", "wb") as out:
            code = subprocess.run(argv, cwd=ROOT, env=env, stdout=out, stderr=out).returncode
        if code:
            sys.exit(f"error: the run ended with {code}:\n{(folder / 'out').read_text()[-3000:]}")
        figures, held = examine(folder / "shared" / "run", outside, args.hosts, args.mbit)
    print(json.dumps(figures))
    print(json.dumps(held))
    return not all(held.values())


if __name__ == "__main__":
    sys.exit(main())
