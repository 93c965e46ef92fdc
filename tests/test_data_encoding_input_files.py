"""Links to input files are followed, any name is allowed, pipes are not opened."""

import os
import socket

import pytest
from data_samples import encode_source

from jaxtrain.data.encoding.formats import printable_path
from jaxtrain.data.encoding.input_files import list_files


def names_of(folder):
    return [name for _, name in list_files(str(folder), exclude="unused")]


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "in" / "real").mkdir(parents=True)
    (tmp_path / "in" / "real" / "a.txt").write_text("first text\n")
    (tmp_path / "elsewhere" / "deep").mkdir(parents=True)
    (tmp_path / "elsewhere" / "deep" / "b.txt").write_text("second text\n")
    return tmp_path / "in"


def test_links_to_folders_and_files_are_followed(folder):
    (folder / "linked").symlink_to(folder.parent / "elsewhere")
    (folder / "c.txt").symlink_to(folder / "real" / "a.txt")
    assert names_of(folder) == ["c.txt", "linked/deep/b.txt", "real/a.txt"]


def test_a_folder_with_several_links_to_it_is_read_once(folder):
    (folder / "above").symlink_to(folder)  # a cycle
    (folder / "a-first").symlink_to(folder / "real")
    (folder.parent / "elsewhere" / "back").symlink_to(folder / "real")
    (folder / "linked").symlink_to(folder.parent / "elsewhere")
    (folder / "loop").symlink_to(folder / "loop")
    assert names_of(folder) == ["linked/deep/b.txt", "real/a.txt"]
    files = list_files(str(folder), exclude="unused")
    assert files.left_out == {"links to folders that are read already": 3, "broken links": 1}


def test_pipes_sockets_and_broken_links_are_counted_and_never_opened(folder, tmp_path):
    os.mkfifo(folder / "pipe")
    (folder / "gone").symlink_to(folder / "nowhere")
    (folder / "null").symlink_to("/dev/null")
    here = os.getcwd()
    os.chdir(folder)  # a socket's path may be 107 bytes long
    try:
        listener = socket.socket(socket.AF_UNIX)
        listener.bind("socket")
    finally:
        os.chdir(here)
    meta = encode_source(folder, tmp_path / "out", val_fraction=0.0)
    listener.close()
    assert meta["skipped"] == {"broken links": 1, "pipes, sockets or devices": 3}


def test_names_that_are_not_utf8_are_allowed_and_escaped_in_messages(tmp_path):
    (tmp_path / "in").mkdir()
    for i in range(40):
        with open(os.fsencode(tmp_path / "in") + b"/\xff\xe9 \xc3\xa9%d.txt" % i, "w") as file:
            file.write(f"text {i}\n" * 20)
    with open(os.fsencode(tmp_path / "in") + b"/\xfe.jsonl", "w") as file:
        file.write('{"text": "a"}\n{"text": "b"}\nbad\n')
    files = list_files(str(tmp_path / "in"), exclude="unused")
    assert len(files) == 41
    meta = encode_source(tmp_path / "in", tmp_path / "out")
    assert meta["documents"]["val"] >= 3
    assert r"/\xfe.jsonl, line 3, byte 28: " in meta["problems"][0]
    assert printable_path(os.fsdecode(b"a\xff\xc3\xa9")) == "a\\xffé"


def test_an_unreadable_file_is_skipped_and_named(folder, tmp_path):
    (folder / "bad-disk").symlink_to("/proc/self/mem")  # a regular file; reading it at 0 fails
    for i in range(3):
        (folder / f"{i}.txt").write_text("more\n" * 9)
    meta = encode_source(folder, tmp_path / "out", val_fraction=0.0)
    assert meta["skipped"] == {"unreadable": 1}
    assert "bad-disk: the file cannot be read: Input/output error" in meta["problems"][0]


def test_the_default_text_is_pythons_own_source_without_its_tests():
    names = [name for _, name in list_files("", exclude="unused")]
    assert {"argparse.py", "json/decoder.py"} <= set(names)
    parts = {part for name in names for part in name.split("/")[:-1]}
    assert not parts & {"site-packages", "test", "tests", "idle_test", "__pycache__"}
    assert names == sorted(names) and all(name.endswith(".py") for name in names)


@pytest.mark.parametrize("what", ["missing", "pipe", "empty"])
def test_the_error_for_an_input_without_files_names_the_flag(what, tmp_path):
    path = tmp_path / what
    if what == "pipe":
        os.mkfifo(path)
    if what == "empty":
        path.mkdir()
    with pytest.raises(ValueError, match=rf"--input must be .*{what}") as error:
        list_files(str(path), exclude="unused", flag="--input")
    assert "data.text" not in str(error.value)
