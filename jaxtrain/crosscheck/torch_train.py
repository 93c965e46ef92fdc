"""The twin's training: torch.optim's optimizers, our schedule and clipping, and its trace."""

import contextlib
import math
from itertools import islice

import torch
from torch import nn

from jaxtrain.crosscheck.recorder import Recorder
from jaxtrain.crosscheck.torch_model import build_torch_model

TORCH_SCALES = {"spectral_max": "original", "match_rms": "match_rms_adamw"}


def check_optimizer(cfg) -> None:
    """Raises ValueError where torch.optim has no such optimizer as an OptimConfig's."""
    wanted = {"name": ("adamw", "muon"), "rest": ("adamw",), "noise_scale": (0.0,)}
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
            f"the PyTorch twin must have torch.optim's AdamW or Muon; got {', '.join(wrong)}. "
            "Set --optim.*."
        )


def build_optimizers(cfg, model) -> list:
    """torch.optim's of an OptimConfig: matrices by optim.name, all else on fused AdamW.

    Matrices, embedding and head decay; positions and vectors do not.

    Raises:
        ValueError: torch.optim has no such optimizer.
    """
    check_optimizer(cfg)
    matrices, tables, vectors = [], [], []
    for name, p in model.named_parameters():
        inside = name.startswith("blocks.")
        table = name in ("embed", "head")
        (matrices if inside and p.ndim == 2 else tables if table else vectors).append(p)
    decayed = tables + (matrices if cfg.name == "adamw" else [])
    adamw = torch.optim.AdamW(
        [
            {"params": decayed, "weight_decay": cfg.weight_decay},
            {"params": vectors, "weight_decay": 0.0},
        ],
        lr=cfg.adam_learning_rate,
        betas=(cfg.adam_b1, cfg.adam_b2),
        eps=cfg.adam_eps,
        fused=True,
    )
    if cfg.name == "adamw":
        return [adamw]
    muon = torch.optim.Muon(
        matrices,
        lr=cfg.learning_rate,
        weight_decay=cfg.weight_decay,
        momentum=cfg.momentum,
        nesterov=cfg.nesterov,
        ns_steps=cfg.ns_steps or 5,
        adjust_lr_fn=TORCH_SCALES[cfg.scale],
    )
    return [muon, adamw]


def scale_at(cfg, count: int) -> float:
    """Share of the peak rate of update `count`, from 0, by an OptimConfig's schedule."""
    left = max(cfg.total_steps - count, 0)
    warm = (count + 1) / max(cfg.warmup_steps, 1)
    if cfg.schedule == "constant":
        return min(warm, 1.0)
    if cfg.schedule == "cosine":
        share = min(left / max(cfg.total_steps - cfg.warmup_steps, 1), 1.0)
        place = 0.5 - 0.5 * math.cos(math.pi * share)
    else:
        place = min(left / max(round(cfg.decay_fraction * cfg.total_steps), 1), 1.0)
    scale = cfg.final_scale + (1 - cfg.final_scale) * place
    return min(warm, scale) if left else scale


@contextlib.contextmanager
def muon_products(dtype: str):
    """torch.optim.Muon iterates in bfloat16 whatever the precision; for others its cast is off."""
    narrow = torch.Tensor.bfloat16
    if dtype != "bfloat16":
        torch.Tensor.bfloat16 = lambda x: x.clone()
    try:
        yield
    finally:
        torch.Tensor.bfloat16 = narrow


def clip(model, clip_norm):
    """Scales gradients to a global norm of clip_norm; clip_grad_norm_ adds 1e-6 to the norm.

    The host does not ask how large the norm is: on a GPU it would wait for the whole step.
    """
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    scale = (clip_norm / nn.utils.get_total_norm(grads)).clamp(max=1.0)
    torch._foreach_mul_(grads, scale)


def build_update(cfg, model):
    """update(rate=1.0): clips the gradients that are there and steps with them; a TrainConfig's."""
    optimizers = build_optimizers(cfg.optim, model)
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    peaks = [group["lr"] for group in groups]

    def update(rate=1.0):
        if cfg.optim.clip_norm:
            clip(model, cfg.optim.clip_norm)
        for group, peak in zip(groups, peaks, strict=True):
            group["lr"] = peak * rate
        with muon_products(cfg.optim.ns_dtype):
            for optimizer in optimizers:
                optimizer.step()

    return update


def build_step(cfg, model, compiled=False, recorder=None):
    """step(tokens_BT1 int64, docs_BT1=None, rate=1.0) -> nats []: a TrainConfig's whole step.

    The batch is one piece, whatever cfg.accumulation: the mean over its targets is the same.

    Args:
        compiled: forward and backward by torch.compile; optimizers are fused kernels as they are.
        recorder: a Recorder of the model, which every step is written to.
    """
    losses = torch.compile(model.losses) if compiled else model.losses
    update = build_update(cfg, model)
    options = {"z_loss": cfg.loss.z_loss, "masked": cfg.data.document_mask}
    if recorder:
        options["observe"] = recorder.observe

    def step(tokens_BT1, docs_BT1=None, rate=1.0):
        objective, nats = losses(tokens_BT1, docs_BT1=docs_BT1, **options)
        objective.backward()
        if recorder:
            recorder.before_step(tokens_BT1[:, :-1], tokens_BT1[:, 1:], nats)
        update(rate)
        if recorder:
            recorder.after_step()
        model.zero_grad()
        return nats.detach()

    return step


def record(cfg, steps, path, params, batches) -> None:
    """Trains the twin of a TrainConfig from given weights and writes its trace.

    Args:
        params: our plain dict of arrays at step 0.
        batches: iterator of {"tokens", and perhaps "docs"}, [B,T+1].

    Raises:
        ValueError: torch.optim has no such optimizer, or batches end early.
    """
    model, count = build_torch_model(cfg.model, params), 0
    options = {"precision": cfg.model.dtype, "keep_batches": False}
    with Recorder(path, model, **options) as recorder:
        step = build_step(cfg, model, recorder=recorder)
        for count, batch in enumerate(islice(batches, steps), 1):
            batch = {f"{name}_BT1": torch.as_tensor(x).long() for name, x in batch.items()}
            step(**batch, rate=scale_at(cfg.optim, count - 1))
    if count < steps:
        raise ValueError(f"there must be batches for {steps} steps; got {count}. Set --steps.")
