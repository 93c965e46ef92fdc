"""Optimizers: each parameter's direction and rate, and the sharding of optimizer state."""

import math
from collections.abc import Mapping
from numbers import Real
from typing import Any, TypeAlias, TypeGuard, TypeVar

import jax

Entry = TypeVar("Entry")
Hyperparameter: TypeAlias = float | jax.Array  # an array may be a value that the program computes


def select_option(table: Mapping[str, Entry], name: str, flag: str) -> Entry:
    """Returns the table's entry of that name.

    Raises:
        ValueError: there is no such entry; the message lists all names.
    """
    if name not in table:
        raise ValueError(f"{flag} must be one of {', '.join(table)}; got {name!r}. Set --{flag}.")
    return table[name]


def is_number(value: Any) -> TypeGuard[float]:
    """Returns whether a hyperparameter is a number, neither a schedule nor a program's value."""
    return isinstance(value, Real)


def is_zero(value: Any) -> bool:
    """Returns whether a hyperparameter is known to be 0."""
    return is_number(value) and value == 0


def check_number(value: Any, name: str, below: float = math.inf) -> None:
    """Checks that a hyperparameter is a number in [0, below), an array or a schedule.

    Args:
        name: of a flag, such as "optim.adam_eps", or of an argument.

    Raises:
        ValueError: it is not. Values of arrays and schedules are not known here.
    """
    is_known = is_number(value) or not (callable(value) or hasattr(value, "dtype"))
    if is_known and not (is_number(value) and 0 <= value < below):
        valid = "0 or more, and finite" if below == math.inf else f"in [0, {below:g})"
        setting = f"--{name}" if "." in name else name
        raise ValueError(f"{name} must be {valid}; got {value!r}. Set {setting}.")


def check_decay(value: Any, name: str) -> None:
    """Checks the decay of an average: it must be in [0, 1), see `check_number`."""
    check_number(value, name, below=1)
