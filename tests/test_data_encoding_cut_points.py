"""The pieces in which a long text is encoded are invisible in its tokens."""

import gzip
import json
import random
from dataclasses import replace

import numpy as np
import pytest
import tokenizers
from data_samples import encode_source
from tokenizers import models, normalizers, pre_tokenizers, trainers

from jaxtrain.data.encoding.documents import encode_pieces
from jaxtrain.data.encoding.options import EncodeOptions
from jaxtrain.data.encoding.work_units import Piece
from jaxtrain.data.tokenizer import build_tokenizer

pytestmark = pytest.mark.usefixtures("shard_cache")
PIECE_BYTES = 2_000
LLAMA_3 = (  # a word after one other character, at most 3 digits, newlines after punctuation
    r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def draw_text(parts, size=8_000, longest=6, seed=0):
    """Joins random parts, each repeated up to `longest` times."""
    draw, text, last = random.Random(seed), "", ""
    while len(text) < size:
        part = draw.choice(parts)
        if longest > 1 or part != last:
            text, last = text + part * draw.choice((1, 1, 1, 2, longest)[:longest]), part
    return text


WORDS = "the token of a text lines word ing er running, don't (end). 12 3456789 \n  \t".split(" ")
IDEOGRAPHS = [*"的一是不了人我在有他这中大来上国", "。", "我在", "一是不"]
TEXTS = {
    "words": draw_text([*(w + " " for w in WORDS), *WORDS]),
    "spaces": draw_text(["a ", " b", "  ", "\n", "\n\n ", ".\n", "\r\n", "\t", "x"], longest=70),
    "no spaces": draw_text(IDEOGRAPHS),
    "no repetitions": draw_text([*IDEOGRAPHS, "the ", "text", "e\u0301", "<tool>"], longest=1),
    "combining": draw_text(["e\u0301", "a\u0300\u0323", "ﬁ", "한", "\u1112\u1161\u11ab", " ", "o"]),
    "added tokens": draw_text(["<tool>", "  ", "<t", "ool>", "end.", "\n", "<tools>", " x "]),
    "runs": draw_text(["=" * 1_500, "7" * 1_400, " " * 2_000, "\n" * 1_500, "words of a text. "]),
}
NORMALIZERS = {
    "bert": normalizers.BertNormalizer(),
    "prepend": normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]),
    "nfkc": normalizers.NFKC(),
    "nfc strip lowercase": normalizers.Sequence(
        [normalizers.NFC(), normalizers.Strip(), normalizers.Lowercase()]
    ),
}
SPLITTERS = {
    "bytes": pre_tokenizers.ByteLevel(add_prefix_space=False),
    "prefix": pre_tokenizers.ByteLevel(add_prefix_space=True),
    "llama 3": pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(tokenizers.Regex(LLAMA_3), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    ),
    "words": pre_tokenizers.BertPreTokenizer(),
    **{
        scheme: pre_tokenizers.Metaspace(prepend_scheme=scheme)
        for scheme in ("first", "always", "never")
    },
    "one word": pre_tokenizers.Metaspace(prepend_scheme="first", split=False),
}
TRAINERS = {
    "BPE": trainers.BpeTrainer,
    "Unigram": trainers.UnigramTrainer,
    "WordPiece": trainers.WordPieceTrainer,
}
# (model, normalizer, pre-tokenizer, whether <tool> is an added token that drops space around it)
FAMILIES = {
    "byte-level BPE": ("BPE", None, "bytes", False),
    "byte-level BPE with a prefix": ("BPE", None, "prefix", True),
    "Llama 3": ("BPE", None, "llama 3", True),
    "Llama 2": ("BPE", "prepend", None, True),
    "Metaspace, first": ("BPE", None, "first", True),
    "Metaspace, always": ("BPE", None, "always", True),
    "Metaspace, never": ("BPE", "nfkc", "never", False),
    "Metaspace, not split": ("BPE", "nfc strip lowercase", "one word", False),
    "Unigram": ("Unigram", "nfkc", "always", True),
    "Unigram, not split": ("Unigram", None, "one word", False),
    "WordPiece": ("WordPiece", "bert", "words", False),
}


@pytest.fixture(scope="module")
def family_files(tmp_path_factory):
    """Trains each family once."""
    folder, corpus = tmp_path_factory.mktemp("tokenizers"), [t[:4_000] for t in TEXTS.values()]
    files = {}
    for family, (kind, normalizer, splitter, with_added) in FAMILIES.items():
        unknown = {"unk_token": "<unk>"} if kind != "Unigram" else {}
        tokenizer = tokenizers.Tokenizer(getattr(models, kind)(**unknown))
        if normalizer:
            tokenizer.normalizer = NORMALIZERS[normalizer]
        if splitter:
            tokenizer.pre_tokenizer = SPLITTERS[splitter]
        options = {"vocab_size": 600, "special_tokens": ["<unk>", "<s>"], "show_progress": False}
        if kind == "Unigram":
            options |= {"unk_token": "<unk>", "max_piece_length": 8}
        elif kind == "BPE":
            options["max_token_length"] = 12
        tokenizer.train_from_iterator(corpus, TRAINERS[kind](**options))
        if with_added:
            tokenizer.add_tokens([tokenizers.AddedToken("<tool>", lstrip=True, rstrip=True)])
        files[family] = str(folder / f"{len(files)}.json")
        tokenizer.save(files[family])
    return files


def encoded_tokens(folder):
    [shard] = folder.glob("*_train_*.bin")
    return np.fromfile(shard, "<u2", offset=1024).tolist()


def check_pieces(name, text, folder, kinds=("txt", "txt.gz", "jsonl")):
    """Encodes a text in pieces, in several kinds of files, and compares with one call."""
    tokenizer = build_tokenizer(name)
    expected = [tokenizer.eot, *tokenizer.encode(text).tolist()]
    content = text.encode()
    contents = {
        "txt": content,
        "txt.gz": gzip.compress(content, mtime=0),
        "jsonl": json.dumps({"text": text}).encode(),
    }
    for kind in kinds:
        source, out = folder / f"a.{kind}", folder / f"out.{kind}"
        source.write_bytes(contents[kind])
        encode_source(source, out, name, val_fraction=0.0, piece_bytes=PIECE_BYTES)
        got = encoded_tokens(out)
        differ = next((i for i, (a, b) in enumerate(zip(got, expected)) if a != b), None)  # noqa: B905
        assert (len(got), differ) == (len(expected), None), kind


# In a repetition, a Unigram model chooses between equal scores by their rounding, which depends on
# all text before. The vocabulary of WordPiece misses more of "combining" than `encode` allows.
CASES = [
    (family, text)
    for family in FAMILIES
    for text in (("no repetitions",) if "Unigram" in family else TEXTS)
    if (family, text) != ("WordPiece", "combining")
]


@pytest.mark.parametrize(("family", "text"), CASES)
def test_pieces_do_not_change_the_tokens_of_a_text(text, family, family_files, tmp_path, caplog):
    # The reader of each kind of file cuts texts without knowing the tokenizer.
    kinds = ("txt", "txt.gz", "jsonl") if "byte-level" in family else ("txt",)
    kinds = kinds if text == "no repetitions" else ("txt",)
    check_pieces(family_files[family], TEXTS[text], tmp_path, kinds)
    assert text in ("runs", "spaces") or not caplog.messages  # no piece became longer


@pytest.mark.parametrize("text", TEXTS)
def test_pieces_do_not_change_the_tokens_of_gpt2(text, tmp_path):
    check_pieces("gpt2", TEXTS[text].replace(".\n", "。\n"), tmp_path, ("txt",))


@pytest.mark.parametrize("family", ["byte-level BPE", "Metaspace, first"])
def test_a_text_that_cannot_be_cut_is_encoded_in_longer_pieces_and_reported(
    family, family_files, tmp_path, caplog
):
    text = "start " + "=" * 12 * PIECE_BYTES + " end"
    (tmp_path / "a.txt").write_text(text)
    options = {"val_fraction": 0.0, "piece_bytes": PIECE_BYTES}
    meta = encode_source(tmp_path / "a.txt", tmp_path / "out", family_files[family], **options)
    assert not meta["skipped"]
    longer, unsure = caplog.messages
    assert "a.txt: the text has too few places to cut it" in longer
    assert "longer than 4000 bytes, the first from byte 0 on" in longer
    assert "a.txt: the text is cut at " in unsure and "may differ from those of the whole" in unsure


def test_a_piece_whose_border_a_token_spans_is_encoded_without_its_context(family_files, caplog):
    """A border that was wrongly thought to be safe loses no text."""
    name = family_files["byte-level BPE"]
    tokenizer, text = build_tokenizer(name), TEXTS["words"][:600]
    ids, spans = tokenizer.encode_with_spans(text)
    long = [first for first, end in map(spans, range(len(ids))) if end - first > 2]
    start, stop = long[20] + 1, long[50] + 1
    piece = Piece("x", "x", start, stop, content=text.encode(), before=start, after=600 - stop)
    encoded = encode_pieces([replace(piece, first=False)], tokenizer, EncodeOptions(name))
    assert encoded.tokens["train"].tolist() == tokenizer.encode(text[start:stop]).tolist()
    assert encoded.sizes["train"] == [(len(encoded.tokens["train"]), stop - start)]
    assert [message.split(";")[0] for message in caplog.messages] == [
        f"x, text {start}: the tokens at byte {place} depend on text further away"
        for place in (start, stop)
    ]
