"""Whether a run that would begin at step 0 was further, on a host that is process 0 no more.

With checkpoint.storage=host0 one host alone holds the checkpoints. Where another one has become
process 0 it finds none, would begin anew, and would remove what was logged.
"""

import json
import socket
from pathlib import Path

from jaxtrain.distributed.broadcast import gather_texts, run_on_all_processes
from jaxtrain.metrics.jsonl import read_metrics
from jaxtrain.metrics.step_log import FOLDER


def look(workdir, saved: list[int]) -> dict:
    """What this process's own `workdir` tells of a former start; `saved` are the steps in it."""
    logs = {path.stem: read_metrics(path) for path in (Path(workdir) / FOLDER).glob("*.jsonl")}
    lasts = {process: lines[-1]["step"] for process, lines in logs.items() if lines}
    return {
        "host": socket.gethostname(),
        "led": "0" in logs,  # even if it was killed before it wrote a line
        "logged": max(lasts.values(), default=0),
        "saved": max(saved, default=0),
    }


def find_further(found: list[dict]) -> str:
    """Which hosts know of later steps than process 0 does, of every process's look(); or nothing.

    Process 0 knows where it led the run before: what it has not, was not saved.
    """
    others = [f for f in found[1:] if f["saved"]]
    if not found[0]["led"]:
        others += [f for f in found if f["logged"] and f not in others]
    said = [
        f"{f['host']} has logged step {f['logged']}"
        + (f" and holds checkpoint {f['saved']}" if f["saved"] else "")
        for f in others
    ]
    return ", ".join(dict.fromkeys(said))


def check_not_moved(workdir, saved: list[int]) -> None:
    """Raises ValueError where step 0 is not where the run was. Call it in every process.

    Args:
        saved: steps of the checkpoints that this process sees.
    """
    here = run_on_all_processes(lambda: json.dumps(look(workdir, saved)))
    found = [json.loads(text) for text in gather_texts(here)]
    further = find_further(found)
    if further:
        raise ValueError(
            f"process 0 must be on the host that holds the checkpoints (checkpoint.storage=host0); "
            f"{found[0]['host']} holds none, but {further}. Start with the former process 0's host "
            f"first, copy its checkpoints to {Path(workdir).resolve() / 'checkpoints'} on "
            f"{found[0]['host']}, or set another --workdir to begin anew."
        )
