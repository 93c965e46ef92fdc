"""Rows of suite gpu: what follows from a child's figures, targets, ratios, and their text."""

from typing import NamedTuple

from jaxtrain.benchmarks.timing import verdict

IN_TORCH = ("muon", "adamw")  # torch.optim has no accelerated_lmo: it is held against its Muon
# Targets on an H100 or H200: causal MFU of ours with Muon, and against compiled PyTorch.
MFU = {"gpt_124m": 0.50, "gpt_350m": 0.52, "gpt_774m": 0.55, "llama_1400m": 0.55}
RATIO, OPTIMIZER_SHARE, HOST_SHARE, COLD_S, WARM_S = 1.1, 0.03, 0.05, 60.0, 20.0
SHARE_TOKENS = 524_288  # of the step that the optimizer's share is asked of
OF_OPTIMIZER = (
    "optimizer_share",
    "optimizer_share_range",
    "optimizer_share_at_524288",
    "tokens_per_s_at_524288",
)
HOST_BOUND = 0.8  # of the optimizer's time: its launches then no longer hide behind it


class Item(NamedTuple):
    """One row to be measured."""

    size: str
    variant: str
    optimizer: str
    what: str = "step"  # or "warm start", or the option that is tried

    def __str__(self) -> str:
        return f"{self.size} {self.optimizer} {self.variant} {self.what}"


def shares(found) -> dict:
    """Of the step, of the host and the optimizer, and what a step of SHARE_TOKENS would have.

    The twin's optimizer is timed inside its steps, by events on the card. Ours is a part of one
    program, and is timed as a program of its own, one update launched ahead of the next. Where that
    cannot be the optimizer's time in the step (the host could not launch it as fast as the device
    made it, or it took longer than the whole step), there is no share, but the reason. The steps of
    SHARE_TOKENS are computed: all but the optimizer grows with the tokens.
    """
    step_s, update_s = found["step_s"], found["optimizer_s"]
    found_shares = {"host_share": found["host_s"] / step_s}
    if reason := _no_share(step_s, update_s, found.get("optimizer_host_s", 0.0)):
        return found_shares | dict.fromkeys(OF_OPTIMIZER) | {"no_optimizer_share": reason}
    there_s = (step_s - update_s) * SHARE_TOKENS / found["tokens_per_step"] + update_s
    return found_shares | {
        "optimizer_share": update_s / step_s,
        "optimizer_share_range": [x / step_s for x in found["optimizer_range_s"]],
        "optimizer_share_at_524288": update_s / there_s,
        "tokens_per_s_at_524288": SHARE_TOKENS / there_s,
    }


def _no_share(step_s, update_s, host_s) -> str:
    if update_s > step_s:
        return f"alone it took {update_s:.2g} s, the whole step {step_s:.2g} s"
    if host_s > HOST_BOUND * update_s:
        return f"the host took {host_s:.2g} s to launch what took {update_s:.2g} s"
    return ""


def targets(item, row) -> dict:
    """{figure: verdict} of our rows; what is not known has none."""
    if item.variant != "jaxtrain":
        return {}
    found = {"host_share": verdict(row["host_share"], HOST_SHARE, at_most=True)}
    share = row["optimizer_share_at_524288"]
    if share is not None:
        found["optimizer_share_at_524288"] = verdict(share, OPTIMIZER_SHARE, at_most=True)
    for name in ("mfu", "mfu_at_524288"):
        if item.optimizer == "muon" and row[name] is not None:
            found[name] = verdict(row[name], MFU[item.size])
    # Of Muon alone, which comes first: the others find some of its programs in the cache.
    limits_s = {"step": COLD_S, "warm start": WARM_S} if item.optimizer == "muon" else {}
    if item.size == "llama_1400m" and item.what in limits_s:
        limit_s = limits_s[item.what]
        found["first_step_s"] = verdict(row["first_step_s"], limit_s, at_most=True)
    return found


def ratio_row(rows, size, optimizer) -> dict | None:
    """Ours over theirs in tokens/s, each at its fastest; None until both are there.

    As measured, and at SHARE_TOKENS a step: a shorter step shows more of the optimizers.
    """
    like = optimizer if optimizer in IN_TORCH else "muon"
    cases = {"jaxtrain": f"{size} {optimizer}", "pytorch": f"{size} {like}"}

    def fastest(variant, name):
        alike = (r for r in rows if r.get("variant") == variant and r["case"] == cases[variant])
        return max((r.get(name) or 0.0 for r in alike if r["what"] == "step"), default=0.0)

    values = {}
    for key, name in (("value", "tokens_per_s"), ("value_at_524288", "tokens_per_s_at_524288")):
        ours, theirs = (fastest(variant, name) for variant in cases)
        values[key] = ours / theirs if ours and theirs else None
    if values["value"] is None:
        return None
    row = {"suite": "gpu", "case": cases["jaxtrain"], "ratio": f"jaxtrain / pytorch's {like}"}
    verdicts = {"ratio": values["value"], "ratio_at_524288": values["value_at_524288"]}
    verdicts = {name: verdict(x, RATIO) for name, x in verdicts.items() if x is not None}
    return row | {"what": "ratio", **values, "targets": verdicts}


def line(row) -> str:
    """A row as one line of text."""
    if row["case"] == "ceilings" and "error" not in row:
        return (
            f"{row['device']}: matrix product {row['matmul_flops_per_s'] / 1e12:.2f} TFLOP/s, "
            f"copy {row['copy_bytes_per_s'] / 1e9:.1f} GB/s"
        )
    name = f"{row['case']:28} {row.get('variant', ''):9} {row.get('what', ''):12}"
    if "error" in row:
        return f"{name} {row['error']}"
    verdicts = "".join(f"; {key} {text}" for key, text in row["targets"].items())
    verdicts += "; tiny: a trial of the path" if row.get("tiny") else ""
    if row["what"] == "ratio":
        there = row["value_at_524288"]
        there = "" if there is None else f", {there:.2f}x at {SHARE_TOKENS} tokens a step"
        return f"{name} {row['value']:.2f}x {row['ratio']}{there}{verdicts}"
    mfu = (
        "no MFU: " + row["no_mfu"]
        if row["mfu"] is None
        else (f"MFU {row['mfu']:.1%}, {row['mfu_6n']:.1%} by 6N alone")
    )
    memory = "" if row["peak_bytes"] is None else f", peak {row['peak_bytes'] / 2**30:.1f} GiB"
    planned = row.get("planned_bytes", row["formula_bytes"]) / 2**30
    return (
        f"{name} {row['rows']} rows at once of {row['tokens_per_step']} tokens a step, "
        f"{1e3 * row['step_s']:.1f} ms (p95 {1e3 * row['step_p95_s']:.1f}), "
        f"{row['tokens_per_s']:,.0f} tokens/s, {mfu}, {_optimizer_text(row)}, "
        f"host {row['host_share']:.1%}{memory} (predicted {planned:.1f} GiB){verdicts}"
    )


def _optimizer_text(row) -> str:
    if row["optimizer_share"] is None:
        return "no optimizer's share: " + row["no_optimizer_share"]
    low, high = row["optimizer_share_range"]
    return f"optimizer {row['optimizer_share']:.1%} ({low:.1%} to {high:.1%})"
