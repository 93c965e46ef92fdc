"""Reads several command lines in one process, although absl's flags are global."""

import contextlib

from absl import app, flags


@contextlib.contextmanager
def fresh_flags():
    """Removes the flags that the block has defined when it ends, and unparses all others."""
    assert app  # importing it defines its flags, which must stay
    before = set(flags.FLAGS)
    try:
        yield flags.FLAGS
    finally:
        for name in set(flags.FLAGS) - before:
            delattr(flags.FLAGS, name)
        flags.FLAGS.unparse_flags()


def exit_status(function, *args, **kwargs) -> int:
    """Returns the status with which a function of a command line exits or returns."""
    try:
        status = function(*args, **kwargs)
    except SystemExit as ended:
        status = ended.code
    return status if isinstance(status, int) else int(status is not None)
