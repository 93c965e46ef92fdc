"""Reads, writes and computes llm.c's GPT-2 by its C code. Shares nothing with jaxtrain.interop.

A file is a header of 256 int32, then 16 tensors without names, each of all layers.

Source: Karpathy, https://github.com/karpathy/llm.c: train_gpt2.c, `fill_in_parameter_sizes`,
`gpt2_build_from_checkpoint` and `gpt2_forward`; train_gpt2.py, `write_model` (padding, bfloat16)
"""

import math
import struct
from typing import NamedTuple

import numpy as np


class Header(NamedTuple):
    """The first eight numbers of the header, in order; the others are zero."""

    version: int  # 3: float32, 5: bfloat16
    max_seq_len: int
    vocab_size: int
    num_layers: int
    num_heads: int
    channels: int
    padded_vocab_size: int


def sizes(head):
    """Returns {C's name of a tensor: its shape}, in the order of the file."""
    L, C, Vp, maxT = head.num_layers, head.channels, head.padded_vocab_size, head.max_seq_len
    return {
        "wte": (Vp, C),
        "wpe": (maxT, C),
        "ln1w": (L, C),
        "ln1b": (L, C),
        "qkvw": (L, 3 * C, C),
        "qkvb": (L, 3 * C),
        "attprojw": (L, C, C),
        "attprojb": (L, C),
        "ln2w": (L, C),
        "ln2b": (L, C),
        "fcw": (L, 4 * C, C),
        "fcb": (L, 4 * C),
        "fcprojw": (L, C, 4 * C),
        "fcprojb": (L, C),
        "lnfw": (C,),
        "lnfb": (C,),
    }


def to_bfloat16(x):
    """Returns float32 numbers as the bits of the nearest bfloat16, ties to even."""
    bits = np.asarray(x, "<f4").view("<u4").astype(np.uint64)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype("<u2")


def write(path, head, params):
    """Writes a file; params is {C's name: float32 array}."""
    with open(path, "wb") as file:
        file.write(struct.pack("<256i", 20240326, *head, *[0] * (255 - len(head))))
        for name, shape in sizes(head).items():
            assert params[name].shape == shape
            x = np.ascontiguousarray(params[name], "<f4")
            file.write((x if head.version == 3 else to_bfloat16(x)).tobytes())


def read(path):
    """Returns (Header, {C's name: float32 array})."""
    with open(path, "rb") as file:
        magic, *numbers = struct.unpack("<256i", file.read(1_024))
        assert magic == 20240326 and not any(numbers[7:])
        head, params = Header(*numbers[:7]), {}
        assert head.version in (3, 5)
        for name, shape in sizes(head).items():
            count = math.prod(shape)
            if head.version == 3:
                x = np.array(struct.unpack(f"<{count}f", file.read(4 * count)), np.float32)
            else:
                bits = struct.unpack(f"<{count}H", file.read(2 * count))
                x = (np.array(bits, np.uint32) << 16).view(np.float32)
            params[name] = x.reshape(shape)
        assert not file.read()
    return head, params


def layernorm(x, weight, bias):
    shifted = x - x.mean(-1, keepdims=True)
    return shifted / np.sqrt((shifted**2).mean(-1, keepdims=True) + 1e-5) * weight + bias


def matmul(x, weight, bias=0.0):
    """weight is [outputs, inputs]."""
    return x @ weight.T + bias


def attention(qkv, heads):
    """[T,3C] -> [T,C]; each row has the queries of all heads, then the keys, then the values."""
    T, C = len(qkv), qkv.shape[1] // 3
    width, out = C // heads, np.zeros((T, C))
    for h in range(heads):
        at = slice(h * width, (h + 1) * width)
        q, k, v = (qkv[:, i * C : (i + 1) * C][:, at] for i in range(3))
        for t in range(T):
            scores = k[: t + 1] @ q[t] / math.sqrt(width)
            weights = np.exp(scores - scores.max())
            out[t, at] = weights @ v[: t + 1] / weights.sum()
    return out


def forward(head, params, tokens):
    """Returns the logits [T,V] of one sequence [T], in float64."""
    p = {name: x.astype(np.float64) for name, x in params.items()}
    x = p["wte"][tokens] + p["wpe"][: len(tokens)]
    for i in range(head.num_layers):
        h = layernorm(x, p["ln1w"][i], p["ln1b"][i])
        h = attention(matmul(h, p["qkvw"][i], p["qkvb"][i]), head.num_heads)
        x = x + matmul(h, p["attprojw"][i], p["attprojb"][i])
        h = matmul(layernorm(x, p["ln2w"][i], p["ln2b"][i]), p["fcw"][i], p["fcb"][i])
        h = 0.5 * h * (1 + np.tanh(math.sqrt(2 / math.pi) * (h + 0.044715 * h**3)))
        x = x + matmul(h, p["fcprojw"][i], p["fcprojb"][i])
    logits = matmul(layernorm(x, p["lnfw"], p["lnfb"]), p["wte"])
    return logits[:, : head.vocab_size]
