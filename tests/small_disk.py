"""A small file system that a test fills; without the right to mount one, a limit on file sizes."""

import contextlib
import errno
import os
import resource
import subprocess


class SmallDisk:
    """A folder on a disk that can be full. `reason` is what the system then says.

    Where tmpfs cannot be mounted, files of this process cannot grow beyond what fill() leaves
    (EFBIG instead of ENOSPC): writes fail halfway as well.
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
        """Leaves this many bytes."""
        if not self.mounted:
            limit = leave // 6  # of each file; what is left is for several
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
