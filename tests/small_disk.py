"""A small disk that a test can fill up."""

import contextlib
import errno
import os
import resource
import subprocess


class SmallDisk:
    """A folder on a disk that a test can fill up. `reason` is the text of the system's error then.

    If tmpfs cannot be mounted, fill() limits the size of this process's files: writes then fail
    halfway, too, but with EFBIG instead of ENOSPC.
    """

    def __init__(self, path, megabytes=4):
        self.path = path
        path.mkdir()
        options = f"size={megabytes}m"
        mount = ["mount", "-t", "tmpfs", "-o", options, "small_disk", str(path)]
        self.mounted = subprocess.run(mount, capture_output=True).returncode == 0
        self.reason = os.strerror(errno.ENOSPC if self.mounted else errno.EFBIG)
        self._former = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill(self, leave=0):
        """Fills the disk except for `leave` bytes."""
        if not self.mounted:
            limit = leave // 6  # per file, of which a test writes several
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, self._former[1]))
            return
        filler = self.path / ".filler"
        with contextlib.suppress(OSError), open(filler, "wb", buffering=0) as file:
            while True:
                file.write(bytes(1 << 16))
        if leave:
            os.truncate(filler, max(filler.stat().st_size - leave, 0))

    def free(self):
        (self.path / ".filler").unlink(missing_ok=True)
        resource.setrlimit(resource.RLIMIT_FSIZE, self._former)

    def close(self):
        self.free()
        if self.mounted:
            subprocess.run(["umount", "-l", str(self.path)], check=True)


@contextlib.contextmanager
def small_disk(path, megabytes=4):
    disk = SmallDisk(path, megabytes)
    try:
        yield disk
    finally:
        disk.close()
