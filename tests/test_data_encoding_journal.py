"""A stopped encoding goes on with the same command; two never write one folder."""

import itertools
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

import pytest

from jaxtrain.config.train_config import DataConfig
from jaxtrain.data.corpus import open_corpus
from jaxtrain.data.encode import main
from jaxtrain.data.encoding import journal, pipeline
from jaxtrain.data.encoding.input_files import list_files
from jaxtrain.data.encoding.journal import lock_folder
from jaxtrain.data.encoding.pipeline import encode


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def source(tmp_path):
    """Text files, a compressed .jsonl with bad lines and a parquet file: about 25 tasks."""
    import gzip

    import pyarrow as pa
    import pyarrow.parquet as pq

    folder = tmp_path / "in"
    folder.mkdir()
    modules = sorted(Path(sysconfig.get_path("stdlib")).glob("[a-c]*.py"))[:30]
    texts = [path.read_text(encoding="utf-8") for path in modules]
    for i, text in enumerate(texts[:10]):
        (folder / f"{i}.txt").write_text(text)
    lines = [json.dumps({"text": text}) for text in texts[10:20]]
    (folder / "rows.jsonl.gz").write_bytes(
        gzip.compress("\n".join([*lines, "bad"]).encode(), mtime=0)
    )
    pq.write_table(pa.table({"text": texts[20:]}), folder / "t.parquet", row_group_size=4)
    return folder


class Killed(Exception):
    """Stands for the end of the process."""


def run(source, out, stop_after=None, **knobs):
    """Encodes; with stop_after, ends after so many entries of the journal, as a kill would."""
    knobs = {"val_fraction": 0.1, "piece_bytes": 30_000, "journal_s": 0.0} | knobs
    knobs = {"shard_tokens": 50_000} | knobs
    notes = []
    files = list_files(str(source), exclude=out)
    write, left = journal.Journal.write, stop_after

    def count(self, progress):
        nonlocal left
        write(self, progress)
        left -= 1
        if not left:
            raise Killed

    with pytest.MonkeyPatch.context() as patch:
        if stop_after is not None:
            patch.setattr(journal.Journal, "write", count)
        try:
            encode(files, out, "bytes", note=notes.append, **knobs)
        except Killed:
            notes.append("killed")
    return notes


def contents(folder):
    return {p.name: p.read_bytes() for p in Path(folder).iterdir()}


def test_an_encoding_stopped_anywhere_goes_on_to_the_same_bytes(source, tmp_path):
    run(source, tmp_path / "whole")
    for stops in itertools.count(1, 3):
        out = tmp_path / "stopped"
        if run(source, out, stop_after=stops) != ["killed"]:
            break
        [state] = [p for p in out.iterdir() if p.is_dir()]
        progress = json.loads((state / "progress.json").read_text())["progress"]
        for entry in sum(progress.get("entries", {}).values(), []):
            if "fingerprint" not in entry:  # as a kill after more was written leaves it
                with open(state / entry["file"], "ab") as file:
                    file.write(b"more")
        notes = run(source, out)
        assert not progress.get("entries") or notes[0].startswith("continuing")
        assert contents(out) == contents(tmp_path / "whole")
        shutil.rmtree(out)
    assert stops > 15


def test_an_encoding_that_is_stopped_again_and_again_ends_with_other_workers(source, tmp_path):
    run(source, tmp_path / "whole")
    stops = 0
    while "killed" in run(source, tmp_path / "out", stop_after=5):
        stops += 1
    assert stops > 3
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    run(source, tmp_path / "two", stop_after=20)
    run(source, tmp_path / "two", workers=2)
    assert contents(tmp_path / "two") == contents(tmp_path / "whole")


def test_a_stopped_encoding_that_forces_a_split_goes_on(tmp_path):
    lines = [json.dumps({"text": f"{i} " * 2_000}) for i in range(12)]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    knobs = {"val_fraction": 0.0001, "piece_bytes": 5_000}
    run(tmp_path / "a.jsonl", tmp_path / "whole", **knobs)
    for stop in itertools.count(3, 4):
        out = tmp_path / str(stop)
        if "killed" not in run(tmp_path / "a.jsonl", out, stop_after=stop, **knobs):
            break
        run(tmp_path / "a.jsonl", out, **knobs)
        assert contents(out) == contents(tmp_path / "whole")
    assert stop > 15


@pytest.mark.parametrize("change", ["input", "option", "pieces", "journal", "shard"])
def test_what_cannot_go_on_starts_over(change, source, tmp_path):
    out = tmp_path / "out"
    run(source, out, stop_after=15)
    [state] = [p for p in out.iterdir() if p.is_dir()]
    knobs = {"option": {"val_fraction": 0.2}, "pieces": {"piece_bytes": 20_000}}.get(change, {})
    if change == "input":
        (source / "1.txt").write_text("another text\n")
    if change == "journal":
        (state / "progress.json").write_text('{"version": 1, "piece')
    if change == "shard":
        max(state.glob("*.bin")).write_bytes(b"short")
    notes = run(source, out, **knobs)
    assert not any(note.startswith("continuing") for note in notes)
    if change in ("input", "option"):
        assert notes == [
            "starting over: the input or an option has changed since an encoding was stopped"
        ]
    run(source, tmp_path / "whole", **knobs)
    assert contents(out) == contents(tmp_path / "whole")


def test_an_encoding_stopped_while_it_moves_its_shards_is_finished_by_the_same_command(
    source, tmp_path, monkeypatch
):
    command = ["--input", str(source), "--out", str(tmp_path / "out"), "--tokenizer", "bytes"]
    command += ["--workers", "1", "--shard_tokens", "50000"]
    main([*command[:3], str(tmp_path / "whole"), *command[4:]])
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
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def hold(folder, started):
    with lock_folder(folder):
        started.set()
        time.sleep(60)


@pytest.fixture
def holder(tmp_path):
    """Another process that holds the lock of tmp_path/out."""
    context = multiprocessing.get_context("spawn")
    started = context.Event()
    process = context.Process(target=hold, args=(tmp_path / "out", started))
    process.start()
    assert started.wait(60)
    yield process
    process.kill()
    process.join()


def test_a_second_encoding_into_a_folder_is_refused_with_its_owner(source, tmp_path, holder):
    command = ["--input", str(source), "--out", str(tmp_path / "out"), "--tokenizer", "bytes"]
    with pytest.raises(SystemExit, match=rf"out must be .*process {holder.pid} on .*is writing it"):
        main(command)
    holder.kill()
    holder.join()
    main([*command, "--workers", "1"])  # the lock ended with its process
    assert not [path for path in (tmp_path / "out").iterdir() if path.name[0] == "."]


def test_a_run_waits_for_the_process_that_encodes_its_text(source, tmp_path):
    cfg = DataConfig(text=str(source), val_fraction=0.1)
    context = multiprocessing.get_context("spawn")
    with context.Pool(3) as pool:
        corpora = pool.starmap(open_corpus, [(cfg, "train", 256, tmp_path / "run")] * 3)
    assert len({corpus.fingerprint for corpus in corpora}) == 1
    [folder] = (tmp_path / "run" / "data").iterdir()
    assert not [path for path in folder.iterdir() if path.name[0] == "."]


def test_where_there_are_no_locks_two_encodings_do_not_share_their_files(
    source, tmp_path, monkeypatch
):
    def flock(*_):
        raise OSError(journal.errno.ENOLCK, "No locks available")

    monkeypatch.setattr(journal.fcntl, "flock", flock)
    with lock_folder(tmp_path / "out") as locked:
        assert not locked
        first = journal.Journal(tmp_path / "out", "k" * 32, 1, locked)
        second = journal.Journal(tmp_path / "out", "k" * 32, 1, locked)
        assert first.folder != second.folder


def test_kill_9_leaves_no_encoding_process(tmp_path):
    modules = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    text = "".join(path.read_text(encoding="utf-8") for path in modules)
    (tmp_path / "big.txt").write_text(text * 9)
    command = [sys.executable, "-m", "jaxtrain.data.encode", "--input", str(tmp_path / "big.txt")]
    command += ["--out", str(tmp_path / "out"), "--tokenizer", "gpt2", "--workers", "2"]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL, start_new_session=True)
    deadline = time.monotonic() + 60
    while not (found := children_of(process.pid)) or not list(
        tmp_path.glob("out/.encoding-*/*.bin")
    ):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    while any(is_alive(pid) for pid in found):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def children_of(parent):
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[1]) == parent:
            found.append(int(stat.parent.name))
    return found


def is_alive(pid):
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state not in "ZX"
