"""Answers one request of the operator: reads standard input, writes to standard output."""

import contextlib
import fcntl
import json
import os
import shutil
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from launch.host import log, processes, stopping
from launch.host.agent import serve_orders
from launch.host.claim import claim_run_directory
from launch.host.code import Request, land, receive, root_of
from launch.host.environment import build_environment, summarize_data
from launch.host.facts import gather_facts
from launch.host.files import read_json, write_json
from launch.host.keeper import has_supervisor, is_running, start_detached, supervisor_pids
from launch.host.run_files import read_changes
from launch.host.stream import stream_log

JOBS_KEPT = 50  # a host stores this many folders of ended jobs


def job_folder(request: Request) -> Path:
    """Returns the folder of the request's job on this host."""
    return root_of(request) / "jobs" / request["job"]


def start(request: Request) -> dict[str, bool]:
    """Starts a job's supervisor. A second request for the same job changes nothing.

    A request with `again` only restarts the supervisor of a job that this host already has.
    """
    folder = job_folder(request)
    if request.get("again") and not (folder / "job.json").exists():
        return {"started": False}
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    with start_lock(request):  # of two starts at once one is first
        if has_supervisor(folder) or read_json(folder / "status.json").get("outcome"):
            return {"started": False}
        spec = request["spec"]
        spec["cwd"] = os.path.expanduser(spec["cwd"])
        refuse_second_resume(folder, spec)
        claim = claim_run_directory(spec)
        if not (folder / "job.json").exists():
            (folder / "lease").touch()  # only at first: a detached job must not get one again
        spec["argv"][0] = os.path.expanduser(spec["argv"][0])
        if sites := spec.pop("sites", None):  # it contains a key, so it is in no argument
            write_json(folder / "sites.json", sites)
            spec["argv"] += [f"--sites_file={folder / 'sites.json'}", f"--site={spec['site']}"]
        write_json(folder / "job.json", spec)
        prune(folder.parent)
        start_detached(folder, claim)
        deadline = time.monotonic() + 10
        while not is_running(folder) and time.monotonic() < deadline:
            time.sleep(0.02)
    if not is_running(folder):
        error = (folder / "supervisor.err").read_text().strip().splitlines()[-1:]
        raise RuntimeError(f"the supervisor did not start: {' '.join(error) or 'no reason given'}")
    return {"started": True}


@contextlib.contextmanager
def start_lock(request: Request) -> Iterator[None]:
    """Keeps other requests from starting or killing a job on this host meanwhile."""
    with open(root_of(request) / "start.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def refuse_second_resume(folder: Path, spec: Request) -> None:
    """Raises RuntimeError if the job that this one resumes was resumed as another that runs."""
    old = folder.parent / spec["resumes"] if spec.get("resumes") else None
    if not old or not old.exists():
        return
    claim = old / "resumed_as"
    other = folder.parent / claim.read_text() if claim.exists() else folder
    if other != folder and has_supervisor(other):
        pids = " ".join(map(str, supervisor_pids(other)[:1]))
        who = f"pid {pids} on {socket.gethostname()}"
        problem = f"job {old.name} was resumed as {other.name}, which is running ({who})"
        raise RuntimeError(f"{problem}. Follow that one: python -m launch.run attach {other.name}")
    claim.write_text(folder.name)


def prune(jobs: Path) -> None:
    """Deletes the oldest folders of ended jobs."""
    ended = [path for path in jobs.iterdir() if read_json(path / "status.json").get("outcome")]
    for path in sorted(ended, key=lambda path: path.stat().st_mtime)[:-JOBS_KEPT]:
        shutil.rmtree(path, ignore_errors=True)


def status(request: Request) -> dict[str, Any]:
    """Returns the stored status, whether the job has a supervisor, and its living processes.

    `age_s` is the age of the stored status, or 0 if it is from before a reboot, and `stopped`
    whether a signal has stopped the supervisor.
    """
    folder = job_folder(request)
    if not (folder / "job.json").exists():
        return {"known": False, "processes": processes.marked(request["job"])}
    stored = read_json(folder / "status.json")
    stat = processes.read_stat(stored["pid"]) if is_running(folder) else None
    # All processes of a boot share the monotonic clock, and setting the date does not change it.
    now_s, booted = time.monotonic(), stored.get("boot") == processes.boot_id()
    age_s = now_s - stored.get("written_s", now_s) if booted else 0.0
    return stored | {
        "known": True,
        "alive": has_supervisor(folder),
        "stopped": stat is not None and stat.state in "Tt",
        "age_s": round(age_s, 1),
        "processes": processes.marked(request["job"]),
        "log_bytes": log.size(folder / "log"),
    }


def stop(request: Request) -> dict[str, Any]:
    """Stops a job on this host, see launch.host.stopping.

    With `kill`, a request to start the job that arrives later starts nothing.
    """
    folder = job_folder(request)
    known, why = folder.exists(), request["why"]
    if request.get("kill"):
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        with start_lock(request):
            return {"known": known, "left": stopping.stop(folder, why, kill=True)}
    return {"known": known, "left": stopping.stop(folder, why, kill=False) if known else []}


def detach(request: Request) -> dict:
    """Removes the job's lease, so that the job continues without an operator."""
    (job_folder(request) / "lease").unlink(missing_ok=True)
    return {}


def follow(request: Request) -> None:
    """Streams the job's log, see launch.host.stream."""
    folder = job_folder(request)
    stream_log(folder, request, lambda: has_supervisor(folder), send_frame)


def send_frame(header: dict, data: bytes = b"") -> None:
    """Writes a JSON line to standard output, and bytes after it."""
    sys.stdout.buffer.write(json.dumps(header).encode() + b"\n" + data)
    sys.stdout.buffer.flush()


def pull(request: Request) -> dict[str, Any]:
    """Returns what is new in the job's run directory, and `over`: whether the job has ended.

    `over` is determined before the files are read, so if it is true, they are complete. A relative
    run directory is relative to the folder in which the job runs.
    """
    folder = job_folder(request)
    ended = bool(read_json(folder / "status.json").get("outcome"))
    over = ended and not has_supervisor(folder)
    cwd = read_json(folder / "job.json").get("cwd", "")
    workdir = Path(cwd, os.path.expanduser(request["folder"]))
    return {"over": over} | read_changes(workdir, request["have"], request["skip"])


def facts(request: Request) -> None:
    """Sends this host's facts, then serves orders, see launch.host.agent."""
    serve_orders(request, send_frame, gather_facts(root_of(request), request))


def net(request: Request) -> None:
    """Serves orders, see launch.host.agent."""
    serve_orders(request, send_frame, {})


def tied_to_connection(function: Callable[[Request], dict]) -> Callable[[Request], dict]:
    """Makes a request end, with its child processes, when the operator's connection breaks.

    sshd does not end a command that has no terminal when its connection breaks, but it closes the
    command's standard input.
    """

    def kill_at_end_of_input():
        while os.read(0, 4096):
            pass
        processes.kill_all(lambda: processes.descendants(os.getpid()))
        os._exit(1)

    def call(request: Request) -> dict:
        threading.Thread(target=kill_at_end_of_input, daemon=True).start()
        return function(request)

    return call


REQUESTS: dict[str, Callable[[Request], dict | None]] = {
    "start": start,
    "status": status,
    "stop": stop,
    "detach": detach,
    "pull": pull,
    "follow": follow,
    "facts": facts,
    "net": net,
    "land": land,
    "receive": receive,
    "build": tied_to_connection(lambda request: build_environment(root_of(request), request)),
    "data": tied_to_connection(summarize_data),
}


def main(request: Request) -> int:
    """Answers one request with {"ok": value} or {"error": text}."""
    os.umask(0o077)
    try:
        answer = REQUESTS[request["op"]](request)
        if answer is not None:
            send_frame({"ok": answer})
    except BrokenPipeError:
        return 0
    except Exception as error:
        send_frame({"error": f"{type(error).__name__}: {error}"})
    return 0
