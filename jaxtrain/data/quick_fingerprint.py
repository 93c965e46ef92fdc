"""What a config's data is on this machine, at a glance: launch.run compares hosts by it.

    python -m jaxtrain.data.quick_fingerprint gpt_124m --data.shards=DIR

Prints {"files", "bytes", "fingerprint"}: of names, sizes and blocks that are read here and there,
so that it takes seconds where training's own fingerprint reads every byte. Files that differ
elsewhere alone look the same; training then refuses at its start.
"""

import hashlib
import json

from absl import flags

from jaxtrain.config import train_config as config_lib
from jaxtrain.config.command_line import CommandForm
from jaxtrain.data.encoding.input_files import list_files
from jaxtrain.data.shards import find_shards
from jaxtrain.distributed.program import run_main

BLOCK_BYTES, BLOCKS = 1 << 12, 16  # read of each file: its first, its last, and some between


def quick_fingerprint(cfg) -> dict:
    """Of a TrainConfig's data, wherever the files lie.

    Raises:
        ValueError: there are no files, or numbered ones have gaps.
    """
    if cfg.data.shards:
        paths = find_shards(cfg.data.shards, "train") + find_shards(cfg.data.shards, "val")
        paths += [index for path in paths if (index := path.with_suffix(".idx")).is_file()]
        missing = [str(path) for path in paths if not path.is_file()]
        if missing:
            raise ValueError(f"data.shards must be whole; {', '.join(missing[:4])} are missing.")
        files = [(path, path.name) for path in paths]
    else:
        files = list_files(cfg.data.text, exclude=cfg.workdir)
    whole, total = hashlib.sha256(), 0
    for path, name in files:
        size = path.stat().st_size
        whole.update(f"{name}\0{size}\0".encode(errors="surrogateescape"))
        whole.update(_sample(path, size))
        total += size
    return {"files": len(files), "bytes": total, "fingerprint": whole.hexdigest()[:32]}


def _sample(path, size: int) -> bytes:
    last = max(0, size - BLOCK_BYTES)
    with open(path, "rb") as file:
        blocks = []
        for start in sorted({last * i // (BLOCKS - 1) for i in range(BLOCKS)}):
            file.seek(start)
            blocks.append(file.read(BLOCK_BYTES))
    return b"".join(blocks)


def main() -> None:
    print(json.dumps(quick_fingerprint(config_lib.freeze(flags.FLAGS.config))))


def command(argv=None, prog="python -m jaxtrain.data.quick_fingerprint") -> None:
    run_main(main, (), CommandForm("train", __doc__, config="must"), argv, prog)


if __name__ == "__main__":
    command()
