"""Exit statuses of ranks and supervisors; jaxtrain/errors.py has the trainer's, a test compares."""

LOST_LEADER = 70  # EX_SOFTWARE: the first host was unreachable for longer than Policy.wait_s
PREEMPTED = 75  # EX_TEMPFAIL: a signal stopped the run after a save; start it again
NO_RETRY = 78  # EX_CONFIG: the program reports that the same start would fail again
STOPPED = 143  # 128 + SIGTERM: stopped before there was anything to save
