"""Suite scaling: data-parallel and fsdp steps on 1, 2, 4, ... local devices.

In weak scaling all steps have the same rows per device, in strong scaling the same rows in all. The
efficiency is the tokens/s of n devices over n times those of one. The exposed communication is a
step's time minus the time that one device takes for its share of the rows. One device makes the
same computation without communication, except that n devices share the optimizer's work; so the
difference can be negative.
"""

import argparse
import dataclasses
import os
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax

from jaxtrain.benchmarks.child import BenchJob, child_main, job_config, run_child
from jaxtrain.benchmarks.jax_child import JaxStep, is_oom
from jaxtrain.benchmarks.step_timing import time_steps
from jaxtrain.config.train_config import MeshConfig
from jaxtrain.distributed.runtime import start_runtime
from pallas_kernels.quiet import has_gpu

MESHES = {
    "data-parallel": lambda n: MeshConfig(replica=n, fsdp=1),
    "fsdp": lambda n: MeshConfig(replica=1, fsdp=n),
}
SIZE, ROWS = "gpt_124m", 16  # rows per device
JOB = BenchJob("scale", SIZE, "muon", rows=ROWS, most_s=5.0)
# AdamW compiles in a quarter of Muon's time.
TINY_JOB = BenchJob("scale", SIZE, "adamw", rows=1, tiny=True)
VIRTUAL_DEVICES_FLAG = "--xla_force_host_platform_device_count"
VIRTUAL_DEVICES = 8
NO_FIGURE = "virtual devices share one processor: this tests the suite, it measures no scaling"


def median_step_s(job: BenchJob, mesh: MeshConfig, batch: int, devices: Sequence[Any]) -> float:
    """Returns the median time of a step of `batch` rows on the given devices."""
    rows = min(batch, job.rows * len(devices))
    job = dataclasses.replace(job, batch=batch, rows=rows)
    cfg = dataclasses.replace(job_config(job), mesh=mesh)
    start_runtime(cfg)
    step = JaxStep(cfg, devices)
    step.init()
    return time_steps(job, cfg, step.launch, float)["step_s"]


def measure_scaling(job: BenchJob) -> dict[str, Any]:
    """Measures every mesh, kind of scaling and device count; returns {"rows": [...]}."""
    devices, known_s, rows = jax.devices(), {}, []
    counts = [2**k for k in range(len(devices).bit_length())]
    counts = [counts[0], counts[-1]] if job.tiny else counts

    def step_s(mesh: str, n: int, batch: int) -> float:
        key = mesh if n > 1 else "", n, batch  # on one device all meshes are the same program
        if key not in known_s:
            known_s[key] = median_step_s(job, MESHES[mesh](n), batch, devices[:n])
        return known_s[key]

    for mesh in MESHES:
        for kind in ("weak", "strong"):
            for n in counts:
                batch = job.rows * (n if kind == "weak" else counts[-1])
                n_devices_s, one_share_s = step_s(mesh, n, batch), step_s(mesh, 1, batch // n)
                ideal_s = one_share_s if kind == "weak" else step_s(mesh, 1, batch) / n
                rows.append(
                    {
                        "suite": "scaling",
                        "case": f"{job.size} {mesh} {kind}",
                        "devices": n,
                        "batch": batch,
                        "step_s": n_devices_s,
                        "alone_s": one_share_s,
                        "exposed_s": n_devices_s - one_share_s,
                        "ideal_s": ideal_s,
                        "efficiency": ideal_s / n_devices_s,
                        "device": devices[0].device_kind,
                        "platform": devices[0].platform,
                    }
                )
    return {"rows": rows}


def measure(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Yields the suite's rows; without a GPU, at tiny sizes on virtual devices."""
    gpu, env = has_gpu(), {}
    if not gpu:  # of two equal XLA flags the last one counts
        flags = f"{os.environ.get('XLA_FLAGS', '')} {VIRTUAL_DEVICES_FLAG}={VIRTUAL_DEVICES}"
        env = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
    with tempfile.TemporaryDirectory() as folder:
        job = JOB if gpu and not args.tiny else TINY_JOB
        result = run_child("scaling", job, Path(folder), 60 * args.minutes, env)
    if "rows" not in result:
        reason = result.get("error") or result["oom"]
        yield {"suite": "scaling", "case": SIZE, "error": reason}
        return
    for row in result["rows"]:
        yield row | ({} if row["platform"] == "gpu" else {"note": NO_FIGURE})


def describe(row: dict[str, Any]) -> str:
    """Returns a row as one line of text."""
    if "error" in row:
        return f"{row['case']:32} {row['error']}"
    text = (
        f"{row['case']:32} {row['devices']:3} devices {1e3 * row['step_s']:9.2f} ms, ideal "
        f"{1e3 * row['ideal_s']:9.2f} ms, efficiency {row['efficiency']:6.1%}, exposed "
        f"communication {1e3 * row['exposed_s']:9.2f} ms"
    )
    return f"{text}; {row['note']}" if "note" in row else text


if __name__ == "__main__":
    child_main({"scale": measure_scaling}, is_oom)
