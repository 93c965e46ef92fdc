"""Writes run directories as the trainer does, with chosen step times and losses."""

import json
import math
import random

A40 = {
    "name": "a40",
    "kind": "NVIDIA A40",
    "peak_flops_per_s": {"bfloat16": 149.7e12, "tf32": 74.8e12},
    "hbm_bytes_per_s": 696e9,
    "hbm_bytes": 47_697_362_944,
    "source": "NVIDIA A40 datasheet, 2022-06",
}
TOKENS = 524_288  # a step


def series(steps, median_s=1.0, seed=0, spread=0.02):
    """Returns step times with noise, a slow drift and rare outliers."""
    rng = random.Random(seed)
    times = []
    for step in range(steps):
        drift = 1 + 0.5 * spread * math.sin(step / 30)
        outlier = 1.6 if rng.random() < 0.01 else 1.0
        times.append(median_s * drift * outlier * math.exp(rng.gauss(0, spread)))
    return times


def curve(steps, seed=0, shift=0.0):
    rng = random.Random(seed)
    return [3.2 + 6 * (step + 2) ** -0.4 + shift + rng.gauss(0, 0.03) for step in range(steps)]


def write_run(folder, times_s, losses=None, log_every=1, processes=1, chip=A40, **config):
    """Writes a run of len(times_s) steps; `config` replaces keys of config.json."""
    losses = losses or curve(len(times_s))
    (folder / "hosts").mkdir(parents=True)
    settings = {"steps": len(times_s), "log_every": log_every, "seed": 0}
    settings |= {"model": {"dtype": "bfloat16"}, "data": {"batch": 512, "seq_len": 1_024}}
    flops, moved = 4.5e14, 2e11
    peaks = chip and (chip["peak_flops_per_s"]["bfloat16"], chip["hbm_bytes_per_s"])
    work = {"tokens_per_step": TOKENS, "params": 124_000_000, "flops_6n_per_step": 0.9 * flops}
    work |= {"flops_causal_per_step": flops, "hbm_bytes_per_step": moved, "collectives": []}
    work["roofline_s"] = chip and max(flops / 8 / peaks[0], moved / peaks[1])
    found = {"config": settings, "config_hash": "0123456789ab", "command": ["train.py"]}
    found |= {"versions": {"python": "3.11.7", "jax": "0.10.2"}, "devices": 8, "chip": chip}
    found |= {"device": chip["kind"] if chip else "cpu", "processes": processes, "hosts": 1}
    found |= {"routes": {"attention": "attention  cudnn  cuDNN's through JAX, causal"}}
    found |= {"data": {"fingerprint": "f" * 32, "tokens": 10**9}, "work": work}
    (folder / "config.json").write_text(json.dumps(found | config))
    _write_lines(folder / "metrics.jsonl", _metrics(times_s, losses, log_every, work, peaks))
    for process in range(processes if processes > 1 else 0):
        lines = list(_host(times_s, process))
        _write_lines(folder / "hosts" / f"{process}.jsonl", lines)
    wall_s = 1.1 * sum(times_s)
    lost = {"save": 0.07 * sum(times_s), "eval": 0.03 * sum(times_s)}
    summary = {"step": len(times_s), "steps": len(times_s), "stopped_by": None, "lost_s": lost}
    summary |= {"perf/wall_s": wall_s, "perf/goodput": 1 / 1.1}
    (folder / "summary.json").write_text(json.dumps(summary))
    return folder


def _metrics(times_s, losses, log_every, work, peaks):
    yield {"step": 0, "time": 1.7e9, "perf/compile_time_s": 31.0}
    for step in range(log_every, len(times_s) + 1, log_every):
        window = sorted(times_s[step - log_every : step])
        mean_s = sum(window) / log_every
        line = {"step": step, "time": 1.7e9 + sum(times_s[:step])}
        line |= {"train/loss_nats": losses[step - 1], "perf/step_time_s": window[len(window) // 2]}
        line |= {"perf/tokens_per_s": TOKENS / mean_s, "perf/tokens_per_s_actual": 470e3 / mean_s}
        line |= {"data/wait_s": 1e-3, "perf/hbm_peak_bytes": 31 << 30, "perf/goodput": 0.9}
        wire = {"comm/wire_bytes": 3 << 30, "comm/effective_bytes_per_s": 2.4e9 / mean_s}
        line |= wire | {"comm/overhead": 0.042}
        if peaks:
            flops = work["flops_causal_per_step"]
            line["perf/mfu"] = flops / 8 / peaks[0] / mean_s
            line["perf/mfu_6n"] = 0.9 * line["perf/mfu"]
            line["perf/mbu"] = work["hbm_bytes_per_step"] / peaks[1] / mean_s
        yield line
        if step % 100 == 0:
            yield {
                "step": step,
                "time": line["time"] + 1,
                "eval/loss_nats": losses[step - 1] + 0.02,
            }


def _host(times_s, process):
    rng = random.Random(process)
    yield {"step": 0, "time": 1.7e9, "event": "start"}
    for step, seconds in enumerate(times_s, 1):
        slow = 0.05 if process == 3 and 200 <= step < 260 else 0.0
        line = {
            "step": step,
            "time": 1.7e9 + step,
            "perf/step_time_s": seconds + rng.gauss(0, 1e-3),
        }
        sent = {"comm/wire_sent_bytes": 3 << 29, "comm/wire_received_bytes": 3 << 29}
        yield line | {"data/wait_s": 1e-3 + slow + abs(rng.gauss(0, 1e-3))} | sent


def _write_lines(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
