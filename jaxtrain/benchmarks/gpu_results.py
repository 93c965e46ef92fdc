"""Computes shares, verdicts and ratios from the GPU suite's measurements; formats its rows."""

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

from jaxtrain.benchmarks.gpu_items import TORCH_OPTIMIZERS, Item
from jaxtrain.benchmarks.timing import target_verdict

# Targets on an H100 or H200: jaxtrain's MFU with Muon (counting causal attention), its tokens/s
# over those of compiled PyTorch, shares of the optimizer and of an idle device, time to first step.
MFU = {"gpt_124m": 0.50, "gpt_350m": 0.52, "gpt_774m": 0.55, "llama_1400m": 0.55}
RATIO, OPTIMIZER_SHARE, IDLE_SHARE, COLD_START_S, WARM_START_S = 1.1, 0.03, 0.05, 60.0, 20.0
# The optimizer's share falls with the tokens of a step; its target is for this many.
SHARE_TOKENS = 524_288
OPTIMIZER_FIGURES = (
    "optimizer_share",
    "optimizer_share_range",
    "optimizer_share_at_524288",
    "tokens_per_s_at_524288",
)
HOST_BOUND = 0.8  # if launching takes a larger share of the optimizer's time, the device may wait


def step_shares(result: dict[str, Any]) -> dict[str, Any]:
    """Returns the host's and the optimizer's share of a step, and figures at SHARE_TOKENS.

    The host's share is the time that launching takes. If the GPU's queue is full, launching waits
    for the GPU: on an H100 it took 99.9 % of our step, in which the GPU was idle for 1.8 %
    (2026-11-26). So only the idle share of a profile says whether the host slows the GPU.

    PyTorch's optimizer is timed inside its steps, by events on the GPU. Our step is one program, so
    our optimizer is timed as another program. A reason replaces the share if the child ended before
    that, if the host could not launch that program fast enough, or if it took longer than the whole
    step: then its time is not the optimizer's time inside the step. The figures at SHARE_TOKENS are
    computed: everything but the optimizer grows with the tokens.
    """
    step_s, update_s = result["step_s"], result.get("optimizer_s")
    host_share = {"host_share": result["host_s"] / step_s}
    launch_s = result.get("optimizer_host_s", 0.0)
    reason = ""
    if update_s is None:
        reason = result.get("incomplete", "it was not timed")
    elif update_s > step_s:
        reason = f"as its own program it took {update_s:.2g} s, the whole step {step_s:.2g} s"
    elif launch_s > HOST_BOUND * update_s:
        reason = f"the host took {launch_s:.2g} s to launch what took {update_s:.2g} s"
    if update_s is None or reason:
        return host_share | dict.fromkeys(OPTIMIZER_FIGURES) | {"no_optimizer_share": reason}
    large_step_s = (step_s - update_s) * SHARE_TOKENS / result["tokens_per_step"] + update_s
    return host_share | {
        "optimizer_share": update_s / step_s,
        "optimizer_share_range": [x / step_s for x in result["optimizer_range_s"]],
        "optimizer_share_at_524288": update_s / large_step_s,
        "tokens_per_s_at_524288": SHARE_TOKENS / large_step_s,
    }


def target_verdicts(item: Item, row: dict[str, Any]) -> dict[str, str]:
    """Returns {figure: verdict} for a row of jaxtrain; figures that are unknown have none."""
    if item.variant != "jaxtrain":
        return {}
    verdicts = {}
    if row.get("idle_share") is not None:
        verdicts["idle_share"] = target_verdict(row["idle_share"], IDLE_SHARE, at_most=True)
    share = row["optimizer_share_at_524288"]
    if share is not None:
        verdicts["optimizer_share_at_524288"] = target_verdict(share, OPTIMIZER_SHARE, at_most=True)
    if item.optimizer != "muon":
        return verdicts
    for name in ("mfu", "mfu_at_524288"):
        if row[name] is not None:
            verdicts[name] = target_verdict(row[name], MFU[item.size])
    # Only for Muon, which is measured first: later optimizers find some programs in the cache.
    limits_s = {"step": COLD_START_S, "warm start": WARM_START_S}
    if item.size == "llama_1400m" and item.what in limits_s:
        limit_s = limits_s[item.what]
        verdicts["first_step_s"] = target_verdict(row["first_step_s"], limit_s, at_most=True)
    return verdicts


def ratio_row(rows: Sequence[dict[str, Any]], size: str, optimizer: str) -> dict[str, Any] | None:
    """Returns our tokens/s over PyTorch's, each at its fastest; None until both are measured.

    There is a second ratio, at SHARE_TOKENS, as optimizers take a larger share of short steps.
    """
    torch_optimizer = optimizer if optimizer in TORCH_OPTIMIZERS else "muon"
    cases = {"jaxtrain": f"{size} {optimizer}", "pytorch": f"{size} {torch_optimizer}"}

    def fastest(variant: str, figure: str) -> float:
        alike = (r for r in rows if r.get("variant") == variant and r["case"] == cases[variant])
        return max((r.get(figure) or 0.0 for r in alike if r["what"] == "step"), default=0.0)

    def ratio(figure: str) -> float | None:
        ours, theirs = fastest("jaxtrain", figure), fastest("pytorch", figure)
        return ours / theirs if ours and theirs else None

    ratios = {"ratio": ratio("tokens_per_s"), "ratio_at_524288": ratio("tokens_per_s_at_524288")}
    if ratios["ratio"] is None:
        return None
    return {
        "suite": "gpu",
        "case": cases["jaxtrain"],
        "ratio": f"jaxtrain / pytorch's {torch_optimizer}",
        "what": "ratio",
        "value": ratios["ratio"],
        "value_at_524288": ratios["ratio_at_524288"],
        "targets": {name: target_verdict(x, RATIO) for name, x in ratios.items() if x is not None},
    }


def newest_ratios(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns rows without the ratios that a later row of the same case replaces."""
    last = {row["case"]: row for row in rows if row.get("what") == "ratio"}
    return [row for row in rows if row.get("what") != "ratio" or row is last[row["case"]]]


def stamp(row: dict[str, Any], tiny: bool) -> dict[str, Any]:
    """Returns a row with its date. Tiny rows have no targets and no ratio: they measure nothing."""
    row = row | {"date": f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ}"}
    if tiny:
        row |= {"tiny": True, "targets": {}}
        row |= {name: None for name in ("value", "value_at_524288") if name in row}
    return row


def describe(row: dict[str, Any]) -> str:
    """Returns a row as one line of text."""
    if row["case"] == "ceilings" and "error" not in row:
        return (
            f"{row['device']}: matrix product {row['matmul_flops_per_s'] / 1e12:.2f} TFLOP/s, "
            f"copy {row['copy_bytes_per_s'] / 1e9:.1f} GB/s"
        )
    what = f"{row.get('what', '')}{' half' * bool(row.get('half'))}"
    name = f"{row['case']:28} {row.get('variant', ''):9} {what:12}"
    if "error" in row:
        return f"{name} {row['error']}"
    ending = "".join(f"; {figure} {verdict}" for figure, verdict in row["targets"].items())
    if row.get("tiny"):
        ending += "; tiny: no meaningful figures"
    if row["what"] == "ratio" and row.get("tiny"):
        return f"{name} no ratio: a trial compares nothing{ending}"
    if row["what"] == "ratio":
        large = row["value_at_524288"]
        large = "" if large is None else f", {large:.2f}x at {SHARE_TOKENS} tokens a step"
        return f"{name} {row['value']:.2f}x {row['ratio']}{large}{ending}"
    mfu = f"no MFU: {row.get('no_mfu')}"
    if row["mfu"] is not None:
        mfu = f"MFU {row['mfu']:.1%}, {row['mfu_6n']:.1%} by 6N only"
    peak = "" if row["peak_bytes"] is None else f", peak {row['peak_bytes'] / 2**30:.1f} GiB"
    predicted = row.get("planned_bytes", row["formula_bytes"]) / 2**30
    launching = f"launching {row['host_share']:.1%}"
    if row.get("idle_share") is not None:
        launching = f"device idle {row['idle_share']:.1%}"
    elif row.get("no_trace"):
        launching += f", no trace: {row['no_trace']}"
    return (
        f"{name} micro-batches of {row['rows']} row{'s' * (row['rows'] > 1)}, "
        f"{row['tokens_per_step']} tokens a step, "
        f"{1e3 * row['step_s']:.1f} ms (p95 {1e3 * row['step_p95_s']:.1f}), "
        f"{row['tokens_per_s']:,.0f} tokens/s, {mfu}, {_describe_optimizer(row)}, "
        f"{launching}{peak} (predicted {predicted:.1f} GiB){ending}"
    )


def _describe_optimizer(row: dict[str, Any]) -> str:
    if row["optimizer_share"] is None:
        return f"no optimizer share: {row['no_optimizer_share']}"
    low, high = row["optimizer_share_range"]
    return f"optimizer {row['optimizer_share']:.1%} ({low:.1%} to {high:.1%})"
