"""The words of a run's report: its step lines, evaluations and closing lines."""

import math

LOSS, EVAL_LOSS, EVAL_BITS = "train/loss_nats", "eval/loss_nats", "eval/bits_per_byte"
EVAL_TOKENS = "eval/tokens"
PLAIN = "the parameters"  # what is evaluated where no average or look-ahead is kept


def step_text(metrics: dict, eta_s: float | None, columns: int | None = None) -> str:
    """Returns loss, tokens/s, median step time and time left, in columns that do not move.

    Args:
        columns: that the text may take; it is shortened where it would be cut. None is any number.
    """
    tokens_per_s, step_s = metrics.get("perf/tokens_per_s"), metrics.get("perf/step_time_s")
    speed = "-" if tokens_per_s is None else format_grouped(tokens_per_s)
    step_ms = "-" if step_s is None else milliseconds(step_s)
    eta = "-" if eta_s is None else format_duration(eta_s)
    loss = f"loss {metrics[LOSS]:6.3f}"
    texts = [
        f"{loss}  {speed:>9} tok/s  {step_ms:>6} ms/step  eta {eta}",
        f"{loss}  {speed} tok/s  eta {eta}",
        f"{loss}  eta {eta}",
    ]
    return next((text for text in texts if columns is None or len(text) <= columns), texts[-1])


def eval_text(metrics: dict) -> str:
    """Returns `loss 1.702 nats/token  2.456 bits/byte  of 65,536 tokens`, as far as it is known."""
    bits = f"  {metrics[EVAL_BITS]:.3f} bits/byte" if EVAL_BITS in metrics else ""
    tokens = f"  of {metrics[EVAL_TOKENS]:,} tokens" if EVAL_TOKENS in metrics else ""
    return f"loss {metrics[EVAL_LOSS]:.3f} nats/token{bits}{tokens}"


def closing_lines(summary: dict) -> list[str]:
    """What became of the run, from the entries of summary.json; lines without figures stay out."""
    step, steps = summary["step"], summary["steps"]
    done = step >= steps and not summary.get("stopped_by")
    loss = f"  loss {summary[LOSS]:.3f} nats/token" if LOSS in summary else ""
    lines = [f"{'done ' if done else 'stopped'} step {step}/{steps}{loss}"]
    if EVAL_LOSS in summary:
        at = summary.get("eval_at", PLAIN)
        lines.append(f"eval  {eval_text(summary)}{'' if at == PLAIN else f'  at {at}'}")
    if "perf/step_time_s" in summary:
        names = {"p50": "_s", "p95": "_p95_s", "p99": "_p99_s"}
        times = {q: summary.get(f"perf/step_time{name}") for q, name in names.items()}
        shown = "  ".join(f"{q} {format_seconds(s)}" for q, s in times.items() if s)
        lines.append(f"steps {shown}  {format_grouped(summary['perf/tokens_per_s'])} tok/s")
    if "perf/wall_s" in summary:
        share = summary.get("perf/goodput")
        share = f", {share:.0%} of it in steps" if share is not None else ""
        tokens = format_grouped(summary["perf/tokens"])
        lines.append(f"time  {format_duration(summary['perf/wall_s'])} for {tokens} tokens{share}")
    if "lost_s" in summary:
        most = sorted(summary["lost_s"].items(), key=lambda item: -item[1])
        lost = "  ".join(f"{cause} {seconds:.1f} s" for cause, seconds in most if seconds >= 0.05)
        lines.append(f"lost  {lost or 'nothing'}")
    return lines


def format_grouped(number: float) -> str:
    """`6 842`: thousands apart; `0.13` below 10."""
    return f"{number:.2g}" if number < 9.5 else f"{number:,.0f}".replace(",", " ")


def milliseconds(seconds: float) -> str:
    """`0.8`, `299`, `12 345`: ms, with a decimal below 10."""
    return f"{seconds * 1e3:.1f}" if seconds < 9.95e-3 else format_grouped(seconds * 1e3)


def format_seconds(seconds: float) -> str:
    """`8.67 ms`, `720 ms`, `3.41 s`: three digits, as launch.summary shows the same figure."""
    value, unit = (1e3 * seconds, "ms") if seconds < 0.9995 else (seconds, "s")
    decimals = max(0, 2 - math.floor(math.log10(value) + 1e-9)) if value > 0 else 0
    return f"{value:.{decimals}f} {unit}"


def format_duration(seconds: float) -> str:
    """`0:54`, `1:02:03`, `2d 01:02:03`."""
    minutes, s = divmod(round(max(seconds, 0)), 60)
    hours, m = divmod(minutes, 60)
    days, h = divmod(hours, 24)
    if days:
        return f"{days}d {h:02}:{m:02}:{s:02}"
    return f"{h}:{m:02}:{s:02}" if h else f"{m}:{s:02}"
