"""Rows of suite gpu: what follows from a child's figures, targets, ratios, and their text."""

from typing import NamedTuple

from jaxtrain.benchmarks.measure import verdict

IN_TORCH = ("muon", "adamw")  # torch.optim has no accelerated_lmo: it is held against its Muon
# Targets on an H100 or H200: causal MFU of ours with Muon, and against compiled PyTorch.
MFU = {"gpt_124m": 0.50, "gpt_350m": 0.52, "gpt_774m": 0.55, "llama_1400m": 0.55}
RATIO, OPTIMIZER_SHARE, HOST_SHARE, COLD_S, WARM_S = 1.1, 0.03, 0.05, 60.0, 20.0
SHARE_TOKENS = 524_288  # of the step that the optimizer's share is asked of


class Item(NamedTuple):
    """One row to be measured."""

    size: str
    variant: str
    optimizer: str
    what: str = "step"  # or "warm start", or the option that is tried

    def __str__(self) -> str:
        return f"{self.size} {self.optimizer} {self.variant} {self.what}"


def shares(found) -> dict:
    """Of the step, of the optimizer and the host; the optimizer's at SHARE_TOKENS a step too.

    That one is computed from this row's measured parts: the rest of the step grows with its tokens.
    """
    rest_s = max(found["step_s"] - found["optimizer_s"], 0.0)
    there_s = rest_s * SHARE_TOKENS / found["tokens_per_step"] + found["optimizer_s"]
    return {
        "optimizer_share": found["optimizer_s"] / found["step_s"],
        "optimizer_share_at_524288": found["optimizer_s"] / there_s,
        "host_share": found["host_s"] / found["step_s"],
    }


def targets(item, row) -> dict:
    """{figure: verdict} of our rows; what is not known has none."""
    if item.variant != "jaxtrain":
        return {}
    found = {"host_share": verdict(row["host_share"], HOST_SHARE, at_most=True)}
    share = row["optimizer_share_at_524288"]
    found["optimizer_share_at_524288"] = verdict(share, OPTIMIZER_SHARE, at_most=True)
    if item.optimizer == "muon" and row["mfu"] is not None:
        found["mfu"] = verdict(row["mfu"], MFU[item.size])
    # Of Muon alone, which comes first: the others find some of its programs in the cache.
    limits_s = {"step": COLD_S, "warm start": WARM_S} if item.optimizer == "muon" else {}
    if item.size == "llama_1400m" and item.what in limits_s:
        limit_s = limits_s[item.what]
        found["first_step_s"] = verdict(row["first_step_s"], limit_s, at_most=True)
    return found


def ratio_row(rows, size, optimizer) -> dict | None:
    """Ours over theirs in tokens/s, each at its fastest; None until both are there."""
    like = optimizer if optimizer in IN_TORCH else "muon"
    cases = {"jaxtrain": f"{size} {optimizer}", "pytorch": f"{size} {like}"}
    best = {}
    for row in rows:
        name = row.get("variant")
        if row["case"] == cases.get(name) and row["what"] == "step" and "tokens_per_s" in row:
            best[name] = max(best.get(name, 0.0), row["tokens_per_s"])
    if len(best) < 2:
        return None
    ratio = best["jaxtrain"] / best["pytorch"]
    row = {"suite": "gpu", "case": cases["jaxtrain"], "ratio": f"jaxtrain / pytorch's {like}"}
    return row | {"what": "ratio", "value": ratio, "targets": {"ratio": verdict(ratio, RATIO)}}


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
    verdicts = "; ".join(f"{key} {text}" for key, text in row["targets"].items())
    if row["what"] == "ratio":
        return f"{name} {row['value']:.2f}x {row['ratio']}; {verdicts}"
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
        f"{row['tokens_per_s']:,.0f} tokens/s, {mfu}, optimizer {row['optimizer_share']:.1%}, "
        f"host {row['host_share']:.1%}{memory} (predicted {planned:.1f} GiB); {verdicts}"
    )
