"""What distinguishes a model's layers from each other: their window and their RoPE.

Their weights have equal shapes. A kind is static, so that each has its own compiled code.
"""

from typing import NamedTuple

from jaxtrain.config.model_section import ModelConfig
from jaxtrain.model.attention import Scoring


class LayerKind(NamedTuple):
    scoring: Scoring
    rope: str  # see rope_tables


def _kind(cfg: ModelConfig, number: int) -> LayerKind:
    """Returns the kind of a layer; the first has number 1."""
    is_global = cfg.global_every > 0 and number % cfg.global_every == 0
    window = 0 if is_global else cfg.window
    rotates = cfg.position == "rope" and not (cfg.nope_every and number % cfg.nope_every == 0)
    rope = ("local" if window and cfg.rope_local_theta else "global") if rotates else "none"
    return LayerKind(Scoring(window, cfg.attention_scale, cfg.attention_softcap), rope)


def kinds_by_layer(cfg: ModelConfig) -> list[LayerKind]:
    """Returns the kind of each of the L layers."""
    return [_kind(cfg, number) for number in range(1, cfg.L + 1)]


def layer_kinds(cfg: ModelConfig) -> tuple[LayerKind, ...]:
    """Returns the kinds of the first layers, up to where they repeat; most models have one kind."""
    kinds = kinds_by_layer(cfg)
    period = next(p for p in range(1, cfg.L + 1) if kinds[p:] == kinds[:-p])
    return tuple(kinds[:period])
