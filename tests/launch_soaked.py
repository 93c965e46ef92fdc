"""Runs the trainer beside a thread that prints, and that leaks what SOAK_LEAK names.

The printed lines make the log of every rank large enough to be rotated.
"""

import os
import runpy
import tempfile
import threading
import time

TICK_S, LINES, LINE_BYTES, LEAKED_BYTES = 0.25, 10, 100, 1 << 18  # of a tick
LEAKS = ("", "memory", "descriptors", "threads", "files")


def print_and_leak(leak: str) -> None:
    kept = []
    while True:
        time.sleep(TICK_S)
        print("\n".join(LINES * ["x" * LINE_BYTES]))
        if leak == "memory":
            kept.append(b"x" * LEAKED_BYTES)
        elif leak == "descriptors":
            kept.append(os.dup(0))
        elif leak == "threads":
            threading.Thread(target=time.sleep, args=(1e6,), daemon=True).start()
        elif leak == "files":  # in the job's folder, where the heartbeat is
            tempfile.mkstemp(dir=os.path.dirname(os.environ["JAXTRAIN_BEAT"]))


def main():
    leak = os.environ.get("SOAK_LEAK", "")
    if leak not in LEAKS:
        raise ValueError(f"SOAK_LEAK must be one of {LEAKS}; got {leak!r}.")
    threading.Thread(target=print_and_leak, args=(leak,), daemon=True).start()
    runpy.run_module("jaxtrain.train", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
