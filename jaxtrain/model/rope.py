"""Rotary position embedding (RoPE).

Source: Su et al. 2021, https://arxiv.org/abs/2104.09864
"""

import jax
import jax.numpy as jnp

from jaxtrain.config.model_section import ModelConfig

RopeTables = tuple[jax.Array, jax.Array]  # cos_TK and sin_TK, of at least float32


def rope_tables(cfg: ModelConfig, positions_T: jax.Array) -> RopeTables:
    """Computes the cosines and sines of the rotation angles of integer positions."""
    dtype = jnp.float64 if cfg.dtype == "float64" else jnp.float32
    wavelength_K = cfg.rope_theta ** (jnp.arange(0, cfg.K, 2, dtype=dtype) / cfg.K)
    angle_TK = positions_T[:, None].astype(dtype) / wavelength_K
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
