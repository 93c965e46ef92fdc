"""Optimizers: each parameter's direction and rate, and the sharding of optimizer state."""

from collections.abc import Mapping
from typing import TypeVar

Entry = TypeVar("Entry")


def select_option(table: Mapping[str, Entry], name: str, flag: str) -> Entry:
    """Returns the table's entry of that name.

    Raises:
        ValueError: there is no such entry; the message lists all names.
    """
    if name not in table:
        raise ValueError(f"{flag} must be one of {', '.join(table)}; got {name!r}. Set --{flag}.")
    return table[name]
