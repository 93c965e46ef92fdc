"""Optimizers: each parameter's direction and rate, and the sharding of optimizer state."""

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


def check_decay(value: Any, flag: str) -> None:
    """Checks the decay of an average, if it is a number.

    Raises:
        ValueError: it is outside [0, 1).
    """
    if is_number(value) and not 0 <= value < 1:
        raise ValueError(f"{flag} must be in [0, 1); got {value}. Set --{flag}.")
