"""The PyTorch twin: the transformer of a ModelConfig, as PyTorch has it.

It shares nothing with the JAX side but the config. Parameters carry the names of our plain dict,
so `load_params` makes both start equal and `read_params` gives weights or gradients back in our
shapes. Precision is torch.autocast's over float32 masters, with the residual stream in bfloat16.
"""

import numpy as np

try:
    import torch
except ModuleNotFoundError as error:
    raise ImportError(
        'the PyTorch twin needs torch, which is missing. Run pip install "jaxtrain[crosscheck]".'
    ) from error

from torch import nn
from torch.nn import functional as F


class Norm(nn.Module):
    def __init__(self, cfg, width, form):
        super().__init__()
        self.form, self.eps = form, cfg.norm_eps
        self.gain = nn.Parameter(torch.ones(width))
        biased = form == "layer" and cfg.bias
        self.bias = nn.Parameter(torch.zeros(width)) if biased else None

    def forward(self, x):
        x = x.to(self.gain.dtype)  # bf16 would lose the mean square, and autocast leaves it be
        if self.form == "layer":
            return F.layer_norm(x, self.gain.shape, self.gain, self.bias, self.eps)
        return F.rms_norm(x, self.gain.shape, self.gain, self.eps)


def rotate(x_BHTK, cos_TK, sin_TK):
    """Rotary position, halves rotated. Source: https://arxiv.org/abs/2104.09864."""
    first, second = x_BHTK.chunk(2, -1)
    return x_BHTK * cos_TK + torch.cat((-second, first), -1) * sin_TK


def same_document(docs_BT):
    """bool [B,1,T,T]: whether a query sees a key, which stands before it in its document."""
    same_BTT = docs_BT[:, :, None] == docs_BT[:, None, :]
    return same_BTT.tril()[:, None]


class Attention(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.cfg = cfg
        self.q = nn.Linear(cfg.D, cfg.H * cfg.K, cfg.bias)
        self.k = nn.Linear(cfg.D, cfg.G * cfg.K, cfg.bias)
        self.v = nn.Linear(cfg.D, cfg.G * cfg.K, cfg.bias)
        self.o = nn.Linear(cfg.H * cfg.K, cfg.D, cfg.bias)
        if cfg.qk_norm:
            self.q_norm = Norm(cfg, cfg.K, "rms")
            self.k_norm = Norm(cfg, cfg.K, "rms")

    def forward(self, x_BTD, rope, seen_B1TT=None):
        cfg = self.cfg
        q = self.q(x_BTD).unflatten(-1, (cfg.H, cfg.K)).transpose(1, 2)
        k = self.k(x_BTD).unflatten(-1, (cfg.G, cfg.K)).transpose(1, 2)
        v = self.v(x_BTD).unflatten(-1, (cfg.G, cfg.K)).transpose(1, 2)
        if cfg.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        if rope is not None:
            q, k = rotate(q, *rope), rotate(k, *rope)
        mask = {"is_causal": True} if seen_B1TT is None else {"attn_mask": seen_B1TT}
        o_BHTK = F.scaled_dot_product_attention(q, k, v, **mask, enable_gqa=cfg.G < cfg.H)
        return self.o(o_BHTK.transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    def __init__(self, cfg):
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
    def __init__(self, cfg):
        super().__init__()
        self.attention_norm = Norm(cfg, cfg.D, cfg.norm)
        self.attention = Attention(cfg)
        self.mlp_norm = Norm(cfg, cfg.D, cfg.norm)
        self.mlp = Mlp(cfg)

    def forward(self, h_BTD, rope, seen_B1TT=None):
        h_BTD = h_BTD + self.attention(self.attention_norm(h_BTD), rope, seen_B1TT)
        return h_BTD + self.mlp(self.mlp_norm(h_BTD))


class TorchTransformer(nn.Module):
    """tokens int64 [B,T] -> logits float32 [B,T,V]; `loss` is the mean nats of the next token."""

    def __init__(self, cfg):
        super().__init__()
        self.cfg = cfg
        self.embed = nn.Parameter(torch.zeros(cfg.V, cfg.D))
        if cfg.position == "learned":
            self.positions = nn.Parameter(torch.zeros(cfg.positions, cfg.D))
        self.blocks = nn.ModuleList(Block(cfg) for _ in range(cfg.L))
        self.final_norm = Norm(cfg, cfg.D, cfg.norm)
        if not cfg.tied:
            self.head = nn.Parameter(torch.zeros(cfg.V, cfg.D))

    def _rope(self, T):
        like = {"dtype": self.embed.dtype, "device": self.embed.device}
        exponent_K = torch.arange(0, self.cfg.K, 2, **like) / self.cfg.K
        at_T = torch.arange(T, **like)
        angle_TK = torch.outer(at_T, self.cfg.rope_theta**-exponent_K).repeat(1, 2)
        return angle_TK.cos(), angle_TK.sin()

    def forward(self, tokens_BT, docs_BT=None, observe=lambda name, x: None):
        """docs_BT: attention stays inside documents; observe(name, x) sees each layer's output."""
        cfg, T = self.cfg, tokens_BT.shape[1]
        seen_B1TT = None if docs_BT is None else same_document(docs_BT)
        device, narrow = tokens_BT.device.type, cfg.dtype == "bfloat16"
        with torch.autocast(device, torch.bfloat16, enabled=narrow):
            h_BTD, rope = F.embedding(tokens_BT, self.embed), None
            if cfg.position == "learned":
                h_BTD = h_BTD + self.positions[:T]
            else:
                rope = self._rope(T)
            if cfg.dtype == "bfloat16":  # the residual stream too, as llm.c and nanochat have it
                h_BTD = h_BTD.bfloat16()
            observe("embed", h_BTD)
            for i, block in enumerate(self.blocks):
                h_BTD = block(h_BTD, rope, seen_B1TT)
                observe(f"blocks.{i}", h_BTD)
            head_VD = self.embed if cfg.tied else self.head
            logits = F.linear(self.final_norm(h_BTD), head_VD).to(self.embed.dtype)
        cap = cfg.logit_softcap
        logits = cap * torch.tanh(logits / cap) if cap else logits
        observe("logits", logits)
        return logits

    def loss(self, tokens_BT1, **options):
        """int64 [B,T+1] -> nats []."""
        return self.losses(tokens_BT1, **options)[1]

    def losses(self, tokens_BT1, docs_BT1=None, masked=False, z_loss=0.0, **observe):
        """(objective, nats): means over the targets that are no padding (documents of -1).

        Args:
            masked: attention stays inside documents too.
            z_loss: weight of the squared logarithm of the softmax's denominator.
        """
        docs_BT = docs_BT1[:, :-1] if masked else None
        logits_ND = self(tokens_BT1[:, :-1], docs_BT, **observe).flatten(0, 1)
        targets_N = tokens_BT1[:, 1:].flatten()
        if docs_BT1 is not None:
            kept_N = docs_BT1[:, 1:].flatten() >= 0
            logits_ND, targets_N = logits_ND[kept_N], targets_N[kept_N]
        nats = F.cross_entropy(logits_ND, targets_N)
        if not z_loss:
            return nats, nats
        return nats + z_loss * logits_ND.logsumexp(-1).square().mean(), nats


def build_torch_model(cfg, params=None) -> TorchTransformer:
    """The PyTorch model of a ModelConfig, with float64 masters for float64."""
    model = TorchTransformer(cfg)
    model = model.double() if cfg.dtype == "float64" else model
    if params is not None:
        load_params(model, params)
    return model


NAMES = {"w": "weight", "b": "bias"}  # ours -> nn.Linear's; the others are called alike


def _flatten(tree, path=()):
    for name, x in tree.items():
        yield from _flatten(x, (*path, name)) if isinstance(x, dict) else [((*path, name), x)]


def _tensors(model, path):
    """The tensors that our leaf at this path stacks, and whether they are Linear's [O,I]."""
    name = ".".join((*path[:-1], NAMES.get(path[-1], path[-1])))
    if path[0] != "blocks":
        return [model.get_parameter(name)], False
    name = name.removeprefix("blocks.")
    return [block.get_parameter(name) for block in model.blocks], path[-1] == "w"


@torch.no_grad()
def load_params(model, params) -> None:
    """Copies our plain dict of arrays into a TorchTransformer.

    Raises:
        ValueError: the dict does not hold exactly the model's parameters.
    """
    arrays = {path: np.asarray(x) for path, x in _flatten(params)}
    count, wanted = sum(x.size for x in arrays.values()), sum(p.numel() for p in model.parameters())
    if count != wanted:
        raise ValueError(
            f"params must hold the twin's {wanted} weights; got {count}. Build both of one config."
        )
    for path, array in arrays.items():
        tensors, transposed = _tensors(model, path)
        for tensor, x in zip(tensors, array.reshape(len(tensors), -1), strict=True):
            shape = tensor.shape[::-1] if transposed else tensor.shape
            matrix = torch.from_numpy(x.reshape(shape).copy())
            tensor.copy_(matrix.T if transposed else matrix)


def read_params(model, like, grads=False) -> dict:
    """Weights, or their gradients, as NumPy arrays in the tree and shapes of `like`."""

    def read(path, shape):
        tensors, transposed = _tensors(model, path)
        parts = [t.grad if grads else t.detach() for t in tensors]
        arrays = [(x.T if transposed else x).numpy() for x in parts]
        return np.stack(arrays).reshape(shape)

    def walk(tree, path=()):
        return {
            name: walk(x, (*path, name)) if isinstance(x, dict) else read((*path, name), x.shape)
            for name, x in tree.items()
        }

    return walk(like)
