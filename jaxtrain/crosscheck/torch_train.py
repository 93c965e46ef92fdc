"""Trains the PyTorch side: torch.optim's optimizers, the schedule, clipping and the trace."""

import functools
import math
from collections.abc import Callable, Iterable
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import nn

from jaxtrain.config.train_config import OptimConfig, TrainConfig
from jaxtrain.crosscheck.recorder import Recorder
from jaxtrain.crosscheck.torch_model import TorchTransformer, build_torch_model
from jaxtrain.crosscheck.torch_muon import Muon

BuildOptimizer = Callable[[list[dict[str, Any]]], torch.optim.Optimizer]
# optim.scale -> torch.optim.Muon's adjust_lr_fn
TORCH_SCALES = {"spectral_max": "original", "match_rms": "match_rms_adamw"}


def check_optimizer(cfg: OptimConfig) -> None:
    """Raises ValueError if torch.optim does not have the optimizer of a config."""
    wanted = {"name": ("adamw", "muon"), "rest": ("adamw",), "noise_scale": (0.0,)}
    wanted |= {"cautious_decay": (False,), "parametrisation": ("standard",)}
    if cfg.name == "muon":
        wanted |= {"scale": tuple(TORCH_SCALES), "geometry": ("spectral",), "per_head": (False,)}
        wanted |= {"ns_coefficients": ("jordan",), "narrow_buffers": (False,)}
    got = {key: getattr(cfg, key) for key in wanted}
    wrong = [
        f"optim.{key}={got[key]} (must be {' or '.join(map(str, values))})"
        for key, values in wanted.items()
        if got[key] not in values
    ]
    if wrong:
        raise ValueError(
            "the PyTorch side has torch.optim's AdamW and Muon only; got "
            f"{', '.join(wrong)}. Set --optim.*."
        )


def build_optimizers(
    cfg: OptimConfig, model: nn.Module, build_theirs: BuildOptimizer | None = None
) -> list[torch.optim.Optimizer]:
    """Builds the optimizer optim.name for the matrices and fused AdamW for all other parameters.

    Muon is torch.optim's if optim.ns_dtype is bfloat16, its only type, else torch_muon.py's.

    Args:
        build_theirs: builds somebody's optimizer, from parameter groups, in place of optim.name.

    Raises:
        ValueError: torch.optim does not have the optimizer, and build_theirs is None.
    """
    if build_theirs is None:
        check_optimizer(cfg)
    kinds = {"embed": "embedding", "positions": "positions", "head": "head"}
    rates = {
        "embedding": cfg.embedding_learning_rate,
        "positions": cfg.embedding_learning_rate,
        "head": cfg.head_learning_rate,
        "vectors": cfg.vector_learning_rate,
    }
    matrices, members = [], {}
    for name, p in model.named_parameters():
        is_matrix = name.startswith("blocks.") and p.ndim == 2
        kind = "matrices" if is_matrix else kinds.get(name, "vectors")
        if is_matrix and cfg.name != "adamw":
            matrices.append(p)
        else:
            decay = cfg.weight_decay if is_matrix else cfg.adam_weight_decay or cfg.weight_decay
            decay = decay if kind in cfg.decaying else 0.0
            rate = rates.get(kind) or cfg.adam_learning_rate
            members.setdefault((rate, decay), []).append(p)
    groups = [
        {"params": params, "lr": rate, "weight_decay": decay}
        for (rate, decay), params in members.items()
    ]
    if cfg.name == "adamw" and build_theirs is not None:
        # Settings that all parameters share are left to their optimizer, which may have no decay.
        shared = {"lr": cfg.adam_learning_rate} | (
            {} if cfg.weight_decay else {"weight_decay": 0.0}
        )
        kept = lambda key, value: key == "params" or value != shared.get(key)
        return [build_theirs([{k: x for k, x in g.items() if kept(k, x)} for g in groups])]
    adamw = torch.optim.AdamW(
        groups,
        betas=(cfg.adam_b1, cfg.adam_b2),
        eps=cfg.adam_eps,
        fused=True,
    )
    if cfg.name == "adamw":
        return [adamw]
    if build_theirs is not None:
        decays = not cfg.weight_decay or "matrices" in cfg.decaying
        group = {"params": matrices} | ({} if decays else {"weight_decay": 0.0})
        return [build_theirs([group]), adamw]
    build = torch.optim.Muon
    if cfg.ns_dtype != "bfloat16":
        build = functools.partial(Muon, dtype=getattr(torch, cfg.ns_dtype))
    muon = build(
        matrices,
        lr=cfg.learning_rate,
        weight_decay=cfg.weight_decay if "matrices" in cfg.decaying else 0.0,
        momentum=cfg.momentum,
        nesterov=cfg.nesterov,
        ns_steps=cfg.ns_steps or 5,
        adjust_lr_fn=TORCH_SCALES[cfg.scale],
    )
    return [muon, adamw]


def rate_fraction(cfg: OptimConfig, count: int) -> float:
    """Returns the learning rate of update `count` (from 0) as a fraction of the peak rate."""
    left = max(cfg.total_steps - count, 0)
    warmup = (count + 1) / max(cfg.warmup_steps, 1)
    if cfg.schedule == "constant":
        return min(warmup, 1.0)
    if cfg.schedule == "cosine":
        share = min(left / max(cfg.total_steps - cfg.warmup_steps, 1), 1.0)
        height = 0.5 - 0.5 * math.cos(math.pi * share)
    else:
        height = min(left / max(round(cfg.decay_fraction * cfg.total_steps), 1), 1.0)
    scale = cfg.final_scale + (1 - cfg.final_scale) * height
    return min(warmup, scale) if left else scale


def clip_gradients(model: nn.Module, clip_norm: float, eps: float = 0.0) -> None:
    """Scales the gradients down to a global norm of clip_norm.

    With eps=1e-6 it equals torch's clip_grad_norm_. The host never reads the norm, as it would have
    to wait for the backward pass.
    """
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    scale = (clip_norm / (nn.utils.get_total_norm(grads) + eps)).clamp(max=1.0)
    torch._foreach_mul_(grads, scale)  # pyright: ignore[reportPrivateImportUsage]


def build_update(
    cfg: TrainConfig, model: nn.Module, build_theirs: BuildOptimizer | None = None
) -> Callable[..., None]:
    """Returns update(rate=1.0), which clips the model's gradients and steps the optimizers.

    `rate` is a fraction of the peak learning rates. For build_theirs see build_optimizers.
    """
    optimizers = build_optimizers(cfg.optim, model, build_theirs)
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    peaks = [group["lr"] for group in groups]

    def update(rate=1.0):
        if cfg.optim.clip_norm:
            clip_gradients(model, cfg.optim.clip_norm, cfg.optim.clip_eps)
        for group, peak in zip(groups, peaks, strict=True):
            group["lr"] = peak * rate
        for optimizer in optimizers:
            optimizer.step()

    return update


def build_step(
    cfg: TrainConfig,
    model: TorchTransformer,
    compiled: bool = False,
    recorder: Recorder | None = None,
    build_theirs: BuildOptimizer | None = None,
) -> Callable[..., torch.Tensor]:
    """Returns step(tokens_BT1 int64, docs_BT1=None, weights_BT=None, rate=1.0) -> nats [].

    cfg.accumulation is ignored: the whole batch gives the same mean over its targets.

    Args:
        compiled: use torch.compile for the forward and backward pass; the optimizers are fused.
        recorder: writes a trace of the steps.
        build_theirs: see build_optimizers.
    """
    losses = torch.compile(model.losses) if compiled else model.losses
    update = build_update(cfg, model, build_theirs)
    options: dict[str, Any] = {"z_loss": cfg.loss.z_loss, "masked": cfg.data.document_mask}
    if recorder:
        options["observe"] = recorder.observe

    def step(tokens_BT1, docs_BT1=None, weights_BT=None, rate=1.0):
        objective, nats = losses(tokens_BT1, docs_BT1=docs_BT1, weights_BT=weights_BT, **options)
        objective.backward()
        if recorder:
            targets_BT, counts = tokens_BT1[:, 1:], weights_BT
            if docs_BT1 is not None and counts is None:
                counts = docs_BT1[:, 1:] >= 0
            recorder.before_step(tokens_BT1[:, :-1], targets_BT, nats, counts)
        update(rate)
        if recorder:
            recorder.after_step()
        model.zero_grad()
        return nats.detach()

    return step


def record(
    cfg: TrainConfig,
    steps: int,
    path: str | Path,
    params: dict[str, Any],
    batches: Iterable[dict[str, Any]],
    build_theirs: BuildOptimizer | None = None,
) -> None:
    """Trains the PyTorch side for `steps` steps and writes the trace.

    Args:
        params: the parameters at step 0, as jaxtrain's nested dict of arrays.
        batches: {"tokens"} and optionally {"docs"}, [B,T+1], and {"weights"}, [B,T].
        build_theirs: see build_optimizers.

    Raises:
        ValueError: torch.optim does not have the optimizer, or there are too few batches.
    """
    model, count = build_torch_model(cfg.model, params), 0
    options: dict[str, Any] = {"activations": {}, "keep_batches": False}  # the model observes
    with Recorder(path, model, precision=cfg.model.dtype, **options) as recorder:
        step = build_step(cfg, model, recorder=recorder, build_theirs=build_theirs)
        for count, batch in enumerate(islice(batches, steps), 1):
            tensors = {
                f"{name}_BT1": torch.as_tensor(batch[name]).long()
                for name in ("tokens", "docs")
                if name in batch
            }
            if "weights" in batch:
                tensors["weights_BT"] = torch.as_tensor(batch["weights"])
            step(**tensors, rate=rate_fraction(cfg.optim, count - 1))
    if count < steps:
        raise ValueError(f"there must be batches for {steps} steps; got {count}. Set --steps.")
