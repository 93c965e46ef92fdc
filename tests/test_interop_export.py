"""Exports of whole runs: transformers continues a text as `jaxtrain generate` does."""

import dataclasses
import json
import shutil

import jax
import llmc_reference
import numpy as np
import pytest
from safetensors.numpy import load_file
from small_models import MODELS
from test_interop_hf_tokenizer import bpe

from configs import debug
from jaxtrain.config import train_config as config_lib
from jaxtrain.data.tokenizer import build_tokenizer
from jaxtrain.generate import tokenizer_name
from jaxtrain.interop import InteropError
from jaxtrain.interop.hf import write_folder
from jaxtrain.interop.import_export import export_weights, import_weights
from jaxtrain.model.transformer import build_model
from jaxtrain.model.trees import named_leaves
from jaxtrain.ops.routes import choose_routes
from jaxtrain.train import train
from jaxtrain.training.run import build_run, restore_run
from jaxtrain.training.sampling import complete

pytestmark = pytest.mark.long  # every test needs the fixture's runs

PROMPT = "3 plus 4"
TOKENS = 40
FILES = ("", "generation_")  # of config.json


@pytest.fixture(scope="module")
def documents(tmp_path_factory):
    """A JSONL of short documents, whose ends a model learns quickly."""
    path = tmp_path_factory.mktemp("text") / "sums.jsonl"
    lines = [json.dumps({"text": f"{a} plus {b}."}) for a in range(40) for b in range(40)]
    path.write_text("\n".join(lines))
    return path


def train_debug(workdir, text):
    config = debug.get_config()
    config.update(workdir=str(workdir), compile_cache="", steps=80, save_every=80, log_every=20)
    config.data.text = str(text)
    config.sample.tokens = 0
    config.model.update(L=1, V=320)  # 256 tokens and padding
    config.optim.update(name="adamw", adam_learning_rate=0.02)
    assert train(config_lib.freeze(config), jax.devices()[:1], quiet=True) == 0


def make_run(workdir, text, name, tokenizer, V):
    """Creates a run with random weights."""
    cfg = dataclasses.replace(MODELS[name], V=V)
    model = build_model(cfg, choose_routes(cfg, False, "cpu", False))
    rng = np.random.default_rng(1)
    params = {k: 0.3 * rng.normal(size=s.shape) for k, s in named_leaves(model.shapes).items()}
    write_folder(workdir.parent / "random", cfg, named_leaves(model.axes), params)
    import_weights(workdir.parent / "random", workdir, text=str(text), tokenizer=tokenizer)


@pytest.fixture(scope="module")
def made(tmp_path_factory, documents):
    """Returns {kind: (run, its export)}."""
    roots = {k: tmp_path_factory.mktemp(k) for k in ("bytes", "bfloat16", "gpt2", "bpe")}
    own = bpe(roots["bpe"] / "own/tokenizer.json", ("<pad>", "<s>", "</s>"))
    train_debug(roots["bytes"] / "run", documents)
    shutil.copytree(roots["bytes"] / "run", roots["bfloat16"] / "run")
    stored = roots["bfloat16"] / "run/config.json"
    stored.write_text(stored.read_text().replace('"dtype": "float32"', '"dtype": "bfloat16"', 1))
    make_run(roots["gpt2"] / "run", documents, "gpt2", "gpt2", 50_304)
    make_run(roots["bpe"] / "run", documents, "llama", own, 320)
    for root in roots.values():
        export_weights(root / "run", root / "hf")
    return {kind: (root / "run", root / "hf") for kind, root in roots.items()}


def ours(workdir, dtype=None):
    """Returns how `jaxtrain generate --temperature=0` continues PROMPT."""
    run, state = restore_run(workdir)
    if dtype:
        model = dataclasses.replace(run.cfg.model, dtype=dtype)
        run = build_run(dataclasses.replace(run.cfg, model=model), run.mesh.devices.flat)
    tokenizer = build_tokenizer(tokenizer_name(workdir))
    ids = tokenizer.encode(PROMPT)
    [sample], _ = complete(run, state, tokenizer, [ids], TOKENS, 0.0, 0)
    return sample


def theirs(folder, **options):
    reason = "transformers is missing: install the crosscheck extra to compare with it"
    transformers = pytest.importorskip("transformers", reason=reason)
    pytest.importorskip("torch", reason=reason)
    options = options or {"return_full_text": False}
    options |= {"max_new_tokens": TOKENS, "do_sample": False}
    return transformers.pipeline("text-generation", str(folder))(PROMPT, **options)


@pytest.mark.parametrize("kind", ["bytes", "gpt2", "bpe", "bfloat16"])
def test_a_pipeline_continues_a_text_as_generate_does_and_stops_at_its_end(made, kind):
    workdir, folder = made[kind]
    expected = ours(workdir, "float32" if kind == "bfloat16" else None)
    [found] = theirs(folder)
    assert found["generated_text"] == expected.text
    if kind == "bytes":  # trained for long enough to have learned it
        assert expected.ended and "." in found["generated_text"]


def test_a_pipeline_generates_the_token_that_ends_a_text_and_nothing_after_it(made):
    workdir, folder = made["bytes"]
    [found] = theirs(folder, return_tensors=True)
    [eos] = {json.loads((folder / f"{x}config.json").read_text())["eos_token_id"] for x in FILES}
    ids, prompt = found["generated_token_ids"], [eos, *PROMPT.encode()]
    assert ids[: len(prompt)] == prompt and ids.index(eos, 1) == len(ids) - 1
    assert bytes(ids[len(prompt) : -1]).decode() == ours(workdir).text


def test_padding_of_the_vocabulary_is_removed_and_reported(made, tmp_path, capsys):
    workdir, folder = made["bytes"]
    stored = load_file(folder / "model.safetensors")
    assert json.loads((folder / "config.json").read_text())["vocab_size"] == 256
    assert stored["model.embed_tokens.weight"].shape == stored["lm_head.weight"].shape == (256, 32)
    export_weights(workdir, tmp_path / "out", tokenizer="none")
    assert "vocabulary: 320 rows; without a tokenizer" in capsys.readouterr().out
    stored = load_file(tmp_path / "out/model.safetensors")
    assert stored["lm_head.weight"].shape == (320, 32)


def test_an_llm_c_file_has_as_many_tokens_as_the_tokenizer_of_a_padded_run(made, tmp_path):
    shutil.copytree(made["gpt2"][0], tmp_path / "run")
    stored = json.loads((tmp_path / "run/config.json").read_text())
    stored["config"]["weights"] = ""  # a run that imported nothing: V=50304 is padding
    (tmp_path / "run/config.json").write_text(json.dumps(stored))
    export_weights(tmp_path / "run", tmp_path / "out.bin")
    head, tensors = llmc_reference.read(tmp_path / "out.bin")
    assert (head.vocab_size, head.padded_vocab_size) == (50_257, 50_304)
    assert tensors["wte"][50_256].any() and not tensors["wte"][50_257:].any()


def test_an_export_names_the_special_tokens_of_its_run(made):
    for kind, bos, eos, pad in (
        ("bytes", 0, 0, 0),
        ("gpt2", 50_256, 50_256, 50_256),
        ("bpe", 1, 1, 0),
    ):
        folder = made[kind][1]
        config = json.loads((folder / "config.json").read_text())
        generation = json.loads((folder / "generation_config.json").read_text())
        assert (config["bos_token_id"], config["eos_token_id"]) == (bos, eos), kind
        assert (generation["bos_token_id"], generation["eos_token_id"]) == (bos, eos), kind
        assert generation["pad_token_id"] == pad, kind
    assert generation["suppress_tokens"][-1] == 319  # of a vocabulary that is padded


def test_an_export_prints_its_checks_and_a_command_that_works(made, tmp_path, capsys):
    workdir, _ = made["bytes"]
    export_weights(workdir, tmp_path / "it's here")
    out = capsys.readouterr().out
    assert "Qwen3ForCausalLM, float32" in out
    assert "vocabulary: 256 rows; 64 rows of padding are removed" in out
    assert "checked: reading it back gives the same weights and logits" in out
    assert "computes the same logits" in out or "not checked with transformers" in out
    last = out.splitlines()[-1]
    assert last.startswith("next") and " -c 'from transformers import pipeline" in last


def test_positions_are_the_sequence_length_that_rope_was_trained_with(made):
    config = json.loads((made["bytes"][1] / "config.json").read_text())
    assert config["max_position_embeddings"] == 32
    assert json.loads((made["gpt2"][1] / "config.json").read_text())["n_positions"] == 64


@pytest.mark.parametrize("kind", ["bytes", "bpe"])
def test_an_export_is_imported_with_its_own_tokenizer_and_exported_again(
    made, kind, tmp_path, documents, capsys
):
    workdir, folder = made[kind]
    import_weights(folder, tmp_path / "run", text=str(documents))
    assert "documents start with token" not in capsys.readouterr().out
    export_weights(tmp_path / "run", tmp_path / "again")
    for name in ("config.json", "generation_config.json", "tokenizer_config.json"):
        first, again = (json.loads((f / name).read_text()) for f in (folder, tmp_path / "again"))
        assert first == again, name
    first, again = ((f / "model.safetensors").read_bytes() for f in (folder, tmp_path / "again"))
    assert first == again


def test_a_run_without_a_known_tokenizer_is_exported_without_one(made, tmp_path, capsys):
    workdir, _ = made["bytes"]
    export_weights(workdir, tmp_path / "out", tokenizer="none")
    assert not list((tmp_path / "out").glob("tokenizer*"))
    assert "no tokenizer files" in capsys.readouterr().out
    generation = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert generation["eos_token_id"] is None


def test_a_moved_run_still_finds_its_own_tokenizer(made, tmp_path):
    shutil.copytree(made["bpe"][0], tmp_path / "moved")
    stored = json.loads((tmp_path / "moved/config.json").read_text())
    name = stored["data"]["tokenizer"]
    stored["data"]["tokenizer"] = name.replace(str(made["bpe"][0]), "/nowhere/run")
    (tmp_path / "moved/config.json").write_text(json.dumps(stored))
    export_weights(tmp_path / "moved", tmp_path / "out")
    expected = (made["bpe"][1] / "tokenizer.json").read_bytes()
    assert (tmp_path / "out/tokenizer.json").read_bytes() == expected

    shutil.rmtree(tmp_path / "moved/data")
    with pytest.raises(InteropError, match="tokenizer.json.*Set --tokenizer. --tokenizer=none"):
        export_weights(tmp_path / "moved", tmp_path / "other")
    export_weights(tmp_path / "moved", tmp_path / "other", tokenizer=name)
    assert (tmp_path / "other/tokenizer.json").read_bytes() == expected
