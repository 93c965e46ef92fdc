import dataclasses
import os

import pytest

from jaxtrain.config import train_config as config_lib
from jaxtrain.data.quick_fingerprint import BLOCK_BYTES, quick_fingerprint, summarise
from jaxtrain.run_directory.lock import RunLock
from launch.host.claim import Claim


def fingerprint_of(folder):
    cfg = config_lib.TrainConfig()
    return quick_fingerprint(
        dataclasses.replace(cfg, data=dataclasses.replace(cfg.data, shards=str(folder)))
    )


def test_the_fingerprint_ignores_the_folder_and_changes_with_content_and_size(tmp_path):
    content = {"text_train_000000.bin": bytes(range(256)) * 1024, "text_val_000000.bin": b"12"}
    results = []
    for i, change in enumerate((None, None, "first", "last", "middle", "size")):
        folder = tmp_path / str(i)
        folder.mkdir()
        for name, data in content.items():
            data = bytearray(data)
            index = {"first": 0, "last": -1, "middle": len(data) // 15 * 7 + BLOCK_BYTES // 2}
            if "train" in name and change in index:
                data[index[change]] ^= 1
            (folder / name).write_bytes(data + b"x" * (change == "size" and "val" in name))
        results.append(fingerprint_of(folder))
    assert results[0] == results[1] and (results[0]["files"], results[0]["bytes"]) == (
        2,
        256 * 1024 + 2,
    )
    assert len({result["fingerprint"] for result in results}) == 5


def test_a_gap_in_the_numbers_of_shards_is_an_error(tmp_path):
    for i in (0, 2):
        (tmp_path / f"text_train_{i:06d}.bin").write_bytes(b"12")
    (tmp_path / "text_val_000000.bin").write_bytes(b"12")
    with pytest.raises(ValueError, match="text_train_000001.bin are missing"):
        fingerprint_of(tmp_path)


def test_the_command_names_the_run_directory_and_the_run_that_writes_to_it(tmp_path, monkeypatch):
    (tmp_path / "text").write_text("some text")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("JAXTRAIN_JOB", "1126-a")
    (tmp_path / "runs").mkdir()
    (tmp_path / "link").symlink_to("runs")
    cfg = dataclasses.replace(config_lib.TrainConfig(), workdir="link/debug")
    cfg = dataclasses.replace(cfg, data=dataclasses.replace(cfg.data, text=str(tmp_path / "text")))
    assert summarise(cfg)["owner"] == {} and not (tmp_path / "runs" / "debug").exists()
    with RunLock("runs/debug"):
        found = summarise(cfg)
    assert found["workdir"] == str(tmp_path / "runs" / "debug") and found["files"] == 1
    assert found["owner"]["pid"] == os.getpid() and found["owner"]["job"] == "1126-a"
    assert summarise(cfg)["owner"] == {}
    claim = Claim(tmp_path / "runs" / "debug", "1126-b")  # that job waits for its next attempt
    assert summarise(cfg)["owner"]["job"] == "1126-b"
    claim.release()
    assert summarise(cfg)["owner"] == {}
