"""Exit statuses of ranks, supervisors and the launcher.

The trainer's are in `jaxtrain/errors.py`; a test checks that the two files agree.
"""

LOST_LEADER = 70  # EX_SOFTWARE: the first host's supervisor was silent for Policy.wait_s
WORKER_FAILED = 71  # EX_OSERR: a supervisor's worker raised; supervisor.err has the traceback
PREEMPTED = 75  # EX_TEMPFAIL: a signal stopped the run after a save; start it again
REFUSED = 78  # EX_CONFIG: the program reports that the same start would fail again
UNREACHABLE = 113  # EHOSTUNREACH: a host was lost, or did not become ready in time
STUCK = 124  # as timeout(1): a rank made no progress
CANNOT_START = 127  # as shells: the program could not be started
INTERRUPTED = 130  # 128 + SIGINT: Ctrl-C ended the command of the launcher
KILLED = 137  # 128 + SIGKILL
STOPPED = 143  # 128 + SIGTERM: stopped without a save
