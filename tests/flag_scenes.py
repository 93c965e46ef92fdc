"""Command lines read in this process: absl's flags are global, so each scene takes its own away."""

import contextlib

from absl import app, flags


@contextlib.contextmanager
def fresh_flags():
    """The flags that are defined inside are gone afterwards, and the others unread as before."""
    assert app  # its own flags are defined when it is imported
    before = set(flags.FLAGS)
    try:
        yield flags.FLAGS
    finally:
        for name in set(flags.FLAGS) - before:
            delattr(flags.FLAGS, name)
        flags.FLAGS.unparse_flags()


def exit_status(function, *args, **kwargs) -> int:
    """The status with which a command line ends the program."""
    try:
        found = function(*args, **kwargs)
    except SystemExit as ended:
        found = ended.code
    return found if isinstance(found, int) else int(found is not None)
