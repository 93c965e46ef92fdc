"""Optimizers: each parameter's direction and rate, and the sharding of optimizer state.

Errors name the argument of a call, and in parentheses the flag that sets it in the trainer:
"momentum must be in [0, 1); got 1.0. Set momentum (--optim.momentum)."
"""

import math
from collections.abc import Mapping
from numbers import Real
from typing import Any, TypeAlias, TypeGuard, TypeVar

import jax

Entry = TypeVar("Entry")
Hyperparameter: TypeAlias = float | jax.Array  # an array may be a value that the program computes


def how_to_set(argument: str, flag: str) -> str:
    """Returns the end of an error: what to set in a call, in the trainer, or (with both) in each.

    Args:
        argument: of a function of the library; empty if only a flag sets the value.
        flag: such as "optim.momentum"; empty if there is none.
    """
    if not (argument and flag):
        return f"Set {argument or f'--{flag}'}."
    return f"Set {argument} (--{flag})."


def select_option(table: Mapping[str, Entry], name: str, flag: str, argument: str = "") -> Entry:
    """Returns the table's entry of that name; flag and argument are as in `how_to_set`.

    Raises:
        ValueError: there is no such entry; the message lists all names.
    """
    if name not in table:
        raise ValueError(
            f"{argument or flag} must be one of {', '.join(table)}; got {name!r}. "
            f"{how_to_set(argument, flag)}"
        )
    return table[name]


def is_number(value: Any) -> TypeGuard[float]:
    """Returns whether a hyperparameter is a number, neither a schedule nor a program's value."""
    return isinstance(value, Real)


def is_zero(value: Any) -> bool:
    """Returns whether a hyperparameter is known to be 0."""
    return is_number(value) and value == 0


def check_number(value: Any, argument: str, flag: str = "", below: float = math.inf) -> None:
    """Checks that a hyperparameter is a number in [0, below), or an array.

    Args:
        argument, flag: see `how_to_set`.

    Raises:
        ValueError: it is not. Values of arrays are not known here.
    """
    if callable(value):
        raise ValueError(
            f"{argument} must be a number or an array; got {value!r}. Pass a schedule through "
            f"optax.inject_hyperparams(RECIPE)({argument}=...)."
        )
    is_known = is_number(value) or not hasattr(value, "dtype")
    if is_known and not (is_number(value) and 0 <= value < below):
        valid = "0 or more, and finite" if below == math.inf else f"in [0, {below:g})"
        raise ValueError(f"{argument} must be {valid}; got {value!r}. {how_to_set(argument, flag)}")


def check_decay(value: Any, argument: str, flag: str = "") -> None:
    """Checks the decay of an average: it must be in [0, 1), see `check_number`."""
    check_number(value, argument, flag, below=1)


def check_rate(value: Any, argument: str) -> None:
    """Checks a learning rate: a schedule, or what `check_number` accepts."""
    if not callable(value):
        check_number(value, argument)
