"""Lists the names of measured metrics: the same in metrics.jsonl, TensorBoard and Prometheus.

A name is `group/name_unit`. Training, evaluation and the optimizer name their own metrics
(`train/`, `eval/`, `optim/`); all names of measurements are here. A {placeholder} stands for each
word of a fixed set.
"""

import re

CAUSES = ("save", "eval", "data", "diagnosis", "sample", "phases", "probe", "profile", "sites")
OWN = ("compute", "data", "host")  # what a rank may be slow in
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
    "perf/tokens_per_s": "tokens over the time in steps, all devices",
    "perf/tokens_per_s_per_device": "tokens over the time in steps, per device",
    "perf/tokens_per_s_actual": "tokens over the whole time, pauses included",
    "perf/goodput": "share of the wall time in which a step trained on a batch",
    "perf/mfu": "share of the peak FLOP/s: 6N plus causal attention, without recomputation",
    "perf/mfu_6n": "share of the peak FLOP/s: 6N, without attention",
    "perf/mbu": "share of the peak HBM bytes/s: bytes that the compiled step moves",
    "perf/hbm_bytes": "allocated on the fullest device of process 0",
    "perf/hbm_peak_bytes": "most ever allocated on the fullest device of process 0",
    "perf/pause_{cause}_s": "time of the window in which no step ran, by cause",
    "perf/phase_{phase}_s": "time of one part of the step, run by itself at steady state",
    "rank/{own}_ratio": "own time of a rank over the median rank's, newest probes",
    "data/wait_s": "mean wait of the host for a batch, per step",
    "comm/{collective}_bytes": "payload per device and step",
    "comm/wire_bytes": "sent and received by process 0's host, per step",
    "comm/wire_sent_bytes": "sent by process 0's host, per step",
    "comm/wire_received_bytes": "received by process 0's host, per step",
    "comm/effective_bytes_per_s": "payload that a host must send, over the mean step time",
    "comm/overhead": "bytes sent over the payload that a host must send, minus 1",
    "comm/algbw_bytes_per_s": "payload of the gradient exchange over its own time",
    "comm/busbw_bytes_per_s": "bytes that a device must send for the exchange, over its own time",
    "sites/round": "number of the newest exchange with the other sites that was applied",
    "sites/round_s": "time from sending this site's code until all codes had come",
    "sites/waited_s": "time for which training waited for the other sites",
    "sites/age_steps": "steps from the start of the exchange to its application",
    "sites/payload_bytes": "codes sent and received in an exchange, by all processes of this site",
    "sites/wire_bytes": "all bytes sent and received for it, with headers and retransmissions",
}
# Those of a mixture's sources and of tasks, whose names are in the config.
NAMED = {
    r"data/\w+_tokens": "tokens read of a source of the mixture",
    r"data/\w+_epochs": "epochs read of a source of the mixture, by all sites",
    r"train/\w+_loss_nats": "training loss of a source since the last logged step",
    r"eval/\w+_loss_nats": "loss of a source's held-out text, or of a held-out text of eval.tasks",
    r"eval/\w+_tokens": "tokens read of a held-out text",
    r"eval/\w+_bits_per_byte": "bits per byte of a held-out text, or of a task's right choices",
    r"eval/\w+_accuracy": "share of a task's examples that are right",
    r"eval/\w+_accuracy_norm": "the same, with likelihoods per byte of a choice",
    r"eval/\w+_stderr": "standard error of an accuracy",
    r"eval/\w+_examples": "examples of a task that were scored",
    r"eval/\w+_truncated": "examples of a task that were cut",
}
_WORDS = {"cause": CAUSES, "own": OWN, "phase": PHASES, "collective": COLLECTIVES}
PREFIX = "jaxtrain_"


def measured_names() -> dict[str, str]:
    """Returns {name: description} of everything that a run may measure."""
    names = {}
    for name, text in MEASURED.items():
        placeholder = re.search(r"{(\w+)}", name)
        if not placeholder:
            names[name] = text
            continue
        for word in _WORDS[placeholder[1]]:
            names[name.replace(placeholder[0], word)] = f"{text}: {word}"
    return names


def describe_metric(name: str) -> str:
    """Returns the description of a metric; its name if there is none."""
    texts = (text for pattern, text in NAMED.items() if re.fullmatch(pattern, name))
    return measured_names().get(name) or next(texts, name)


def prometheus_name(name: str) -> str:
    """Returns the name in Prometheus: `perf/step_time_s` -> `jaxtrain_perf_step_time_s`."""
    return PREFIX + re.sub(r"[^a-zA-Z0-9_]", "_", name)
