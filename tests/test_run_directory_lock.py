import errno
import functools
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

import runs
from jaxtrain.run_directory import lock as run_lock
from jaxtrain.run_directory.liveness import (
    describe_this_process,
    find_owner,
    is_owner_alive,
    locks_this_host_only,
    pid_start,
    read_owner,
)
from jaxtrain.run_directory.lock import RunLocked

RunLock = functools.partial(run_lock.RunLock, wait_s=0.1)
OWNER = """
import sys, time
from jaxtrain.run_directory.lock import RunLock
with RunLock(sys.argv[1]):
    print("locked", flush=True)
    time.sleep(60)
"""


def start_owner(workdir):
    """Starts a process that locks `workdir`."""
    argv = [sys.executable, "-c", OWNER, str(workdir)]
    process = subprocess.Popen(argv, cwd=runs.ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "locked\n"
    return process


def no_locks(file, operation):
    """Behaves like flock() on a file system without locks."""
    raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))


def rewrite_owner(path, **values):
    path.write_text(json.dumps(read_owner(path) | values))


def test_a_second_run_is_refused_and_a_kill_9_of_the_first_frees_the_folder(tmp_path):
    owner = start_owner(tmp_path)
    (tmp_path / "metrics.jsonl").write_text("{}")
    with pytest.raises(RunLocked) as error, RunLock(tmp_path):
        pass
    text = str(error.value)
    start = read_owner(tmp_path / ".lock")["start"]
    assert f"in use by pid {owner.pid} on {socket.gethostname()}, started {start}" in text
    assert f"`kill {owner.pid}` (it saves first)" in text and "set another --workdir" in text
    assert "remove" not in text and "\n" not in text
    assert (tmp_path / "metrics.jsonl").read_text() == "{}"
    owner.send_signal(signal.SIGKILL)
    owner.communicate()
    assert read_owner(tmp_path / ".lock")["pid"] == owner.pid  # out of date, which does not matter
    with RunLock(tmp_path):
        assert read_owner(tmp_path / ".lock")["pid"] == os.getpid()
    assert not (tmp_path / ".lock").exists()


def test_reading_the_lock_file_does_not_free_the_lock(tmp_path):
    with RunLock(tmp_path):
        (tmp_path / ".lock").read_text()  # closing any descriptor would free a POSIX lock
        with pytest.raises(RunLocked), RunLock(tmp_path):
            pass


def test_child_processes_do_not_inherit_the_lock(tmp_path):
    program = """if True:
        import os, subprocess, sys, time
        from jaxtrain.run_directory.lock import RunLock
        RunLock(sys.argv[1]).__enter__()
        child = subprocess.Popen(["sleep", "30"], close_fds=False, stdout=subprocess.DEVNULL)
        fork = os.fork()
        if not fork:
            os.close(1)
            time.sleep(30)
        print(child.pid, fork, flush=True)
        os._exit(1)
    """
    argv = [sys.executable, "-W", "ignore", "-c", program, str(tmp_path)]
    done = subprocess.run(argv, cwd=runs.ROOT, stdout=subprocess.PIPE, text=True)
    assert done.returncode == 1 and read_owner(tmp_path / ".lock")
    try:
        with RunLock(tmp_path):
            pass
    finally:
        for pid in done.stdout.split():
            os.kill(int(pid), signal.SIGKILL)


def test_a_start_that_is_refused_leaves_no_empty_folder(tmp_path):
    with pytest.raises(ZeroDivisionError), RunLock(tmp_path / "run"):
        raise ZeroDivisionError
    assert not (tmp_path / "run").exists()


def test_a_run_whose_lock_file_was_removed_locks_again_or_stops(tmp_path):
    with RunLock(tmp_path) as first:
        first.check()
        (tmp_path / ".lock").unlink()
        first.check()
        with pytest.raises(RunLocked), RunLock(tmp_path):
            pass
        (tmp_path / ".lock").unlink()
        other = start_owner(tmp_path)
        with pytest.raises(RunLocked, match=f"in use by pid {other.pid}"):
            first.check()
        other.kill()
        other.communicate()


def test_the_error_of_a_folder_at_the_path_of_the_lock_file_names_the_remedy(tmp_path):
    with RunLock(tmp_path) as lock:
        (tmp_path / ".lock").unlink()
        (tmp_path / ".lock").mkdir()
        with pytest.raises(ValueError, match=f"Remove {tmp_path / '.lock'} and start again"):
            lock.check()


def test_removing_the_lock_file_frees_the_folder_of_a_host_that_has_died(tmp_path):
    owner = start_owner(tmp_path)  # like an NFSv3 server, which keeps a dead client's lock
    rewrite_owner(tmp_path / ".lock", host="gone")
    with pytest.raises(RunLocked) as error, RunLock(tmp_path):
        pass
    assert f"If that host has died, remove {tmp_path / '.lock'} and start" in str(error.value)
    (tmp_path / ".lock").unlink()
    with RunLock(tmp_path):
        pass
    owner.kill()
    owner.communicate()


def test_processes_of_a_run_share_its_lock_and_other_runs_are_refused(tmp_path):
    with RunLock(tmp_path, run_id="a"):
        with RunLock(tmp_path, run_id="a") as second:
            with pytest.raises(RunLocked), RunLock(tmp_path, run_id="b"):
                pass
            with pytest.raises(RunLocked), RunLock(tmp_path):
                pass
        assert (tmp_path / ".lock").exists()  # the last one removes it
        with pytest.raises(RunLocked), RunLock(tmp_path, run_id="b"):
            pass
    assert not (tmp_path / ".lock").exists() and second.describe() == []
    with RunLock(tmp_path, run_id="b"):
        pass


def test_without_flock_an_owner_on_this_host_is_alive_if_its_pid_is(tmp_path):
    with RunLock(tmp_path, flock=no_locks) as lock:
        [line] = lock.describe()
        assert f"{tmp_path / '.lock'} cannot be locked (No locks available)" in line
        dead = subprocess.Popen([sys.executable, "-c", ""])
        dead.wait()
        for pid, alive in ((dead.pid, False), (os.getppid(), True)):
            values = {"pid": pid, "pid_start": pid_start(pid) if alive else "1"}
            rewrite_owner(tmp_path / ".lock", **values)
            if alive:
                with pytest.raises(RunLocked, match=f"in use by pid {pid} "):
                    RunLock(tmp_path, flock=no_locks).__enter__()
            else:
                RunLock(tmp_path, flock=no_locks).__enter__()


def test_without_flock_a_pid_that_was_given_to_another_process_is_not_the_owner(tmp_path):
    with RunLock(tmp_path, flock=no_locks):
        rewrite_owner(tmp_path / ".lock", pid=os.getppid(), pid_start="1")
        with RunLock(tmp_path, flock=no_locks):
            pass


@pytest.mark.parametrize("skew_s", [0.0, 7_200.0, -7_200.0])
def test_without_flock_an_owner_on_another_host_is_alive_while_it_touches_the_file(
    tmp_path, monkeypatch, skew_s
):
    clock = time.time
    monkeypatch.setattr(time, "time", lambda: clock() + skew_s)  # hosts' clocks may differ
    with RunLock(tmp_path, flock=no_locks, beat_s=0.05):  # which touches the file
        rewrite_owner(tmp_path / ".lock", boot="another", host="gpu7")
        with pytest.raises(RunLocked, match="on gpu7, started"):
            RunLock(tmp_path, flock=no_locks, beat_s=0.2).__enter__()
    RunLock(tmp_path, flock=no_locks).__enter__()
    rewrite_owner(tmp_path / ".lock", boot="another", host="gpu7")
    with RunLock(tmp_path, flock=no_locks, beat_s=0.05):  # the other no longer touches it
        assert read_owner(tmp_path / ".lock")["host"] == socket.gethostname()


def test_the_owner_of_a_folder_is_not_the_owner_of_its_copy(tmp_path):
    with RunLock(tmp_path / "run", flock=no_locks):
        pid = os.getppid()
        rewrite_owner(tmp_path / "run" / ".lock", pid=pid, pid_start=pid_start(pid))
        shutil.copytree(tmp_path / "run", tmp_path / "copy")
        with RunLock(tmp_path / "copy", flock=no_locks):
            pass


def test_processes_that_look_for_an_owner_do_not_take_each_other_for_it(tmp_path):
    path = tmp_path / ".lock"
    stale = describe_this_process(None, 0) | {"pid": 1, "pid_start": "another process"}
    path.write_text(json.dumps(stale))
    with ThreadPoolExecutor(8) as pool:  # flock excludes threads that have opened the file, too
        assert list(pool.map(find_owner, [path] * 400)) == [{}] * 400
    with RunLock(tmp_path):
        assert find_owner(path) == read_owner(path) != {}


def test_an_owner_that_removes_its_file_as_it_is_read_is_not_alive(tmp_path):
    assert not is_owner_alive(tmp_path / ".lock", None, stale_s=0.0)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"pid": 1}', "\0\xff"])
def test_a_damaged_lock_file_is_replaced(tmp_path, text):
    (tmp_path / ".lock").write_text(text)
    for flock in ({}, {"flock": no_locks}):
        with RunLock(tmp_path, **flock):
            assert read_owner(tmp_path / ".lock")["pid"] == os.getpid()


@pytest.mark.parametrize(
    ("mount", "kind"),
    [
        ("nfs4 srv:/x rw,vers=4.2,local_lock=none", ""),
        ("nfs srv:/x rw,vers=3,nolock", "nfs"),
        ("nfs srv:/x rw,vers=3,local_lock=all", "nfs"),
        ("fuse.sshfs host:/x rw", "fuse.sshfs"),
        ("ext4 /dev/sda1 rw", ""),
        ("lustre mgs:/x rw,localflock", "lustre"),
        ("cifs //srv/x rw,nobrl", "cifs"),
    ],
)
def test_mounts_whose_locks_do_not_reach_other_hosts_are_recognised(tmp_path, mount, kind):
    mounts = tmp_path / "mountinfo"
    point = str(tmp_path / "my runs").replace(" ", "\\040")
    lines = ["21 1 8:1 / / rw,relatime shared:1 - ext4 /dev/sda1 rw"]
    lines.append(f"33 21 0:40 / {point} rw,relatime shared:7 - {mount}")
    mounts.write_text("\n".join(lines) + "\n")
    (tmp_path / "my runs").mkdir()
    assert locks_this_host_only(tmp_path / "my runs" / "a", mounts) == kind
    assert locks_this_host_only(tmp_path / "other", mounts) == ""
