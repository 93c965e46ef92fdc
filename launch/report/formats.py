"""Formats numbers with their units, for the terminal and the page."""

import math

SUFFIXES = ((1e12, 1e12, "T"), (1e9, 1e9, "G"), (1e6, 1e6, "M"), (1e4, 1e3, "k"))


def digits(value: float, count: int = 3) -> str:
    """Formats a number with `count` significant digits and no exponent: `1.00`, `801`, `1643`."""
    if not value or not math.isfinite(value):
        return f"{value:g}"
    return f"{value:.{max(0, count - 1 - math.floor(math.log10(abs(value)) + 1e-9))}f}"


def short(value: float) -> str:
    """Formats a number briefly, without trailing zeros: `0.35`, `12`, `1500`, `15k`, `3.2M`."""
    if not math.isfinite(value):
        return str(value)
    for least, unit, letter in SUFFIXES:
        if abs(value) >= least * 0.9995:
            return f"{_trim(digits(value / unit))}{letter}"
    return _trim(digits(value))


def _trim(text: str) -> str:
    return text.rstrip("0").rstrip(".") if "." in text else text


def seconds(value: float) -> str:
    """Formats seconds as `8.67 ms`, `720 ms` or `3.41 s`."""
    factor, unit = time_unit(value)
    return f"{digits(factor * value)} {unit}"


def time_unit(value: float) -> tuple[float, str]:
    """Returns (factor, unit) for showing seconds of this size."""
    return (1e3, "ms") if value < 0.9995 else (1.0, "s")


def duration(seconds: float) -> str:
    """Formats seconds as `54 s`, `3 min 20 s`, `2 h 05 min` or `3 d 04 h`."""
    minutes, s = divmod(round(seconds), 60)
    hours, m = divmod(minutes, 60)
    days, h = divmod(hours, 24)
    if days:
        return f"{days} d {h:02} h"
    if hours:
        return f"{hours} h {m:02} min"
    return f"{minutes} min {s:02} s" if minutes else f"{s} s"


def duration_or_ms(value: float) -> str:
    """Formats seconds with `duration` from 10 s on, otherwise with `seconds`."""
    return duration(value) if value >= 10 else seconds(value)


def percent(value: float) -> str:
    """Formats a share as `41.5 %`."""
    return f"{100 * value:.1f} %"


def size(value: float) -> str:
    """Formats bytes as `19.6 GiB` or `3.2 MiB`."""
    for unit, bytes_ in (("TiB", 2**40), ("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if value >= bytes_:
            return f"{digits(value / bytes_)} {unit}"
    return f"{value:.0f} B"


def rate(value: float) -> str:
    """Formats a network's bytes/s as `12.5 MB/s`, in powers of ten as links are specified."""
    factor, unit = rate_unit(value)
    return f"{digits(factor * value)} {unit}"


def rate_unit(value: float) -> tuple[float, str]:
    """Returns (factor, unit) for showing bytes/s of this size."""
    return (1e-6, "MB/s") if value < 1e9 else (1e-9, "GB/s")


def grouped(value: float) -> str:
    """Formats a number with a narrow space between groups of three digits."""
    return f"{value:,.0f}".replace(",", "\u202f")
