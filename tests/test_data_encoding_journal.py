"""The same command continues a stopped encoding; two encodings never share a folder."""

import contextlib
import errno
import gzip
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from data_samples import contents, encode_source

from jaxtrain.config.train_config import DataConfig
from jaxtrain.data.corpus import open_corpus
from jaxtrain.data.encode import main
from jaxtrain.data.encoding import journal, pipeline
from jaxtrain.data.encoding.journal import lock_folder

pytestmark = pytest.mark.usefixtures("shard_cache")
OPTIONS: dict[str, Any] = {"piece_bytes": 300, "shard_tokens": 500}


@pytest.fixture
def source(tmp_path):
    """Text files, a compressed .jsonl with a bad line and a parquet file: about 20 tasks."""
    folder = tmp_path / "in"
    folder.mkdir()
    texts = [f"{i}: {'word ' * (20 + 7 * i % 60)}\n" * 2 for i in range(24)]
    for i, text in enumerate(texts[:8]):
        (folder / f"{i}.txt").write_text(text)
    lines = [json.dumps({"text": text}) for text in texts[8:16]]
    content = "\n".join([*lines[:4], "bad", *lines[4:]]).encode()
    (folder / "rows.jsonl.gz").write_bytes(gzip.compress(content, mtime=0))
    pq.write_table(pa.table({"text": texts[16:]}), folder / "t.parquet", row_group_size=4)
    return folder


def encode_with_snapshots(source, out, limit=None, **options):
    """Encodes and copies `out` whenever the journal has been written, as a kill would leave it.

    Args:
        limit: number of copies after which the encoding is stopped.

    Returns:
        the copies.
    """
    copies, write = [], journal.Journal.write

    def write_and_copy(self, progress):
        write(self, progress)
        copies.append(out.with_name(f"{out.name}_{len(copies)}"))
        shutil.copytree(out, copies[-1])
        if len(copies) == limit:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch, contextlib.suppress(KeyboardInterrupt):
        patch.setattr(os, "fsync", lambda descriptor: None)  # no test cuts the power
        patch.setattr(journal.Journal, "write", write_and_copy)
        encode_source(source, out, journal_s=0.0, **OPTIONS | options)
    return copies


def resume(source, out, **options):
    """Encodes with the given options changed and returns the notes for the user."""
    notes = []
    encode_source(source, out, note=notes.append, **OPTIONS | options)
    return notes


def stored_progress(out):
    [path] = out.glob(f"{journal.STATE}*/{journal.PROGRESS}")
    return json.loads(path.read_text())["progress"]


def test_an_encoding_killed_anywhere_continues_to_the_same_bytes(source, tmp_path):
    copies = encode_with_snapshots(source, tmp_path / "out")
    assert len(copies) > 15
    for copy in copies:
        progress = stored_progress(copy)
        for entry in sum(progress.get("entries", {}).values(), []):
            if "fingerprint" not in entry:  # a kill may leave more than the journal describes
                with open(next(copy.glob(f"*/{entry['file']}")), "ab") as file:
                    file.write(b"more")
        notes = resume(source, copy)
        assert not progress.get("entries") or notes[0].startswith("continuing")
        assert contents(copy) == contents(tmp_path / "out")


def test_an_encoding_killed_again_and_again_finishes_with_another_number_of_workers(
    source, tmp_path
):
    resume(source, tmp_path / "fresh")
    out, done = tmp_path / "out", 0
    for _ in range(3):
        out = encode_with_snapshots(source, out, limit=3)[-1]
        assert stored_progress(out)["done"] > done
        done = stored_progress(out)["done"]
    assert resume(source, out, workers=2)[0].startswith("continuing")
    assert contents(out) == contents(tmp_path / "fresh")


def test_a_killed_encoding_that_had_to_force_a_split_continues(tmp_path):
    lines = [json.dumps({"text": f"{i} " * 200}) for i in range(6)]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    copies = encode_with_snapshots(tmp_path / "a.jsonl", tmp_path / "out", val_fraction=0.0001)
    assert len(copies) > 10  # everything is encoded twice
    for copy in copies:
        resume(tmp_path / "a.jsonl", copy, val_fraction=0.0001)
        assert contents(copy) == contents(tmp_path / "out")


@pytest.mark.parametrize("change", ["input", "option", "pieces", "journal", "shard"])
def test_an_encoding_that_cannot_continue_starts_over(change, source, tmp_path):
    out = encode_with_snapshots(source, tmp_path / "out", limit=12)[-1]
    [state] = out.glob(f"{journal.STATE}*")
    options = {"option": {"val_fraction": 0.2}, "pieces": {"piece_bytes": 200}}.get(change, {})
    if change == "input":
        (source / "1.txt").write_text("another text\n")
    if change == "journal":
        (state / journal.PROGRESS).write_text('{"version": 1, "piece')
    if change == "shard":
        max(state.glob("*.bin")).write_bytes(b"short")
    notes = resume(source, out, **options)
    assert not any(note.startswith("continuing") for note in notes)
    if change in ("input", "option"):
        assert notes == [
            "starting over: the input or an option has changed since an encoding was stopped"
        ]
    resume(source, tmp_path / "fresh", **options)
    assert contents(out) == contents(tmp_path / "fresh")


def encode_command(source, out):
    return [f"--input={source}", f"--out={out}", "--tokenizer=bytes", "--workers=1"]


def test_an_encoding_stopped_while_it_moves_its_shards_is_finished_by_the_same_command(
    source, tmp_path, monkeypatch
):
    command = [*encode_command(source, tmp_path / "out"), "--shard_tokens=500"]
    main([*encode_command(source, tmp_path / "fresh"), "--shard_tokens=500"])
    moved = []

    def replace(old, new):
        moved.extend([old] if str(old).endswith(".bin") else [])
        if len(moved) > 3:
            raise KeyboardInterrupt
        os.rename(old, new)

    with monkeypatch.context() as patch:
        patch.setattr(pipeline.os, "replace", replace)
        with pytest.raises(SystemExit, match="130"):
            main(command)
    assert len(list((tmp_path / "out").glob("*.bin"))) == 3
    main(command)
    assert contents(tmp_path / "out") == contents(tmp_path / "fresh")


LOCK_AND_SLEEP = """
import pathlib, sys, time
from jaxtrain.data.encoding.journal import lock_folder
with lock_folder(pathlib.Path(sys.argv[1])):
    print("locked", flush=True)
    time.sleep(60)
"""


def test_a_second_encoding_into_a_folder_is_refused_until_the_first_process_ends(source, tmp_path):
    argv = [sys.executable, "-c", LOCK_AND_SLEEP, str(tmp_path / "out")]
    with subprocess.Popen(argv, stdout=subprocess.PIPE) as owner:
        assert owner.stdout and owner.stdout.readline() == b"locked\n"
        message = rf"out must be .*process {owner.pid} on .*is writing it"
        with pytest.raises(SystemExit, match=message):
            main(encode_command(source, tmp_path / "out"))
        owner.kill()
    main(encode_command(source, tmp_path / "out"))
    assert not list((tmp_path / "out").glob(".*"))


def test_runs_that_share_a_folder_wait_for_the_one_that_encodes_the_text(source, tmp_path):
    cfg = DataConfig(text=str(source), val_fraction=0.1)
    with ThreadPoolExecutor(3) as pool:  # each opens the lock file, as processes do
        opening = [pool.submit(open_corpus, cfg, "train", 256, tmp_path / "run") for _ in range(3)]
    assert len({future.result().fingerprint for future in opening}) == 1
    [folder] = (tmp_path / "run" / "data").iterdir()
    assert not list(folder.glob(".*"))


def test_without_file_locks_two_encodings_do_not_share_their_files(tmp_path, monkeypatch):
    def flock(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(journal.fcntl, "flock", flock)
    with lock_folder(tmp_path / "out") as locked:
        assert not locked
        first, second = (journal.Journal(tmp_path / "out", "k" * 32, 1, locked) for _ in range(2))
        assert first.folder != second.folder


def test_kill_9_leaves_no_encoding_process(tmp_path):
    (tmp_path / "big.txt").write_text("some words, to be encoded\n" * 2_000_000)
    argv = [sys.executable, "-m", "jaxtrain.data.encode", "--input", str(tmp_path / "big.txt")]
    argv += ["--out", str(tmp_path / "out"), "--tokenizer", "gpt2", "--workers", "2"]
    process = subprocess.Popen(argv, stderr=subprocess.DEVNULL, start_new_session=True)
    deadline = time.monotonic() + 60
    while not (children := children_of(process.pid)) or not list(
        tmp_path.glob("out/.encoding-*/*.bin")
    ):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    while any(is_alive(pid) for pid in children):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def process_status(pid):
    """Returns the fields of /proc/PID/stat, beginning with the state; [] if the process is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []


def children_of(parent):
    pids = [int(path.name) for path in Path("/proc").glob("[0-9]*")]
    return [pid for pid in pids if process_status(pid)[1:2] == [str(parent)]]


def is_alive(pid):
    return bool(process_status(pid)) and process_status(pid)[0] not in "ZX"
