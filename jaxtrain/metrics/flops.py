"""Counts model FLOPs: what the mathematics of one token costs, however a program computes it.

A product with a matrix of N weights is 2N FLOPs a token forward (a multiply and an add for each
weight) and 4N backward. Lookups, norms, softmax and recomputation are not counted. Attention's two
products over T keys are counted in full, as in PaLM's MFU, or causally: only the keys that a query
may see, (T + 1) / 2 on average.

Source: Chowdhery et al. 2022 (PaLM), appendix B, https://arxiv.org/abs/2204.02311
"""

from typing import NamedTuple

from jaxtrain.config.train_config import ModelConfig

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


def forward_flops(cfg: ModelConfig, seq_len: int, causal: bool = False) -> Flops:
    """Returns the forward FLOPs of one token, the mean over a sequence of seq_len tokens.

    Args:
        causal: count only the keys that a query may see instead of all.
    """
    keys = (seq_len + 1) / 2 if causal else seq_len
    return Flops(2.0 * matrix_weights(cfg), 4.0 * cfg.L * cfg.H * cfg.K * keys)


def training_flops(cfg: ModelConfig, seq_len: int, causal: bool = False) -> Flops:
    """Returns forward and backward FLOPs of one token: 6N + 12*L*H*K*T with full attention."""
    return Flops(*(FORWARD_AND_BACKWARD * x for x in forward_flops(cfg, seq_len, causal)))
