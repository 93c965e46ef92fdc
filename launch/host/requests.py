"""What the operator may ask of a host: a request on standard input, answers on standard output."""

import contextlib
import fcntl
import json
import os
import select
import shutil
import sys
import threading
import time
from pathlib import Path

from launch.host import log
from launch.host import processes as tree
from launch.host.agent import measure
from launch.host.environment import build_environment, glance
from launch.host.exit_codes import STOPPED
from launch.host.facts import gather_facts
from launch.host.files import read_json, write_json
from launch.host.hashing import hash_files
from launch.host.run_files import WORKDIR, read_changes, run_directory
from launch.host.supervise import KEEPER, start_detached

SILENT_S = 2.0  # between the signs of life of a stream that has nothing to say
STALE_S = 86_400.0  # of code that began to come: nobody sends it any more
JOBS_KEPT = 50  # folders of ended jobs, per host


def root_of(request) -> Path:
    """The launcher's folder on this host: of this user alone."""
    root = Path(os.path.expanduser(request["workdir"])).absolute()
    root.mkdir(parents=True, exist_ok=True, mode=0o700)
    return root


def job_folder(request) -> Path:
    return root_of(request) / "jobs" / request["job"]


def start(request) -> dict:
    """Starts a job's supervisor; a second request for the same job changes nothing.

    With `again` it is one of a job that this host has had: it begins none.
    """
    folder = job_folder(request)
    if request.get("again") and not (folder / "job.json").exists():
        return {"started": False}
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if is_kept(folder) or (read_json(folder / "status.json").get("outcome")):
            return {"started": False}
        spec = request["spec"]
        spec |= {"cwd": os.path.expanduser(spec["cwd"])}
        refuse_second(folder, spec)
        if not (folder / "job.json").exists():
            (folder / "lease").touch()  # once: a job that was detached has none for good
        spec["argv"][0] = os.path.expanduser(spec["argv"][0])
        write_json(folder / "job.json", spec)
        prune(folder.parent)
        start_detached(folder)
        deadline = time.monotonic() + 10
        while not is_running(folder) and time.monotonic() < deadline:
            time.sleep(0.02)
    if not is_running(folder):
        why = (folder / "supervisor.err").read_text().strip().splitlines()[-1:]
        raise RuntimeError(f"the supervisor did not start: {' '.join(why) or 'no reason given'}")
    return {"started": True}


def refuse_second(folder: Path, spec: dict) -> None:
    """Raises RuntimeError where another job that lives on this host writes to the same run."""
    where = run_directory(spec)
    for other in folder.parent.iterdir() if where else ():
        if other != folder and is_kept(other):
            if run_directory(read_json(other / "job.json")) == where:
                what = f"job {other.name} lives and writes to {where}"
                raise RuntimeError(f"{what}. Stop it, or set another {WORKDIR}")


def prune(jobs: Path) -> None:
    """Removes the oldest folders of ended jobs."""
    ended = [path for path in jobs.iterdir() if read_json(path / "status.json").get("outcome")]
    for path in sorted(ended, key=lambda path: path.stat().st_mtime)[:-JOBS_KEPT]:
        shutil.rmtree(path, ignore_errors=True)


def is_running(folder: Path) -> bool:
    """Whether the supervisor that wrote the status lives: same boot, same start, same pid."""
    status = read_json(folder / "status.json")
    if status.get("boot") != tree.boot_id():
        return False
    stat = tree.read_stat(status["pid"])
    return stat is not None and stat.started == status["started"] and stat.state not in "ZX"


def is_kept(folder: Path) -> bool:
    """Whether there is a supervisor, be it between two lives of its worker."""
    with contextlib.suppress(FileNotFoundError), open(folder / KEEPER) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return is_running(folder)


def status(request) -> dict:
    """The job's status; `alive` is looked at now, as is what lives of the job."""
    folder = job_folder(request)
    if not (folder / "job.json").exists():
        return {"known": False, "processes": tree.marked(request["job"])}
    found = read_json(folder / "status.json")
    return found | {
        "known": True,
        "alive": is_kept(folder),
        "processes": tree.marked(request["job"]),
        "log_bytes": log.size(folder / "log"),
    }


def stop(request) -> dict:
    """Asks the job to stop; without a supervisor, ends what is left of it here."""
    folder = job_folder(request)
    if not folder.exists():
        return {"known": False, "left": []}
    if is_kept(folder) and not request.get("kill"):
        (folder / "stop").write_text(request["why"])
        return {"known": True, "left": []}
    found = read_json(folder / "status.json")
    supervisor = [found["pid"]] if is_running(folder) else []
    keepers = [stat.parent for pid in supervisor if (stat := tree.read_stat(pid))]
    find = lambda: [p for p in keepers + supervisor if tree.alive(p)] or tree.marked(request["job"])
    left = tree.end_all(find)
    found = read_json(folder / "status.json")
    if not found.get("outcome"):  # else a request to start it again would
        outcome = {"code": STOPPED, "why": request["why"]}
        write_json(folder / "status.json", found | {"outcome": outcome})
    return {"known": True, "left": left}


def detach(request) -> dict:
    """Frees a job of its lease: it goes on without an operator."""
    (job_folder(request) / "lease").unlink(missing_ok=True)
    return {}


def follow(request) -> None:
    """The log from `offset` on, as frames `{"at": offset, "bytes": n}` and then the bytes.

    It begins earlier where `tail` is not the mark of what is before the offset, see log.resume.
    A frame without bytes carries the status. Each line that the operator sends renews the lease;
    the stream ends with the job, or when nothing was sent for a while.
    """
    folder = job_folder(request)
    offset = log.resume(folder / "log", request["offset"], request["tail"])
    said, heard = 0.0, time.monotonic()
    while True:
        at, data = log.read(folder / "log", offset)
        if data:
            frame({"at": at, "bytes": len(data)}, data)
            offset = at + len(data)
        now, alive = time.monotonic(), is_kept(folder)
        found = read_json(folder / "status.json")
        if now - said > SILENT_S or not alive:
            said = now
            known = (folder / "job.json").exists()
            frame({"status": found, "alive": alive, "known": known})
        if not data and not alive and log.size(folder / "log") <= offset:
            return
        if select.select([0], [], [], 0.0 if data else 0.1)[0]:
            if not os.read(0, 4096):
                return
            heard = now
            with contextlib.suppress(FileNotFoundError):  # the job was detached: it needs none
                os.utime(folder / "lease")
        if now - heard > 15:
            return


def frame(head: dict, data: bytes = b"") -> None:
    sys.stdout.buffer.write(json.dumps(head).encode() + b"\n" + data)
    sys.stdout.buffer.flush()


def pull(request) -> dict:
    """What is new in the job's run directory; a relative one begins where the job runs."""
    cwd = read_json(job_folder(request) / "job.json").get("cwd", "")
    folder = Path(cwd, os.path.expanduser(request["folder"]))
    return read_changes(folder, request["have"], request["skip"])


def over(request) -> dict:
    """Whether the job has ended, so that all it wrote is there."""
    folder = job_folder(request)
    ended = bool(read_json(folder / "status.json").get("outcome"))
    return {"over": ended and not is_kept(folder)}


def facts(request) -> None:
    """Facts of this host; then it measures what it is told to, see net.measure."""
    measure(request, frame, gather_facts(root_of(request), request))


def net(request) -> None:
    """Measures the network to the other hosts; see net.measure."""
    measure(request, frame, {})


def land(request) -> dict:
    """Gives code that has arrived whole its name; `missing` says whether it must be sent."""
    folder = root_of(request) / "code" / request["hash"]
    draft = folder.with_name(f".{request['hash']}.{request['by']}")
    if folder.exists():
        shutil.rmtree(draft, ignore_errors=True)
        os.utime(folder)
        return {"missing": False, "folder": str(folder)}
    folder.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    for path in folder.parent.glob(".*"):
        with contextlib.suppress(FileNotFoundError):  # whole now, and renamed
            if time.time() - path.stat().st_ctime > STALE_S:  # mtime may be what was sent
                shutil.rmtree(path, ignore_errors=True)
    if not draft.exists():
        draft.mkdir(mode=0o700)
        return {"missing": True, "folder": str(draft)}
    found = hash_files(draft, request["files"])
    if found != request["hash"]:
        raise RuntimeError(
            f"the code that arrived hashes to {found}, not to {request['hash']}: "
            "a file was edited while it was sent. Start again"
        )
    runs = root_of(request) / "runs"  # a relative --config.workdir outlives this code
    runs.mkdir(exist_ok=True)
    if not (draft / "runs").exists():
        os.symlink(runs, draft / "runs")
    os.rename(draft, folder)
    return {"missing": False, "folder": str(folder)}


def held(function):
    """The function, ended with all its processes when the operator's end of the line is gone."""

    def watch():
        while os.read(0, 4096):
            pass
        tree.end_all(lambda: tree.descendants(os.getpid()))
        os._exit(1)

    def run(request):
        threading.Thread(target=watch, daemon=True).start()
        return function(request)

    return run


OPS = {
    "start": start,
    "status": status,
    "stop": stop,
    "detach": detach,
    "pull": lambda request: over(request) | pull(request),  # in this order
    "follow": follow,
    "facts": facts,
    "net": net,
    "land": land,
    "build": held(lambda request: build_environment(root_of(request), request)),
    "glance": held(glance),
}


def main(request: dict) -> int:
    """Answers one request. What fails is an answer too: {"error": text}."""
    os.umask(0o077)
    try:
        answer = OPS[request["op"]](request)
        if answer is not None:
            frame({"ok": answer})
    except BrokenPipeError:
        return 0
    except Exception as error:
        frame({"error": f"{type(error).__name__}: {error}"})
    return 0
