"""llm.c's debug states as one-step traces: batch, logits, loss and all gradients of a GPT-2.

Source: Karpathy et al., https://github.com/karpathy/llm.c, train_gpt2.py, `write_state`, version 2
"""

import math
from pathlib import Path

import numpy as np

from jaxtrain.crosscheck.trace import TraceError, Writer, batch_hash
from jaxtrain.interop.llmc import HEADER, file_layout, padded_vocab_size

MAGIC, VERSION = 20240327, 2
FUSED = "c_attn"  # queries, keys and values


def write_trace(state, cfg, path) -> None:
    """Writes the one-step trace, named as Hugging Face names it, of a state of a ModelConfig.

    Raises:
        TraceError: the file is no debug state of version 2, or of another model.
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
    data, at = np.memmap(state, np.uint8, "r"), [4 * HEADER]

    def take(count, dtype="<f4"):
        raw = data[at[0] : at[0] + 4 * count]
        at[0] += 4 * count
        return np.frombuffer(raw, dtype)

    inputs_BT, targets_BT = (take(B * T, "<i4").reshape(B, T) for _ in range(2))
    logits, loss = take(B * T * cfg.V), float(take(1)[0])
    grads, square = {}, 0.0
    with Writer(path, "llm.c", "float32") as writer:
        for name, shape, transposed in tensors:
            x = take(math.prod(shape)).reshape(shape)
            x = x[: cfg.V] if shape[0] == P else x
            x = x.T if transposed else x
            square += float(np.square(x.astype(np.float64)).sum())
            parts = np.split(x, 3, -1) if FUSED in name else [x]
            for i, part in enumerate(parts):
                grads[f"{name}/{i}" if FUSED in name else name] = part
        tokens_BT1 = np.concatenate([inputs_BT, targets_BT[:, -1:]], 1)
        if not np.array_equal(tokens_BT1[:, 1:], targets_BT):
            raise TraceError(f"targets of {state} must be its inputs, one later; they are not.")
        line = {"step": 1, "batch": batch_hash(tokens_BT1), "loss": loss, "grad_norm": square**0.5}
        writer.write(
            line
            | {"activations": writer.digests([("logits", logits)])}
            | {"gradient": writer.digests(grads.items()), "tokens": tokens_BT1.tolist()}
        )
