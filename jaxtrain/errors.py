"""Exit statuses of the commands, and the exceptions that more than one folder raises.

The launcher imports nothing of jaxtrain, so launch/host/exit_codes.py repeats PREEMPTED and
REFUSED; tests/test_errors.py compares them. jaxtrain/distributed/program.py lists all statuses.
"""

PREEMPTED = 75  # EX_TEMPFAIL: a signal stopped the run without loss; the same command resumes it
REFUSED = 78  # EX_CONFIG: bad input; the same start would fail again
INTERRUPTED = 130  # 128 + SIGINT, as shells report it


class CheckpointError(RuntimeError):
    """One checkpoint, or every one, is damaged or unreadable."""


class SaveFailed(CheckpointError):
    """A checkpoint could not be written; the earlier ones are intact."""
