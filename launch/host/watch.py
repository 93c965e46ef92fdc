"""Ends the ranks of a host whose supervisor has ended or has stopped running.

The supervisor's keeper usually does this. It cannot while a signal has stopped both of them: then
the ranks would train on, unseen and out of reach. So each attempt also starts this program, as
`python -c SOURCE MARK LIMIT_S`. It reads a byte from the supervisor at least every second. It
imports nothing of the launcher, because a host stores no file of it.
"""

import os
import select
import signal
import sys
import time

SLICE_S = 0.5


def wait_for_silence(limit_s: float) -> None:
    """Returns once standard input has ended, or nothing has come from it for limit_s.

    Only time in which this process itself runs counts: if a whole machine is frozen for a while,
    its supervisor and its ranks go on together.
    """
    silent_s = 0.0
    while silent_s < limit_s:
        if not select.select([0], [], [], SLICE_S)[0]:
            silent_s += SLICE_S
        elif os.read(0, 4096):
            silent_s = 0.0
        else:
            return


def kill_marked(mark: str) -> None:
    """Kills all processes whose environment contains the mark, until there are none."""
    while True:
        found = []
        for pid in filter(str.isdecimal, os.listdir("/proc")):
            try:
                with open(f"/proc/{pid}/environ", "rb") as file:  # empty for a zombie
                    if mark.encode() in file.read().split(b"\0"):
                        found.append(int(pid))
                        os.kill(int(pid), signal.SIGKILL)
            except OSError:  # it has ended, or is another user's
                continue
        if not found:
            return
        time.sleep(SLICE_S)


if __name__ == "__main__":
    wait_for_silence(float(sys.argv[2]))
    kill_marked(sys.argv[1])
