"""Code reaches a host through the request's own connection, without rsync."""

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
