"""Runs EleutherAI's lm_eval on a run, without an export.

Source: https://github.com/EleutherAI/lm-evaluation-harness
"""

import contextlib
import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxtrain.interop.text_model import TextModel

DEFAULT_TOKENS = 256  # of a generated text, as for lm_eval's own models


def _import(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ValueError(
            f"--lm_eval needs the package lm_eval, of which {error.name} is missing. Install it: "
            "pip install 'jaxtrain[eval]'"
        ) from error


def wrap_for_lm_eval(model: TextModel) -> Any:
    """Returns the model as lm_eval's LM.

    Raises:
        ValueError: lm_eval is not installed.
    """

    class RunLM(_import("lm_eval.api.model").LM):
        def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]:
            return model.log_likelihoods([request.args for request in requests])

        def loglikelihood_rolling(self, requests: list[Any]) -> list[float]:
            return model.rolling_log_likelihoods([request.args[0] for request in requests])

        def generate_until(self, requests: list[Any]) -> list[str]:
            return [_generate(model, *request.args) for request in requests]

    return RunLM()


def _generate(model: TextModel, context: str, options: dict[str, Any]) -> str:
    until = options.get("until") or []
    temperature = float(options.get("temperature") or 0.0) if options.get("do_sample") else 0.0
    tokens = options.get("max_gen_toks") or DEFAULT_TOKENS
    return model.generate(
        context, [until] if isinstance(until, str) else until, tokens, temperature
    )


def run_lm_eval(model: TextModel, tasks: Sequence[str], limit: int = 0) -> tuple[str, dict]:
    """Returns lm_eval's table of results, and its results by task.

    Args:
        tasks: lm_eval's names of tasks, or paths of its YAML files.
        limit: examples of each task; 0 takes all.

    Raises:
        ValueError: lm_eval is not installed, or does not know a task.
    """
    wrapped = wrap_for_lm_eval(model)
    if all(Path(task).is_file() for task in tasks):
        # Reading the list of lm_eval's own tasks takes 19 s, and most task files name none of them.
        with contextlib.suppress(KeyError):
            return _evaluate(wrapped, tasks, limit, know_own_tasks=False)
    try:
        return _evaluate(wrapped, tasks, limit, know_own_tasks=True)
    except KeyError as error:
        raise ValueError(
            f"--lm_eval must name tasks that lm_eval knows; got {', '.join(tasks)}: {error}"
        ) from error


def _evaluate(
    wrapped: Any, tasks: Sequence[str], limit: int, know_own_tasks: bool
) -> tuple[str, dict]:
    manager = _import("lm_eval.tasks").TaskManager(include_defaults=know_own_tasks)
    results = _import("lm_eval.evaluator").simple_evaluate(
        wrapped, tasks=list(tasks), limit=limit or None, log_samples=False, task_manager=manager
    )
    return _import("lm_eval.utils").make_table(results), results["results"]
