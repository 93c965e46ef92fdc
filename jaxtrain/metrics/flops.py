"""Counts model FLOPs: what the mathematics of one token costs, however a program computes it.

A product with a matrix of N weights is 2N FLOPs a token forward (a multiply and an add for each
weight) and 4N backward. Lookups, norms, softmax and recomputation are not counted. Attention's two
products over T keys are counted in full, as in PaLM's MFU, or causally: only the keys that a query
may see, (T + 1) / 2 on average. A layer with a window of W < T counts W keys in full; causally, the
first W queries see fewer.

Source: Chowdhery et al. 2022 (PaLM), appendix B, https://arxiv.org/abs/2204.02311
"""

from typing import NamedTuple

from jaxtrain.config.train_config import ModelConfig
from jaxtrain.model.layer_kinds import kinds_by_layer

FORWARD_AND_BACKWARD = 3  # backward has two products for each forward one: a gradient per factor


class Flops(NamedTuple):
    """FLOPs of one token."""

    matrices: float  # products with the weights of the layers and the head
    attention: float  # queries x keys and probabilities x values

    @property
    def total(self) -> float:
        return self.matrices + self.attention


def matrix_weights(cfg: ModelConfig) -> int:
    """Returns the number of weights that multiply every token: layers and head, not lookups."""
    projections = 2 * cfg.D * cfg.H * cfg.K + 2 * cfg.D * cfg.G * cfg.K
    ffn = (3 if cfg.has_gated_mlp else 2) * cfg.D * cfg.F
    return cfg.L * (projections + ffn) + cfg.V * cfg.D


def mean_keys(seq_len: int, window: int, causal: bool) -> float:
    """Returns how many keys are counted for a query, the mean over a sequence.

    Args:
        window: last keys that a query sees; 0 is all.
    """
    most = min(window or seq_len, seq_len)
    # Query t of 0, 1, ... sees min(t + 1, most) keys: most*(most-1)/2 pairs fewer than in full.
    return most - most * (most - 1) / (2 * seq_len) if causal else most


def forward_flops(cfg: ModelConfig, seq_len: int, causal: bool = False) -> Flops:
    """Returns the forward FLOPs of one token, the mean over a sequence of seq_len tokens.

    Args:
        causal: count only the keys that a query may see instead of all.
    """
    windows = (kind.scoring.window for kind in kinds_by_layer(cfg))
    keys = sum(mean_keys(seq_len, window, causal) for window in windows)
    return Flops(2.0 * matrix_weights(cfg), 4.0 * cfg.H * cfg.K * keys)


def training_flops(cfg: ModelConfig, seq_len: int, causal: bool = False) -> Flops:
    """Returns forward and backward FLOPs of one token: 6N + 12*L*H*K*T without a window."""
    return Flops(*(FORWARD_AND_BACKWARD * x for x in forward_flops(cfg, seq_len, causal)))
