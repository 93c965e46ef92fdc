"""Model FLOPs: what the mathematics of one token costs, whatever a program spends on it.

A product with a matrix of N weights is 2N FLOPs a token forward and 4N backward; lookups, norms,
softmax and recomputation count nothing. Attention's two products over T keys are counted full,
as in PaLM's MFU, or causal: only the keys that a query may see, (T + 1) / 2 on average.

Source: Chowdhery et al. 2022 (PaLM), appendix B, https://arxiv.org/abs/2204.02311
"""

from typing import NamedTuple

FORWARD_AND_BACKWARD = 3  # of the forward: the gradients of both factors are a product each


class Flops(NamedTuple):
    """FLOPs of one token."""

    matrices: float  # weights of the layers and the head
    attention: float  # queries by keys, probabilities by values

    @property
    def total(self) -> float:
        return self.matrices + self.attention


def matrix_weights(cfg) -> int:
    """Weights that multiply every token, of a ModelConfig: layers and head, no lookups."""
    projections = 2 * cfg.D * cfg.H * cfg.K + 2 * cfg.D * cfg.G * cfg.K
    ffn = (3 if cfg.mlp == "swiglu" else 2) * cfg.D * cfg.F
    return cfg.L * (projections + ffn) + cfg.V * cfg.D


def forward_flops(cfg, seq_len: int, causal: bool = False) -> Flops:
    """FLOPs of one token forward, mean over a sequence of seq_len tokens.

    Args:
        cfg: a ModelConfig.
        causal: count the keys that a query sees, not all of them.
    """
    keys = (seq_len + 1) / 2 if causal else seq_len
    return Flops(2.0 * matrix_weights(cfg), 4.0 * cfg.L * cfg.H * cfg.K * keys)


def training_flops(cfg, seq_len: int, causal: bool = False) -> Flops:
    """forward_flops and the backward's: 6N + 12*L*H*K*T a token where attention is full."""
    return Flops(*(FORWARD_AND_BACKWARD * x for x in forward_flops(cfg, seq_len, causal)))
