"""The command `jaxtrain encode`: messages, names, locales, and the printed training command."""

import importlib
import os
import re
import shlex
import subprocess
import sys

import pytest
from data_samples import contents

import jaxtrain.config.train_config as config_lib
import runs
from jaxtrain.data.corpus import open_corpus
from jaxtrain.data.encode import main
from jaxtrain.data.sequences import WindowSequences

pytestmark = pytest.mark.usefixtures("shard_cache", "in_tmp_path")


@pytest.fixture
def in_tmp_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def encode_command(source, out, *flags):
    return [f"--input={source}", f"--out={out}", "--tokenizer=bytes", "--workers=1", *flags]


def write_lines(path, count, text="a document of some words\\n"):
    path.write_text("".join(f'{{"text": "{i} {text}"}}\n' for i in range(count)))
    return path


WRONG = {
    "no input": (["--input=nosuch.txt"], "--input must be .*'nosuch.txt', which does not exist in"),
    "no tokenizer": (
        ["--tokenizer=nosuch"],
        "^error: --tokenizer must be .*'nosuch'.* Set --tokenizer",
    ),
    "no key": (["--text_field=content"], "rows.jsonl, line 1, byte 0: .*Set --text_field"),
    "no folder": (["--out=/dev/null/shards"], "^error: /dev/null/shards: Not a directory"),
    "a file as folder": (["--out=rows.jsonl"], "^error: rows.jsonl: File exists"),
    "too little": (["--input=one.jsonl"], "--input"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_each_error_names_the_flags_of_this_command(kind, tmp_path):
    write_lines(tmp_path / "rows.jsonl", 20)
    write_lines(tmp_path / "one.jsonl", 1).write_text('{"text": "a"}')
    flags, message = WRONG[kind]
    with pytest.raises(SystemExit) as stop:
        main(encode_command("rows.jsonl", "shards", *flags))
    error = str(stop.value.code)
    assert re.search(message, error.replace("\n", " ")), error
    assert "config" not in error and "data.t" not in error


@pytest.mark.parametrize("tokenizer", ["bytes", "gpt2"])
@pytest.mark.parametrize("count", [2, 9, 2_000])
def test_the_printed_command_trains_on_the_shards(tokenizer, count, tmp_path, capsys):
    write_lines(tmp_path / "some rows.jsonl", count)
    main(encode_command("some rows.jsonl", "my shards", f"--tokenizer={tokenizer}"))
    printed = capsys.readouterr().out
    [line] = [line for line in printed.splitlines() if " train quickstart " in line]
    words = shlex.split(line)
    flags = words[words.index("quickstart") + 1 :]
    config = importlib.import_module("configs.quickstart").get_config()
    for flag in flags:
        name, _, value = flag.removeprefix("--").partition("=")
        old = config_lib.flatten(config_lib.freeze(config))[name]
        config.update_from_flattened_dict({name: type(old)(value)})
    cfg = config_lib.freeze(config)
    for split in ("train", "val"):
        corpus = open_corpus(cfg.data, split, cfg.model.V, tmp_path / "run")
        assert corpus.tokenizer_name == tokenizer and corpus.tokens > 1
        if split == "train":
            assert len(WindowSequences(corpus, cfg.data.seq_len)) >= cfg.data.batch


def test_the_summary_counts_the_documents_of_each_split_and_lists_what_was_skipped(
    tmp_path, capsys
):
    path = write_lines(tmp_path / "rows.jsonl", 60)
    path.write_text(path.read_text() + "bad\n")
    main(encode_command("rows.jsonl", "shards"))
    printed = capsys.readouterr().out
    assert "train: 58 document(s), " in printed and "val: 2 document(s), " in printed
    assert "skipped 1 not JSON" in printed and "rows.jsonl, line 61, byte " in printed


def test_the_summary_without_held_out_text_says_that_training_needs_some(tmp_path, capsys):
    write_lines(tmp_path / "rows.jsonl", 60)
    main(encode_command("rows.jsonl", "shards", "--val_fraction=0"))
    printed = capsys.readouterr().out
    assert "training needs a held-out shard" in printed and "quickstart" not in printed


def test_names_with_spaces_and_unicode_give_the_same_shards_in_an_ascii_locale(tmp_path, capsys):
    folder, out = tmp_path / "über alles 文", tmp_path / "ö"
    folder.mkdir()
    for i in range(40):
        write_lines(folder / f"é {i}.jsonl", 5)
        (folder / f"文 {i}.txt").write_text(f"some text {i}\n" * 9)
    main(encode_command(folder, out))
    assert "nothing skipped" in capsys.readouterr().out
    before = contents(out)
    argv = [sys.executable, "-W", "error", "-m", "jaxtrain.data.encode"]
    argv += [*encode_command(folder, out), "--overwrite"]
    env = {k: v for k, v in os.environ.items() if k != "LANG"} | runs.ASCII
    done = subprocess.run(argv, capture_output=True, env=env, cwd=runs.ROOT)
    assert done.returncode == 0, done.stderr.decode()
    assert b"nothing skipped" in done.stdout
    assert contents(out) == before
    assert set(before) == {
        "ber_alles_train_000000.bin",
        "ber_alles_val_000000.bin",
        "meta.json",
    }


def test_the_shards_of_an_earlier_encoding_are_only_replaced_with_overwrite(tmp_path):
    write_lines(tmp_path / "rows.jsonl", 60)
    main(encode_command("rows.jsonl", "shards"))
    before = contents(tmp_path / "shards", "*.bin")
    with pytest.raises(SystemExit, match="--overwrite"):
        main(encode_command("rows.jsonl", "shards"))
    main(encode_command("rows.jsonl", "shards", "--overwrite", "--name=other"))
    after = contents(tmp_path / "shards", "*.bin")
    assert list(before.values()) == list(after.values()) and not before.keys() & after.keys()
    (tmp_path / "shards" / "foreign.bin").write_bytes(b"")
    with pytest.raises(SystemExit, match="foreign.bin"):
        main(encode_command("rows.jsonl", "shards", "--overwrite"))


def test_help_starts_with_three_examples_and_contains_no_path_of_this_machine(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    shown = capsys.readouterr().out
    assert stop.value.code == 0
    examples = [line.strip() for line in shown.splitlines()[1:4]]
    assert all(line.startswith("python -m jaxtrain.data.encode ") for line in examples)
    assert os.path.dirname(sys.executable) not in shown
    for word in ("parquet", "zstd", "--on_bad_document", "kill -9", "Memory"):
        assert word in shown
