import json

import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from jaxtrain.data.tokenizer import build_tokenizer
from jaxtrain.interop import InteropError
from jaxtrain.interop.hf_tokenizer import (
    SpecialTokens,
    build_tokenizer_json,
    declared_tokens,
    special_tokens,
    write_generation_config,
    write_tokenizer,
)

TEXTS = [
    "def main():\n    return 1\n",
    "a  b\t\tc\n\n\n",
    "Größe 東京 👩‍👩‍👧",
    "Ā\x01\x7f",
    "'s 1234 ~",
]


def bpe(path, specials=("<|endoftext|>",), processor=None, **options):
    """Writes a small byte-pair tokenizer.json, trained on TEXTS; returns its path."""
    built = tokenizers.Tokenizer(models.BPE())
    built.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    built.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=list(specials), initial_alphabet=alphabet
    )
    built.train_from_iterator(TEXTS * 4, trainer)
    if processor:
        built.post_processor = processor
    if "truncation" in options:
        built.enable_truncation(options["truncation"])
    if "padding" in options:
        built.enable_padding(length=options["padding"], pad_token=specials[0])
    path.parent.mkdir(parents=True, exist_ok=True)
    built.save(str(path))
    return str(path)


def written(folder, name, **options):
    """Writes a run's tokenizer files; returns (the run's tokenizer, the folder)."""
    ours = build_tokenizer(name)
    special = special_tokens(ours, **options)
    folder.mkdir()
    write_tokenizer(folder, ours, special, 128)
    return ours, folder


@pytest.fixture(params=["bytes", "gpt2", "bpe"])
def name(request, tmp_path):
    """A value of data.tokenizer."""
    return bpe(tmp_path / "own/tokenizer.json") if request.param == "bpe" else request.param


def test_the_exported_tokenizer_gives_the_ids_of_the_run_after_its_eot(name, tmp_path):
    ours, folder = written(tmp_path / "hf", name)
    theirs = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    for text in TEXTS:
        ids = ours.encode(text).tolist()
        assert theirs.encode(text).ids == [ours.eot, *ids]
        assert theirs.decode(ids) == text


def test_autotokenizer_gives_the_ids_of_the_run_and_names_its_special_tokens(name, tmp_path):
    reason = "transformers is missing: install the crosscheck extra to compare with it"
    transformers = pytest.importorskip("transformers", reason=reason)
    ours, folder = written(tmp_path / "hf", name)
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    for text in TEXTS:
        found = theirs(text)
        assert found.input_ids == [ours.eot, *ours.encode(text)]
        assert set(found) == {"input_ids", "attention_mask"}  # generate takes no token_type_ids
        assert theirs.decode(found.input_ids, skip_special_tokens=True) == text
    assert theirs.bos_token_id == theirs.eos_token_id == theirs.pad_token_id == ours.eot
    assert theirs.model_max_length == 128


def test_our_own_reader_reads_an_exported_byte_tokenizer(tmp_path):
    _, folder = written(tmp_path / "hf", "bytes")
    again = build_tokenizer(str(folder / "tokenizer.json"))
    assert (again.vocab_size, again.eot) == (256, 0)
    text = "".join(map(chr, range(1, 0x250)))
    assert again.encode(text).tolist() == list(text.encode())


@pytest.mark.parametrize("options", [{"truncation": 3}, {"padding": 50}])
def test_an_exported_tokenizer_neither_truncates_nor_pads(tmp_path, options):
    whole = build_tokenizer(bpe(tmp_path / "whole/tokenizer.json"))
    data = build_tokenizer_json(build_tokenizer(bpe(tmp_path / "a/tokenizer.json", **options)))
    theirs = tokenizers.Tokenizer.from_str(json.dumps(data))
    assert theirs.encode(TEXTS[0]).ids == [whole.eot, *whole.encode(TEXTS[0])]


def test_a_processor_that_adds_other_tokens_is_replaced(tmp_path):
    other = processors.TemplateProcessing("$A <end>", special_tokens=[("<end>", 1)])
    name = bpe(tmp_path / "own/tokenizer.json", ("<|endoftext|>", "<end>"), other)
    ours, folder = written(tmp_path / "hf", name)
    theirs = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    assert theirs.encode("a b").ids == [ours.eot, *ours.encode("a b")]


def test_a_processor_that_adds_the_same_start_token_is_unchanged(tmp_path):
    own = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 0)])
    name = bpe(tmp_path / "own/tokenizer.json", ("<s>", "</s>"), own)
    _, folder = written(tmp_path / "hf", name)
    stored = [json.loads((tmp_path / f / "tokenizer.json").read_text()) for f in ("own", "hf")]
    assert stored[0] == stored[1]


def test_a_tokenizer_file_changed_since_training_is_refused(tmp_path):
    name = bpe(tmp_path / "own/tokenizer.json")
    ours = build_tokenizer(name)
    bpe(tmp_path / "own/tokenizer.json", ("<|endoftext|>", "<one>", "<more>"))
    with pytest.raises(
        InteropError, match="must give the ids of the run's tokenizer .*--tokenizer"
    ):
        write_tokenizer(tmp_path, ours, special_tokens(ours), 128)


def test_special_tokens_are_those_of_the_run(tmp_path):
    assert special_tokens(build_tokenizer("bytes")) == SpecialTokens(0, (0,), None)
    assert special_tokens(build_tokenizer("gpt2")) == SpecialTokens(50_256, (50_256,), None)
    own = build_tokenizer(bpe(tmp_path / "a/tokenizer.json", ("<pad>", "<s>", "</s>")))
    assert special_tokens(own) == SpecialTokens(1, (1,), 0)
    assert special_tokens(None) == SpecialTokens()
    assert special_tokens(None, 7) == SpecialTokens(7, (7,))
    assert special_tokens(build_tokenizer("bytes"), 10).eos == (0, 10)


def test_generation_stops_at_the_declared_end_of_text_and_at_eot(tmp_path):
    name = bpe(tmp_path / "own/tokenizer.json", ("<s>", "</s>"))
    (tmp_path / "own/tokenizer_config.json").write_text('{"eos_token": {"content": "</s>"}}')
    ours, folder = written(tmp_path / "hf", name)
    assert special_tokens(ours).fields()["eos_token_id"] == [1, 0]
    config = json.loads((folder / "tokenizer_config.json").read_text())
    assert (config["bos_token"], config["eos_token"]) == ("<s>", "</s>")


def test_ends_of_text_are_taken_from_a_source_folder_with_the_same_tokenizer(tmp_path):
    name = bpe(tmp_path / "run/tokenizer.json", ("<s>", "</s>"))
    for home in ("same", "other"):
        bpe(tmp_path / home / "tokenizer.json", ("<s>", "</s>"))
        (tmp_path / home / "generation_config.json").write_text('{"eos_token_id": 1}')
    bpe(tmp_path / "other/tokenizer.json", ("<s>", "<more>", "</s>"))
    ours = build_tokenizer(name)
    assert special_tokens(ours, -1, [tmp_path / "same"]).eos == (1, 0)
    assert special_tokens(ours, -1, [tmp_path / "other"]).eos == (0,)


def test_declared_tokens_are_read_in_the_order_of_transformers(tmp_path):
    bpe(tmp_path / "tokenizer.json", ("<s>", "</s>", "<pad>"))
    assert declared_tokens(tmp_path) == SpecialTokens()
    named = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": None}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(named))
    assert declared_tokens(tmp_path) == SpecialTokens(0, (1,), None)
    (tmp_path / "config.json").write_text('{"bos_token_id": 5, "eos_token_id": 6}')
    assert declared_tokens(tmp_path) == SpecialTokens(5, (6,), None)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [7, 8], "pad_token_id": 9}')
    assert declared_tokens(tmp_path) == SpecialTokens(5, (7, 8), 9)


@pytest.mark.parametrize("value", [["<s>"], {"id": 1}, {"content": 1}, 1])
def test_a_declared_token_that_is_not_a_text_is_refused_with_its_field(value, tmp_path):
    bpe(tmp_path / "tokenizer.json", ("<s>", "</s>"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": value}))
    with pytest.raises(InteropError, match=r"tokenizer_config.json must name a token in eos_token"):
        declared_tokens(tmp_path)


def test_ids_without_a_token_are_suppressed_in_generation(tmp_path):
    bytes_ = build_tokenizer("bytes")
    path = tmp_path / "generation_config.json"
    write_generation_config(tmp_path, special_tokens(bytes_), bytes_, 260)
    config = json.loads(path.read_text())
    assert config["suppress_tokens"] == [256, 257, 258, 259]
    assert (config["eos_token_id"], config["pad_token_id"]) == (0, 0)
    write_generation_config(tmp_path, special_tokens(bytes_), bytes_, 256)
    assert "suppress_tokens" not in json.loads(path.read_text())
