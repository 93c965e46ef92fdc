"""Exit statuses of every command, and the exceptions that more than one folder raises.

`launch/host/exit_codes.py` has the same statuses for the launcher, which imports nothing of
jaxtrain; a test compares the two files.
"""

PREEMPTED = 75  # EX_TEMPFAIL: a signal stopped the run after a save; start it again
REFUSED = 78  # EX_CONFIG: bad input; the same start would fail again
INTERRUPTED = 130  # 128 + SIGINT, the shells' convention


class CheckpointError(RuntimeError):
    """A checkpoint, or every one of them, is damaged or unreadable."""


class SaveFailed(CheckpointError):
    """A checkpoint could not be written; the earlier ones are intact."""
