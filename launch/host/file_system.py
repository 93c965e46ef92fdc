"""Finds out whether a folder's file system locks files for other hosts, too.

A host has no jaxtrain, so this is a copy of a part of jaxtrain/run_directory/liveness.py. A test
keeps the two equal.
"""

from pathlib import Path

# Types of file systems whose flock, by default, works only between the processes of one host.
THIS_HOST_ONLY = ("9p", "fuse", "virtiofs", "vboxsf", "drvfs")
# Mount options that limit flock to one host.
LOCAL_OPTIONS = {"nolock", "localflock", "nobrl", "local_lock=all", "local_lock=flock"}


def locks_this_host_only(folder: str | Path, mounts: str | Path = "/proc/self/mountinfo") -> str:
    """Returns the folder's file-system type if its flock does not lock for other hosts, else ""."""
    try:
        lines = Path(mounts).read_text().splitlines()
    except OSError:
        return ""
    resolved = Path(folder).resolve()
    longest, kind, options = "", "", ""  # of the innermost mount that contains the folder
    for line in lines:
        before, _, after = line.partition(" - ")
        escaped, own_options = before.split()[4:6]
        # Spaces and other bytes are written as octal escapes.
        point = escaped.encode().decode("unicode_escape").encode("latin-1").decode(errors="replace")
        if resolved.is_relative_to(point) and len(point) >= len(longest):
            kind, *_, super_options = after.split()
            longest, options = point, f"{own_options},{super_options}"
    is_local = kind.startswith(THIS_HOST_ONLY) or LOCAL_OPTIONS & set(options.split(","))
    return kind if is_local else ""
