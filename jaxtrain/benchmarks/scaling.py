"""Suite scaling: data-parallel and fsdp on 1, 2, 4, ... local devices, against the ideal.

Weak scaling keeps the rows of a device, strong scaling those of the step. The efficiency is the
tokens/s of n devices over n times one device's. What communication costs that nothing hides is the
step's time less that of one device alone on its own share of the rows: the same computation with
no exchange, but for the optimizer, whose work the devices share; it may therefore be negative.
"""

import dataclasses
import glob
import os
import tempfile
from pathlib import Path

import jax

from jaxtrain.benchmarks.child import BenchJob, child_main, config_of, measure_steps, run_child
from jaxtrain.benchmarks.jax_child import JaxStep, is_oom
from jaxtrain.config.train_config import MeshConfig
from jaxtrain.distributed.runtime import start_runtime
from jaxtrain.training.run import build_run, compile_step

MESHES = {
    "data-parallel": lambda n: MeshConfig(replica=n, fsdp=1),
    "fsdp": lambda n: MeshConfig(replica=1, fsdp=n),
}
SIZE, ROWS = "gpt_124m", 16  # rows of a device
TINY = dict(optimizer="adamw", rows=1, tiny=True)  # a quarter of Muon's compilation
VIRTUAL = 8  # devices of a CPU
VIRTUAL_FLAG = f"--xla_force_host_platform_device_count={VIRTUAL}"
NO_FIGURE = "virtual devices share one processor: the harness ran, these are no scaling figures"


def counts_of(devices: int, tiny: bool) -> list[int]:
    """Powers of two up to all devices; with tiny the first and the last alone."""
    found = [n for n in (2**k for k in range(devices.bit_length())) if n <= devices]
    return [found[0], found[-1]] if tiny else found


def step_s(job, mesh, batch, devices) -> float:
    """Median seconds of a step of `batch` rows on these devices."""
    rows = min(batch, job.rows * len(devices))  # a step's rows that are held at once
    cfg = config_of(dataclasses.replace(job, batch=batch, rows=rows))
    cfg = dataclasses.replace(cfg, mesh=mesh)
    start_runtime(cfg)
    run = build_run(cfg, devices)
    ours = JaxStep(run, compile_step(run))
    return measure_steps(dataclasses.replace(job, batch=batch), cfg, ours.launch, float)["step_s"]


def scale(job) -> dict:
    """{"rows": [...]} of every mesh, count and kind of scaling; each program is timed once."""
    devices, known, rows = jax.devices(), {}, []
    counts = counts_of(len(devices), job.tiny)

    def timed(name, n, batch):
        key = name if n > 1 else "", n, batch
        if key not in known:
            known[key] = step_s(job, MESHES[name](n), batch, devices[:n])
        return known[key]

    for name in MESHES:
        for kind in ("weak", "strong"):
            for n in counts:
                batch = job.rows * (n if kind == "weak" else counts[-1])
                one_s = timed(name, 1, job.rows if kind == "weak" else batch)
                row = {"suite": "scaling", "case": f"{job.size} {name} {kind}", "devices": n}
                row |= {"batch": batch, "step_s": timed(name, n, batch)}
                row["alone_s"] = timed(name, 1, batch // n)
                row["exposed_s"] = row["step_s"] - row["alone_s"]
                ideal_s = one_s if kind == "weak" else one_s / n
                rows.append(row | {"ideal_s": ideal_s, "efficiency": ideal_s / row["step_s"]})
    about = {"device": devices[0].device_kind, "platform": devices[0].platform}
    return {"rows": [row | about for row in rows]}


def run(args):
    """Yields the suite's rows. On a machine without GPUs at tiny sizes, on virtual devices."""
    gpu = bool(glob.glob("/dev/nvidia[0-9]*")) or os.path.exists("/dev/dxg")
    tiny, env = args.tiny or not gpu, {}
    if not gpu:
        flags = os.environ.get("XLA_FLAGS", "").split()
        kept = [flag for flag in flags if not flag.startswith(VIRTUAL_FLAG.split("=")[0])]
        env = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": " ".join([*kept, VIRTUAL_FLAG])}
    with tempfile.TemporaryDirectory() as folder:
        values = TINY if tiny else dict(optimizer="muon", rows=ROWS, most_s=5.0)
        job = BenchJob("scale", SIZE, **values)
        found = run_child("scaling", job, Path(folder), 60 * args.minutes, env)
    if "rows" not in found:
        reason = found.get("error") or found["oom"]
        yield {"suite": "scaling", "case": SIZE, "error": reason}
        return
    for row in found["rows"]:
        yield row | ({} if row["platform"] == "gpu" else {"note": NO_FIGURE})


def line(row) -> str:
    """A row as one line of text."""
    if "error" in row:
        return f"{row['case']:32} {row['error']}"
    text = (
        f"{row['case']:32} {row['devices']:3} devices {1e3 * row['step_s']:9.2f} ms, ideal "
        f"{1e3 * row['ideal_s']:9.2f}, efficiency {row['efficiency']:6.1%}, exposed "
        f"{1e3 * row['exposed_s']:9.2f} ms"
    )
    return f"{text}; {row['note']}" if "note" in row else text


if __name__ == "__main__":
    child_main({"scale": scale}, is_oom)
