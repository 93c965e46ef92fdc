"""Proposes batch sizes from the gradient noise of a run."""

import math
from statistics import fmean

from launch.report.formats import grouped
from launch.report.run_folder import RunFolder
from launch.report.stats import deviation, split

NOISE, SIGNAL = "optim/all/gradient_noise", "optim/all/gradient_signal"
LEAST = 8  # diagnoses, as the ratio of a single one is noise itself
ERRORS = 2.0  # standard errors from which the mean of the signal is known not to be 0
PARTS = 8  # of the run at most, in each of which noise and signal are averaged


def propose_schedule(run: RunFolder) -> str:
    """Returns a data.batch_schedule with batches as large as the gradient noise scale.

    Noise and signal of the diagnoses are averaged over parts of the run, and over neighbouring
    parts where their ratio would fall. The sizes are data.batch / accumulation times powers of two,
    rounded down.

    Returns:
        "" if there are fewer than LEAST diagnoses, or the signal is nowhere known not to be 0. From
        the part on in which it is not, the last size stays.

    Source: McCandlish et al. 2018, https://arxiv.org/abs/1812.06162, section 2: a batch of the
    noise scale takes twice the tokens and twice the steps of the two extremes.
    """
    data = run.settings["data"]
    smallest = data["batch"] // run.settings.get("accumulation", 1)
    pairs = []
    for first, scale in noise_scales(run):
        powers = math.log2(max(scale / data["seq_len"] / smallest, 1)) if scale < math.inf else -1
        if powers >= 0 and (not pairs or smallest << math.floor(powers) > pairs[-1][1]):
            pairs.append((run.step_tokens.before(first), smallest << math.floor(powers)))
    if not pairs:
        return ""
    return " ".join(f"{tokens}:{size}" for tokens, size in [(0, pairs[0][1]), *pairs[1:]])


def noise_scales(run: RunFolder) -> list[tuple[int, float]]:
    """Returns (first step, noise scale in tokens) of parts of the run, never falling."""
    noise, signal = dict(run.points(NOISE)), dict(run.points(SIGNAL))
    steps = sorted(noise.keys() & signal.keys())
    if len(steps) < LEAST:
        return []
    scale_of = lambda part: _scale([noise[s] for s in part], [signal[s] for s in part])
    parts: list[list[int]] = []  # steps
    for part in split(steps, min(PARTS, len(steps) * 2 // LEAST)):
        parts.append(part)
        while len(parts) > 1 and scale_of(parts[-2]) >= scale_of(parts[-1]):
            parts[-2:] = [parts[-2] + parts[-1]]
    return [(part[0], scale_of(part)) for part in parts]


def _scale(noise: list[float], signal: list[float]) -> float:
    """Returns the ratio of the means; inf if the signal is within ERRORS standard errors of 0."""
    error = deviation(signal) / math.sqrt(len(signal))
    known = fmean(signal) > ERRORS * error
    return max(fmean(noise), 0.0) / fmean(signal) if known else math.inf


def describe_proposals(runs: list[RunFolder]) -> list[str]:
    """Returns a line for each run whose gradient noise proposes a batch schedule."""
    lines = []
    for run in runs:
        if text := propose_schedule(run):
            scales = [scale for _, scale in noise_scales(run) if scale < math.inf]
            known = f"{grouped(scales[0])} to {grouped(scales[-1])}"
            lines.append(
                f"{run.name}: noise scale {known} tokens, which proposes "
                f'--data.batch_schedule="{text}"'
            )
    return lines
