import json
import subprocess
import sys
import sysconfig
from pathlib import Path

import numpy as np
import pytest

from jaxtrain.config.train_config import DataConfig
from jaxtrain.data.corpus import open_corpus
from jaxtrain.data.encode import main
from jaxtrain.data.encoding.divide_input import divide_input
from jaxtrain.data.encoding.input_files import list_files
from jaxtrain.data.encoding.pipeline import encode
from jaxtrain.data.tokenizer import build_tokenizer


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def texts(tmp_path):
    """A folder of real text: 30 modules of the standard library in two levels."""
    folder = tmp_path / "texts"
    (folder / "below").mkdir(parents=True)
    modules = sorted(Path(sysconfig.get_path("stdlib")).glob("[a-d]*.py"))[:30]
    for i, path in enumerate(modules):
        (folder / ("below" if i % 3 else "") / path.name).write_bytes(path.read_bytes())
    return folder


def run(folder, out, tokenizer="bytes", **knobs):
    return encode(list_files(str(folder), exclude=out), out, tokenizer, **knobs)


def shards_of(out):
    return {path.name: path.read_bytes() for path in sorted(Path(out).glob("*.bin"))}


def opened(source, split="train", **knobs):
    return open_corpus(DataConfig(shards=str(source), **knobs), split, 65_536, "unused")


def tokens_of(source, split="train"):
    corpus = opened(source, split)
    return np.concatenate([corpus.read(i, 0, s.tokens) for i, s in enumerate(corpus.shards)])


def documents_of(tokens, eot):
    starts = np.flatnonzero(tokens == eot)
    assert starts[0] == 0, "a corpus begins with a document"
    return [part[1:] for part in np.split(tokens, starts[1:])]


@pytest.mark.parametrize("name", ["bytes", "gpt2"])
def test_every_document_is_in_one_split_and_decodes_to_its_text(name, texts, tmp_path):
    tokenizer = build_tokenizer(name)
    run(texts, tmp_path / "out", name, val_fraction=0.2)
    decoded = [
        tokenizer.decode(ids)
        for split in ("train", "val")
        for ids in documents_of(tokens_of(tmp_path / "out", split), tokenizer.eot)
    ]
    originals = [p.read_text(encoding="utf-8") for p in texts.rglob("*.py")]
    assert sorted(decoded) == sorted(originals)


@pytest.mark.parametrize("name", ["bytes", "gpt2"])
def test_the_result_does_not_depend_on_workers(name, texts, tmp_path):
    name = name
    knobs = {"val_fraction": 0.1, "shard_tokens": 50_000, "piece_bytes": 60_000}
    for workers in (1, 2):
        run(texts, tmp_path / str(workers), name, workers=workers, **knobs)
    assert shards_of(tmp_path / "1") == shards_of(tmp_path / "2")
    metas = [(tmp_path / str(w) / "meta.json").read_text() for w in (1, 2)]
    assert metas[0] == metas[1] and len(shards_of(tmp_path / "1")) > 2


@pytest.mark.parametrize("name", ["bytes", "gpt2"])
def test_cutting_a_long_text_into_pieces_changes_no_token(name, texts, tmp_path):
    name = name
    whole = tmp_path / "whole.txt"
    whole.write_bytes(b"".join(p.read_bytes() for p in sorted(texts.rglob("*.py"))))
    run(whole, tmp_path / "cut", name, piece_bytes=10_000)
    run(whole, tmp_path / "uncut", name, piece_bytes=1 << 30)
    assert shards_of(tmp_path / "cut") == shards_of(tmp_path / "uncut")
    units, _ = divide_input(list_files(str(whole), exclude=tmp_path), 0.0, "text", 10_000)
    assert len(units) > 10


def test_a_text_without_newlines_is_cut_between_characters(tmp_path):
    (tmp_path / "long.txt").write_text("你好🦊é" * 5_000, encoding="utf-8")
    run(tmp_path / "long.txt", tmp_path / "out", piece_bytes=1_001)
    assert tokens_of(tmp_path / "out").astype(np.uint8).tobytes()[1:].decode() == "你好🦊é" * 5_000


def test_shards_and_meta_count_tokens_and_text_bytes(texts, tmp_path):
    meta = run(texts, tmp_path / "out", "gpt2", val_fraction=0.1, shard_tokens=20_000)
    text_bytes = sum(p.stat().st_size for p in texts.rglob("*.py"))
    assert sum(e["text_bytes"] for e in meta["shards"]) == text_bytes
    train = [e for e in meta["shards"] if e["split"] == "train"]
    assert {e["tokens"] for e in train[:-1]} == {20_000} and 0 < train[-1]["tokens"] <= 20_000
    assert all(1 < e["text_bytes"] / e["tokens"] < 8 for e in meta["shards"])
    corpus = opened(tmp_path / "out")
    assert (corpus.tokenizer_name, corpus.eot) == ("gpt2", 50_256)
    expected = sum(e["text_bytes"] for e in train) / corpus.tokens
    assert corpus.bytes_per_token == pytest.approx(expected, rel=1e-12)


def test_held_out_is_about_the_asked_share_and_never_nothing(texts, tmp_path):
    for fraction in (0.02, 0.1, 0.4):
        meta = run(texts, tmp_path / str(fraction), val_fraction=fraction)
        sizes = {s: sum(e["tokens"] for e in meta["shards"] if e["split"] == s) for s in SPLITS}
        assert 0.4 * fraction < sizes["val"] / sum(sizes.values()) < 1.1 * fraction


SPLITS = ("train", "val")


def test_of_a_single_file_the_last_part_is_held_out(tmp_path):
    text = "".join(f"line {i} of a text\n" for i in range(5_000))
    (tmp_path / "one.txt").write_text(text)
    run(tmp_path / "one.txt", tmp_path / "out", val_fraction=0.25)
    train, val = (tokens_of(tmp_path / "out", s).astype(np.uint8).tobytes() for s in SPLITS)
    assert train[:1] == val[:1] == b"\0"
    assert (train[1:] + val[1:]).decode() == text
    assert 0.24 < len(val) / len(text) < 0.26


def test_each_line_of_jsonl_is_a_document(tmp_path):
    rows = [f"document {i}\n\nline é {i}" for i in range(400)]
    lines = "\n".join(json.dumps({"id": i, "body": row}) for i, row in enumerate(rows))
    (tmp_path / "rows.jsonl").write_text(lines + "\n\n")
    knobs = {"val_fraction": 0.2, "text_field": "body"}
    run(tmp_path / "rows.jsonl", tmp_path / "a", **knobs)
    run(tmp_path / "rows.jsonl", tmp_path / "b", piece_bytes=1_000, workers=2, **knobs)
    assert shards_of(tmp_path / "a") == shards_of(tmp_path / "b")
    split = [documents_of(tokens_of(tmp_path / "a", s), 0) for s in SPLITS]
    decoded = [bytes(ids.tolist()).decode() for part in split for ids in part]
    assert sorted(decoded) == sorted(rows) and 40 < len(split[1]) < 120


@pytest.mark.parametrize("line", ["no json", '{"other": "x"}', '{"text": 3}', "[1]"])
def test_a_bad_line_of_jsonl_is_named_by_file_and_place(line, tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"text": "good"}\n' + line + "\n")
    with pytest.raises(ValueError, match=r"rows\.jsonl, line 2, byte 17: expected .*; found"):
        run(tmp_path / "rows.jsonl", tmp_path / "out", on_bad_document="stop")
    assert not list((tmp_path / "out").iterdir())  # nothing half-written stays


def test_what_is_no_text_is_skipped_and_counted(texts, tmp_path):
    (texts / "nul.txt").write_bytes(b"a\0b")
    (texts / "latin.txt").write_bytes("é".encode("latin-1"))
    (texts / "empty.txt").write_bytes(b"")
    (texts / ".hidden").write_bytes(b"hidden")
    meta = run(texts, tmp_path / "out")
    assert meta["skipped"] == {"empty": 1, "holding NUL bytes": 1, "not UTF-8": 1}
    assert (tokens_of(tmp_path / "out") == 0).sum() == 30
    for path in texts.rglob("*.py"):
        path.unlink()
    with pytest.raises(ValueError, match="at least one document.*1 holding NUL bytes"):
        run(texts, tmp_path / "none")


def test_text_is_encoded_once_and_again_when_it_or_the_tokenizer_changes(texts, tmp_path):
    def corpus(split="train", **knobs):
        cfg = DataConfig(text=str(texts), val_fraction=0.1, **knobs)
        vocab_size = 50_304 if cfg.tokenizer == "gpt2" else 256
        return open_corpus(cfg, split, vocab_size, tmp_path / "run")

    first = corpus()
    written = Path(first.shards[0].path).stat().st_mtime_ns
    assert corpus() == first and Path(first.shards[0].path).stat().st_mtime_ns == written
    assert corpus(tokenizer="gpt2").fingerprint != first.fingerprint
    assert corpus() == first
    (texts / "abc.py").write_text("changed = True\n")
    assert corpus().fingerprint != first.fingerprint
    assert corpus("val").tokens / (corpus().tokens + corpus("val").tokens) < 0.12


def test_the_default_text_is_pythons_own_source_without_its_tests():
    names = [name for _, name in list_files("", exclude="unused")]
    assert {"argparse.py", "json/decoder.py"} <= set(names)
    parts = {part for name in names for part in name.split("/")[:-1]}
    assert not parts & {"site-packages", "test", "tests", "idle_test", "__pycache__"}
    assert names == sorted(names) and all(name.endswith(".py") for name in names)


def test_a_run_inside_its_text_does_not_train_on_its_own_output(texts):
    cfg = DataConfig(text=str(texts))
    first = open_corpus(cfg, "train", 256, texts / "runs" / "a")
    assert open_corpus(cfg, "train", 256, texts / "runs" / "a") == first


def test_shards_that_meta_lists_must_be_there_and_be_the_same(texts, tmp_path):
    run(texts, tmp_path / "out", shard_tokens=100_000)
    path = tmp_path / "out" / "text_train_000001.bin"
    content = bytearray(path.read_bytes())
    content[2_000] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"000001\.bin: expected fingerprint .*; found"):
        opened(tmp_path / "out")
    last = sorted((tmp_path / "out").glob("*.bin"))[-1]
    last.unlink()
    with pytest.raises(ValueError, match=rf"{last.name}: expected .*; found no such file"):
        opened(tmp_path / "out")


def test_the_command_encodes_refuses_to_overwrite_and_explains_itself(texts, tmp_path, capsys):
    command = ["--input", str(texts), "--out", str(tmp_path / "out"), "--tokenizer", "bytes"]
    finished = subprocess.run(
        [sys.executable, "-W", "error", "-m", "jaxtrain.data.encode", *command],
        capture_output=True,
        text=True,
        check=True,
    )
    assert "train: " in finished.stdout and "nothing skipped" in finished.stdout
    before = shards_of(tmp_path / "out")
    with pytest.raises(SystemExit, match="--overwrite"):
        main(command)
    main([*command, "--overwrite", "--workers", "1", "--name", "other"])
    after = shards_of(tmp_path / "out")
    assert list(before.values()) == list(after.values()) and not before.keys() & after.keys()
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    assert stop.value.code == 0 and "--val_fraction" in capsys.readouterr().out
