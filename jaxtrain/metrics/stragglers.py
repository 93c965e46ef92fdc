"""Decides which ranks are stragglers: slower than the others, in almost every one of many probes.

The rule compares a rank with the others at the same probe, so it needs no clock that hosts share. A
rank's value is above the limit if it exceeds the reference, the lower median over ranks, by the
factor RATIO and by SIGMAS standard deviations. A rank becomes a straggler if QUORUM of its last
WINDOW values are above the limit, and ceases to be one if at most WINDOW - QUORUM are.

False alarms: if a disturbance lifts a value above the limit with probability p, independently at
each probe, the count in a window is binomial, and a healthy rank is named in a window with
probability sum_{k >= QUORUM} C(WINDOW, k) p^k (1 - p)^(WINDOW - k). For p = 0.1 this is 5.5e-9, and
for 0.2 it is 4.5e-6. SIGMAS keeps p low where the noise is larger than RATIO: for normal noise the
difference of two values exceeds 3 of their standard deviations with p = 0.017. The price is power:
a rank that is 1.3 times as slow is named in its first window at 3 % noise, in its second at 5 %,
and perhaps never at 10 %.

With two ranks the reference is the faster one: the rule then finds that one rank is slower than the
other, but not which of the two is the unusual one.
"""

from collections import deque

import numpy as np

from jaxtrain.metrics.step_log import SIGMA_OF_MAD

WINDOW, QUORUM = 12, 10
RATIO, SIGMAS = 1.15, 3.0


class StragglerRule:
    """Applies the rule to one kind of value after another, for all ranks at once.

    Args:
        ranks: number of ranks.
        kinds: number of kinds of values, each of which is judged by itself.

    Attributes:
        is_slow_RK: bool [ranks, kinds], whether a rank is a straggler.
        ratios_RK: float [ranks, kinds], a rank's values over the reference, median over the window.
    """

    def __init__(self, ranks: int, kinds: int):
        self.is_slow_RK = np.zeros((ranks, kinds), bool)
        self.ratios_RK = np.ones((ranks, kinds))
        self._logs = deque(maxlen=WINDOW)

    def add(self, values_RK: np.ndarray) -> None:
        """Takes the values of one probe, all positive, and updates is_slow_RK and ratios_RK.

        No rank is slow before there are WINDOW probes.
        """
        self._logs.append(np.log(values_RK))
        logs_PRK = np.stack(self._logs)
        excess_PRK = logs_PRK - _lower_median(logs_PRK)
        self.ratios_RK = np.exp(np.median(excess_PRK, 0))
        if len(self._logs) < WINDOW:
            return
        # A rank's deviation from its own median is noise, whether or not it is slow.
        noise_K = np.median(abs(logs_PRK - np.median(logs_PRK, 0)), (0, 1))
        limit_K = np.maximum(np.log(RATIO), SIGMAS * SIGMA_OF_MAD * noise_K)
        counts_RK = (excess_PRK > limit_K).sum(0)
        self.is_slow_RK = np.where(
            self.is_slow_RK, counts_RK > WINDOW - QUORUM, counts_RK >= QUORUM
        )


def _lower_median(x_PRK: np.ndarray) -> np.ndarray:
    """Returns the median over ranks, [P,1,K]; of an even number, the lower of the middle two."""
    middle = (x_PRK.shape[1] - 1) // 2
    return np.partition(x_PRK, middle, 1)[:, middle : middle + 1]
