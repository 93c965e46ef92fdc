"""Rotary position embedding (RoPE).

Source: Su et al. 2021, https://arxiv.org/abs/2104.09864
"""

import math

import jax
import jax.numpy as jnp

from jaxtrain.config.model_section import ModelConfig

RopeTables = tuple[jax.Array, jax.Array]  # cos_TK and sin_TK, of at least float32


def scale_wavelengths(cfg: ModelConfig, wavelength_K: jax.Array) -> jax.Array:
    """Lengthens RoPE's wavelengths, in tokens per radian, so that longer sequences stay in range.

    linear: all by rope_factor, as if positions were divided by it. llama3: those that turn less
    than rope_low_freq times in the original positions by rope_factor, those that turn more than
    rope_high_freq times not at all, and between the two the frequency is interpolated.

    Source: linear: Chen et al. 2023, https://arxiv.org/abs/2306.15595; llama3: Llama 3.1's
        apply_scaling, https://github.com/meta-llama/llama-models (models/llama3/model.py)
    """
    if cfg.rope_scaling == "linear":
        return wavelength_K * cfg.rope_factor
    turns_K = cfg.rope_original_positions / (2 * math.pi * wavelength_K)
    low, high = cfg.rope_low_freq, cfg.rope_high_freq
    unscaled_K = jnp.clip((turns_K - low) / (high - low), 0, 1)
    return wavelength_K / (unscaled_K + (1 - unscaled_K) / cfg.rope_factor)


def rope_tables(cfg: ModelConfig, kind: str, positions_T: jax.Array) -> RopeTables | None:
    """Computes the cosines and sines of the rotation angles of integer positions.

    Wavelengths are theta ** (i/n) for the n rotating pairs; the other pairs have the angle 0.

    Args:
        kind: "global" for rope_theta with rope_scaling, "local" for rope_local_theta, which is
            never scaled, or "none", which returns None.
    """
    if kind == "none":
        return None
    dtype = jnp.float64 if cfg.dtype == "float64" else jnp.float32
    theta = cfg.rope_local_theta if kind == "local" else cfg.rope_theta
    rotating = 2 * cfg.rope_pairs
    wavelength_K = theta ** (jnp.arange(0, rotating, 2, dtype=dtype) / rotating)
    if kind == "global" and cfg.rope_scaling != "none":
        wavelength_K = scale_wavelengths(cfg, wavelength_K)
    angle_TK = positions_T[:, None].astype(dtype) / wavelength_K
    angle_TK = jnp.pad(angle_TK, ((0, 0), (0, cfg.K // 2 - cfg.rope_pairs)))
    angle_TK = jnp.concatenate([angle_TK, angle_TK], axis=-1)
    return jnp.cos(angle_TK), jnp.sin(angle_TK)


def rotate(x_BTHK: jax.Array, cos_TK: jax.Array, sin_TK: jax.Array) -> jax.Array:
    """Rotates queries or keys by their position.

    Entry i is paired with entry i + K/2, as in Hugging Face's Llama.
    """
    x = x_BTHK.astype(cos_TK.dtype)
    first, second = jnp.split(x, 2, axis=-1)
    rotated = jnp.concatenate([-second, first], axis=-1)
    out = x * cos_TK[:, None] + rotated * sin_TK[:, None]
    return out.astype(x_BTHK.dtype)
