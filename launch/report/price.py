"""Computes the cost of tokens, and the GPUs for a deadline, from a baseline and a price list."""

import math
from pathlib import Path

from launch.inventory import read_toml

MONTH_S = 30 * 86_400
SPANS_S = {"m": 60, "h": 3_600, "d": 86_400, "w": 7 * 86_400}


def read_prices(path: Path | str) -> dict:
    """Reads {"currency", "per_gpu_hour": {chip: price}} from a TOML file such as docs/prices.toml.

    Raises:
        ValueError: the currency or a price is missing or not valid.
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
        ValueError: the text is not a positive number with a unit.
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
    """Returns the cost and the capacity, with the assumptions behind them.

    Args:
        availability: share of the time in which the GPUs are available, in (0, 1].
        tokens: number of tokens to train on; None computes no deadline.
        span_s: seconds in which to train on them; given if `tokens` is.
        params: parameter count of another model, whose speed is scaled from the baseline's.

    Raises:
        ValueError: the chip has no price, or the baseline has no parameter count to scale from.
    """
    key, figures = baseline["key"], baseline["figures"]
    chip = key["device"]
    if chip not in prices["per_gpu_hour"]:
        priced = ", ".join(prices["per_gpu_hour"])
        raise ValueError(f"--prices must have {chip!r} in [per_gpu_hour]; got {priced}.")
    if "tokens_per_s" not in figures:
        raise ValueError("--against must have tokens/s; its runs have none. Record other runs.")
    if params and not baseline["params"]:
        raise ValueError(
            "--params needs a baseline with a parameter count; its runs recorded none. Omit it."
        )
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
    if tokens and span_s:
        result |= {
            "tokens": tokens,
            "deadline_s": span_s,
            # Slightly less, so that rounding does not add a GPU to an exact number.
            "gpus": math.ceil(tokens / (per_gpu * availability * span_s) * (1 - 1e-12)),
            "cost": result["cost_per_1e9_tokens"] * tokens / 1e9,
        }
    return result


def _assumptions(baseline, chip, hourly, prices, availability, params) -> list[str]:
    key, figures = baseline["key"], baseline["figures"]
    rate = figures["tokens_per_s"]["value"]
    goodput = figures.get("goodput")
    runs = ", ".join(baseline["runs"])
    lines = [
        f"{rate:,.0f} tokens/s on {key['devices']} x {chip}, measured in {runs}",
        f"goodput {goodput['value']:.1%} in the same runs: saves, evaluation and start-up"
        if goodput
        else "goodput 100 %: the runs did not measure it",
        f"{hourly:g} {prices['currency']} per GPU hour, whether the GPU computes or waits",
        f"the GPUs are available {availability:.1%} of the time and are paid for only then",
        f"each GPU is as fast with more or fewer than {key['devices']} of them: perfect scaling",
        "a month has 30 days; disks, network and staff are not included",
    ]
    if params:
        lines.append(
            f"{params:,.0f} parameters instead of {baseline['params']:,}: time in proportion, at "
            "the same MFU; jaxtrain.plan checks whether the model fits"
        )
    return lines
