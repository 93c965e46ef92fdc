"""Decides whether a series of samples has stopped growing, for tests/launch_soak.py.

The first half of a series is its warm-up. Over the second half, the slope is the median of the
slopes between all pairs of samples, which a few outliers do not move. The growth is this slope
times the duration of the half or, if it is more, the median of the half's last quarter less that of
its first: a series that rises in a few large steps has a slope of 0 between most pairs.
Source: Theil 1950 and Sen 1968, the Theil-Sen estimator.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

LEAST_SAMPLES = 20  # of a series that can be judged
MEMORY_SHARE = 0.01  # memory may grow by less than this share of its median
# A number may grow by less than one and less than this share: a checkpoint's number of files and
# the number of threads differ somewhat from one save to the next.
COUNT, COUNT_SHARE = 1.0, 0.1
# PSS is not judged: it falls and rises with the other processes that map the same libraries.
MEMORY = ("rss_bytes", "anonymous_bytes", "malloc_bytes", "python_blocks")
COUNTS = ("descriptors", "threads", "files")


def growth(times_s: Sequence[float], values: Sequence[float]) -> float:
    """Returns by how much a series grows over its second half.

    Raises:
        ValueError: there are fewer than LEAST_SAMPLES.
    """
    if len(values) < LEAST_SAMPLES:
        raise ValueError(f"a trend needs {LEAST_SAMPLES} samples; got {len(values)}. Soak longer.")
    half = len(values) // 2
    t_N, x_N = np.asarray(times_s[half:], float), np.asarray(values[half:], float)
    earlier, later = np.triu_indices(len(t_N), 1)
    slopes = (x_N[later] - x_N[earlier]) / (t_N[later] - t_N[earlier])
    quarter = len(x_N) // 4
    rise = np.median(x_N[-quarter:]) - np.median(x_N[:quarter])
    return float(max(np.median(slopes) * (t_N[-1] - t_N[0]), rise))


def summarize(samples: Sequence[Mapping[str, float]]) -> dict[str, dict[str, float]]:
    """Returns, for each figure of a series of samples, four numbers about its second half.

    They are the median, the lowest tenth (below which a tenth of the values are), the growth and,
    of the whole series, the largest value.

    Args:
        samples: "time_s" and the values of the same figures. The first ones may lack some figures,
            which then count as those of the last.
    """
    times_s, half = [sample["time_s"] for sample in samples], len(samples) // 2
    figures = {}
    for name in samples[-1].keys() - {"time_s"}:
        values = [sample.get(name, samples[-1][name]) for sample in samples]
        figures[name] = {
            "median": float(np.median(values[half:])),
            "lowest_tenth": float(np.quantile(values[half:], 0.1)),
            "largest": max(values),
            "growth": growth(times_s, values),
        }
    return figures


def leaks(
    figures: Mapping[str, Mapping[str, float]], known: Mapping[str, float] | None = None
) -> list[str]:
    """Returns the names of the figures that still grow, as `summarize` describes them.

    Args:
        known: {name: growth over the second half that is explained, and added to the limit}.
    """
    found, known = [], known or {}
    for name, figure in figures.items():
        limit = math.inf
        if name in MEMORY:
            limit = MEMORY_SHARE * figure["median"]
        elif name in COUNTS:
            limit = max(COUNT, COUNT_SHARE * figure["median"])
        if figure["growth"] >= limit + known.get(name, 0.0):
            found.append(name)
    return found


def judge(
    samples_of: Mapping[str, Sequence[Mapping[str, float]]],
    required: Sequence[str],
    known: Mapping[str, float] | None = None,
) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """Returns the figures of everything that was sampled, and what is wrong, in words.

    What has fewer than LEAST_SAMPLES, such as a request that answers one question, is left out.

    Args:
        samples_of: {name: its samples}.
        required: beginnings of names, each of which must be among the figures.
        known: as in `leaks`, of those that report malloc_bytes.
    """
    figures, problems = {}, []
    for name, samples in samples_of.items():
        if len(samples) >= LEAST_SAMPLES:
            found = summarize(samples)
            figures[name] = {"samples": len(samples), **found}
            explained = known if "malloc_bytes" in found else None
            problems += [f"{name}: {leak} grow" for leak in leaks(found, explained)]
    for name in required:
        if not any(found.startswith(name) for found in figures):
            problems.append(f"{name}: fewer than {LEAST_SAMPLES} samples")
    return figures, problems
