"""Cases of tests/launch_acceptance.py: complete runs, resumed on fewer processes."""

import subprocess
import sys
from functools import partial

from launch_scene import ROOT

from jaxtrain.metrics.jsonl import read_metrics

HALF, WHOLE = 20, 40  # steps
# Largest difference from the losses of one process. Because sums are in another order, the float32
# run differs by 2.3e-5 after 200 steps (2 vCPU, jax 0.10.2), and the float64 run by 1e-13.
WITHIN = {"float32": 1e-4, "float64": 1e-5}


def losses(path) -> dict[int, float]:
    """Returns {step: loss} of the run in a folder."""
    records = read_metrics(path / "metrics.jsonl")
    return {r["step"]: r["train/loss_nats"] for r in records if "train/loss_nats" in r}


def largest_gap(actual: dict[int, float], expected: dict[int, float]) -> float:
    """Returns the largest difference between losses of a step; inf if the steps differ."""
    if actual.keys() != expected.keys():
        return float("inf")
    return max(abs(actual[step] - expected[step]) for step in expected)


def restored(scene, repetition, storage) -> dict:
    """Resumes a checkpoint of 3 processes on 3, 2 and 1.

    The trainer compares every restored leaf with its digest. On 3 processes the later losses must
    be bitwise those of an uninterrupted run. On fewer, sums are in another order, so the losses
    must agree to 1e-9.
    """
    del repetition
    place = {"shared": "/mnt/shared", "host0": "/root/runs"}[storage]
    keep = dict(save_every=HALF, checkpoint__storage=storage, optim__total_steps=WHOLE)
    first = f"{storage}-half"
    values = lambda name, steps: keep | dict(workdir=f"{place}/{name}", steps=steps)
    scene.bed.run("h0", "mkdir", "-p", place)
    launched = scene.launch(first, **values(first, HALF))
    assert launched.wait() == 0, launched.output()
    uninterrupted = scene.launch(f"{storage}-whole", **values(f"{storage}-whole", WHOLE))
    assert uninterrupted.wait() == 0, uninterrupted.output()
    result, losses_of = {}, {}
    for count in (3, 2, 1):
        name = f"{storage}-on-{count}"
        scene.bed.run("h0", "cp", "-r", f"{place}/{first}", f"{place}/{name}")
        names = scene.bed.names[:count]
        hosts = scene.bed.inventory(scene.folder / f"{name}.toml", only=names)
        launched = scene.launch(name, hosts=hosts, **values(name, WHOLE))
        result[f"exit 0 on {count}"] = launched.wait() == 0
        result[f"resumed on {count}"] = f"step {HALF}" in launched.output()
    for name in [f"{storage}-whole"] + [f"{storage}-on-{count}" for count in (3, 2, 1)]:
        into = scene.folder / f"{name}.run"
        into.mkdir()
        copied = scene.bed.run("h0", "cat", f"{place}/{name}/metrics.jsonl")
        (into / "metrics.jsonl").write_text(copied)
        losses_of[name] = losses(into)
    expected = losses_of.pop(f"{storage}-whole")
    gaps = [largest_gap(losses_of[f"{storage}-on-{count}"], expected) for count in (3, 2, 1)]
    result |= {"largest_gap_nats": gaps, "bitwise on 3": gaps[0] == 0.0}
    return result | {"1e-9 on 2 and 1": max(gaps) <= 1e-9, "nothing left": not scene.left()}


def two_hundred(scene, repetition, dtype) -> dict:
    """Compares the losses of 200 steps on 3 hosts with those of one process."""
    del repetition
    name, values = f"steps-200-{dtype}", dict(steps=200, save_every=100, model__dtype=dtype)
    launched = scene.launch(name, **values)
    result = {"exit 0": launched.wait() == 0, "nothing left": not scene.left()}
    single = scene.folder / f"{name}-single"
    flags = scene.flags(name, **values, workdir=single, compile_cache=scene.folder / "xla")
    argv = [sys.executable, "-m", "jaxtrain.train", *flags]
    subprocess.run(argv, env=scene.env, cwd=ROOT, check=True, capture_output=True)
    gap = largest_gap(losses(scene.shared / name), losses(single))
    last = losses(single)[200]
    return result | {
        "last_loss_nats": last,
        "largest_gap_nats": gap,
        "losses equal": gap <= WITHIN[dtype],
    }


CASES = {
    f"restore-{storage}": partial(restored, storage=storage) for storage in ("shared", "host0")
}
CASES |= {
    f"steps-200-{dtype}": partial(two_hundred, dtype=dtype) for dtype in ("float32", "float64")
}
