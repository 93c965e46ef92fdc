"""Track 3 of modded-nanogpt in float64, written from its definition: model, Muon and AdamW.

It shares no code with jaxtrain. Differences from the benchmark's script: numbers are float64
everywhere, and Newton-Schulz does not add 1e-7 to the norm of the summed gradient.

Source: Jordan et al., https://github.com/KellerJordan/modded-nanogpt,
    records/track_3_optimization/results/20260610_tuned_baseline_3250
"""

import torch
from torch import nn
from torch.nn import functional as F

EPS = 2.0**-23  # of F.rms_norm for bfloat16 activations


class Gain(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.gains = nn.Parameter(torch.ones(width, dtype=torch.float64))

    def forward(self, x):
        return F.rms_norm(x, self.gains.shape, self.gains, EPS)


def linear(inputs, outputs):
    return nn.Linear(inputs, outputs, dtype=torch.float64)


def turn(x_BTHK):
    """Turns each pair of entries backwards by its angle; half of the pairs have the angle 0."""
    count = x_BTHK.shape[-1] // 4
    frequency = (1 / 1024) ** torch.linspace(0, 1, count, dtype=torch.float64)
    frequency = torch.cat([frequency, torch.zeros(count, dtype=torch.float64)])
    angle = torch.outer(torch.arange(x_BTHK.shape[1], dtype=torch.float64), frequency)[:, None]
    first, second = x_BTHK.chunk(2, -1)
    left = first * angle.cos() + second * angle.sin()
    right = second * angle.cos() - first * angle.sin()
    return torch.cat([left, right], -1)


class Layer(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.heads, self.norm1, self.norm2 = heads, Gain(width), Gain(width)
        self.q, self.k, self.v, self.o = (linear(width, width) for _ in "qkvo")
        self.up, self.down = linear(width, 4 * width), linear(4 * width, width)

    def attend(self, x):
        q, k, v = (f(x).unflatten(-1, (self.heads, -1)) for f in (self.q, self.k, self.v))
        q, k = (turn(F.rms_norm(y, y.shape[-1:], eps=EPS)) for y in (q, k))
        scores = 0.12 * torch.einsum("bthk,bshk->bhts", q, k)
        future = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
        shares = scores.masked_fill(future, -torch.inf).softmax(-1)
        return self.o(torch.einsum("bhts,bshk->bthk", shares, v).flatten(2))

    def forward(self, x):
        x = x + self.attend(self.norm1(x))
        return x + self.down(self.up(self.norm2(x)).relu().square())


class Track3(nn.Module):
    def __init__(self, width, heads, layers, vocabulary):
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width, dtype=torch.float64)
        self.norm1, self.norm2 = Gain(width), Gain(width)
        self.blocks = nn.ModuleList(Layer(width, heads) for _ in range(layers))
        self.proj = linear(width, vocabulary)

    def forward(self, tokens, targets):
        """Returns the summed loss of int64 [B,T] tokens and targets."""
        x = self.norm1(self.embed(tokens))
        for block in self.blocks:
            x = block(x)
        logits = self.proj(self.norm2(x))
        logits = 15 * logits / (logits.square() + 15**2).sqrt()
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")


def orthogonalize(x):
    """Applies 12 iterations of the polynomial 2s - 1.5s^3 + 0.5s^5 to the singular values."""
    x = x / x.norm()
    for _ in range(12):
        gram = x @ x.T
        x = 2 * x + (-1.5 * gram + 0.5 * gram @ gram) @ x
    return x


def build_step(model, steps):
    """Returns step(count), which updates the model from its gradients; count starts at 0."""
    matrices = [p for p in model.blocks.parameters() if p.ndim == 2]
    vectors = [p for p in model.parameters() if p.ndim == 1]
    peaks = (0.7, 0.004, 0.015)
    adamw = torch.optim.AdamW(
        [
            {"params": params, "lr": rate}
            for params, rate in zip(
                ([model.embed.weight], [model.proj.weight], vectors), peaks, strict=True
            )
        ],
        betas=(0.8, 0.95),
        eps=1e-10,
        weight_decay=0.001,
    )
    momenta = [torch.zeros_like(p) for p in matrices]

    @torch.no_grad()
    def step(count):
        share = min(1.0, (1 - count / steps) / 0.7)
        for group, peak in zip(adamw.param_groups, peaks, strict=True):
            group["lr"] = peak * share
        adamw.step()
        rate = 0.025 * share
        for p, momentum in zip(matrices, momenta, strict=True):
            momentum.lerp_(p.grad, 0.05)
            direction = orthogonalize(p.grad.lerp(momentum, 0.95))
            direction *= max(1, p.shape[0] / p.shape[1]) ** 0.5
            p.mul_(1 - rate * 0.05).sub_(rate * direction)
        model.zero_grad()

    return step
