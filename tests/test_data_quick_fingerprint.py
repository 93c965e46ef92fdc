import dataclasses

import pytest

from jaxtrain.config import train_config as config_lib
from jaxtrain.data.quick_fingerprint import BLOCK_BYTES, quick_fingerprint


def of_shards(folder):
    cfg = config_lib.TrainConfig()
    return quick_fingerprint(
        dataclasses.replace(cfg, data=dataclasses.replace(cfg.data, shards=str(folder)))
    )


def test_data_looks_the_same_wherever_it_lies_and_not_when_a_part_or_a_size_differs(tmp_path):
    content = {"text_train_000000.bin": bytes(range(256)) * 1024, "text_val_000000.bin": b"12"}
    seen = []
    for i, change in enumerate((None, None, "first", "last", "middle", "size")):
        folder = tmp_path / str(i)
        folder.mkdir()
        for name, data in content.items():
            data = bytearray(data)
            at = {"first": 0, "last": -1, "middle": len(data) // 15 * 7 + BLOCK_BYTES // 2}
            if "train" in name and change in at:
                data[at[change]] ^= 1
            (folder / name).write_bytes(data + b"x" * (change == "size" and "val" in name))
        seen.append(of_shards(folder))
    assert seen[0] == seen[1] and (seen[0]["files"], seen[0]["bytes"]) == (2, 256 * 1024 + 2)
    assert len({found["fingerprint"] for found in seen}) == 5


def test_a_gap_in_the_shards_is_named(tmp_path):
    for i in (0, 2):
        (tmp_path / f"text_train_{i:06d}.bin").write_bytes(b"12")
    (tmp_path / "text_val_000000.bin").write_bytes(b"12")
    with pytest.raises(ValueError, match="text_train_000001.bin are missing"):
        of_shards(tmp_path)
