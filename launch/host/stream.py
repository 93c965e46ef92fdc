"""Streams a job's log to the operator, and renews the job's lease meanwhile."""

import contextlib
import os
import select
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from launch.host import log
from launch.host.files import read_json

STATUS_S = 2.0  # between the status frames of a stream
LEASE_S = 15.0  # a stream ends if its operator sends nothing for this long


def stream_log(
    folder: Path,
    request: dict[str, Any],
    is_alive: Callable[[], bool],
    send_frame: Callable[..., None],
) -> None:
    """Streams the log from `offset` on: frames {"at": offset, "bytes": n}, then those n bytes.

    It begins earlier if `tail` does not match the log before the offset, see log.resume. Frames
    without bytes carry the status. One that says that the job has no supervisor is the last frame,
    after the whole log. Each line from the operator renews the job's lease. The stream also ends
    with the connection, or when the operator has sent nothing for LEASE_S.

    Args:
        is_alive: returns whether the job has a supervisor.
    """
    offset = log.resume(folder / "log", request["offset"], request["tail"])
    gone, status_at = threading.Event(), 0.0
    # In a thread, because an operator who does not read blocks send_frame.
    threading.Thread(target=_renew_lease, args=(folder, gone), daemon=True).start()
    while not gone.is_set():
        now, alive = time.monotonic(), is_alive()  # before the read, which then gets the last bytes
        start, data = log.read(folder / "log", offset)
        if data:
            send_frame({"at": start, "bytes": len(data)}, data)
            offset = start + len(data)
        ended = not alive and not data
        if ended or (alive and now - status_at > STATUS_S):
            status_at, known = now, (folder / "job.json").exists()
            status = read_json(folder / "status.json")
            send_frame({"status": status, "alive": alive, "known": known})
        if ended:
            return
        if not data:
            gone.wait(0.1)


def _renew_lease(folder: Path, gone: threading.Event) -> None:
    """Renews the lease with each line from the operator; sets `gone` when no more will come."""
    while select.select([0], [], [], LEASE_S)[0] and os.read(0, 4096):
        with contextlib.suppress(OSError):  # a detached job has no lease
            os.utime(folder / "lease")
    gone.set()
