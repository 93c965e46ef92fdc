import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtrain.config.train_config import MeshConfig, ModelConfig
from jaxtrain.data.tokenizer import ByteTokenizer
from jaxtrain.distributed.mesh import build_mesh
from jaxtrain.generate import check_flags, tokenizer_name
from jaxtrain.model.transformer import build_model
from jaxtrain.ops.routes import choose_routes
from jaxtrain.training.sampling import (
    build_sampler,
    check_length,
    complete,
    decode_shell_text,
    draw_tokens,
    escape_controls,
    fit_positions,
    shorten_prompt,
)

MODEL = ModelConfig(L=2, D=32, H=4, G=2, K=8, F=48, V=64, dtype="float32")


@pytest.fixture
def model():
    return build_model(MODEL, choose_routes(MODEL, False, "cpu", False))


@pytest.fixture
def mesh():
    return build_mesh(MeshConfig(1, 1, 1), jax.devices()[:1])


def test_sampling_at_temperature_0_equals_the_argmax_of_full_forward_passes(model, mesh):
    params = model.init(jax.random.key(0))
    prompt = jax.random.randint(jax.random.key(1), (3, 5), 0, 64)
    got = build_sampler(model, mesh, 6, 0.0, 0)(params, prompt, jax.random.key(2))
    text = prompt
    forward = jax.jit(lambda text: model.logits(params, model.apply(params, text)))
    for n in range(6):
        padded = jnp.pad(text, ((0, 0), (0, 6 - n)))  # one shape: the future is masked
        following = jnp.argmax(forward(padded)[:, text.shape[1] - 1], -1)
        text = jnp.concatenate([text, following[:, None].astype(text.dtype)], 1)
    np.testing.assert_array_equal(got, text[:, 5:])


def test_samples_are_determined_by_the_key_and_rows_differ(model, mesh):
    params = model.init(jax.random.key(0))
    prompt = jnp.ones((4, 3), jnp.int32)
    sampler = build_sampler(model, mesh, 16, 1.0, 0)
    a, b = sampler(params, prompt, jax.random.key(0)), sampler(params, prompt, jax.random.key(0))
    np.testing.assert_array_equal(a, b)
    assert not np.array_equal(a, sampler(params, prompt, jax.random.key(1)))
    assert len({tuple(row) for row in np.asarray(a)}) == 4


def test_top_k_draws_only_from_the_likeliest():
    logits = jax.random.normal(jax.random.key(0), (512, 64))
    drawn = draw_tokens(logits, jax.random.key(1), 1.0, 3)
    likeliest = jax.lax.top_k(logits, 3)[1]
    assert jnp.all((drawn[:, None] == likeliest).any(-1))
    assert len(set((drawn[:, None] == likeliest).argmax(-1).tolist())) == 3


def test_temperature_draws_with_the_softmax_of_scaled_logits():
    logits = jnp.log(jnp.array([[0.5, 0.3, 0.2]])).repeat(20_000, 0)
    drawn = draw_tokens(logits, jax.random.key(0), 0.5, 0)
    want = np.array([0.25, 0.09, 0.04]) / 0.38
    np.testing.assert_allclose(np.bincount(drawn, minlength=3) / 20_000, want, atol=0.015)


@pytest.mark.parametrize(("name", "values"), [("tokens", (0, 1.0, 0)), ("temperature", (1, -1, 0))])
def test_build_sampler_names_a_setting_out_of_range(model, mesh, name, values):
    with pytest.raises(ValueError, match=f"{name} must be at least"):
        build_sampler(model, mesh, *values)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("samples", 0),
        ("tokens", 0),
        ("temperature", -1.0),
        ("temperature", float("nan")),
        ("temperature", float("inf")),
        ("top_k", -1),
    ],
)
def test_a_flag_out_of_range_is_named(name, value):
    good = {"samples": 1, "tokens": 1, "temperature": 0.0, "top_k": 0}
    check_flags(**good)
    with pytest.raises(ValueError, match=rf"{name} must be .*; got {value}\. Set --{name}\."):
        check_flags(**good | {name: value})


def test_prompt_and_sample_must_fit_the_learned_positions():
    learned = ModelConfig(position="learned", positions=64)
    check_length(learned, 32, 32)
    message = r"fit model.positions=64; got 33 \+ 32 tokens. Set --tokens to at most 31"
    with pytest.raises(ValueError, match=message):
        check_length(learned, 33, 32)
    with pytest.raises(ValueError, match=r"got 64 \+ 1 tokens. Shorten --prompt"):
        check_length(learned, 64, 1)


def test_a_prompt_typed_in_an_ascii_locale_is_decoded_as_utf8():
    typed = "naïve 你好"
    read = typed.encode().decode("ascii", "surrogateescape")  # sys.argv with LC_ALL=C
    assert decode_shell_text(read, "--prompt") == typed == decode_shell_text(typed, "--prompt")
    with pytest.raises(ValueError, match="Set --prompt"):
        decode_shell_text("\udcff", "--prompt")


def test_a_long_prompt_is_printed_without_its_middle():
    prompt = "start" + "x" * 3_000 + "end"
    assert shorten_prompt("short") == "short" and shorten_prompt("x" * 400) == "x" * 400
    short = shorten_prompt(prompt)
    assert short.startswith("start") and short.endswith("end") and len(short) < 450
    assert " ... [2,608 characters] ... " in short


def test_control_characters_are_printed_as_escapes():
    assert escape_controls("a\tb\nc\x1b[31m\0\r\x9bé") == "a\tb\nc\\x1b[31m\\x00\\x0d\\x9bé"


class Fixed:
    """A model that continues any prompt with `answer`, token by token."""

    def __init__(self, answer):
        self.answer = jnp.array([*answer, 0])

    def init_cache(self, B, T):
        return jnp.zeros((B, 1))

    def extend(self, params, cache, tokens_BT, at):
        after = at + tokens_BT.shape[1] - params  # the prompt's length
        return jnp.full((*tokens_BT.shape, 1), after, jnp.int32), cache

    def logits(self, params, hidden_BT1):
        return 100.0 * jax.nn.one_hot(self.answer[hidden_BT1[..., 0]], 256)


@pytest.mark.parametrize(
    ("answer", "text", "ended"),
    [(b"abc\0def", "abc", True), (b"abcdefg", "abcdefg", False), (b"\0abcdef", "", True)],
)
def test_a_sample_ends_where_the_model_ends_the_text(mesh, answer, text, ended):
    class Run:
        cfg, model = type("Cfg", (), {"model": MODEL}), Fixed(answer)

    Run.mesh = mesh
    state = type("State", (), {"opt_state": (), "params": jnp.int32(3)})  # eot and "xy"
    [sample], _ = complete(Run, state, ByteTokenizer(), [np.frombuffer(b"xy", np.uint8)], 7, 0, 0)
    assert (sample.text, sample.ended) == (text, ended)


@pytest.mark.parametrize(
    ("prompt", "tokens", "fitted"),
    [(10, 20, (10, 20)), (64, 20, (43, 20)), (64, 256, (31, 32)), (0, 256, (0, 63))],
)
def test_a_sample_is_cut_to_the_learned_positions(prompt, tokens, fitted):
    learned = ModelConfig(position="learned", positions=64)
    assert fit_positions(learned, prompt, tokens) == fitted
    check_length(learned, 1 + fitted[0], fitted[1])  # 1: what starts a document
    assert fit_positions(ModelConfig(position="rope"), prompt, tokens) == (prompt, tokens)


@pytest.mark.parametrize(("temperature", "top_k"), [(0.0, 0), (1.0, 8)])
def test_ids_that_only_pad_the_vocabulary_are_never_drawn(model, mesh, temperature, top_k):
    params = model.init(jax.random.key(0))
    params["head"] = params["head"].at[..., 5:].multiply(100.0)  # the likeliest by far
    sample = build_sampler(model, mesh, 8, temperature, top_k, vocab_size=5)
    drawn = np.asarray(sample(params, jnp.ones((16, 3), jnp.int32), jax.random.key(0)))
    assert drawn.max() < 5


def test_sampling_uses_the_tokenizer_of_the_shards_by_default(tmp_path):
    stored = {"config": {"data": {"tokenizer": "bytes"}}, "data": {"tokenizer": "gpt2"}}
    (tmp_path / "config.json").write_text(json.dumps(stored))
    assert tokenizer_name(tmp_path) == "gpt2"
    assert tokenizer_name(tmp_path, "bytes") == "bytes"


def test_shards_without_a_tokenizer_name_need_the_flag(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"config": {}, "data": {"tokenizer": None}}))
    with pytest.raises(ValueError, match="must be known.* Set --tokenizer"):
        tokenizer_name(tmp_path)
    with pytest.raises(ValueError, match="--run must be a run's folder"):
        tokenizer_name(tmp_path / "none")
