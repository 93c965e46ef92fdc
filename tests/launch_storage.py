"""Whole runs and their checkpoints, on other numbers of processes: rows of the acceptance."""

import subprocess
import sys
from functools import partial

from launch_scene import ROOT

from jaxtrain.metrics.jsonl import read_metrics

HALF, WHOLE = 20, 40  # steps
# Of losses against one process'. The float32 run's sums, taken in another order, part by 2.3e-5 in
# 200 steps (2 vCPU, jax 0.10.2); float64's by 1e-13: the algorithm is the same.
WITHIN = {"float32": 1e-4, "float64": 1e-5}


def losses(path) -> dict:
    """{step: loss} of a run's folder."""
    records = read_metrics(path / "metrics.jsonl")
    return {r["step"]: r["train/loss_nats"] for r in records if "train/loss_nats" in r}


def furthest(found: dict, expected: dict) -> float:
    """The largest difference between losses of the same steps; infinite where steps differ."""
    if found.keys() != expected.keys():
        return float("inf")
    return max(abs(found[step] - expected[step]) for step in expected)


def restored(scene, times, storage) -> dict:
    """Checkpoints of 3 processes train on with 3, 2 and 1: the same bits, the same losses.

    Every leaf that is restored is compared with its digest, so a run that goes on has the bits.
    With 3 processes the losses after it are bitwise those of a run without a stop; with fewer, the
    sums of a step are taken in another order, so they are those to 1e-9.
    """
    del times
    place = {"shared": "/mnt/shared", "host0": "/root/runs"}[storage]
    keep = dict(save_every=HALF, checkpoint__storage=storage, optim__total_steps=WHOLE)
    first = f"{storage}-half"
    values = lambda name, steps: keep | dict(workdir=f"{place}/{name}", steps=steps)
    scene.bed.run("h0", "mkdir", "-p", place)
    launched = scene.launch(first, **values(first, HALF))
    assert launched.wait() == 0, launched.said()
    undisturbed = scene.launch(f"{storage}-whole", **values(f"{storage}-whole", WHOLE))
    assert undisturbed.wait() == 0, undisturbed.said()
    row, found = {}, {}
    for count in (3, 2, 1):
        name = f"{storage}-on-{count}"
        scene.bed.run("h0", "cp", "-r", f"{place}/{first}", f"{place}/{name}")
        names = scene.bed.names[:count]
        hosts = scene.bed.inventory(scene.folder / f"{name}.toml", only=names)
        launched = scene.launch(name, hosts=hosts, **values(name, WHOLE))
        row[f"exit 0 on {count}"] = launched.wait() == 0
        row[f"resumed on {count}"] = f"step {HALF}" in launched.said()
    for name in [f"{storage}-whole"] + [f"{storage}-on-{count}" for count in (3, 2, 1)]:
        into = scene.folder / f"{name}.run"
        into.mkdir()
        copied = scene.bed.run("h0", "cat", f"{place}/{name}/metrics.jsonl")
        (into / "metrics.jsonl").write_text(copied)
        found[name] = losses(into)
    expected = found.pop(f"{storage}-whole")
    gaps = [furthest(found[f"{storage}-on-{count}"], expected) for count in (3, 2, 1)]
    row |= {"largest_gap_nats": gaps, "bitwise on 3": gaps[0] == 0.0}
    return row | {"1e-9 on 2 and 1": max(gaps) <= 1e-9, "nothing left": not scene.left()}


def two_hundred(scene, times, dtype) -> dict:
    """200 steps on 3 hosts have the losses of one process."""
    del times
    name, values = f"steps-200-{dtype}", dict(steps=200, save_every=100, model__dtype=dtype)
    launched = scene.launch(name, **values)
    row = {"exit 0": launched.wait() == 0, "nothing left": not scene.left()}
    alone = scene.folder / f"{name}-alone"
    flags = scene.flags(name, **values, workdir=alone, compile_cache=scene.folder / "xla")
    argv = [sys.executable, "-m", "jaxtrain.train", *flags]
    subprocess.run(argv, env=scene.env, cwd=ROOT, check=True, capture_output=True)
    gap = furthest(losses(scene.shared / name), losses(alone))
    last = losses(alone)[200]
    return row | {
        "last_loss_nats": last,
        "largest_gap_nats": gap,
        "losses equal": gap <= WITHIN[dtype],
    }


ROWS = {f"restore-{storage}": partial(restored, storage=storage) for storage in ("shared", "host0")}
ROWS |= {
    f"steps-200-{dtype}": partial(two_hundred, dtype=dtype) for dtype in ("float32", "float64")
}
