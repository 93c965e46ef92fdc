"""Prints a quick fingerprint of a config's data, which the launcher compares between hosts.

    python -m jaxtrain.data.quick_fingerprint gpt_124m --data.shards=DIR

It is {"files", "bytes", "fingerprint"}. The fingerprint covers the names and sizes of all files
and 16 blocks of each, so it takes seconds. A difference outside these blocks is not noticed here.
Training notices it at its start, because its own fingerprint covers every byte.

It also prints the run directory of the config and, if another run or job writes to it, the content
of that run's or job's lock file: {"workdir", "owner"}.
"""

import hashlib
import json
from pathlib import Path

from absl import flags

from jaxtrain.config import train_config as config_lib
from jaxtrain.config.command_line import CommandForm
from jaxtrain.config.train_config import TrainConfig
from jaxtrain.data.encoding.input_files import list_files
from jaxtrain.data.shard_files import find_shards, list_shards
from jaxtrain.distributed.program import run_main
from jaxtrain.run_directory.liveness import find_owner
from jaxtrain.run_directory.lock import JOB_FILE, LOCK_FILE

BLOCK_BYTES, BLOCKS = 1 << 12, 16  # per file: the first, the last, and 14 in between


def quick_fingerprint(cfg: TrainConfig) -> dict:
    """Returns the number of files, their bytes, and a hash of names, sizes and some blocks.

    The folder is not part of it, so that hosts can store the data in different places.

    Raises:
        ValueError: there are no files, or the numbers of shards have gaps.
    """
    if cfg.data.shards:
        names = list_shards(cfg.data.shards)
        paths = find_shards(cfg.data.shards, "train") + find_shards(cfg.data.shards, "val")
        missing = [str(path) for path in paths if not path.is_file()]
        if missing:
            raise ValueError(f"data.shards must be complete; {', '.join(missing[:4])} are missing.")
        files = [(path, names[path]) for path in paths]
        indices = [(p.with_suffix(".idx"), f"{name} index") for p, name in files]
        files += [(path, name) for path, name in indices if path.is_file()]
    else:
        files = list_files(cfg.data.text, exclude=cfg.workdir)
    digest, total = hashlib.sha256(), 0
    for path, name in files:
        size = path.stat().st_size
        digest.update(f"{name}\0{size}\0".encode(errors="surrogateescape"))
        digest.update(_read_blocks(path, size))
        total += size
    return {"files": len(files), "bytes": total, "fingerprint": digest.hexdigest()[:32]}


def _read_blocks(path: Path, size: int) -> bytes:
    last = max(0, size - BLOCK_BYTES)
    blocks = []
    with open(path, "rb") as file:
        for start in sorted({last * i // (BLOCKS - 1) for i in range(BLOCKS)}):
            file.seek(start)
            blocks.append(file.read(BLOCK_BYTES))
    return b"".join(blocks)


def summarise(cfg: TrainConfig) -> dict:
    """Returns the quick fingerprint, the run directory, and who writes to it: {} if nobody does."""
    workdir = Path(cfg.workdir).absolute()
    owner = find_owner(workdir / LOCK_FILE) or find_owner(workdir / JOB_FILE)
    return quick_fingerprint(cfg) | {"workdir": str(workdir.resolve()), "owner": owner}


def main() -> None:
    print(json.dumps(summarise(config_lib.freeze(flags.FLAGS.config))))


def command(
    argv: list[str] | None = None, prog: str = "python -m jaxtrain.data.quick_fingerprint"
) -> None:
    run_main(main, (), CommandForm("train", __doc__ or "", config="must"), argv, prog)


if __name__ == "__main__":
    command()
