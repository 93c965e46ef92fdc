"""The names of what a run measures: the same in metrics.jsonl, TensorBoard and Prometheus.

A name is `group/name_unit`. Names of training, evaluation and optimizer groups (`train/`, `eval/`,
`optim/`) are their makers'; those of measurement are all here. {} stands for a word of a fixed set.
"""

import re

CAUSES = ("save", "eval", "data", "diagnosis", "sample", "phases", "profile")
COLLECTIVES = (
    "all_reduce",
    "all_gather",
    "reduce_scatter",
    "all_to_all",
    "collective_permute",
)
PHASES = ("forward", "forward_backward", "exchange", "optimizer", "whole", "overlap", "exposed")

MEASURED = {
    "perf/compile_time_s": "compiling the step",
    "perf/step_time_s": "step time, median of the window",
    "perf/step_time_p95_s": "step time, 95th percentile of the window",
    "perf/step_time_p99_s": "step time, 99th percentile of the window",
    "perf/step_time_max_s": "step time, slowest of the window",
    "perf/tokens_per_s": "tokens over the time of steps, all devices",
    "perf/tokens_per_s_per_device": "the same, of one device",
    "perf/tokens_per_s_actual": "tokens over all time, pauses too",
    "perf/goodput": "share of the wall time in steps that were made, with a batch at hand",
    "perf/mfu": "share of the peak FLOP/s: 6N and causal attention, once",
    "perf/mfu_6n": "share of the peak FLOP/s: 6N",
    "perf/mbu": "share of the peak HBM bytes/s that the compiled step moves",
    "perf/hbm_bytes": "allocated on the fullest device of process 0",
    "perf/hbm_peak_bytes": "most that was ever allocated on it",
    "perf/pause_{cause}_s": "of the window that no step ran in, by cause",
    "perf/phase_{phase}_s": "a part of the step alone, at steady state",
    "data/wait_s": "host's mean wait for a batch, a step",
    "comm/{collective}_bytes": "payload of a device and step",
    "comm/wire_bytes": "sent and received by process 0's host, a step",
    "comm/wire_sent_bytes": "sent by process 0's host, a step",
    "comm/wire_received_bytes": "received by process 0's host, a step",
    "comm/effective_bytes_per_s": "payload that a host must send, over the step time",
    "comm/overhead": "bytes sent over that payload, minus 1",
    "comm/algbw_bytes_per_s": "payload of the exchange over its time alone",
    "comm/busbw_bytes_per_s": "what a device must send for it, over its time alone",
}
_WORDS = {"cause": CAUSES, "phase": PHASES, "collective": COLLECTIVES}
PREFIX = "jaxtrain_"


def measured_names() -> dict[str, str]:
    """{name: what it is} of all that a run may measure."""
    found = {}
    for form, text in MEASURED.items():
        placeholder = re.search(r"{(\w+)}", form)
        for word in _WORDS[placeholder[1]] if placeholder else ("",):
            name = form.replace(placeholder[0], word) if placeholder else form
            found[name] = f"{text}: {word}" if word else text
    return found


def prometheus_name(name: str) -> str:
    """`perf/step_time_s` -> `jaxtrain_perf_step_time_s`; other characters become _."""
    return PREFIX + re.sub(r"[^a-zA-Z0-9_]", "_", name)
