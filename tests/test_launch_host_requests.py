from pathlib import Path

from launch.host import requests
from launch.host.hashing import hash_files


def test_the_hash_of_code_depends_on_paths_modes_and_contents(tmp_path):
    (tmp_path / "a").write_text("1")
    hashes = {hash_files(tmp_path, ["a"])}
    (tmp_path / "a").chmod(0o755)
    hashes.add(hash_files(tmp_path, ["a"]))
    (tmp_path / "a").write_text("2")
    hashes.add(hash_files(tmp_path, ["a"]))
    (tmp_path / "a").rename(tmp_path / "b")
    hashes.add(hash_files(tmp_path, ["b"]))
    assert len(hashes) == 4


def test_incompletely_received_code_is_deleted_after_a_day(tmp_path, monkeypatch):
    request = {"workdir": str(tmp_path), "hash": "1", "files": []}
    interrupted = Path(requests.land(request | {"by": "a"})["folder"])
    (interrupted / "file").write_text("half")
    arriving = Path(requests.land(request | {"by": "b"})["folder"])
    assert interrupted.exists() and arriving.exists()
    monkeypatch.setattr(requests, "STALE_S", -1.0)
    new = Path(requests.land(request | {"by": "c"})["folder"])
    assert list((tmp_path / "code").iterdir()) == [new]
