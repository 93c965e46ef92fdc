"""What tokens cost and how many GPUs they take, from a baseline and a price list."""

import math

from launch.inventory import read_toml

MONTH_S = 30 * 86_400
SPANS_S = {"m": 60, "h": 3_600, "d": 86_400, "w": 7 * 86_400}


def read_prices(path) -> dict:
    """{"currency", "per_gpu_hour": {chip: price}} of a TOML file; docs/prices.toml is an example.

    Raises:
        ValueError: the file is not of that form.
    """
    found = read_toml(path, "--prices")
    prices = found.get("per_gpu_hour")
    good = isinstance(prices, dict) and all(
        isinstance(price, int | float) and price >= 0 for price in prices.values()
    )
    if not good or not isinstance(found.get("currency"), str):
        raise ValueError(f'--prices {path} must have currency = "..." and [per_gpu_hour] prices.')
    return found


def read_span(text: str) -> float:
    """Seconds of `90m`, `36h`, `7d` or `2w`.

    Raises:
        ValueError: it is none of them.
    """
    try:
        span_s = float(text[:-1]) * SPANS_S[text[-1:]]
    except (KeyError, ValueError):
        span_s = 0.0
    if not 0 < span_s < math.inf:
        raise ValueError(f"--deadline must be like 90m, 36h, 7d or 2w; got {text!r}.")
    return span_s


def price(baseline: dict, prices: dict, availability=1.0, tokens=None, span_s=None, params=None):
    """Cost and capacity, and what they take for granted.

    Args:
        availability: share of the time in which the GPUs are there, in (0, 1].
        tokens, span_s: how many tokens in what time, s; both or neither.
        params: of another model, scaled by parameters; None is the baseline's own.

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
    found = {
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
        found |= {
            "tokens": tokens,
            "deadline_s": span_s,
            "gpus": math.ceil(tokens / (per_gpu * availability * span_s) * (1 - 1e-12)),
            "cost": found["cost_per_1e9_tokens"] * tokens / 1e9,
        }
    return found


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
