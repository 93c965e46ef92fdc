"""RoPE and attention masks of the PyTorch model, written independently of the JAX model."""

import math
from typing import Any

import torch

from jaxtrain.config.train_config import ModelConfig


def rotate(x_BHTK: torch.Tensor, cos_TK: torch.Tensor, sin_TK: torch.Tensor) -> torch.Tensor:
    """Applies rotary position embedding to the two halves of K. Source: arxiv.org/abs/2104.09864"""
    first, second = x_BHTK.chunk(2, -1)
    return x_BHTK * cos_TK + torch.cat((-second, first), -1) * sin_TK


def scale_frequencies(cfg: ModelConfig, frequency_K: torch.Tensor) -> torch.Tensor:
    """Applies cfg.rope_scaling to RoPE's frequencies in radians per token.

    Source: `_compute_llama3_parameters` of transformers, modeling_rope_utils.py.
    """
    if cfg.rope_scaling == "none":
        return frequency_K
    if cfg.rope_scaling == "linear":
        return frequency_K / cfg.rope_factor
    length_K = 2 * math.pi / frequency_K
    longest, shortest = (
        cfg.rope_original_positions / turns for turns in (cfg.rope_low_freq, cfg.rope_high_freq)
    )
    share_K = cfg.rope_original_positions / length_K - cfg.rope_low_freq
    share_K = share_K / (cfg.rope_high_freq - cfg.rope_low_freq)
    between_K = (1 - share_K) * frequency_K / cfg.rope_factor + share_K * frequency_K
    scaled_K = torch.where(length_K > longest, frequency_K / cfg.rope_factor, between_K)
    return torch.where(length_K < shortest, frequency_K, scaled_K)


def attention_mask(
    T: int, window: int, docs_BT: torch.Tensor | None, device: torch.device
) -> torch.Tensor | None:
    """Returns bool [B or 1,1,T,S]: whether query T sees key S; None if it sees all until itself.

    Args:
        window: a query sees this many keys at most; 0 is no limit.
        docs_BT: document ids; a query sees its own document only.
    """
    if docs_BT is None and not window:
        return None
    seen_TS = torch.ones(T, T, dtype=torch.bool, device=device).tril()
    if window:
        seen_TS = seen_TS.triu(1 - window)
    if docs_BT is None:
        return seen_TS[None, None]
    return (seen_TS & (docs_BT[:, :, None] == docs_BT[:, None, :]))[:, None]


def layer_kind(cfg: ModelConfig, number: int) -> tuple[int, str]:
    """Returns the window, 0 for none, and the kind of RoPE of layer 1, 2, ..., L."""
    sees_all = cfg.global_every and number % cfg.global_every == 0
    window = 0 if sees_all else cfg.window
    if cfg.position != "rope" or (cfg.nope_every and number % cfg.nope_every == 0):
        return window, "none"
    return window, "local" if window and cfg.rope_local_theta else "global"


def rope_tables(
    cfg: ModelConfig, T: int, kind: str, **like: Any
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Returns cosines and sines [T,K] of RoPE; None if kind is "none".

    Args:
        kind: "local" is unscaled, with cfg.rope_local_theta; "global" is the model's own.
        like: dtype and device.
    """
    if kind == "none":
        return None
    theta = cfg.rope_local_theta if kind == "local" else cfg.rope_theta
    pairs = cfg.K // 2
    turning = round(pairs * cfg.rope_fraction)
    frequency_K = theta ** -(torch.arange(turning, **like) / turning)
    if kind == "global":
        frequency_K = scale_frequencies(cfg, frequency_K)
    frequency_K = torch.cat([frequency_K, frequency_K.new_zeros(pairs - turning)])
    angle_TK = torch.outer(torch.arange(T, **like), frequency_K).repeat(1, 2)
    return angle_TK.cos(), angle_TK.sin()
