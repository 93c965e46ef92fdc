"""Evaluates a run's weights on tasks: accuracies of multiple choice, bits per byte."""

import math
from collections.abc import Callable, Iterable, Sequence

import numpy as np

from jaxtrain.data.tasks.open_tasks import Task
from jaxtrain.data.tasks.tokens import TokenExample, cut_pieces
from jaxtrain.training.scoring import Scorer


class TaskScores:
    """Scores the examples of several tasks together, so that their batches are full.

    Args:
        scorer: of the run.
        tasks: from open_tasks; held-out texts among them are left out.
    """

    def __init__(self, scorer: Scorer, tasks: Iterable[Task]):
        self._scorer, self._tasks = scorer, [task for task in tasks if task.corpus is None]
        self._pieces, self._choice_of, choices = [], [], 0  # the choice that a piece belongs to
        for task in self._tasks:
            for example in task.examples:
                for choice in example.choices:
                    pieces = list(cut_pieces(example.context, choice, scorer.context_length))
                    self._pieces += pieces
                    self._choice_of += [choices] * len(pieces)
                    choices += 1
        self._choices = choices

    def evaluate(self, params, stop_signal: Callable = lambda: None) -> dict[str, float] | None:
        """Returns the metrics of all tasks, or None if a signal came.

        Args:
            params: the weights to evaluate.
            stop_signal: called before each batch.
        """
        scored = self._scorer.score(params, self._pieces, stop_signal)
        if scored is None:
            return None
        nats, greedy = np.zeros(self._choices), np.ones(self._choices, bool)
        np.add.at(nats, self._choice_of, scored[0])
        np.logical_and.at(greedy, self._choice_of, scored[1])
        metrics, first = {}, 0
        for task in self._tasks:
            stop = first + sum(len(example.choices) for example in task.examples)
            found = task_metrics(task.examples, nats[first:stop], greedy[first:stop])
            cut = sum(is_cut(example, self._scorer.context_length) for example in task.examples)
            found["truncated"] = cut
            metrics |= {f"eval/{task.name}_{name}": value for name, value in found.items()}
            first = stop
        return metrics


def is_cut(example: TokenExample, context_length: int) -> bool:
    """Returns whether an example is longer than the context, so that its start is cut off."""
    return len(example.context) + max(map(len, example.choices)) > context_length + 1


def task_metrics(
    examples: Sequence[TokenExample], nats: np.ndarray, greedy: np.ndarray
) -> dict[str, float]:
    """Returns the metrics of one task from the nats of each choice.

    An example with several choices is right if the right one has the fewest nats, or for
    accuracy_norm the fewest per unit of its size; of equal ones the first counts, as in lm_eval.
    An example with one choice is right if greedy decoding gives it.

    Args:
        nats: float64 [choices of all examples].
        greedy: bool [choices of all examples], whether each token is the likeliest one.

    Returns:
        accuracy, accuracy_norm, their standard errors, bits_per_byte of the right choices, and
        examples; without those that are undefined.
    """
    right, right_norm, bits, text_bytes, first = [], [], 0.0, 0, 0
    for example in examples:
        stop = first + len(example.choices)
        own = nats[first:stop]
        if len(example.choices) == 1:
            right.append(bool(greedy[first]))
        else:
            right.append(int(np.argmin(own)) == example.answer)
            right_norm.append(int(np.argmin(own / example.sizes)) == example.answer)
        if example.answer_bytes:
            bits += own[example.answer] / math.log(2)
            text_bytes += example.answer_bytes
        first = stop
    metrics: dict[str, float] = {}
    for name, hits in (("accuracy", right), ("accuracy_norm", right_norm)):
        if not hits:
            continue
        metrics[name] = float(np.mean(hits))
        if len(hits) > 1:
            metrics[f"{name}_stderr"] = float(np.std(hits, ddof=1) / math.sqrt(len(hits)))
    if text_bytes:
        metrics["bits_per_byte"] = bits / text_bytes
    return metrics | {"examples": len(examples)}
