"""PyTorch training loops as users write them, for the acceptance of crosscheck.

They share no code with jaxtrain's PyTorch side: optimizers are torch.optim's or written out here.
"""

import contextlib
import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from jaxtrain.crosscheck.recorder import Recorder
from tests.crosscheck_models import (
    TOKENS,
    VOCABULARY,
    Fault,
    Setup,
    Variant,
    activations_of,
    load_plain,
    load_transformers,
)

MUON_RATE, MOMENTUM = 0.02, 0.95
JORDAN = 3.4445, -4.7750, 2.0315
NO_FAULT = Fault()
# The matrix that faults of a single tensor change, by family.
MATRIX = {
    "gpt2": "transformer.h.1.mlp.c_fc.weight",
    "llama": "model.layers.1.mlp.up_proj.weight",
}


class PlainAdamW(torch.optim.Optimizer):
    """AdamW written out, in which faults can be planted."""

    def __init__(self, groups, setup: Setup, fault: Fault):
        super().__init__(groups, {"lr": setup.rate, "weight_decay": 0.0})
        self.setup, self.fault = setup, fault

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self.update(p, group["lr"], group["weight_decay"])

    def update(self, p, lr, decay):
        fault, state = self.fault, self.state[p]
        b1, b2 = self.setup.betas
        b1 = fault.mix("first beta", b1, lambda: 0.8)
        b2 = fault.mix("second beta", b2, lambda: 0.999)
        eps = fault.mix("epsilon of Adam", self.setup.adam_eps, lambda: 1e-6)
        coupled = fault.amount("weight decay in the gradient")
        grad = p.grad + coupled * decay * p
        n = state["n"] = state.get("n", 0) + 1
        m = state["m"] = b1 * state.get("m", 0) + (1 - b1) * grad
        v = state["v"] = b2 * state.get("v", 0) + (1 - b2) * grad * grad
        correction1, correction2 = (
            fault.mix("no bias correction", 1 - b**n, lambda: 1.0) for b in (b1, b2)
        )
        m, v = m / correction1, v / correction2
        right = v.sqrt() + eps
        root = fault.mix("epsilon inside the root", right, lambda: (v + eps).sqrt())
        p.mul_(1 - lr * (1 - coupled) * decay).sub_(lr * m / root)


class PlainMuon(torch.optim.Optimizer):
    """Muon written out, which orthogonalises in a type to choose.

    Source: Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/
    """

    def __init__(self, groups, setup: Setup, fault: Fault):
        super().__init__(groups, {"lr": MUON_RATE, "weight_decay": 0.0})
        self.setup, self.fault = setup, fault

    def direction(self, x, dtype):
        iterations = 5
        y = x.to(dtype)
        y = y / y.norm()
        y = y if y.shape[0] <= y.shape[1] else y.T
        a, b, c = JORDAN
        for _ in range(iterations):
            gram = y @ y.T
            y = a * y + (b * gram + c * gram @ gram) @ y
        y = y if x.shape[0] <= x.shape[1] else y.T
        return y.to(x.dtype)

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                self.update(p, group["lr"], group["weight_decay"])

    def update(self, p, lr, decay):
        fault, state = self.fault, self.state[p]
        m = state["m"] = MOMENTUM * state.get("m", 0) + (1 - MOMENTUM) * p.grad
        nesterov = MOMENTUM * m + (1 - MOMENTUM) * p.grad
        x = fault.mix("momentum without Nesterov", nesterov, lambda: m)
        narrow = lambda: self.direction(x, torch.bfloat16)
        y = self.direction(x, getattr(torch, self.setup.ns_dtype))
        y = fault.mix("Newton-Schulz in bfloat16", y, narrow)
        ratio = p.shape[0] / p.shape[1]
        scale = max(1, ratio) ** 0.5
        scale = fault.mix("scale by the wrong fan", scale, lambda: max(1, 1 / ratio) ** 0.5)
        p.mul_(1 - lr * decay).sub_(lr * scale * y)


def decay_group(name: str, p: torch.Tensor) -> str:
    """Returns jaxtrain's name of the group of parameters whose weights decay together."""
    if p.ndim == 1:
        return "vectors"
    parts = set(name.split("."))
    if parts & {"wpe", "positions"}:
        return "positions"
    if parts & {"wte", "embed_tokens", "embed"}:
        return "embedding"
    return "head" if parts & {"lm_head", "head"} else "matrices"


def build_optimizers(
    setup: Setup, variant: Variant, model: nn.Module, fault: Fault = NO_FAULT
) -> list[torch.optim.Optimizer]:
    """Builds AdamW, or Muon for the matrices and AdamW for the rest."""
    groups: dict[str, dict[str, Any]] = {}
    for name, p in model.named_parameters():
        kind = decay_group(name, p)
        decay = setup.weight_decay if kind in setup.decays.split(",") else 0.0
        if kind == "vectors":
            decay = fault.mix("weight decay of vectors", decay, lambda: setup.weight_decay)
        if kind == "embedding":
            decay = fault.mix("no weight decay of the embedding", decay, lambda: 0.0)
        groups.setdefault(kind, {"params": [], "weight_decay": decay})["params"].append(p)
    muon = groups.pop("matrices") if setup.optimizer == "muon" else None
    if variant.adam == "single":
        adam: torch.optim.Optimizer = PlainAdamW(groups.values(), setup, fault)
    else:
        how = {variant.adam: True}
        adam = torch.optim.AdamW(
            list(groups.values()), setup.rate, setup.betas, setup.adam_eps, **how
        )
    if muon is None:
        return [adam]
    if setup.ns_dtype == "bfloat16":
        return [torch.optim.Muon([muon], MUON_RATE, momentum=MOMENTUM), adam]
    return [PlainMuon([muon], setup, fault), adam]


def rate_share(setup: Setup, count: int) -> float:
    """Returns the share of the peak rate after `count` updates: linear warm-up, then cosine."""
    share = min((count + 1) / setup.warmup, 1.0)
    if setup.schedule == "cosine" and count >= setup.warmup:
        done = (count - setup.warmup) / (setup.steps - setup.warmup)
        share = min(share, 0.5 + 0.5 * math.cos(math.pi * done))
    return share


def clip(setup: Setup, model: nn.Module, fault: Fault) -> None:
    """Clips the gradients to their global norm."""
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    if setup.clip_eps == 1e-6 and not fault.size:
        torch.nn.utils.clip_grad_norm_(model.parameters(), setup.clip)
        return
    norm = torch.stack([g.norm() for g in grads]).norm()
    norm = norm + fault.mix("epsilon of clip_grad_norm_", setup.clip_eps, lambda: 1e-6)
    share = min(1.0, setup.clip / float(norm))
    for g in grads:
        alone = lambda g=g: min(1.0, setup.clip / float(g.norm()))
        part = fault.mix("each tensor clipped alone", share, alone)
        g.mul_(fault.mix("no clipping", part, lambda: 1.0))


def mean_loss(logits, targets, order, fault: Fault) -> torch.Tensor:
    """Returns the mean loss in nats of [B,T,V] and [B,T]."""
    logits, targets = logits.flatten(0, 1), targets.flatten()
    if order == "rows":
        loss = -logits.log_softmax(-1).gather(1, targets[:, None]).flip(0).mean()
    else:
        loss = F.cross_entropy(logits, targets)
    wrong = lambda: F.cross_entropy(logits, targets.roll(-1))
    loss = fault.mix("targets off by one", loss, wrong)
    smoothing = 0.1 * fault.amount("label smoothing")
    if smoothing:
        loss = F.cross_entropy(logits, targets, label_smoothing=smoothing)
    square = lambda: loss + 1e-4 * logits.logsumexp(-1).square().mean()
    return fault.mix("z-loss", loss, square)


def accumulate_gradients(
    setup: Setup, variant: Variant, model: nn.Module, tokens: torch.Tensor, fault: Fault
) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Computes gradients, and yields (inputs, targets, loss) after each micro-batch.

    The losses in nats add up to the batch's mean.
    """
    x, y = tokens[:, :-1], tokens[:, 1:]
    B, count = len(x), setup.accumulation
    cuts = np.linspace(0, B, count + 1).astype(int)
    uneven = fault.amount("mean of the means of uneven micro-batches")
    if uneven:
        cuts = np.array([0, B // 4, B])
    pieces = list(zip(cuts, cuts[1:], strict=False))
    for i, (start, stop) in enumerate(reversed(pieces) if variant.order == "rows" else pieces):
        part = slice(start, stop)
        out = model(x[part])
        logits = out if isinstance(out, torch.Tensor) else out.logits
        loss = mean_loss(logits, y[part], variant.order, fault)
        share = fault.mix(
            "mean of the means of uneven micro-batches",
            (stop - start) / B,
            lambda: 1 / len(pieces),
        )
        factor = fault.mix("sum over micro-batches", 1.0, lambda: len(pieces))
        if i == len(pieces) - 1:
            factor = fault.mix("last micro-batch lost", factor, lambda: 0.0)
        (factor * share * loss).backward()
        yield x[part], y[part], share * loss


def train(
    setup: Setup,
    variant: Variant,
    folder: Path,
    batches: Iterable[np.ndarray],
    path: Path,
    fault: Fault = NO_FAULT,
    model: nn.Module | None = None,
) -> None:
    """Trains and writes a trace.

    Args:
        folder: Hugging Face folder of the initial weights.
        batches: tokens int [B,T+1].
        model: replaces the one that `variant` names.
    """
    torch.set_num_threads(variant.threads)
    torch.manual_seed(0)  # of dropout
    if model is None and variant.module == "transformers":
        model = load_transformers(setup, variant, folder)
    elif model is None:
        model = load_plain(setup, variant, folder, fault)
    if size := fault.amount("one weight matrix changed"):
        with torch.no_grad():
            model.get_parameter(MATRIX[setup.family]).mul_(1 + 1e-3 * size)
    with Recorder(path, model, activations=activations_of(model), average="tokens") as recorder:
        optimizers = build_optimizers(setup, variant, model, fault)
        peaks = [[group["lr"] for group in o.param_groups] for o in optimizers]
        before = [p.detach().clone() for p in model.parameters()]
        for count, tokens in enumerate(batches):
            tokens = torch.from_numpy(tokens).long()
            with stale_weights(model, before, fault):
                for part in accumulate_gradients(setup, variant, model, tokens, fault):
                    recorder.micro_batch(*part)
            recorder.before_step()
            before = [p.detach().clone() for p in model.parameters()]
            if setup.clip:
                clip(setup, model, fault)
            share = rate_share(setup, count)
            early = lambda n=count: rate_share(setup, n - 1)
            share = fault.mix("schedule one step late", share, early)
            share *= 1 + 0.1 * fault.amount("learning rate")
            for optimizer, rates in zip(optimizers, peaks, strict=True):
                for group, peak in zip(optimizer.param_groups, rates, strict=True):
                    group["lr"] = share * peak
                optimizer.step()
            spoil_weights(model, setup, before, fault)
            recorder.after_step()
            clear(model, fault)


@contextlib.contextmanager
def stale_weights(model: nn.Module, before: list[torch.Tensor], fault: Fault) -> Iterator[None]:
    """Computes gradients at the weights of the step before, if that fault is planted."""
    if not (size := fault.amount("stale weights")):
        yield
        return
    now = [p.detach().clone() for p in model.parameters()]
    with torch.no_grad():
        for p, old in zip(model.parameters(), before, strict=True):
            p.lerp_(old, size)
    yield
    with torch.no_grad():
        for p, new in zip(model.parameters(), now, strict=True):
            p.copy_(new)


@torch.no_grad()
def spoil_weights(model: nn.Module, setup: Setup, before: list[torch.Tensor], fault: Fault) -> None:
    """Changes the weights after a step, if a fault of that kind is planted."""
    for (name, p), old in zip(model.named_parameters(), before, strict=True):
        p.lerp_(p.bfloat16().to(p.dtype), fault.amount("weights stored in bfloat16"))
        if name == MATRIX[setup.family]:
            p.lerp_(old, fault.amount("one weight matrix not trained"))


def clear(model: nn.Module, fault: Fault) -> None:
    """Clears the gradients; a fault leaves a part of them."""
    for p in model.parameters():
        if p.grad is not None:
            p.grad.mul_(fault.amount("gradients not cleared"))


def make_batches(setup: Setup, variant: Variant, text: bytes) -> Iterator[np.ndarray]:
    """Yields a batch per step, int64 [rows,TOKENS+1], of random places in a text or random."""
    generator = np.random.default_rng(variant.seed)
    tokens, shape = np.frombuffer(text, np.uint8), (setup.rows, TOKENS + 1)
    for _ in range(setup.steps):
        starts = generator.integers(0, len(tokens) - TOKENS, (setup.rows, 1))
        chosen = tokens[starts + np.arange(TOKENS + 1)]
        if variant.data == "uniform":
            chosen = generator.integers(0, VOCABULARY, shape)
        yield chosen.astype(np.int64)
