"""Computes the cost of tokens and the GPUs that they need, from a baseline and a price list."""

import math
from pathlib import Path

from launch.inventory import read_toml

MONTH_S = 30 * 86_400
SPANS_S = {"m": 60, "h": 3_600, "d": 86_400, "w": 7 * 86_400}


def read_prices(path: Path | str) -> dict:
    """Reads {"currency", "per_gpu_hour": {chip: price}} from a TOML file such as docs/prices.toml.

    Raises:
        ValueError: the file has another form.
    """
    price_list = read_toml(path, "--prices")
    prices = price_list.get("per_gpu_hour")
    valid = isinstance(prices, dict) and all(
        isinstance(price, int | float) and price >= 0 for price in prices.values()
    )
    if not valid or not isinstance(price_list.get("currency"), str):
        raise ValueError(f'--prices {path} must have currency = "..." and [per_gpu_hour] prices.')
    return price_list


def read_span(text: str) -> float:
    """Returns the seconds of a time span such as `90m`, `36h`, `7d` or `2w`.

    Raises:
        ValueError: the text has another form.
    """
    try:
        span_s = float(text[:-1]) * SPANS_S[text[-1:]]
    except (KeyError, ValueError):
        span_s = 0.0
    if not 0 < span_s < math.inf:
        raise ValueError(f"--deadline must be like 90m, 36h, 7d or 2w; got {text!r}.")
    return span_s


def price(
    baseline: dict,
    prices: dict,
    availability: float = 1.0,
    tokens: float | None = None,
    span_s: float | None = None,
    params: float | None = None,
) -> dict:
    """Returns the cost and the capacity, with their assumptions.

    Args:
        availability: share of the time in which the GPUs are available, in (0, 1].
        tokens, span_s: a number of tokens and the seconds in which to train on them, or neither.
        params: the parameters of another model, whose speed is scaled from the baseline's.

    Raises:
        ValueError: the chip has no price, or the baseline lacks what is needed.
    """
    key, figures = baseline["key"], baseline["figures"]
    chip = key["device"]
    if chip not in prices["per_gpu_hour"]:
        priced = ", ".join(prices["per_gpu_hour"])
        raise ValueError(f"--prices must have {chip!r} in [per_gpu_hour]; got {priced}.")
    if params and not baseline["params"]:
        raise ValueError("--params needs the baseline's own; its runs did not write work.params.")
    hourly, scale = prices["per_gpu_hour"][chip], baseline["params"] / params if params else 1.0
    goodput = figures["goodput"]["value"] if "goodput" in figures else 1.0
    per_gpu = figures["tokens_per_s"]["value"] / key["devices"] * goodput * scale
    result = {
        "currency": prices["currency"],
        "per_gpu_hour": hourly,
        "tokens_per_s_per_gpu": per_gpu,
        "cost_per_1e9_tokens": hourly / 3_600 / per_gpu * 1e9,
        "tokens_per_month": per_gpu * key["devices"] * availability * MONTH_S,
        "tokens_per_month_per_gpu": per_gpu * availability * MONTH_S,
        "availability": availability,
        "assumptions": _assumptions(baseline, chip, hourly, prices, availability, params),
    }
    if tokens:
        result |= {
            "tokens": tokens,
            "deadline_s": span_s,
            "gpus": math.ceil(tokens / (per_gpu * availability * span_s) * (1 - 1e-12)),
            "cost": result["cost_per_1e9_tokens"] * tokens / 1e9,
        }
    return result


def _assumptions(baseline, chip, hourly, prices, availability, params) -> list[str]:
    key, figures = baseline["key"], baseline["figures"]
    rate = figures["tokens_per_s"]["value"]
    goodput = figures.get("goodput")
    lines = [
        f"{rate:,.0f} tokens/s on {key['devices']} x {chip}, as {', '.join(baseline['runs'])} had",
        f"goodput {goodput['value']:.1%}, of the same runs: saves, evaluation and start-up"
        if goodput
        else "goodput 100 %: the runs did not measure it",
        f"{hourly:g} {prices['currency']} for a GPU and hour, while it computes and while it waits",
        f"the GPUs are there {availability:.1%} of the time, and are paid for only then",
        f"more or fewer GPUs than {key['devices']} are as fast each: no loss by scaling",
        "a month has 30 days; disks, network and people are not in it",
    ]
    if params:
        lines.append(
            f"{params:,.0f} parameters in place of {baseline['params']:,}: time in proportion, at "
            "the same MFU; whether it fits, jaxtrain.plan says"
        )
    return lines
