"""Optimizers: direction of each parameter's step, its rate, and where its state rests."""


def pick(table: dict, name: str, flag: str):
    """table[name].

    Raises:
        ValueError: no such entry; the message lists them.
    """
    if name not in table:
        raise ValueError(f"{flag} must be one of {', '.join(table)}; got {name!r}. Set --{flag}.")
    return table[name]
