"""Cases of tests/launch_acceptance.py with round trips of 150 ms."""

import collections
import json
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time

from bed import OPERATOR
from launch_scene import ROOT

from jaxtrain.metrics.jsonl import read_metrics

ONE_WAY_MS = 75.0
PREFLIGHT_S = 5.0
STEPS = 300  # long enough for the faults of the operator's link
TOLERANCE = 0.2  # relative difference between the measured and the explained slowdown of a step


def set_operator_far(bed):
    """Gives the operator's links a delay of ONE_WAY_MS, and the links between hosts none."""
    bed.link("*", "*", delay_ms=0.0)
    bed.link(OPERATOR, "*", delay_ms=ONE_WAY_MS)


def preflight(scene, repetition) -> dict:
    """Times preflight of three hosts with new connections, three times."""
    del repetition
    preflight_s = []
    for i in range(3):
        sockets = tempfile.mkdtemp(dir=scene.bed.folder)
        common = [f"--hosts={scene.hosts}", f"--ssh_config={scene.bed.ssh_config}", "--module=this"]
        launched = scene.run(f"preflight-{i}", *common, XDG_RUNTIME_DIR=sockets)
        assert launched.wait() == 0, launched.output()
        [seconds] = re.findall(r"preflight of 3 hosts, ([\d.]+) s", launched.output())
        preflight_s.append(float(seconds))
    return {"preflight_s": preflight_s, "in time": max(preflight_s) < PREFLIGHT_S}


def _ended_well(scene, launched, job, name) -> dict:
    code, output = launched.wait(), launched.output()
    return {
        "exit 0": code == 0,
        "one attempt": "exit 0 after 1 attempts" in output and "noticed" not in output,
        "same bits": scene.bits(name) == scene.reference(steps=STEPS),
        "log byte-identical": scene.same_logs(job),
        "nothing left": not scene.left(),
    }


def _detached(scene, name):
    """Starts a detached run; once it trains, returns its job and a launcher that follows it."""
    started = scene.launch(name, "--detach", steps=STEPS)
    assert started.wait() == 0, started.output()
    follower = scene.run(f"{name}-attached", "attach", started.job)
    scene.wait_for(follower, name, 12)
    return started.job, follower


def _cut(scene, seconds):
    scene.bed.link(OPERATOR, "*", up=False)
    time.sleep(seconds)
    scene.bed.link(OPERATOR, "*", up=True)


def attach(scene, repetition) -> dict:
    """Cuts the operator's link for 25 s; `attach` must continue without losing a byte."""
    del repetition
    job, follower = _detached(scene, "attach")
    _cut(scene, 25)
    return _ended_well(scene, follower, job, "attach")


def killed(scene, repetition) -> dict:
    """Kills an attached launcher; the next one must get the complete log and the outcome."""
    del repetition
    job, follower = _detached(scene, "killed")
    follower.process.send_signal(signal.SIGKILL)
    follower.wait()
    time.sleep(5)
    second = scene.run("killed-again", "attach", job)
    return _ended_well(scene, second, job, "killed")


def flap(scene, repetition) -> dict:
    """Cuts the operator's link, then a host's, for 5 s each; the job must not notice."""
    del repetition
    launched = scene.launch("operator-flap", steps=STEPS)
    scene.wait_for(launched, "operator-flap", 12)
    _cut(scene, 5)
    time.sleep(2)
    scene.bed.cut("h1")
    time.sleep(5)
    scene.bed.heal("h1")
    return _ended_well(scene, launched, launched.job, "operator-flap")


def probe(scene, name, *options) -> dict:
    """Returns the content of the file that launch.probe writes."""
    out = scene.folder / f"{name}.json"
    argv = [sys.executable, "-m", "launch.probe", f"--hosts={scene.hosts}", f"--out={out}"]
    argv += [f"--ssh_config={scene.bed.ssh_config}", *options]
    done = subprocess.run(argv, cwd=ROOT, env=scene.env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(out.read_text())


def headers(scene, repetition) -> dict:
    """Compares the bytes that the links carried with those that header_share predicts."""
    del repetition
    traffic = lambda: {k: v for k, v in scene.bed.traffic().items() if OPERATOR not in k}
    before = traffic()
    result = probe(scene, "headers", "--no_jax", "--seconds=1")
    wire = sum(count["bytes"] - before[link]["bytes"] for link, count in traffic().items())
    payload = sum(pair["bytes"] for pair in result["tcp"])
    computed = sum(pair["bytes"] * (1 + pair["header_share"]) for pair in result["tcp"])
    counted = sum(pair["wire_bytes"][0] for pair in result["tcp"] if not pair["both"])
    sent = sum(pair["bytes"] for pair in result["tcp"] if not pair["both"])
    return {
        "payload_bytes": payload,
        "wire_bytes": wire,
        "wire_share": wire / payload - 1,
        "interface_share": counted / sent - 1,
        "header_share": result["tcp"][0]["header_share"],
        "computed within 2 %": abs(computed / wire - 1) < 0.02,
    }


def measure_job(scene, name, steps, counted) -> dict:
    """Runs a job; returns its median step time, and its wire bytes per step.

    Args:
        counted: the steps (first, last) between which bytes are counted.
    """
    launched = scene.launch(name, steps=steps, save_every=steps, model__L=1)
    marks = []
    for step in counted:
        scene.wait_for(launched, name, step, limit_s=500)
        traffic = {k: v["bytes"] for k, v in scene.bed.traffic().items() if OPERATOR not in k}
        marks.append((read_metrics(scene.shared / name / "metrics.jsonl")[-1]["step"], traffic))
    assert launched.wait() == 0, launched.output()
    records = read_metrics(scene.shared / name / "metrics.jsonl")
    times = [r["perf/step_time_s"] for r in records if r.get("perf/step_time_s")]
    (first, before), (last, after) = marks
    wire = {link: (after[link] - before[link]) / (last - first) for link in after}
    step_time_s = statistics.median(times[2:])
    return {
        "step_time_s": step_time_s,
        "wire_bytes": round(sum(wire.values())),  # with headers, and the supervisors' messages
        "effective_bytes_per_s": round(sum(wire.values()) / step_time_s),
    }


def distance(scene, repetition) -> dict:
    """Checks that the probe's timings explain how much longer a step takes at 150 ms.

    gloo handles the operands of a step's collectives one after the other. So the increase of the
    step's time must be the sum of the increases of all operands, each timed separately.
    """
    del repetition
    argv = [sys.executable, "-m", "tests.launch_step", str(len(scene.bed.names))]
    argv += scene.flags("plan", model__L=1, compile_cache=scene.folder / "xla")
    env = scene.env | {"JAX_PLATFORMS": "cpu"}
    listed = subprocess.run(argv, cwd=ROOT, env=env, capture_output=True, text=True)
    assert listed.returncode == 0, listed.stderr
    operands = collections.Counter(map(tuple, json.loads(listed.stdout.splitlines()[-1])))
    cases = ",".join(f"{kind}:{size}" for kind, size in operands)
    passes = {"all_reduce": 2 * (len(scene.bed.names) - 1), "all_gather": len(scene.bed.names) - 1}
    ideal_bytes = sum(passes[kind] * size * count for (kind, size), count in operands.items())
    result: dict = {"operands": sum(operands.values()), "ideal_bytes": ideal_bytes}
    spent_s, job, rtt_s = {}, {}, {}
    for name, one_way_ms, steps, counted in (
        ("near", 0.0, 100, (20, 90)),
        ("far", ONE_WAY_MS, 8, (2, 7)),
    ):
        for a, b in (("h0", "h1"), ("h0", "h2"), ("h1", "h2")):
            scene.bed.link(a, b, delay_ms=one_way_ms)
        job[name] = measure_job(scene, f"job-{name}", steps, counted)
        measured = probe(scene, f"probe-{name}", "--seconds=2", "--pings=20", f"--cases={cases}")
        seconds = {(r["collective"], r["bytes"]): r["seconds"] for r in measured["collectives"]}
        spent_s[name] = sum(count * seconds[operand] for operand, count in operands.items())
        rtt_s[name] = statistics.median(pair["rtt_p50_s"] for pair in measured["tcp"])
        single_streams = [p for p in measured["tcp"] if p["streams"] == 1 and not p["both"]]
        slowest = min(pair["bytes_per_s"] for pair in single_streams)
        result[name] = job[name] | {"rtt_s": rtt_s[name], "stream_bytes_per_s": slowest}
        result[name] |= {"collectives_s": spent_s[name]}
    set_operator_far(scene.bed)
    measured_s = job["far"]["step_time_s"] - job["near"]["step_time_s"]
    explained_s = spent_s["far"] - spent_s["near"]
    trips = measured_s / (rtt_s["far"] - rtt_s["near"])
    result |= {"slower_s": measured_s, "explained_s": explained_s, "round_trips": trips}
    return result | {"explained": abs(explained_s / measured_s - 1) <= TOLERANCE}


CASES = {
    "far-preflight": preflight,
    "far-attach": attach,
    "far-killed": killed,
    "far-flap": flap,
    "headers": headers,
    "distance": distance,
}
