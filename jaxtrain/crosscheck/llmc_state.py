"""Converts llm.c's debug states (batch, logits, loss and gradients of a GPT-2) to one-step traces.

Source: Karpathy et al., https://github.com/karpathy/llm.c, train_gpt2.py, `write_state`, version 2
"""

import math
from pathlib import Path

import numpy as np

from jaxtrain.config.train_config import ModelConfig
from jaxtrain.crosscheck.trace import TraceError, TraceWriter, batch_hash
from jaxtrain.interop.llmc import HEADER, file_layout, padded_vocab_size

MAGIC, VERSION = 20240327, 2
FUSED = "c_attn"  # queries, keys and values in one tensor


def write_trace(state: str | Path, cfg: ModelConfig, path: str | Path) -> None:
    """Writes a debug state as a trace of one step, with Hugging Face's tensor names.

    Raises:
        TraceError: the file is not a debug state of version 2, or it belongs to another model.
    """
    head = np.fromfile(state, "<i4", HEADER)
    if len(head) < HEADER or (head[0], head[1]) != (MAGIC, VERSION):
        raise TraceError(
            f"an llm.c debug state must start with {MAGIC}, {VERSION}; got {head[:2]} in {state}."
        )
    B, T = int(head[2]), int(head[3])
    P = padded_vocab_size(cfg.V)
    tensors = list(file_layout(cfg.positions, cfg.L, cfg.D, P))
    numbers = HEADER + 2 * B * T + B * T * cfg.V + 1
    numbers += sum(math.prod(shape) for _, shape, _ in tensors)
    if Path(state).stat().st_size != 4 * numbers:
        raise TraceError(
            f"{state} must have {4 * numbers:,} bytes for B={B}, T={T} and this model; got "
            f"{Path(state).stat().st_size:,}. Set --weights to the model that it was made with."
        )
    data, offset = np.memmap(state, "<f4", "r"), HEADER

    def read(count: int) -> np.ndarray:
        nonlocal offset
        offset += count
        return data[offset - count : offset]

    inputs_BT, targets_BT = (read(B * T).view("<i4").reshape(B, T) for _ in range(2))
    logits, loss = read(B * T * cfg.V), float(read(1)[0])
    grads, square = {}, 0.0
    with TraceWriter(path, "llm.c", "float32") as writer:
        for name, shape, transposed in tensors:
            x = read(math.prod(shape)).reshape(shape)
            x = x[: cfg.V] if shape[0] == P else x
            x = x.T if transposed else x
            square += float(np.square(x.astype(np.float64)).sum())
            parts = np.split(x, 3, -1) if FUSED in name else [x]
            for i, part in enumerate(parts):
                grads[f"{name}/{i}" if FUSED in name else name] = part
        tokens_BT1 = np.concatenate([inputs_BT, targets_BT[:, -1:]], 1)
        if not np.array_equal(tokens_BT1[:, 1:], targets_BT):
            raise TraceError(
                f"targets of {state} must be its inputs, shifted by one; they are not."
            )
        line = {
            "step": 1,
            "batch": batch_hash(inputs_BT, targets_BT),
            "loss": loss,
            "grad_norm": square**0.5,
        }
        line["activations"] = writer.digests([("logits", logits)])
        line["gradient"] = writer.digests(grads.items())
        writer.write(line | {"tokens": tokens_BT1.tolist()})
