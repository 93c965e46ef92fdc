"""Evaluation tasks: their files, and their examples as tokens."""

import json

import numpy as np
import pytest

from jaxtrain.config.run_sections import EvalConfig
from jaxtrain.config.task_list import TaskSource, parse_tasks
from jaxtrain.config.train_config import DataConfig
from jaxtrain.data.tasks.examples import Example, read_examples
from jaxtrain.data.tasks.open_tasks import fingerprint_tasks, open_tasks
from jaxtrain.data.tasks.tokens import cut_pieces, encode_pair, read_llmc
from jaxtrain.data.tokenizer import build_tokenizer

HELLASWAG = {
    "ctx_a": "A man sits  on a roof.",
    "ctx_b": "he",
    "ctx": "A man sits  on a roof. he",
    "activity_label": "Roof shingle removal",
    "endings": ["starts [substeps] up.", "[title] rips tiles."],
    "label": 1,
}
ARC_AI2 = {
    "question": {
        "stem": "Why?",
        "choices": [{"text": "x", "label": "A"}, {"text": "y", "label": "B"}],
    },
    "answerKey": "B",
}
ARC_HF = {
    "question": "Why?",
    "choices": {"text": ["x", "y"], "label": ["A", "B"]},
    "answerKey": "B",
}
CHOICES = {"context": "One, two,", "choices": ["three.", "four."], "label": 0}
LAMBADA = {"text": "She opened the old door"}
LINES = {
    "hellaswag": HELLASWAG,
    "arc": ARC_AI2,
    "choices": CHOICES,
    "last_word": LAMBADA,
}


@pytest.fixture
def write(tmp_path):
    """A function (records, name) -> path of a file with a JSON object in each line."""

    def write_lines(records, name="task.jsonl"):
        path = tmp_path / name
        path.write_text("".join(f"{json.dumps(record)}\n" for record in records))
        return path

    return write_lines


def write_llmc(path, examples):
    """Writes (label, context, completions) in the format of llm.c's write_evalfile."""
    stream = []
    for i, (label, context, completions) in enumerate(examples):
        own = [65_535, 0, i, label, len(completions), len(context), *context]
        for completion in completions:
            own += [len(completion), *completion]
        own[1] = 2 * len(own)
        stream += own
    header = np.zeros(256, "<i4")
    header[:3] = 20240522, 1, len(examples)
    path.write_bytes(header.tobytes() + np.array(stream, "<u2").tobytes())
    return path


def open_one(tasks, tmp_path, tokenizer="bytes", V=50_304, **values):
    cfg = EvalConfig(tasks=tasks, **values)
    return open_tasks(cfg, DataConfig(tokenizer="bytes"), tokenizer, V, tmp_path)


def test_hellaswag_is_put_together_as_lm_eval_does(write):
    [example] = read_examples("hellaswag", write([HELLASWAG]))
    context = "Roof shingle removal: A man sits on a roof. He"
    assert example == Example(context, (" starts  up.".replace("  ", " "), "  rips tiles."), 1)


def test_both_published_forms_of_arc_give_the_same_example(write):
    examples = read_examples("arc", write([ARC_AI2, ARC_HF]))
    assert examples == [Example("Question: Why?\nAnswer:", (" x", " y"), 1)] * 2


def test_the_last_word_is_scored_with_the_space_before_it(write):
    [example] = read_examples("last_word", write([LAMBADA]))
    assert example == Example("She opened the old", (" door",), 0)


@pytest.mark.parametrize(
    ("kind", "change", "field"),
    [
        ("hellaswag", {"label": 2}, "label"),
        ("hellaswag", {"label": ""}, "label"),
        ("hellaswag", {"label": True}, "label"),
        ("hellaswag", {"endings": ["one"]}, "endings"),
        ("hellaswag", {"endings": ["one", ""]}, "endings"),
        ("hellaswag", {"ctx_a": 3}, "ctx_a"),
        ("arc", {"answerKey": "C"}, "answerKey"),
        ("arc", {"question": "Why?"}, "choices"),
        ("arc", {"question": {"stem": "Why?"}}, "question.choices"),
        ("arc", {"question": {"choices": ARC_AI2["question"]["choices"]}}, "question.stem"),
        ("choices", {"context": None}, "context"),
        ("last_word", {"text": "word"}, "text"),
    ],
)
def test_a_malformed_line_is_named_with_its_field(write, kind, change, field):
    path = write([LINES[kind], LINES[kind] | change])
    with pytest.raises(ValueError, match=f"task.jsonl, line 2, .*'{field}'"):
        read_examples(kind, path)


def test_a_line_that_is_not_json_is_named(tmp_path):
    path = tmp_path / "task.jsonl"
    path.write_text(f'\n{json.dumps(LAMBADA)}\n{{"text": "a b\n')
    with pytest.raises(ValueError, match="line 3, .*JSON object: .*character"):
        read_examples("last_word", path)


@pytest.mark.parametrize("kind", LINES)
def test_the_kind_of_a_file_is_detected_from_its_fields(write, tmp_path, kind):
    [task] = open_one(f"a={write([LINES[kind]])}", tmp_path, start_token=False)
    assert (task.kind, len(task.examples)) == (kind, 1)
    spelled = task.examples[0]
    [example] = read_examples(kind, write([LINES[kind]]))
    text = lambda ids: bytes(ids.astype(np.uint8)).decode()
    assert text(spelled.context) == example.context
    assert tuple(map(text, spelled.choices)) == example.choices


def test_the_start_token_precedes_a_context_if_it_is_wanted_or_there_is_none(write, tmp_path):
    path = write([CHOICES, CHOICES | {"context": ""}])
    assert EvalConfig().start_token  # as lm_eval does for the exported tokenizer
    for wanted in (False, True):
        [task] = open_one(f"a={path}", tmp_path, start_token=wanted)
        first, second = (example.context.tolist() for example in task.examples)
        assert first == [0] * wanted + list(b"One, two,") and second == [0]


def test_sizes_are_bytes_without_the_space_and_answer_bytes_are_with_it(write, tmp_path):
    [task] = open_one(f"a={write([CHOICES | {'choices': ['é', 'abc']}])}", tmp_path)
    assert task.examples[0].sizes == (2, 3)
    assert task.examples[0].answer_bytes == 3


def test_a_limit_takes_examples_spread_over_the_file(write, tmp_path):
    lines = [{"text": f"word {i}"} for i in range(10)]
    [task] = open_one(f"a={write(lines)}", tmp_path, examples=4)
    assert [bytes(e.choices[0].astype(np.uint8)) for e in task.examples] == [
        b" 0",
        b" 2",
        b" 5",
        b" 7",
    ]
    assert task.total == 10 and "4 of 10 examples" in task.describe(32)


def test_the_fingerprint_is_that_of_the_examples(write, tmp_path):
    prints = [
        fingerprint_tasks(open_one(f"a={write([line])}", tmp_path))
        for line in (CHOICES, CHOICES, CHOICES | {"label": 1})
    ]
    assert prints[0] == prints[1] != prints[2]


def test_a_text_file_is_a_held_out_set_of_all_its_text(tmp_path, shard_cache):
    (tmp_path / "wiki.txt").write_text("Some held-out text.\n")
    [task] = open_one(f"wiki={tmp_path / 'wiki.txt'}", tmp_path, V=256)
    assert task.kind == "heldout" and task.corpus.tokens == 1 + len("Some held-out text.\n")


@pytest.mark.parametrize(
    ("tasks", "message"),
    [
        ("hellaswag", "NAME=PATH"),
        ("a=x a=y", "each task once, not a "),
        ("a=arcade:x", "kind among hellaswag.*not 'arcade'"),
        ("a='x", "balanced quotes"),
    ],
)
def test_a_malformed_list_of_tasks_is_refused_with_the_flag(tasks, message):
    with pytest.raises(ValueError, match=f"{message}.*--eval.tasks"):
        EvalConfig(tasks=tasks)


def test_paths_with_spaces_are_quoted():
    assert parse_tasks("a=arc:'x y.jsonl' b=z") == [
        TaskSource("a", "arc", "x y.jsonl"),
        TaskSource("b", "", "z"),
    ]


@pytest.mark.parametrize(
    ("entry", "tokenizer", "message"),
    [
        ("a=missing.jsonl", "bytes", "does not exist"),
        ("a={}", None, "needs the run's tokenizer"),
        ("a=arc:{}", "bytes", "line 1, as arc: field 'question'"),
    ],
)
def test_tasks_that_cannot_be_used_are_refused(write, tmp_path, entry, tokenizer, message):
    with pytest.raises(ValueError, match=message):
        open_one(entry.format(write([LAMBADA])), tmp_path, tokenizer)


LLMC = [(1, [5, 6], [[7], [8, 9]]), (0, [50_256], [[1, 2, 3], [4]])]


def test_a_file_of_llmc_is_read_and_normalises_by_tokens(tmp_path):
    path = write_llmc(tmp_path / "hellaswag_val.bin", LLMC)
    [task] = open_one(f"a={path}", tmp_path, tokenizer=None, start_token=False)
    assert task.kind == "llmc"
    for example, (label, context, completions) in zip(task.examples, LLMC, strict=True):
        assert example.answer == label and example.context.tolist() == context
        assert [choice.tolist() for choice in example.choices] == completions
        assert example.sizes == tuple(map(len, completions)) and example.answer_bytes == 0
    with pytest.raises(ValueError, match="below model.V=1000; got 50256"):
        open_one(f"a={path}", tmp_path, tokenizer=None, V=1000, start_token=False)
    with pytest.raises(ValueError, match="must be gpt2; got bytes"):
        open_one(f"a={path}", tmp_path)


@pytest.mark.parametrize(("cut", "example"), [(2, 1), (9, 1), (16, 1), (20, 1), (28, 0)])
def test_a_file_of_llmc_that_is_cut_off_is_refused(tmp_path, cut, example):
    path = write_llmc(tmp_path / "a.bin", LLMC)
    path.write_bytes(path.read_bytes()[:-cut])
    with pytest.raises(ValueError, match=f"example {example}, .*the file ends before it"):
        read_llmc(path)


def test_spaces_at_the_end_of_a_context_belong_to_the_continuation():
    tokenizer = build_tokenizer("gpt2")
    parts = [encode_pair(tokenizer, *pair) for pair in (("The cat ", "sat"), ("The cat", " sat"))]
    for (context, text), same in zip(parts, parts[::-1], strict=True):
        assert context.tolist() == same[0].tolist() and text.tolist() == same[1].tolist()
    assert tokenizer.decode(parts[0][1]) == " sat"


@pytest.mark.parametrize("context", [1, 3, 7, 8, 20])
@pytest.mark.parametrize("choice", [1, 2, 7, 8, 9, 30])
def test_each_token_of_a_choice_is_scored_once_with_the_longest_context(context, choice):
    T, ids = 8, np.arange(context + choice)
    pieces = list(cut_pieces(ids[:context], ids[context:], T))
    scored = np.concatenate([piece.tokens[-piece.scored :] for piece in pieces[::-1]])
    assert scored.tolist() == ids[context:].tolist()
    assert all(len(piece.tokens) <= T + 1 for piece in pieces)
    if choice <= T:  # as lm_eval: the last T + 1 tokens of both
        [piece] = pieces
        assert piece.tokens.tolist() == ids[-(T + 1) :].tolist()
