"""Checks that two sides did the same work: same config, same data, and losses within noise."""

import math
from dataclasses import dataclass
from statistics import fmean, stdev

from launch.report.sides import Side
from launch.report.stats import noise, split, t_quantile

CHANCE = 1e-3  # of refusing two equal sides because of noise, over all parts of the curve
PARTS = 4
# With fewer degrees of freedom the noise between runs is unreliable: with 3 the limit would be 22
# standard errors.
FREEDOM = 5


@dataclass(frozen=True)
class LossMatch:
    """The part of the curve where the sides differ most, in standard errors of the difference."""

    steps: tuple[int, int]
    gap_nats: float  # A's mean minus B's
    errors: float
    limit: float  # the largest `errors` that noise explains
    noise: str  # where the noise was estimated

    def __str__(self) -> str:
        return (
            f"{self.gap_nats:+.4f} nats over steps {self.steps[0]} to {self.steps[1]}, "
            f"{self.errors:.1f} standard errors (at most {self.limit:.1f}) of {self.noise}"
        )


def differences(a: Side, b: Side) -> list[str]:
    """Describes each difference between the sides' work, except that of their losses."""
    found = []
    same = a.config_hash == b.config_hash
    if a.settings is None or b.settings is None:
        if not same:
            found.append(f"config hash: {a.config_hash} against {b.config_hash}")
    elif not same and a.settings != b.settings:
        pairs = {name: (_setting(a, name), _setting(b, name)) for name in a.settings | b.settings}
        texts = [f"{name} {x!r} against {y!r}" for name, (x, y) in sorted(pairs.items()) if x != y]
        found.append(f"config: {'; '.join(texts)}")
    if a.data_fingerprint != b.data_fingerprint:
        found.append(f"data fingerprint: {a.data_fingerprint} against {b.data_fingerprint}")
    if a.tokens_per_step != b.tokens_per_step:
        found.append(f"tokens a step: {a.tokens_per_step} against {b.tokens_per_step}")
    return found


def _setting(side, name):
    return side.settings.get(name, "(none)")


def match_losses(a: Side, b: Side) -> LossMatch | None:
    """Returns the largest difference over the curves' parts.

    With seven or more runs, the noise is estimated from the differences between runs. With two,
    it is estimated from the steps within each run: this is the noise of the batches, but not the
    drift between runs of different seeds, so the check errs towards refusing. With three to six
    runs the larger of the two estimates is used, with the limit that belongs to the second.

    Returns:
        None if no step has a loss on both sides, or too few do to estimate the noise.
    """
    runs = a.losses + b.losses
    steps = sorted(set.intersection(*(set(run) for run in runs))) if a.losses and b.losses else []
    if not steps or (len(runs) == 2 and len(steps) < 3):
        return None
    parts = split(steps, PARTS) if len(steps) >= 3 * PARTS else [steps]
    share = 1 - CHANCE / 2 / len(parts)
    found = [_match(a, b, part, share) for part in parts]
    return max(found, key=lambda match: match.errors / match.limit)


def _match(a, b, steps, share) -> LossMatch:
    curves = [[[run[step] for step in steps] for run in side.losses] for side in (a, b)]
    means = [[fmean(curve) for curve in side] for side in curves]
    gap = fmean(means[0]) - fmean(means[1])
    counts = [len(side) for side in means]
    freedom, error, words = sum(counts) - 2, 0.0, f"the noise between {sum(counts)} runs"
    if freedom:
        squares = sum(stdev(side) ** 2 * (len(side) - 1) for side in means if len(side) > 1)
        error = math.sqrt(squares / freedom * sum(1 / n for n in counts))
    if freedom < FREEDOM and len(steps) >= 3:
        squares = [fmean(noise(curve) ** 2 for curve in side) / len(side) for side in curves]
        within = math.sqrt(sum(squares) / len(steps))
        words = words if error > within else "the batches' noise within a run"
        freedom, error = sum(counts) * (len(steps) - 2), max(error, within)
    errors = 0.0 if gap == 0 else abs(gap) / error if error else math.inf
    return LossMatch((steps[0], steps[-1]), gap, errors, t_quantile(share, freedom), words)
