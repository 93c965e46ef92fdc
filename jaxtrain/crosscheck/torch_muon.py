"""Muon in PyTorch with a choice of Newton-Schulz's type; torch.optim.Muon has bfloat16 only.

Source: Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/
"""

import math

import torch

# adjust_lr_fn of torch.optim.Muon -> factor of a step, from the numbers of outputs and inputs
FACTORS = {
    "original": lambda outputs, inputs: math.sqrt(max(1, outputs / inputs)),
    "match_rms_adamw": lambda outputs, inputs: 0.2 * math.sqrt(max(outputs, inputs)),
}


def orthogonalize(x_OI: torch.Tensor, dtype: torch.dtype, steps: int) -> torch.Tensor:
    """Applies Jordan's Newton-Schulz iteration in `dtype`, rounding where torch.optim.Muon does."""
    a, b, c = 3.4445, -4.7750, 2.0315
    is_tall = x_OI.shape[0] > x_OI.shape[1]
    x = x_OI.to(dtype)
    x = x.T if is_tall else x
    x = x / x.norm().clamp(min=1e-7)
    for _ in range(steps):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if is_tall else x


class Muon(torch.optim.Optimizer):
    """Equals torch.optim.Muon, bitwise in bfloat16, but has no default settings.

    Args:
        params: matrices [O,I].
        dtype: type of the Newton-Schulz iteration.
        settings: lr, weight_decay, momentum, nesterov, ns_steps and adjust_lr_fn, as in torch.
    """

    def __init__(self, params, dtype: torch.dtype, **settings):
        super().__init__(params, settings)
        self.dtype = dtype

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            rate, momentum = group["lr"], group["momentum"]
            for p in group["params"]:
                mean = self.state[p].setdefault("momentum", torch.zeros_like(p))
                mean.lerp_(p.grad, 1 - momentum)
                ahead = p.grad.lerp(mean, momentum) if group["nesterov"] else mean
                direction = orthogonalize(ahead, self.dtype, group["ns_steps"])
                factor = FACTORS[group["adjust_lr_fn"]](*p.shape)
                p.mul_(1 - rate * group["weight_decay"]).add_(direction, alpha=-rate * factor)
