"""Detects that a run would start over because another host has become process 0.

With checkpoint.storage=host0 only the host of process 0 stores checkpoints. A host that becomes
process 0 later finds none: it would start at step 0 and remove the metrics of the former start.
"""

import json
import socket
from pathlib import Path
from typing import Any

from jaxtrain.distributed.broadcast import gather_texts, run_on_all_processes
from jaxtrain.metrics.jsonl import read_metrics
from jaxtrain.metrics.step_log import FOLDER


def find_earlier_start(workdir: Path | str, saved: list[int]) -> dict[str, Any]:
    """Returns the traces of an earlier start in this host's `workdir`.

    Args:
        saved: steps of the checkpoints in it.
    """
    logs = {path.stem: read_metrics(path) for path in (Path(workdir) / FOLDER).glob("*.jsonl")}
    lasts = {process: lines[-1]["step"] for process, lines in logs.items() if lines}
    return {
        "host": socket.gethostname(),
        "was_process_0": "0" in logs,  # the file exists from the start, before its first line
        "logged": max(lasts.values(), default=0),  # last step
        "saved": max(saved, default=0),
    }


def describe_later_steps(starts: list[dict[str, Any]]) -> str:
    """Returns which hosts got further than process 0, which is at step 0; "" if none did.

    Logged steps do not count if the host of process 0 had that role before: it has no checkpoint,
    so none was ever saved, and those steps are lost anyway.

    Args:
        starts: find_earlier_start() of every process, in order.
    """
    further = [start for start in starts[1:] if start["saved"]]
    if not starts[0]["was_process_0"]:
        further += [start for start in starts if start["logged"] and start not in further]
    texts = []
    for start in further:
        checkpoint = f" and stores checkpoint {start['saved']}" if start["saved"] else ""
        texts.append(f"{start['host']} has logged step {start['logged']}{checkpoint}")
    return ", ".join(dict.fromkeys(texts))


def check_not_moved(workdir: Path | str, saved: list[int]) -> None:
    """Raises ValueError if the run was further on another host. Every process must call it.

    Args:
        saved: steps of the checkpoints that this process sees.
    """
    here = run_on_all_processes(lambda: json.dumps(find_earlier_start(workdir, saved)))
    starts = [json.loads(text) for text in gather_texts(here)]
    if further := describe_later_steps(starts):
        raise ValueError(
            f"process 0 must be on the host that stores the checkpoints "
            f"(checkpoint.storage=host0); {starts[0]['host']} has none, but {further}. Start with "
            "the former process 0's host first, copy its checkpoints to "
            f"{Path(workdir).resolve() / 'checkpoints'} on {starts[0]['host']}, or set another "
            "--workdir to start over."
        )
