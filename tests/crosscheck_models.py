"""Small models for the acceptance of crosscheck: transformers' own, and one written out by hand.

The model written out by hand has the tensor names and shapes of Hugging Face's GPT-2 or Llama. It
shares no code with jaxtrain's PyTorch side. Faults can be planted in it: `Fault.mix` moves a value
from the right one towards a wrong one.
"""

import contextlib
import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from torch.nn import functional as F

LAYERS, HEADS, VOCABULARY, TOKENS = 2, 4, 256, 32
THETA = 10_000.0


@dataclass(frozen=True)
class Setup:
    """What both frameworks must know of a run. Runs with equal setups share one compilation."""

    family: str  # "gpt2" or "llama"
    tied: bool = False
    kv_heads: int = HEADS  # fewer than HEADS is grouped-query attention
    width: int = 64
    norm_eps: float = 1e-5
    precision: str = "float32"
    optimizer: str = "adamw"  # or "muon", with AdamW for all but the matrices
    ns_dtype: str = "float32"  # in which Muon orthogonalises; torch.optim.Muon uses bfloat16
    rate: float = 3e-3  # peak, of AdamW
    betas: tuple[float, float] = (0.9, 0.95)
    adam_eps: float = 1e-8
    weight_decay: float = 0.0
    decays: str = "matrices,embedding,head"  # the parameters that weight_decay applies to
    clip: float = 0.0  # global norm; 0 does not clip
    clip_eps: float = 0.0  # added to that norm; torch's clip_grad_norm_ adds 1e-6
    schedule: str = "constant"  # or "cosine"
    warmup: int = 1
    accumulation: int = 1
    rows: int = 8
    steps: int = 6

    @property
    def dtype(self) -> torch.dtype:
        return getattr(torch, self.precision)


@dataclass(frozen=True)
class Variant:
    """How a PyTorch loop computes a setup; every variant of a setup is correct."""

    module: str = "plain"  # "transformers", "plain" or "twin", jaxtrain's own PyTorch model
    attention: str = "eager"  # or "sdpa"
    adam: str = "single"  # or "foreach" or "fused"
    order: str = "forward"  # of sums: or "channels" or "rows", which are added in reverse
    threads: int = 1
    data: str = "text"  # or "uniform", random tokens
    spread: bool = True  # the initial gains and biases are random, not 1 and 0
    seed: int = 0


@dataclass(frozen=True)
class Fault:
    """A fault and its size: 1 is the whole fault, 0 none."""

    name: str = ""
    size: float = 0.0

    def amount(self, name: str) -> float:
        return self.size if name == self.name else 0.0

    def mix(self, name: str, right: Any, wrong: Callable[[], Any]) -> Any:
        """Returns (1 - size) * right + size * wrong() if `name` is planted, else `right`."""
        if not self.amount(name):
            return right
        return right + self.size * (wrong() - right)


def save_start(setup: Setup, variant: Variant, folder: Path) -> Path:
    """Writes a random model of transformers' own class as a Hugging Face folder."""
    torch.manual_seed(variant.seed)
    shared = {"vocab_size": VOCABULARY, "tie_word_embeddings": setup.tied}
    shared |= {"bos_token_id": 0, "eos_token_id": 0}
    if setup.family == "gpt2":
        config = transformers.GPT2Config(
            n_positions=TOKENS,
            n_embd=setup.width,
            n_layer=LAYERS,
            n_head=HEADS,
            layer_norm_epsilon=setup.norm_eps,
            **dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0),
            **shared,
        )
    else:
        config = transformers.LlamaConfig(
            hidden_size=setup.width,
            intermediate_size=setup.width * 2 + 16,
            num_hidden_layers=LAYERS,
            num_attention_heads=HEADS,
            num_key_value_heads=setup.kv_heads,
            max_position_embeddings=TOKENS,
            rms_norm_eps=setup.norm_eps,
            **shared,
        )
    model = transformers.AutoModelForCausalLM.from_config(config)
    if variant.spread:  # gains of 1 and biases of 0 would hide faults
        with torch.no_grad():
            for p in model.parameters():
                p.add_((0.1 if p.ndim == 1 else 0.02) * torch.randn_like(p))
    with contextlib.redirect_stderr(io.StringIO()):  # a progress bar
        model.save_pretrained(folder)
    return folder


def load_transformers(setup: Setup, variant: Variant, folder: Path) -> nn.Module:
    """Loads a folder by transformers, as a user does."""
    with contextlib.redirect_stderr(io.StringIO()):
        return transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=setup.dtype, attn_implementation=variant.attention
        )


class Linear(nn.Module):
    """x W + b. GPT-2 stores W as [I,O], Llama as [O,I]."""

    def __init__(self, inputs, outputs, conv, bias, parts):
        super().__init__()
        self.conv, (self.fault, self.reverse) = conv, parts
        self.weight = nn.Parameter(torch.zeros((inputs, outputs) if conv else (outputs, inputs)))
        self.bias = nn.Parameter(torch.zeros(outputs)) if bias else None

    def forward(self, x):
        w_IO = self.weight if self.conv else self.weight.T
        if self.fault.amount("TF32 products"):
            x, w_IO = (y + self.fault.size * (to_tf32(y) - y).detach() for y in (x, w_IO))
        y = x.flip(-1) @ w_IO.flip(0) if self.reverse else x @ w_IO
        return y if self.bias is None else y + self.bias


def to_tf32(x: torch.Tensor) -> torch.Tensor:
    """Rounds the mantissa to 10 bits, as NVIDIA's TF32 products do with their inputs."""
    bits = x.float().view(torch.int32)
    return ((bits + 0x1000) & ~0x1FFF).view(torch.float32).to(x.dtype)


class Norm(nn.Module):
    """LayerNorm (with a bias) or RMSNorm."""

    def __init__(self, width, eps, bias, parts):
        super().__init__()
        self.eps, (self.fault, self.reverse) = eps, parts
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width)) if bias else None

    def forward(self, x):
        fault, eps = self.fault, self.fault.mix("epsilon of the norm", self.eps, lambda: 1e-4)
        total = lambda y: (y.flip(-1) if self.reverse else y).mean(-1, keepdim=True)
        if self.bias is not None:
            mean = total(x)
            x = x - fault.mix("RMSNorm for LayerNorm", mean, lambda: torch.zeros_like(mean))
        y = x * torch.rsqrt(total(x * x) + eps) * self.weight
        if size := fault.amount("norm cast to float32"):
            y = y + size * (y.float().to(y.dtype) - y).detach()
        return y if self.bias is None else y + self.bias


class ScaleGradient(torch.autograd.Function):
    """Returns its input; multiplies the gradient by a factor."""

    @staticmethod
    def forward(ctx, x, factor):
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx, *grads):
        return ctx.factor * grads[0], None


def rotary(x_BHTK: torch.Tensor, theta: float, fault: Fault) -> torch.Tensor:
    """Applies RoPE to pairs (i, i + K/2), as Llama does."""
    T, K = x_BHTK.shape[-2:]
    theta = fault.mix("RoPE base", theta, lambda: 2 * theta)
    like = {"dtype": x_BHTK.dtype}
    frequency = theta ** (-torch.arange(0, K, 2, **like) / K)
    angle_TK = torch.outer(torch.arange(T, **like), frequency)
    cos, sin = angle_TK.cos(), angle_TK.sin()

    def turn(first, second):
        return first * cos - second * sin, second * cos + first * sin

    def interleaved():
        return torch.stack(turn(x_BHTK[..., ::2], x_BHTK[..., 1::2]), -1).flatten(-2)

    return fault.mix("RoPE interleaved", torch.cat(turn(*x_BHTK.chunk(2, -1)), -1), interleaved)


def attend(q, k, v, fault: Fault, fused: bool) -> torch.Tensor:
    """Causal attention of [B,H,T,K]."""
    if fused:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)
    T, K = q.shape[-2:]
    scale = fault.mix("no scale of the scores", K**-0.5, lambda: 1.0)
    scores = scale * (q @ k.transpose(-1, -2))
    masked = lambda diagonal: torch.ones(T, T, dtype=torch.bool).triu(diagonal)
    weights = lambda mask: scores.masked_fill(mask, -torch.inf).softmax(-1)
    return fault.mix("mask off by one", weights(masked(1)), lambda: weights(masked(2))) @ v


class Block(nn.Module):
    """A layer of GPT-2 or Llama."""

    def __init__(self, setup: Setup, index: int, fused: bool, parts):
        super().__init__()
        D, K, self.fused, self.index = setup.width, setup.width // HEADS, fused, index
        self.setup, self.fault, self.K = setup, parts[0], K
        if setup.family == "gpt2":
            linear = lambda i, o: Linear(i, o, True, True, parts)
            self.ln_1, self.ln_2 = (Norm(D, setup.norm_eps, True, parts) for _ in range(2))
            self.attn = nn.ModuleDict({"c_attn": linear(D, 3 * D), "c_proj": linear(D, D)})
            self.mlp = nn.ModuleDict({"c_fc": linear(D, 4 * D), "c_proj": linear(4 * D, D)})
            return
        linear = lambda i, o: Linear(i, o, False, False, parts)
        G, hidden = setup.kv_heads * K, 2 * D + 16
        sizes = {"q_proj": (D, D), "k_proj": (D, G), "v_proj": (D, G), "o_proj": (D, D)}
        self.self_attn = nn.ModuleDict({name: linear(*size) for name, size in sizes.items()})
        sizes = {"gate_proj": (D, hidden), "up_proj": (D, hidden), "down_proj": (hidden, D)}
        self.mlp = nn.ModuleDict({name: linear(*size) for name, size in sizes.items()})
        self.input_layernorm = Norm(D, setup.norm_eps, False, parts)
        self.post_attention_layernorm = Norm(D, setup.norm_eps, False, parts)

    def heads(self, x):
        return x.unflatten(-1, (-1, self.K)).transpose(1, 2)

    def gpt2(self, h):
        fault, mlp = self.fault, self.mlp
        x = self.ln_1(h)
        if self.index == 0 and (size := fault.amount("backward pass of a norm")):
            x = ScaleGradient.apply(x, 1 + size)
        q, k, v = map(self.heads, self.attn["c_attn"](x).chunk(3, -1))
        o = attend(q, k, v, fault, self.fused).transpose(1, 2).flatten(2)
        o = self.attn["c_proj"](o)
        bias = self.attn["c_proj"].bias
        h = h + fault.mix("bias of a projection left out", o, lambda: o - bias)
        x = mlp["c_fc"](self.ln_2(h))
        x = fault.mix("exact gelu", F.gelu(x, approximate="tanh"), lambda: F.gelu(x))
        return h + self.drop(mlp["c_proj"](x))

    def drop(self, x):
        """Applies dropout of 10 % of the entries at size 1, with the same mask in every dtype."""
        if not (size := self.fault.amount("dropout left on")):
            return x
        kept = torch.rand(x.shape) >= 0.1 * size
        return x * kept / (1 - 0.1 * size)

    def llama(self, h):
        fault, attention, mlp = self.fault, self.self_attn, self.mlp
        x = self.input_layernorm(h)
        q, k, v = (self.heads(attention[f"{name}_proj"](x)) for name in "qkv")
        q, k = (rotary(y, THETA, fault) for y in (q, k))
        count = q.shape[1] // k.shape[1]
        repeat = lambda y: fault.mix(
            "key heads in the wrong order",
            y.repeat_interleave(count, 1),
            lambda: y.repeat(1, count, 1, 1),
        )
        o = attend(q, repeat(k), repeat(v), fault, self.fused).transpose(1, 2).flatten(2)
        h = h + attention["o_proj"](o)
        x = self.post_attention_layernorm(h)
        return h + mlp["down_proj"](F.silu(mlp["gate_proj"](x)) * mlp["up_proj"](x))

    def forward(self, h):
        return self.gpt2(h) if self.setup.family == "gpt2" else self.llama(h)


class Plain(nn.Module):
    """A GPT-2 or Llama in one file, as nanoGPT writes it."""

    def __init__(self, setup: Setup, variant: Variant, fault: Fault | None = None):
        super().__init__()
        D, self.fault = setup.width, fault or Fault()
        parts = self.fault, variant.order == "channels"
        gpt2, fused = setup.family == "gpt2", variant.attention == "sdpa"
        blocks = nn.ModuleList(Block(setup, i, fused, parts) for i in range(LAYERS))
        norm = Norm(D, setup.norm_eps, gpt2, parts)
        self.drop = nn.Identity()  # a place for a hook
        if gpt2:
            tables = {"wte": nn.Embedding(VOCABULARY, D), "wpe": nn.Embedding(TOKENS, D)}
            self.transformer = nn.ModuleDict(tables | {"h": blocks, "ln_f": norm})
        else:
            table = {"embed_tokens": nn.Embedding(VOCABULARY, D)}
            self.model = nn.ModuleDict(table | {"layers": blocks, "norm": norm})
        self.lm_head = Linear(D, VOCABULARY, False, False, parts)
        self.body = [blocks, norm]  # a list, so that no parameter has two names
        if setup.tied:
            self.lm_head.weight = self.table.weight

    @property
    def table(self) -> nn.Module:
        return (
            self.transformer["wte"] if hasattr(self, "transformer") else self.model["embed_tokens"]
        )

    def forward(self, tokens_BT):
        fault, (blocks, norm) = self.fault, self.body
        h = self.table(tokens_BT)
        if hasattr(self, "transformer"):
            T, wpe = tokens_BT.shape[1], self.transformer["wpe"].weight
            h = h + fault.mix("positions off by one", wpe[:T], lambda: wpe[:T].roll(1, 0))
        h = self.drop(h)
        for block in blocks:
            h = block(h)
        h = norm(h)
        if size := fault.amount("head detached from the embedding"):
            rest = F.linear(h, self.lm_head.weight.detach())
            return (1 - size) * self.lm_head(h) + size * rest
        logits = self.lm_head(h)
        return fault.mix("soft-cap of the logits", logits, lambda: 5 * torch.tanh(logits / 5))


def load_plain(
    setup: Setup, variant: Variant, folder: Path, fault: Fault | None = None
) -> nn.Module:
    """Returns the model written out by hand with the weights of a Hugging Face folder."""
    model = Plain(setup, variant, fault).to(setup.dtype)
    theirs = load_transformers(setup, Variant(), folder).state_dict()
    model.load_state_dict({name: theirs[name] for name in model.state_dict()})
    return model


def activations_of(model: Any) -> dict[str, nn.Module] | None:
    """Returns the submodules to record, or None where the recorder finds them by itself."""
    if isinstance(model, transformers.PreTrainedModel):
        return None
    is_plain = isinstance(model, Plain)
    ends = {"embed": model.drop, "logits": model.lm_head} if is_plain else {}
    blocks = model.body[0] if is_plain else model.blocks
    return ends | {f"blocks.{i}": block for i, block in enumerate(blocks)}
