"""Samples text from a model: prompts are read in one pass, then tokens are drawn one by one."""

import time
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxtrain.distributed.mesh import replicated
from jaxtrain.optim.acceleration import eval_params

PROMPT_CHARS = 400  # of a prompt that is shown; a longer one loses its middle


# A terminal acts on control characters, and a model of bytes may draw any.
CONTROLS = {i: f"\\x{i:02x}" for i in (*range(32), *range(127, 160)) if chr(i) not in "\t\n"}


class Sample(NamedTuple):
    text: str
    ended: bool  # the model drew the end of the text


def choose(logits_BV, key, temperature, top_k):
    """One token a row, int32 [B], from float32 logits.

    temperature 0 takes the likeliest; top_k > 0 draws from that many likeliest tokens.
    """
    if temperature == 0:
        return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
    if top_k and top_k < logits_BV.shape[-1]:
        least = jax.lax.top_k(logits_BV, top_k)[0][:, -1:]
        logits_BV = jnp.where(logits_BV < least, -jnp.inf, logits_BV)
    return jax.random.categorical(key, logits_BV / temperature).astype(jnp.int32)


def build_sampler(model, mesh, tokens: int, temperature: float, top_k: int, vocab_size=None):
    """sample(params, prompt_BT, key) -> int32 [B,tokens], jitted; the prompt is read in one pass.

    Args:
        vocab_size: of the tokenizer; what the model's is padded with is never drawn.

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
            return choose(logits_BV, key, temperature, top_k)

        def one(carry, x):
            (cache, token_B), (at, key) = carry, x
            hidden_BTD, cache = model.extend(params, cache, token_B[:, None], at)
            return (cache, draw(hidden_BTD, key)), token_B

        keys = jax.random.split(key, tokens)
        first_B = draw(hidden_BTD, keys[0])
        at = T + jnp.arange(tokens - 1)
        (_, last_B), rest = jax.lax.scan(one, (cache, first_B), (at, keys[1:]))
        return jnp.concatenate([rest.T, last_B[:, None]], axis=1).astype(jnp.int32)

    return jax.jit(sample, out_shardings=replicated(mesh))


def check_length(cfg, prompt_tokens: int, tokens: int) -> None:
    """Raises ValueError where learned positions end before the sample does.

    Args:
        prompt_tokens: with the token that starts the document.
    """
    if cfg.position == "learned" and prompt_tokens + tokens > cfg.positions:
        room = cfg.positions - prompt_tokens
        advice = f"Set --tokens to at most {room}" if room > 0 else "Shorten --prompt"
        raise ValueError(
            f"prompt and sample must fit model.positions={cfg.positions}; got {prompt_tokens} + "
            f"{tokens} tokens. {advice}."
        )


def decode_shell_text(prompt: str, flag: str) -> str:
    """Returns a flag's value as the UTF-8 text that was typed, in any locale.

    Raises:
        ValueError: it is not UTF-8.
    """
    try:  # in an ASCII locale Python reads each other byte as a lone surrogate
        return prompt.encode(errors="surrogateescape").decode()
    except UnicodeError as error:
        raise ValueError(
            f"the prompt must be UTF-8; got {prompt!r}: {error}. Set {flag}."
        ) from None


def escape_controls(text: str) -> str:
    """Returns the text with control characters spelled out, for a terminal."""
    return text.translate(CONTROLS)


def shorten_prompt(prompt: str) -> str:
    """Returns a prompt to show; a long one as its two ends and how much is between them."""
    left_out = len(prompt) - PROMPT_CHARS
    if left_out <= 0:
        return prompt
    half = PROMPT_CHARS // 2
    return f"{prompt[:half]} ... [{left_out:,} characters] ... {prompt[-half:]}"


def fit_positions(cfg, prompt_tokens: int, tokens: int) -> tuple[int, int]:
    """(prompt, sample) in tokens, cut to what learned positions hold behind a document's start."""
    if cfg.position != "learned":
        return prompt_tokens, tokens
    room = cfg.positions - 1
    prompt_tokens = min(prompt_tokens, max(room - tokens, room // 2))
    return prompt_tokens, min(tokens, room - prompt_tokens)


def complete(run, state, tokenizer, prompts, tokens, temperature, top_k, seed=0):
    """([Sample], tokens/s): what follows each prompt, up to where the model ends the text.

    Prompts of one length are sampled together. Compile time is not in the tokens/s.

    Args:
        prompts: [T] token ids each, of any T.
    """
    params = eval_params(state.opt_state, state.params)
    # Documents start with eot.
    encoded = [np.append(tokenizer.eot, ids).astype(np.int32) for ids in prompts]
    check_length(run.cfg.model, max(map(len, encoded)), tokens)
    known = tokenizer.vocab_size
    sampler = build_sampler(run.model, run.mesh, tokens, temperature, top_k, known)
    samples, elapsed_s = [None] * len(prompts), 0.0
    for length in sorted({len(ids) for ids in encoded}):
        rows = [i for i, ids in enumerate(encoded) if len(ids) == length]
        prompt_BT = np.stack([encoded[i] for i in rows])
        args = params, prompt_BT, jax.random.key(seed)
        compiled = sampler.lower(*args).compile()
        start = time.perf_counter()
        out_BT = jax.device_get(compiled(*args))
        elapsed_s += time.perf_counter() - start
        for row, ids in zip(rows, out_BT, strict=True):
            stop = int(np.argmax(np.append(ids, tokenizer.eot) == tokenizer.eot))
            samples[row] = Sample(tokenizer.decode(ids[:stop]), stop < len(ids))
    return samples, len(prompts) * tokens / elapsed_s
