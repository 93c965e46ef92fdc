import io
import os
import shutil
import sys
import tarfile
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from launch.host import code as code_lib
from launch.host.added_modules import find_added_modules
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
    interrupted = Path(code_lib.land(request | {"by": "a"})["folder"])
    (interrupted / "file").write_text("half")
    arriving = Path(code_lib.land(request | {"by": "b"})["folder"])
    assert interrupted.exists() and arriving.exists()
    monkeypatch.setattr(code_lib, "STALE_S", -1.0)
    request["hash"] = code_lib.hash_files(tmp_path, [])
    new = Path(code_lib.land(request | {"by": "c"})["folder"])
    assert list((tmp_path / "code").iterdir()) == [new]


def test_a_jump_of_the_clock_does_not_delete_arriving_code(tmp_path, monkeypatch):
    request, clock = {"workdir": str(tmp_path), "hash": "1", "files": []}, time.time
    arriving = Path(code_lib.land(request | {"by": "a"})["folder"])
    monkeypatch.setattr(time, "time", lambda: clock() + 2 * code_lib.STALE_S)
    code_lib.land(request | {"by": "b"})
    assert arriving.exists()


def test_code_whose_connection_breaks_leaves_nothing_behind(tmp_path, monkeypatch):
    request = {"workdir": str(tmp_path), "hash": "1", "files": [], "by": "a"}
    draft, packed = Path(code_lib.land(request)["folder"]), io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as tar:
        tar.add(__file__, arcname="file.py")
    half = io.BytesIO(packed.getvalue()[: len(packed.getvalue()) // 2])
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=half))
    with pytest.raises((tarfile.TarError, EOFError)):
        code_lib.receive(request)
    assert not draft.exists()


def test_code_that_was_edited_on_a_host_is_refused(tmp_path):
    (tmp_path / "a.py").write_text("x = 1")
    code = {"hash": code_lib.hash_files(tmp_path, ["a.py"]), "files": ["a.py"], "by": "b"}
    request = {"workdir": str(tmp_path / "host")} | code
    draft = Path(code_lib.land(request)["folder"])
    (draft / "a.py").write_text("x = 1")
    folder = Path(code_lib.land(request)["folder"])
    assert code_lib.land(request) == {"missing": False, "folder": str(folder)}
    (folder / "a.py").write_text("x = 2")
    with pytest.raises(RuntimeError, match="hashes to .* edited on this host. Remove it there"):
        code_lib.land(request)
    (folder / "a.py").unlink()
    with pytest.raises(RuntimeError, match="nothing, as .*a.py is missing"):
        code_lib.land(request)


CODE = ("run.py", "pkg/__init__.py", "pkg/a.py", "pkg/sub/b.txt", "scripts/go.py", "data/readme")
EXTENSION = "cpython-311-x86_64-linux-gnu.so"
IMPORTED = (
    "numpy.py",
    "numpy.pyc",
    "numpy/__init__.py",
    "sitecustomize.py",
    "json.so",
    f"json.{EXTENSION}",
    "pkg.py",
    f"pkg/a.{EXTENSION}",
    "pkg/a/__init__.py",
    "pkg/sub.py",
    "pkg/__init__.abi3.so",
    "scripts/numpy.py",
)
IGNORED = (
    "runs/numpy.py",
    "__pycache__/run.cpython-311.pyc",
    "pkg/__pycache__/a.cpython-311.pyc",
    ".venv/lib/numpy.py",
    "build/lib/pkg/__init__.py",
    "data/prepare.py",
    "numpy/array.npy",
    "numpy.py.orig",
    "numpy-1.py",
    ".#numpy.py",
    "own.pth",
    "libkernel.so",
    f"pkg/_fast.{EXTENSION}",
    "pkg/_version.py",
    "pkg.egg-info/a.py",
)


@pytest.fixture
def landed(tmp_path):
    """Returns code on a host, and the request that a start sends for it."""
    request = {"workdir": str(tmp_path / "host"), "files": list(CODE), "by": "b"}
    tree = tmp_path / "tree"
    for name in CODE:
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        (tree / name).write_text(name)
    request["hash"] = hash_files(tree, CODE)
    shutil.copytree(tree, code_lib.land(request)["folder"], dirs_exist_ok=True)
    return Path(code_lib.land(request)["folder"]), request


@pytest.mark.parametrize("name", IMPORTED)
def test_a_module_that_was_added_to_the_code_on_a_host_is_refused_by_name(landed, name):
    folder, request = landed
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).touch()
    with pytest.raises(RuntimeError, match=f"{name} was added to the code in {folder}"):
        code_lib.land(request)


def test_files_on_a_host_that_change_no_import_are_not_refused(landed):
    folder, request = landed
    for name in IGNORED:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    assert code_lib.land(request) == {"missing": False, "folder": str(folder)}


def test_folders_above_modules_are_searched_and_a_link_to_a_package_is_part_of_the_code(tmp_path):
    (tmp_path / "src" / "pkg").mkdir(parents=True)
    for name in ("__init__.py", "a.py"):
        (tmp_path / "src" / "pkg" / name).touch()
    os.symlink("src/pkg", tmp_path / "pkg")
    files = ["pkg", "src/pkg/__init__.py", "src/pkg/a.py"]
    assert find_added_modules(tmp_path, files) == []
    (tmp_path / "src" / "numpy.py").touch()
    assert find_added_modules(tmp_path, files) == ["src/numpy.py"]


def test_two_operators_can_send_the_same_code_at_once(tmp_path):
    (tmp_path / "a.py").write_text("x = 1")
    code = {"hash": code_lib.hash_files(tmp_path, ["a.py"]), "files": ["a.py"]}
    request = {"workdir": str(tmp_path / "host")} | code
    drafts = {by: Path(code_lib.land(request | {"by": by})["folder"]) for by in "ab"}
    for draft in drafts.values():
        (draft / "a.py").write_text("x = 1")
    answers = [code_lib.land(request | {"by": by}) for by in drafts]
    assert answers[0] == answers[1] and [answer["missing"] for answer in answers] == [False] * 2
    assert [path.name for path in (tmp_path / "host" / "code").iterdir()] == [code["hash"]]
