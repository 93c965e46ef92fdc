"""Which files --data.shards names, in which order, and what it leaves out."""

import os

import numpy as np
import pytest
from data_samples import llmc, open_shards

from jaxtrain.data.shard_files import find_shards, list_shards, split_of

pytestmark = pytest.mark.usefixtures("shard_cache")


def write_shards(folder, *names):
    for i, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(llmc(np.arange(10) + i))
    return folder


def names_of(pattern):
    return list(list_shards(str(pattern)).values())


GLOBS = {
    "*.bin": ["a.bin", "b.bin"],
    "a*.bin": ["a.bin"],
    "[ab].bin": ["a.bin", "b.bin"],
    "*/c.bin": ["below/c.bin"],
    "**/*.bin": ["a.bin", "b.bin", "below/c.bin"],
}


@pytest.mark.parametrize("pattern", GLOBS)
def test_globs_work_below_folders_whose_names_look_like_globs(pattern, tmp_path):
    names = ["a.bin", "b.bin", "below/c.bin"]
    write_shards(tmp_path / "run[1]" / "x[yz]", *names)
    write_shards(tmp_path / "run1" / "xy", *names)
    assert names_of(tmp_path / "run[1]" / "x[yz]" / pattern) == GLOBS[pattern]
    below_wildcard = [f"run[1]/x[yz]/{name}" for name in GLOBS[pattern]]
    assert names_of(tmp_path / "*" / "x[yz]" / pattern)[-len(below_wildcard) :] == below_wildcard


def test_a_folder_whose_name_is_a_glob_is_read(tmp_path):
    write_shards(tmp_path / "run*", "a.bin")
    write_shards(tmp_path / "runs", "b.bin")
    assert names_of(tmp_path / "run*") == ["a.bin"]


def test_a_file_whose_name_looks_like_a_glob_hides_no_other_file(tmp_path):
    write_shards(tmp_path, "*.bin", "a.bin", "x[1].bin", "x1.bin")
    assert names_of(tmp_path / "*.bin") == ["*.bin", "a.bin", "x1.bin", "x[1].bin"]
    assert names_of(tmp_path / "x[1].bin") == ["x[1].bin"]


def test_shards_below_a_folder_without_shards_are_found_in_the_order_of_their_paths(tmp_path):
    names = ["b/2.bin", "b/10.bin", "a-b/z.bin", "a/z.bin", "a/y/1.bin", ".hidden/h.bin"]
    write_shards(tmp_path / "real", *names)
    expected = ["a-b/z.bin", "a/y/1.bin", "a/z.bin", "b/10.bin", "b/2.bin"]
    (tmp_path / "linked").mkdir()
    for child in ("a", "a-b", "b"):
        (tmp_path / "linked" / child).symlink_to(tmp_path / "real" / child)
    for folder in ("real", "linked"):
        assert sorted(names_of(tmp_path / folder)) == sorted(expected)
        assert names_of(tmp_path / folder) == names_of(tmp_path / folder / "**" / "*.bin")
        assert names_of(tmp_path / folder)[-2:] == ["b/10.bin", "b/2.bin"]
    assert (
        open_shards(tmp_path / "linked").fingerprint == open_shards(tmp_path / "real").fingerprint
    )


def test_links_that_form_a_cycle_list_each_file_once(tmp_path):
    write_shards(tmp_path, "a/x.bin", "b/y.bin")
    for link, target in (("a/up", ".."), ("a/self", "."), ("b/up", ".."), ("b/other", "../a")):
        (tmp_path / link).symlink_to(target)
    assert names_of(tmp_path) == ["a/x.bin", "b/other/x.bin", "b/y.bin"]


def test_shards_in_folders_below_one_that_has_shards_are_left_out_and_reported(tmp_path):
    write_shards(tmp_path, "a.bin", "old/b.bin", "old/c.bin")
    described = open_shards(tmp_path).describe()
    assert names_of(tmp_path) == ["a.bin"]
    assert "2 file(s) left out in folders below, such as old/b.bin" in described
    assert f"--data.shards='{tmp_path}/**/*.bin'" in described
    assert "left out" not in open_shards(tmp_path / "**" / "*.bin").describe()


def test_a_glob_that_matches_only_folders_says_how_to_read_their_shards(tmp_path):
    write_shards(tmp_path, "part1/a.bin", "part2/a.bin")
    with pytest.raises(ValueError, match=r"part\*', where there is none; it matches .*part1") as e:
        list_shards(str(tmp_path / "part*"))
    assert f"'{tmp_path}/part*/*.bin'" in str(e.value)


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("val/000.bin", "val"),
        ("train/test/000.bin", "other"),
        ("test/train_000.bin", "train"),
        ("data/val_000.bin", "val"),
        ("interval/medieval.bin", "train"),
        ("val/x_train_000000.bin", "train"),
    ],
)
def test_a_folder_names_the_split_of_files_that_do_not(name, split, tmp_path):
    assert split_of(name) == split
    write_shards(tmp_path / "eval", name)
    if split != "other":
        assert len(find_shards(str(tmp_path / "eval"), split)) == 1


def test_folders_that_cannot_exist_are_an_error_that_names_the_flag(tmp_path):
    (tmp_path / "loop").symlink_to("loop")
    write_shards(tmp_path, "good/a.bin")
    assert names_of(tmp_path) == ["good/a.bin"]
    for pattern in ("loop/*.bin", "x" * 300, "x" * 300 + "/*.bin"):
        with pytest.raises(ValueError, match=r"--data\.shards"):
            list_shards(str(tmp_path / pattern))


def test_names_with_any_bytes_are_read_and_printed_in_one_line(tmp_path):
    name = os.fsdecode(b"a\n\xff\x1b[2J .bin")
    write_shards(tmp_path, name, "b.bin")
    assert open_shards(tmp_path).tokens == 20
    (tmp_path / name).write_bytes(b"")
    with pytest.raises(ValueError) as error:
        open_shards(tmp_path)
    assert r"a\n\xff\x1b[2J .bin: expected" in str(error.value)
    assert len(str(error.value).splitlines()) == 2
