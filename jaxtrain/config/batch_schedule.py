"""The number of sequences of each step: the same in all of them, or as data.batch_schedule says.

    0:128 2e8:256 1e9:512

Each pair is TOKENS:SEQUENCES: a size begins with the first step before which the run has trained on
at least that many tokens. So a step's size, and the number of sequences before it, depend only on
the step's number.
"""

import bisect
import functools
from collections.abc import Iterator
from fractions import Fraction
from typing import NamedTuple


class BatchPhase(NamedTuple):
    """Steps in a row with the same number of sequences."""

    first: int  # steps before the phase
    sequences: int  # in each of its steps


class BatchSchedule:
    """How many sequences each step has. Steps are counted from 0.

    Attributes:
        phases: in order; the first begins at step 0, and no two in a row have the same size.
    """

    def __init__(self, phases: tuple[BatchPhase, ...]):
        merged: list[BatchPhase] = []
        for phase in phases:
            if not merged or phase.sequences != merged[-1].sequences:
                merged.append(phase)
        self.phases = tuple(merged)
        self._firsts = [phase.first for phase in merged]
        self._before = [0]  # sequences before each phase
        for phase, after in zip(merged, merged[1:], strict=False):
            steps = after.first - phase.first
            self._before.append(self._before[-1] + steps * phase.sequences)

    @property
    def is_constant(self) -> bool:
        return len(self.phases) == 1

    @property
    def largest(self) -> int:
        """The largest number of sequences of a step."""
        return max(phase.sequences for phase in self.phases)

    def sequences(self, step: int) -> int:
        """Returns the number of sequences of a step."""
        return self.phases[bisect.bisect_right(self._firsts, step) - 1].sequences

    def sequences_before(self, step: int) -> int:
        """Returns the number of sequences of all steps before this one."""
        i = bisect.bisect_right(self._firsts, step) - 1
        return self._before[i] + (step - self.phases[i].first) * self.phases[i].sequences

    def step_at(self, sequences: int | Fraction) -> int:
        """Returns the step before which the number of sequences is nearest to this one."""
        i = bisect.bisect_right(self._before, sequences) - 1
        phase = self.phases[i]
        return phase.first + round(Fraction(sequences - self._before[i]) / phase.sequences)

    def between(self, first: int, end: int) -> tuple[BatchPhase, ...]:
        """Returns the phases of the steps first..end-1, the first of which begins at `first`."""
        inside = (phase for phase in self.phases if first < phase.first < end)
        return BatchPhase(first, self.sequences(first)), *inside

    def from_step(self, step: int) -> "BatchSchedule":
        """Returns the schedule of the steps from this one on, which is its step 0."""
        ahead = (phase for phase in self.phases if phase.first > step)
        phases = BatchPhase(step, self.sequences(step)), *ahead
        return BatchSchedule(tuple(BatchPhase(p.first - step, p.sequences) for p in phases))

    def write(self, seq_len: int) -> str:
        """Returns the text that parse_schedule reads."""
        pairs = zip(self._before, self.phases, strict=True)
        return " ".join(f"{before * seq_len}:{phase.sequences}" for before, phase in pairs)


@functools.cache
def parse_schedule(text: str, batch: int, seq_len: int) -> BatchSchedule:
    """Returns the schedule that a text describes; an empty one describes steps of equal size.

    Args:
        batch: sequences of a step if the text is empty.
        seq_len: tokens of a sequence.

    Raises:
        ValueError: the text is no list of TOKENS:SEQUENCES in ascending order from 0, or a phase
            has no step. The message says what must hold.
    """
    if not text.strip():
        return BatchSchedule((BatchPhase(0, batch),))
    phases: list[BatchPhase] = []
    earlier = Fraction(-1)
    for tokens, sequences in _parse_pairs(text):
        if not phases and tokens:
            raise ValueError(f"must begin with 0:SEQUENCES; it begins with {text.split()[0]}")
        if tokens <= earlier:
            raise ValueError("must have its numbers of tokens in ascending order")
        first = 0
        if phases:
            schedule = BatchSchedule(tuple(phases))
            last, before = phases[-1], schedule.sequences_before(phases[-1].first)
            steps = -(-(tokens / seq_len - before) // last.sequences)  # rounded up
            first = last.first + int(steps)
            if first <= last.first:
                raise ValueError(
                    f"must have at least one step of each size; the {last.sequences} sequences "
                    f"before {float(tokens):.15g} tokens have none"
                )
        phases.append(BatchPhase(first, sequences))
        earlier = tokens
    return BatchSchedule(tuple(phases))


def _parse_pairs(text: str) -> Iterator[tuple[Fraction, int]]:
    for pair in text.split():
        tokens, colon, sequences = pair.partition(":")
        try:
            parsed = Fraction(tokens), int(sequences)
        except (ValueError, ZeroDivisionError):
            parsed = Fraction(-1), 0
        if not colon or parsed[0] < 0 or parsed[1] < 1:
            raise ValueError(
                f"must be pairs TOKENS:SEQUENCES such as '0:128 2e8:256'; {pair!r} is not one"
            )
        yield parsed
