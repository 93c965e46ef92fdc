"""Code reaches a host through the request's own connection, without rsync."""

import os
import subprocess
import sys

import git_trees
import pytest
from local_client import LocalClient

from launch.host.hashing import hash_files
from launch.inventory import Host
from launch.ssh import HostError
from launch.sync_code import read_code, send_code


@pytest.fixture
def code(tmp_path):
    tree = tmp_path / "tree"
    (tree / "pkg").mkdir(parents=True)
    (tree / "pkg" / "a.py").write_text("x = 1")
    (tree / "run.sh").touch(0o755)
    (tree / "link").symlink_to("/etc/hostname")
    git_trees.commit_program(tree, "x = 1")
    (tree / "new \u05d0.txt").write_text("not committed")
    return read_code(tree)


def test_a_host_gets_every_file_its_mode_and_its_links(tmp_path, code):
    hosts = [
        Host(name, f"127.0.0.{i}", python=sys.executable, workdir=str(tmp_path / name))
        for i, name in enumerate("ab", 1)
    ]
    client = LocalClient(hosts)
    for _ in range(2):  # the second time it is there
        folders = send_code(client, code)
        assert [hash_files(folder, code.files) for folder in folders.values()] == [code.hash] * 2
    drafts = [path.name for host in hosts for path in (tmp_path / host.name / "code").iterdir()]
    assert drafts == [code.hash] * 2


def test_code_that_changes_while_it_is_sent_is_refused(tmp_path, code):
    host = Host("a", "127.0.0.1", python=sys.executable, workdir=str(tmp_path / "a"))
    (code.root / "pkg" / "a.py").write_text("x = 2")
    with pytest.raises(HostError, match="A file was edited while it was sent"):
        send_code(LocalClient([host]), code)


@pytest.mark.parametrize("setting", ["color.ui=always", "diff.external=true"])
def test_the_patch_of_changed_code_ignores_how_git_shows_differences(code, setting):
    git = ["git", "-C", str(code.root)]
    (code.root / "program.py").write_text("x = 2")
    subprocess.run([*git, "config", *setting.split("=")], check=True)
    patch = read_code(code.root).patch
    assert "\n+x = 2\n" in patch and "\x1b" not in patch


def test_the_patch_is_text_even_if_the_name_of_a_new_file_is_not(code):
    (code.root / os.fsdecode(b"\xff")).touch()
    git = ["git", "-C", str(code.root)]
    subprocess.run([*git, "config", "core.quotePath", "false"], check=True)
    assert "new file: " in read_code(code.root).patch.encode().decode()


def test_a_tree_that_git_refuses_is_refused_with_gits_reason(tmp_path):
    with pytest.raises(ValueError, match="--code must be .*: fatal: not a git repository"):
        read_code(tmp_path)


def test_an_answer_about_the_code_that_has_no_meaning_is_refused(tmp_path, code):
    class Odd(LocalClient):
        def call(self, host, request, timeout_s=60.0):
            return {}

    with pytest.raises(HostError, match="a: its answer.missing must be true or false; got None"):
        send_code(Odd([Host("a", "127.0.0.1")]), code)


def test_nested_repositories_are_sent_too_and_named(tmp_path, code, capsys):
    git_trees.commit_program(code.root / "vendor" / "inner", "x = 3")
    git_trees.commit_program(code.root / "vendor" / "inner" / "deep", "x = 4")
    (code.root / "vendor" / "inner" / "program.py").write_text("x = 5")
    git = ["git", "-C", str(code.root), "-c", "protocol.file.allow=always"]
    submodule = [*git, "submodule", "--quiet", "add", str(code.root / "vendor" / "inner"), "sub"]
    subprocess.run(submodule, check=True)
    (code.root / "absent").mkdir()
    empty = ["update-index", "--add", "--cacheinfo", f"160000,{code.commit},absent"]
    subprocess.run([*git, *empty], check=True)  # a submodule that was never fetched
    found = read_code(code.root)
    names = {"vendor/inner/program.py", "vendor/inner/deep/program.py", "sub/program.py"}
    assert names <= set(found.files)
    assert found.hash != code.hash and "\n+x = 5\n" in found.patch
    assert "b/vendor/inner/program.py" in found.patch
    said = capsys.readouterr().err
    assert "also sends the git repositories sub, vendor/inner, vendor/inner/deep" in said
    assert "absent is a submodule without files" in said
    host = Host("a", "127.0.0.1", python=sys.executable, workdir=str(tmp_path / "a"))
    [folder] = send_code(LocalClient([host]), found).values()
    assert hash_files(folder, found.files) == found.hash
