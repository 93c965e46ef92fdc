"""The transformer of a ModelConfig, written independently in PyTorch.

It shares no code with the JAX model. Parameters are float32; torch.autocast computes in bfloat16
where the config asks for it. torch_weights.py copies weights in and out.
"""

from collections.abc import Callable
from typing import Any

try:
    import torch
except ModuleNotFoundError as error:
    raise ImportError(
        'the PyTorch side needs torch, which is missing. Run pip install "jaxtrain[crosscheck]".'
    ) from error

from torch import nn
from torch.nn import functional as F

from jaxtrain.config.train_config import ModelConfig
from jaxtrain.crosscheck.torch_positions import (
    attention_mask,
    layer_kind,
    rope_tables,
    rotate,
)
from jaxtrain.crosscheck.torch_weights import load_params


class Norm(nn.Module):
    def __init__(self, cfg: ModelConfig, width: int, form: str, gain: bool = True):
        super().__init__()
        self.form, self.shape, self.eps = form, (width,), cfg.norm_eps
        self.gain = nn.Parameter(torch.ones(width)) if cfg.norm_gain and gain else None
        biased = form == "layer" and cfg.bias
        self.bias = nn.Parameter(torch.zeros(width)) if biased else None

    def forward(self, x):
        # Autocast does not widen x, and bfloat16 would round the mean square.
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        if self.form == "layer":
            return F.layer_norm(x, self.shape, self.gain, self.bias, self.eps)
        return F.rms_norm(x, self.shape, self.gain, self.eps)


def capped_attention(q_BHTK, k_BGSK, v_BGSK, mask_B1TS, scale: float, cap: float) -> torch.Tensor:
    """Attends with scores cap * tanh(s / cap), which PyTorch's own attention lacks."""
    T, repeats = q_BHTK.shape[2], q_BHTK.shape[1] // k_BGSK.shape[1]
    k_BHSK, v_BHSK = (x.repeat_interleave(repeats, 1) for x in (k_BGSK, v_BGSK))
    if mask_B1TS is None:
        mask_B1TS = torch.ones(T, T, dtype=torch.bool, device=q_BHTK.device).tril()
    s_BHTS = scale * (q_BHTK @ k_BHSK.mT)
    s_BHTS = (cap * torch.tanh(s_BHTS / cap)).masked_fill(~mask_B1TS, -torch.inf)
    return s_BHTS.softmax(-1).to(v_BHSK.dtype) @ v_BHSK


class Attention(nn.Module):
    def __init__(self, cfg: ModelConfig):
        super().__init__()
        self.cfg = cfg
        qkv_bias = cfg.bias or cfg.attention_bias in ("qkv", "all")
        self.q = nn.Linear(cfg.D, cfg.H * cfg.K, qkv_bias)
        self.k = nn.Linear(cfg.D, cfg.G * cfg.K, qkv_bias)
        self.v = nn.Linear(cfg.D, cfg.G * cfg.K, qkv_bias)
        self.o = nn.Linear(cfg.H * cfg.K, cfg.D, cfg.bias or cfg.attention_bias == "all")
        self.q_norm = self.k_norm = nn.Identity()
        if cfg.qk_norm:
            heads = (cfg.H, cfg.G) if cfg.qk_norm_over == "all" else (1, 1)
            self.q_norm, self.k_norm = (
                Norm(cfg, n * cfg.K, "rms", cfg.qk_norm_gain) for n in heads
            )

    def forward(self, x_BTD, rope, mask_B1TS=None):
        cfg = self.cfg
        split_heads = lambda x: x.unflatten(-1, (-1, cfg.K)).transpose(1, 2)
        q, k, v = self.q(x_BTD), self.k(x_BTD), self.v(x_BTD)
        if cfg.qk_norm_over == "all":
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = split_heads(q), split_heads(k), split_heads(v)
        if cfg.qk_norm_over == "head":
            q, k = self.q_norm(q), self.k_norm(k)
        if rope is not None:
            q, k = rotate(q, *rope), rotate(k, *rope)
        scale = cfg.attention_scale or cfg.K**-0.5
        if cfg.attention_softcap:
            o_BHTK = capped_attention(q, k, v, mask_B1TS, scale, cfg.attention_softcap)
        else:
            o_BHTK = F.scaled_dot_product_attention(
                *(q, k, v, mask_B1TS),
                is_causal=mask_B1TS is None,
                scale=scale,
                enable_gqa=cfg.G < cfg.H,
            )
        return self.o(o_BHTK.transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    def __init__(self, cfg: ModelConfig):
        super().__init__()
        self.form = cfg.mlp
        if cfg.mlp in ("swiglu", "geglu"):
            self.gate = nn.Linear(cfg.D, cfg.F, cfg.bias)
        self.up = nn.Linear(cfg.D, cfg.F, cfg.bias)
        self.down = nn.Linear(cfg.F, cfg.D, cfg.bias)

    def forward(self, x):
        if self.form == "swiglu":
            return self.down(F.silu(self.gate(x)) * self.up(x))
        if self.form == "geglu":
            return self.down(F.gelu(self.gate(x), approximate="tanh") * self.up(x))
        if self.form == "gelu":
            return self.down(F.gelu(self.up(x), approximate="tanh"))
        return self.down(F.relu(self.up(x)).square())


class Block(nn.Module):
    def __init__(self, cfg: ModelConfig):
        super().__init__()
        self.attention_norm = self.attention_post_norm = nn.Identity()
        self.mlp_norm = self.mlp_post_norm = nn.Identity()
        if cfg.norm_place != "post":
            self.attention_norm = Norm(cfg, cfg.D, cfg.norm)
            self.mlp_norm = Norm(cfg, cfg.D, cfg.norm)
        if cfg.norm_place != "pre":
            self.attention_post_norm = Norm(cfg, cfg.D, cfg.norm)
            self.mlp_post_norm = Norm(cfg, cfg.D, cfg.norm)
        self.attention = Attention(cfg)
        self.mlp = Mlp(cfg)

    def forward(self, h_BTD, rope, mask_B1TS=None):
        y_BTD = self.attention(self.attention_norm(h_BTD), rope, mask_B1TS)
        h_BTD = h_BTD + self.attention_post_norm(y_BTD).to(h_BTD.dtype)
        y_BTD = self.mlp(self.mlp_norm(h_BTD))
        return h_BTD + self.mlp_post_norm(y_BTD).to(h_BTD.dtype)


class TorchTransformer(nn.Module):
    """Maps tokens int64 [B,T] to logits float32 [B,T,V]."""

    def __init__(self, cfg: ModelConfig):
        super().__init__()
        self.cfg = cfg
        self.embed = nn.Parameter(torch.zeros(cfg.V, cfg.D))
        if cfg.position == "learned":
            self.positions = nn.Parameter(torch.zeros(cfg.positions, cfg.D))
        self.embed_norm = Norm(cfg, cfg.D, cfg.norm) if cfg.embed_norm else nn.Identity()
        self.blocks = nn.ModuleList(Block(cfg) for _ in range(cfg.L))
        self.final_norm = Norm(cfg, cfg.D, cfg.norm)
        if not cfg.tied:
            self.head = nn.Parameter(torch.zeros(cfg.V, cfg.D))
        self.head_bias = nn.Parameter(torch.zeros(cfg.V)) if cfg.head_bias else None

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
        like = {"dtype": self.embed.dtype, "device": tokens_BT.device}
        kinds = [layer_kind(cfg, i + 1) for i in range(cfg.L)]
        masks = {w: attention_mask(T, w, docs_BT, tokens_BT.device) for w, _ in set(kinds)}
        ropes = {r: rope_tables(cfg, T, r, **like) for _, r in set(kinds)}
        is_bfloat16 = cfg.dtype == "bfloat16"
        with torch.autocast(tokens_BT.device.type, torch.bfloat16, enabled=is_bfloat16):
            h_BTD = F.embedding(tokens_BT, self.embed)
            if cfg.embed_scale != 1:  # in the type of the activations, as Gemma's own code
                h_BTD = h_BTD.bfloat16() if is_bfloat16 else h_BTD
                h_BTD = h_BTD * h_BTD.new_tensor(cfg.embed_scale)
            if cfg.position == "learned":
                h_BTD = h_BTD + self.positions[:T]
            h_BTD = self.embed_norm(h_BTD)
            if is_bfloat16:  # the residual stream too, as in llm.c and nanochat
                h_BTD = h_BTD.bfloat16()
            observe("embed", h_BTD)
            for i, (block, (window, rope)) in enumerate(zip(self.blocks, kinds, strict=True)):
                h_BTD = block(h_BTD, ropes[rope], masks[window])
                observe(f"blocks.{i}", h_BTD)
            head_VD = self.embed if cfg.tied else self.head
            logits = F.linear(self.final_norm(h_BTD), head_VD).to(self.embed.dtype)
        if self.head_bias is not None:
            logits = logits + self.head_bias
        if (cap := cfg.logit_softcap) and cfg.logit_softcap_form == "tanh":
            logits = cap * torch.tanh(logits / cap)
        elif cap:
            logits = cap * logits / (logits.square() + cap**2).sqrt()
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
        """Returns (objective, nats), means over all targets.

        Args:
            weights_BT: of the targets in the means. None: 1, and 0 for padding, whose document
                is -1.
            masked: attention stays inside documents.
            z_loss: weight of the squared logarithm of the softmax's denominator.
            observe: see forward.
        """
        docs_BT = None
        if masked:
            assert docs_BT1 is not None, "a document mask needs document ids"
            docs_BT = docs_BT1[:, :-1]
        logits_NV = self(tokens_BT1[:, :-1], docs_BT, **observe).flatten(0, 1)
        targets_N = tokens_BT1[:, 1:].flatten()
        if weights_BT is None and docs_BT1 is not None:
            weights_BT = docs_BT1[:, 1:] >= 0
        if weights_BT is not None:
            is_target_N = weights_BT.flatten() != 0
            logits_NV, targets_N = logits_NV[is_target_N], targets_N[is_target_N]
            weights_N = weights_BT.flatten()[is_target_N].to(logits_NV.dtype)
            mean = lambda x_N: (x_N @ weights_N) / weights_N.sum().clamp(min=1)
        else:
            mean = lambda x_N: x_N.mean()
        nats = mean(F.cross_entropy(logits_NV, targets_N, reduction="none"))
        if not z_loss:
            return nats, nats
        return nats + z_loss * mean(logits_NV.logsumexp(-1).square()), nats


def build_torch_model(cfg: ModelConfig, params: dict[str, Any] | None = None) -> TorchTransformer:
    """Builds the model, in float64 if cfg.dtype is, and copies `params` in if they are given."""
    model = TorchTransformer(cfg)
    model = model.double() if cfg.dtype == "float64" else model
    if params is not None:
        load_params(model, params)
    return model
