"""The transformer of a ModelConfig, written independently in PyTorch.

It shares no code with the JAX model. `load_params` copies weights in from jaxtrain's nested dict,
and `read_params` copies weights or gradients out. Parameters are float32; torch.autocast computes
in bfloat16 where the config asks for it.
"""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

try:
    import torch
except ModuleNotFoundError as error:
    raise ImportError(
        'the PyTorch side needs torch, which is missing. Run pip install "jaxtrain[crosscheck]".'
    ) from error

from torch import nn
from torch.nn import functional as F

from jaxtrain.config.train_config import ModelConfig


class Norm(nn.Module):
    def __init__(self, cfg: ModelConfig, width: int, form: str):
        super().__init__()
        self.form, self.eps = form, cfg.norm_eps
        self.gain = nn.Parameter(torch.ones(width))
        biased = form == "layer" and cfg.bias
        self.bias = nn.Parameter(torch.zeros(width)) if biased else None

    def forward(self, x):
        x = x.to(self.gain.dtype)  # autocast does not, and bfloat16 would round the mean square
        if self.form == "layer":
            return F.layer_norm(x, self.gain.shape, self.gain, self.bias, self.eps)
        return F.rms_norm(x, self.gain.shape, self.gain, self.eps)


def rotate(x_BHTK: torch.Tensor, cos_TK: torch.Tensor, sin_TK: torch.Tensor) -> torch.Tensor:
    """Applies rotary position embedding to the two halves of K. Source: arxiv.org/abs/2104.09864"""
    first, second = x_BHTK.chunk(2, -1)
    return x_BHTK * cos_TK + torch.cat((-second, first), -1) * sin_TK


def document_mask(docs_BT: torch.Tensor) -> torch.Tensor:
    """Returns bool [B,1,T,S]: whether key S is in query T's document and not after it."""
    same_BTS = docs_BT[:, :, None] == docs_BT[:, None, :]
    return same_BTS.tril()[:, None]


class Attention(nn.Module):
    def __init__(self, cfg: ModelConfig):
        super().__init__()
        self.cfg = cfg
        self.q = nn.Linear(cfg.D, cfg.H * cfg.K, cfg.bias)
        self.k = nn.Linear(cfg.D, cfg.G * cfg.K, cfg.bias)
        self.v = nn.Linear(cfg.D, cfg.G * cfg.K, cfg.bias)
        self.o = nn.Linear(cfg.H * cfg.K, cfg.D, cfg.bias)
        if cfg.qk_norm:
            self.q_norm = Norm(cfg, cfg.K, "rms")
            self.k_norm = Norm(cfg, cfg.K, "rms")

    def forward(self, x_BTD, rope, mask_B1TS=None):
        cfg = self.cfg
        linears = self.q, self.k, self.v
        q, k, v = (f(x_BTD).unflatten(-1, (-1, cfg.K)).transpose(1, 2) for f in linears)
        if cfg.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        if rope is not None:
            q, k = rotate(q, *rope), rotate(k, *rope)
        o_BHTK = F.scaled_dot_product_attention(
            q, k, v, mask_B1TS, is_causal=mask_B1TS is None, enable_gqa=cfg.G < cfg.H
        )
        return self.o(o_BHTK.transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    def __init__(self, cfg: ModelConfig):
        super().__init__()
        self.form = cfg.mlp
        if cfg.mlp == "swiglu":
            self.gate = nn.Linear(cfg.D, cfg.F, cfg.bias)
        self.up = nn.Linear(cfg.D, cfg.F, cfg.bias)
        self.down = nn.Linear(cfg.F, cfg.D, cfg.bias)

    def forward(self, x):
        if self.form == "swiglu":
            return self.down(F.silu(self.gate(x)) * self.up(x))
        if self.form == "gelu":
            return self.down(F.gelu(self.up(x), approximate="tanh"))
        return self.down(F.relu(self.up(x)).square())


class Block(nn.Module):
    def __init__(self, cfg: ModelConfig):
        super().__init__()
        self.attention_norm = Norm(cfg, cfg.D, cfg.norm)
        self.attention = Attention(cfg)
        self.mlp_norm = Norm(cfg, cfg.D, cfg.norm)
        self.mlp = Mlp(cfg)

    def forward(self, h_BTD, rope, mask_B1TS=None):
        h_BTD = h_BTD + self.attention(self.attention_norm(h_BTD), rope, mask_B1TS)
        return h_BTD + self.mlp(self.mlp_norm(h_BTD))


class TorchTransformer(nn.Module):
    """Maps tokens int64 [B,T] to logits float32 [B,T,V]."""

    def __init__(self, cfg: ModelConfig):
        super().__init__()
        self.cfg = cfg
        self.embed = nn.Parameter(torch.zeros(cfg.V, cfg.D))
        if cfg.position == "learned":
            self.positions = nn.Parameter(torch.zeros(cfg.positions, cfg.D))
        self.blocks = nn.ModuleList(Block(cfg) for _ in range(cfg.L))
        self.final_norm = Norm(cfg, cfg.D, cfg.norm)
        if not cfg.tied:
            self.head = nn.Parameter(torch.zeros(cfg.V, cfg.D))

    def _rope(self, T: int) -> tuple[torch.Tensor, torch.Tensor]:
        like = {"dtype": self.embed.dtype, "device": self.embed.device}
        exponent_K = torch.arange(0, self.cfg.K, 2, **like) / self.cfg.K
        position_T = torch.arange(T, **like)
        angle_TK = torch.outer(position_T, self.cfg.rope_theta**-exponent_K).repeat(1, 2)
        return angle_TK.cos(), angle_TK.sin()

    def forward(
        self,
        tokens_BT: torch.Tensor,
        docs_BT: torch.Tensor | None = None,
        observe: Callable[[str, torch.Tensor], None] = lambda name, x: None,
    ) -> torch.Tensor:
        """Computes logits.

        Args:
            docs_BT: document ids; attention stays inside documents. None: one document per row.
            observe: called with the name and output of each layer.
        """
        cfg, T = self.cfg, tokens_BT.shape[1]
        mask_B1TS = None if docs_BT is None else document_mask(docs_BT)
        device, is_bfloat16 = tokens_BT.device.type, cfg.dtype == "bfloat16"
        with torch.autocast(device, torch.bfloat16, enabled=is_bfloat16):
            h_BTD, rope = F.embedding(tokens_BT, self.embed), None
            if cfg.position == "learned":
                h_BTD = h_BTD + self.positions[:T]
            else:
                rope = self._rope(T)
            if is_bfloat16:  # the residual stream too, as in llm.c and nanochat
                h_BTD = h_BTD.bfloat16()
            observe("embed", h_BTD)
            for i, block in enumerate(self.blocks):
                h_BTD = block(h_BTD, rope, mask_B1TS)
                observe(f"blocks.{i}", h_BTD)
            head_VD = self.embed if cfg.tied else self.head
            logits = F.linear(self.final_norm(h_BTD), head_VD).to(self.embed.dtype)
        cap = cfg.logit_softcap
        logits = cap * torch.tanh(logits / cap) if cap else logits
        observe("logits", logits)
        return logits

    def loss(self, tokens_BT1: torch.Tensor) -> torch.Tensor:
        """Returns the mean loss in nats [] of predicting each next token of int64 [B,T+1]."""
        return self.losses(tokens_BT1)[1]

    def losses(
        self,
        tokens_BT1: torch.Tensor,
        docs_BT1: torch.Tensor | None = None,
        masked: bool = False,
        z_loss: float = 0.0,
        weights_BT: torch.Tensor | None = None,
        **observe: Any,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns (objective, nats), means over all targets but padding, whose document is -1.

        Args:
            masked: attention stays inside documents.
            z_loss: weight of the squared logarithm of the softmax's denominator.
            weights_BT: of the targets in the means; None counts all but padding.
            observe: see forward.
        """
        docs_BT = None
        if masked:
            assert docs_BT1 is not None, "a document mask needs document ids"
            docs_BT = docs_BT1[:, :-1]
        logits_NV = self(tokens_BT1[:, :-1], docs_BT, **observe).flatten(0, 1)
        targets_N = tokens_BT1[:, 1:].flatten()
        if weights_BT is not None:
            share_N = (weights_BT / weights_BT.sum()).flatten().to(logits_NV.dtype)
            nats = F.cross_entropy(logits_NV, targets_N, reduction="none") @ share_N
            return nats + z_loss * logits_NV.logsumexp(-1).square() @ share_N, nats
        if docs_BT1 is not None:
            is_target_N = docs_BT1[:, 1:].flatten() >= 0
            logits_NV, targets_N = logits_NV[is_target_N], targets_N[is_target_N]
        nats = F.cross_entropy(logits_NV, targets_N)
        if not z_loss:
            return nats, nats
        return nats + z_loss * logits_NV.logsumexp(-1).square().mean(), nats


def build_torch_model(cfg: ModelConfig, params: dict[str, Any] | None = None) -> TorchTransformer:
    """Builds the model, in float64 if cfg.dtype is, and copies `params` in if they are given."""
    model = TorchTransformer(cfg)
    model = model.double() if cfg.dtype == "float64" else model
    if params is not None:
        load_params(model, params)
    return model


LINEAR_NAMES = {"w": "weight", "b": "bias"}  # jaxtrain's -> nn.Linear's; other names are the same


def _flatten(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yields (name, leaf) of a nested dict; a name is the keys on its path, joined by dots."""
    for key, x in tree.items():
        if isinstance(x, dict):
            yield from _flatten(x, f"{prefix}{key}.")
        else:
            yield prefix + key, x


def _tensors(model: TorchTransformer, name: str) -> tuple[list[nn.Parameter], bool]:
    """Returns the tensors that one jaxtrain leaf stacks, and whether they are transposed, [O,I]."""
    *parents, last = name.removeprefix("blocks.").split(".")
    torch_name = ".".join([*parents, LINEAR_NAMES.get(last, last)])
    if not name.startswith("blocks."):
        return [model.get_parameter(torch_name)], False
    return [block.get_parameter(torch_name) for block in model.blocks.children()], last == "w"


@torch.no_grad()
def load_params(model: TorchTransformer, params: dict[str, Any]) -> None:
    """Copies jaxtrain's dict of arrays, nested or flat with dotted names, into the model.

    Raises:
        ValueError: the dict does not have exactly the model's parameters.
    """
    arrays = {name: np.asarray(x) for name, x in _flatten(params)}
    count, wanted = sum(x.size for x in arrays.values()), sum(p.numel() for p in model.parameters())
    if count != wanted:
        raise ValueError(
            f"params must have the PyTorch model's {wanted} weights; got {count}. "
            "Build both from one config."
        )
    for name, array in arrays.items():
        tensors, transposed = _tensors(model, name)
        for tensor, x in zip(tensors, array.reshape(len(tensors), -1), strict=True):
            shape = tensor.shape[::-1] if transposed else tensor.shape
            matrix = torch.from_numpy(x.reshape(shape).copy())
            tensor.copy_(matrix.T if transposed else matrix)


def read_params(
    model: TorchTransformer, like: dict[str, Any], grads: bool = False
) -> dict[str, Any]:
    """Returns weights, or their gradients, as NumPy arrays in the tree and shapes of `like`."""

    def read(x: Any, name: str) -> Any:
        if isinstance(x, dict):
            return {key: read(part, f"{name}.{key}" if name else key) for key, part in x.items()}
        tensors, transposed = _tensors(model, name)
        arrays = []
        for tensor in tensors:
            value = tensor.grad if grads else tensor.detach()
            assert value is not None, f"{name} has no gradient"
            arrays.append((value.T if transposed else value).numpy())
        return np.stack(arrays).reshape(x.shape)

    return read(like, "")
