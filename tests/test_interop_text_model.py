"""A run's model as a function of texts, against transformers with the exported weights."""

import jax
import numpy as np
import pytest

from jaxtrain.config.train_config import DataConfig, ModelConfig, TrainConfig
from jaxtrain.data.tokenizer import build_tokenizer
from jaxtrain.interop.hf import write_folder
from jaxtrain.interop.text_model import TextModel
from jaxtrain.model.trees import named_leaves
from jaxtrain.training.run import build_run
from jaxtrain.training.step import TrainState

REASON = "transformers is missing: install the crosscheck extra to compare with it"
T = 64
PAIRS = [
    ("The cat", " sat on the mat"),
    ("", "no context"),
    ("spaces at the end  ", "belong to the continuation"),
    ("é", " ü"),
    ("a long context " * 9, "that is cut"),
]
TEXTS = ["short", "x" * T, "one more than the context, and then some " * 4]


@pytest.fixture(scope="module")
def run():
    sizes = {"L": 2, "D": 32, "H": 4, "G": 2, "K": 8, "F": 48, "V": 256, "dtype": "float32"}
    data = DataConfig(batch=4, seq_len=T)
    return build_run(TrainConfig(model=ModelConfig(**sizes), data=data), jax.devices()[:1])


@pytest.fixture(scope="module")
def params(run):
    """Weights that are large enough for no two next tokens to be about as likely."""
    return jax.tree.map(lambda w: 3 * w, jax.jit(run.model.init)(jax.random.key(0)))


@pytest.fixture(scope="module")
def model(run, params):
    return TextModel(run, TrainState(0, params, (), 0, 0), build_tokenizer("bytes"), True)


@pytest.fixture(scope="module")
def theirs(run, params, tmp_path_factory):
    """Returns transformers' logits [T,V] of tokens [T], computed from the exported weights."""
    torch = pytest.importorskip("torch", reason=REASON)
    transformers = pytest.importorskip("transformers", reason=REASON)
    folder = tmp_path_factory.mktemp("export") / "hf"
    write_folder(folder, run.cfg.model, named_leaves(run.model.axes), named_leaves(params))
    loaded = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    def logits(tokens):
        with torch.no_grad():
            return loaded(torch.tensor([list(tokens)])).logits[0].numpy().astype(np.float64)

    return logits


def score(logits, tokens, scored):
    """Returns the log-likelihood of the last `scored` tokens, and whether they are greedy."""
    rows = logits(tokens[:-1])[-scored:]
    log_p = rows - np.log(np.exp(rows).sum(-1, keepdims=True))
    targets = np.array(tokens[-scored:])
    return log_p[np.arange(scored), targets].sum(), bool((rows.argmax(-1) == targets).all())


def test_likelihoods_are_those_of_transformers_on_the_exported_weights(model, theirs):
    greedy = model.generate("The cat", max_tokens=3)
    found = model.log_likelihoods([*PAIRS, ("The cat", greedy)])
    for (context, text), (nats, is_greedy) in zip(
        [*PAIRS, ("The cat", greedy)], found, strict=True
    ):
        spaces = context[len(context.rstrip()) :]
        tokens = [0, *(context + text).encode()][-T - 1 :]
        expected = score(theirs, tokens, len((spaces + text).encode()))
        assert nats == pytest.approx(expected[0], abs=1e-4)
        assert is_greedy == expected[1]
    assert found[-1][1] and not found[0][1]


def test_rolling_likelihoods_are_those_of_transformers_in_the_same_windows(model, theirs):
    found = model.rolling_log_likelihoods(TEXTS)
    for text, nats in zip(TEXTS, found, strict=True):
        tokens, expected = [0, *text.encode()], 0.0
        for start in range(0, len(text), T):  # targets start + 1 to end
            end = min(start + T, len(text))
            expected += score(theirs, tokens[max(0, end - T) : end + 1], end - start)[0]
        assert nats == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("context", ["The cat", "", "a long context " * 9])
def test_greedy_continuations_are_those_of_transformers(model, theirs, context):
    tokens = [0, *context.encode()][-(T - 5) :]
    for _ in range(5):
        tokens.append(int(theirs(tokens)[-1].argmax()))
    expected = bytes(tokens[-5:]).decode(errors="replace")
    assert model.generate(context, max_tokens=5) == expected.partition("\0")[0]


def test_a_continuation_ends_before_the_first_stop(model):
    whole = model.generate("The cat", max_tokens=12)
    stop = whole[5:7]
    assert model.generate("The cat", [stop, "never"], 12) == whole[: whole.index(stop)]


@pytest.mark.filterwarnings("default")  # of lm_eval's dependencies
def test_lm_eval_runs_on_a_task_of_our_own(model, tmp_path):
    pytest.importorskip("lm_eval", reason="lm_eval is missing: install the eval extra")
    from jaxtrain.interop.lm_eval_model import run_lm_eval

    lines = (
        '{"q": "One, two,", "c": ["three", "dog"], "a": 0}\n{"q": "A", "c": ["B", "é"], "a": 1}\n'
    )
    (tmp_path / "data.jsonl").write_text(lines)
    (tmp_path / "own.yaml").write_text(
        f"""
task: own
dataset_path: json
dataset_kwargs: {{data_files: {{test: {tmp_path}/data.jsonl}}}}
test_split: test
output_type: multiple_choice
doc_to_text: q
doc_to_choice: c
doc_to_target: a
metric_list: [{{metric: acc}}, {{metric: acc_bytes}}]
"""
    )
    table, results = run_lm_eval(model, [str(tmp_path / "own.yaml")])
    nats = lambda context, texts: [
        -model.log_likelihoods([(context, f" {t}")])[0][0] for t in texts
    ]
    first, second = nats("One, two,", ["three", "dog"]), nats("A", ["B", "é"])
    right = [first[0] < first[1], second[1] < second[0]]
    assert results["own"]["acc,none"] == np.mean(right)
    right = [first[0] / 5 < first[1] / 3, second[1] / 2 < second[0]]
    assert results["own"]["acc_bytes,none"] == np.mean(right)
    assert "own" in table


@pytest.mark.parametrize("known", [True, False])
def test_a_task_file_that_names_a_task_of_lm_eval_is_read_with_its_list(
    known, model, tmp_path, monkeypatch
):
    """The list takes 19 s to read, so it is read only if the file alone is not enough."""
    from jaxtrain.interop import lm_eval_model

    path, asked = tmp_path / "own.yaml", []
    path.write_text("include: arc_easy")

    def evaluate(wrapped, tasks, limit, know_own_tasks):
        asked.append(know_own_tasks)
        if not (know_own_tasks and known):
            raise KeyError("arc_easy")
        return "table", {}

    monkeypatch.setattr(lm_eval_model, "wrap_for_lm_eval", lambda model: model)
    monkeypatch.setattr(lm_eval_model, "_evaluate", evaluate)
    run = lambda tasks: lm_eval_model.run_lm_eval(model, tasks)
    if known:
        assert run([str(path)]) == ("table", {}) and asked == [False, True]
        assert run([str(path), "arc_easy"]) == ("table", {}) and asked == [False, True, True]
    else:
        with pytest.raises(ValueError, match="must name tasks that lm_eval knows; got .*arc_easy"):
            run([str(path)])
