"""Samples text from a model: reads the prompt in one pass, then draws one token at a time."""

import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxtrain.config.train_config import ModelConfig
from jaxtrain.data.tokenizer import Tokenizer
from jaxtrain.distributed.mesh import replicated
from jaxtrain.model.transformer import Model
from jaxtrain.optim.acceleration import eval_params
from jaxtrain.training.run import Run
from jaxtrain.training.step import TrainState

PROMPT_CHARS = 400  # printed of a prompt; the middle of a longer one is left out
# Terminals act on control characters, and a byte-level model may draw any of them.
CONTROLS = {i: f"\\x{i:02x}" for i in (*range(32), *range(127, 160)) if chr(i) not in "\t\n"}


class Sample(NamedTuple):
    """A model's continuation of a prompt."""

    text: str
    ended: bool  # the model drew the end-of-text token


def draw_tokens(logits_BV: jax.Array, key: jax.Array, temperature: float, top_k: int) -> jax.Array:
    """Draws one token per row, int32 [B], from float32 logits.

    temperature=0 takes the likeliest token; top_k > 0 draws from that many likeliest tokens only.
    """
    if temperature == 0:
        return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
    if top_k and top_k < logits_BV.shape[-1]:
        least = jax.lax.top_k(logits_BV, top_k)[0][:, -1:]
        logits_BV = jnp.where(logits_BV < least, -jnp.inf, logits_BV)
    return jax.random.categorical(key, logits_BV / temperature).astype(jnp.int32)


def build_sampler(
    model: Model,
    mesh: Mesh,
    tokens: int,
    temperature: float,
    top_k: int,
    vocab_size: int | None = None,
) -> Callable:
    """Returns sample(params, prompt_BT, key) -> int32 [B,tokens], jitted.

    Args:
        vocab_size: of the tokenizer; larger ids, which only pad the model's, are never drawn.

    Raises:
        ValueError: tokens, temperature or top_k is out of range.
    """
    for name, value, low in (("tokens", tokens, 1), ("temperature", temperature, 0)):
        if not value >= low:
            raise ValueError(f"{name} must be at least {low}; got {value}. Set --{name}.")
    if top_k < 0:
        raise ValueError(f"top_k must be at least 0; got {top_k}. Set --top_k.")

    def sample(params, prompt_BT, key):
        B, T = prompt_BT.shape
        cache = model.init_cache(B, T + tokens)
        hidden_BTD, cache = model.extend(params, cache, prompt_BT, 0)

        def draw(hidden_BTD, key):
            logits_BV = model.logits(params, hidden_BTD[:, -1:])[:, 0, :vocab_size]
            return draw_tokens(logits_BV, key, temperature, top_k)

        def read_and_draw(carry, x):
            (cache, token_B), (position, key) = carry, x
            hidden_BTD, cache = model.extend(params, cache, token_B[:, None], position)
            return (cache, draw(hidden_BTD, key)), token_B

        keys = jax.random.split(key, tokens)
        first_B = draw(hidden_BTD, keys[0])
        positions = T + jnp.arange(tokens - 1)
        # Each round stacks the token that it reads and carries the one that it draws, so the last
        # token is in the carry.
        (_, last_B), stacked = jax.lax.scan(read_and_draw, (cache, first_B), (positions, keys[1:]))
        return jnp.concatenate([stacked.T, last_B[:, None]], axis=1).astype(jnp.int32)

    return jax.jit(sample, out_shardings=replicated(mesh))


def check_length(cfg: ModelConfig, prompt_tokens: int, tokens: int) -> None:
    """Raises ValueError if prompt and sample exceed the learned positions.

    Args:
        prompt_tokens: including the token that starts the document.
    """
    if cfg.position == "learned" and prompt_tokens + tokens > cfg.positions:
        left = cfg.positions - prompt_tokens
        advice = f"Set --tokens to at most {left}" if left > 0 else "Shorten --prompt"
        raise ValueError(
            f"prompt and sample must fit model.positions={cfg.positions}; got {prompt_tokens} + "
            f"{tokens} tokens. {advice}."
        )


def decode_shell_text(prompt: str, flag: str) -> str:
    """Returns a flag's value as the UTF-8 text that the user typed, in any locale.

    Raises:
        ValueError: it is not UTF-8.
    """
    try:  # in an ASCII locale Python decodes each byte above 127 to a lone surrogate
        return prompt.encode(errors="surrogateescape").decode()
    except UnicodeError as error:
        raise ValueError(
            f"the prompt must be UTF-8; got {prompt!r}: {error}. Set {flag}."
        ) from None


def escape_controls(text: str) -> str:
    """Returns text for a terminal, with control characters as escapes such as \\x1b."""
    return text.translate(CONTROLS)


def shorten_prompt(prompt: str) -> str:
    """Returns a prompt to print; a long one gets the length of its middle instead of the middle."""
    left_out = len(prompt) - PROMPT_CHARS
    if left_out <= 0:
        return prompt
    half = PROMPT_CHARS // 2
    return f"{prompt[:half]} ... [{left_out:,} characters] ... {prompt[-half:]}"


def fit_positions(cfg: ModelConfig, prompt_tokens: int, tokens: int) -> tuple[int, int]:
    """Returns (prompt, sample) lengths, cut so that both fit the learned positions.

    One position is for the token that starts the document. The prompt is cut first, but to no less
    than half of the positions.
    """
    if cfg.position != "learned":
        return prompt_tokens, tokens
    available = cfg.positions - 1
    prompt_tokens = min(prompt_tokens, max(available - tokens, available // 2))
    return prompt_tokens, min(tokens, available - prompt_tokens)


def complete(
    run: Run,
    state: TrainState,
    tokenizer: Tokenizer,
    prompts: Sequence[np.ndarray],
    tokens: int,
    temperature: float,
    top_k: int,
    seed: int = 0,
) -> tuple[list[Sample], float]:
    """Continues each prompt up to where the model ends the text; returns (samples, tokens/s).

    Prompts of equal length are sampled together. The speed excludes compilation.

    Args:
        prompts: [T] token ids each, of any T.
    """
    params = eval_params(state.opt_state, state.params)
    # As in training, a document starts with the end-of-text token.
    encoded = [np.append(tokenizer.eot, ids).astype(np.int32) for ids in prompts]
    check_length(run.cfg.model, max(map(len, encoded)), tokens)
    sampler = build_sampler(run.model, run.mesh, tokens, temperature, top_k, tokenizer.vocab_size)
    samples, elapsed_s = [Sample("", False)] * len(prompts), 0.0
    for length in sorted({len(ids) for ids in encoded}):
        rows = [i for i, ids in enumerate(encoded) if len(ids) == length]
        prompt_BT = np.stack([encoded[i] for i in rows])
        args = params, prompt_BT, jax.random.key(seed)
        compiled = sampler.lower(*args).compile()
        start = time.perf_counter()
        out_BT = jax.device_get(compiled(*args))
        elapsed_s += time.perf_counter() - start
        for row, ids in zip(rows, out_BT, strict=True):
            end = int(np.argmax(np.append(ids, tokenizer.eot) == tokenizer.eot))
            samples[row] = Sample(tokenizer.decode(ids[:end]), end < len(ids))
    return samples, len(prompts) * tokens / elapsed_s
