"""Writes a step trace of any PyTorch training loop.

Copy this file beside your loop; it needs nothing but torch. Then add three lines to the loop:

    recorder = Recorder("theirs.jsonl", model, split={"c_attn": 3})
    for x, y in batches:
        loss = F.cross_entropy(model(x).flatten(0, 1), y.flatten())
        loss.backward()
        recorder.before_step(x, y, loss)  # after backward(), before clipping
        optimizer.step()
        recorder.after_step()  # before the gradients are cleared
        optimizer.zero_grad()

A trace is a file of JSON lines. The first line is {"trace": 1, "side", "precision", "seed"}. Each
later line is a step: {"step", "batch", "loss", "grad_norm", "activations", "gradient", "update",
"parameter"}. Step 0 has only the parameters, before any update.

- "batch": the first 16 hex digits of the SHA-256 of the inputs and then the targets, as int32
  little-endian, row by row. With keep_batches, "tokens" has the batch itself, [B,T+1], so that
  another framework can train on it.
- "loss": the mean loss of the next token, in nats. "grad_norm": the norm of all gradients together.
- "activations", "gradient", "update", "parameter": {tensor name: digest}. A digest is [norm, mean,
  largest absolute entry, p0 ... p15] in float64. p_k is the sum of all entries, row by row, each
  multiplied by a sign: + where bit k of lowbias32(i ^ lowbias32(seed)) is 1, where i is the entry's
  index mod 2^32. The mean of (p_k - q_k)^2 over k estimates the squared distance of two tensors, so
  a few kilobytes are enough to compare models of any size.

Source: Johnson & Lindenstrauss 1984, with signs as Achlioptas 2003,
https://doi.org/10.1016/S0022-0000(03)00025-4; Wellons 2018, "lowbias32",
https://nullprogram.com/blog/2018/07/31/
"""

import functools
import hashlib
import json
import os

import torch

FORMAT = 1
PROJECTIONS = 16
CHUNK = 1 << 18  # entries digested at once
LOW = 0xFFFFFFFF


def _mix(h):
    """Hashes int64 numbers below 2^32, an int or a tensor, by lowbias32."""
    h = ((h ^ (h >> 16)) * 0x7FEB352D) & LOW
    h = ((h ^ (h >> 15)) * 0x846CA68B) & LOW
    return h ^ (h >> 16)


@functools.lru_cache(maxsize=2)  # most tensors need only the first
def _signs(start, seed):
    """Returns pseudo-random signs, +1 and -1, from entry `start`: float64 [PROJECTIONS,CHUNK]."""
    hashed = _mix((torch.arange(start, start + CHUNK) & LOW) ^ _mix(seed & LOW))
    bits = (hashed >> torch.arange(PROJECTIONS)[:, None]) & 1
    return 2.0 * bits.double() - 1.0


@torch.no_grad()
def digest(x: torch.Tensor, seed: int = 0) -> list[float]:
    """Returns [norm, mean, largest size, p0 ... p15] of a tensor, computed in float64."""
    flat = x.detach().reshape(-1)
    square = total = largest = 0.0
    projections = torch.zeros(PROJECTIONS, dtype=torch.float64)
    for start in range(0, flat.numel(), CHUNK):
        part = flat[start : start + CHUNK].to("cpu", torch.float64)
        projections += _signs(start, seed)[:, : part.numel()] @ part
        square += float(part @ part)
        total += float(part.sum())
        largest = max(largest, float(part.abs().max()))
    return [square**0.5, total / max(flat.numel(), 1), largest, *projections.tolist()]


def batch_hash(inputs: torch.Tensor, targets: torch.Tensor) -> str:
    """Returns 16 hex digits that identify a batch, from its inputs and targets [B,T]."""
    sha = hashlib.sha256()
    for x in (inputs, targets):
        sha.update(x.detach().to("cpu", torch.int32).contiguous().numpy().astype("<i4").tobytes())
    return sha.hexdigest()[:16]


class Recorder:
    """Writes one trace, one line for each training step.

    Args:
        path: the trace; an existing file is replaced.
        model: any nn.Module. The trace uses its parameter names.
        split: {part of a name: count}. A tensor whose name contains the part is split along its
            longest dimension and written as `name/0`, `name/1`, ...: for fused queries, keys and
            values.
        activations: {name: submodule} whose outputs are recorded too. jaxtrain calls them "embed"
            (the input of the first layer), "blocks.0", "blocks.1", ... and "logits".
        precision: the type that the loop computes in: "float64", "float32" or "bfloat16".
        keep_batches: store the tokens of each batch.
    """

    def __init__(
        self,
        path: str | os.PathLike,
        model: torch.nn.Module,
        split: dict[str, int] | None = None,
        activations: dict[str, torch.nn.Module] | None = None,
        precision: str = "float32",
        keep_batches: bool = True,
        side: str = "pytorch",
        seed: int = 0,
    ):
        self._model, self._split, self._seed = model, split or {}, seed
        self._keep_batches, self._observed, self._step = keep_batches, {}, 0
        self._file = open(path, "w", encoding="utf-8")
        self._write({"trace": FORMAT, "side": side, "precision": precision, "seed": seed})
        self._write({"step": 0, "parameter": self._digests(lambda name, p: p)})
        for name, module in (activations or {}).items():
            module.register_forward_hook(functools.partial(self._observe_output, name))

    def observe(self, name: str, x: torch.Tensor) -> None:
        """Records an activation of the current step; the last value of a name counts."""
        self._observed[name] = digest(x, self._seed)

    def _observe_output(self, name, module, args, output):
        """Records a submodule's output, or its first part: transformers' modules return tuples."""
        self.observe(name, output[0] if isinstance(output, tuple) else output)

    @torch.no_grad()
    def before_step(self, inputs: torch.Tensor, targets: torch.Tensor, loss: torch.Tensor) -> None:
        """Records loss and gradients. Call it after backward() and before clipping.

        Args:
            inputs, targets: integer [B,T]: the model's input and the tokens that it must predict.
            loss: mean loss of the targets in nats.
        """
        self._step += 1
        gradient = self._digests(lambda name, p: p.grad)
        self._line = {
            "step": self._step,
            "batch": batch_hash(inputs, targets),
            "loss": float(loss),
            "grad_norm": sum(norm**2 for norm, *_ in gradient.values()) ** 0.5,
            "activations": self._observed,
            "gradient": gradient,
        }
        if self._keep_batches:
            self._line["tokens"] = torch.cat((inputs, targets[:, -1:]), 1).tolist()
        self._observed = {}
        self._before = {name: p.detach().clone() for name, p in self._model.named_parameters()}

    @torch.no_grad()
    def after_step(self) -> None:
        """Records updates and parameters. Call it after the optimizer's step."""
        update = lambda name, p: p.double() - self._before[name].double()
        self._line["update"] = self._digests(update)
        self._line["parameter"] = self._digests(lambda name, p: p)
        self._write(self._line)

    def close(self) -> None:
        self._file.close()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def _digests(self, value_of):
        """Returns the digests of value_of(name, parameter) for each parameter."""
        table = {}
        for name, p in self._model.named_parameters():
            x = value_of(name, p)
            if x is None:
                continue
            count = next((n for part, n in self._split.items() if part in name), 1)
            pieces = x.chunk(count, int(torch.tensor(x.shape).argmax())) if count > 1 else [x]
            for i, piece in enumerate(pieces):
                table[f"{name}/{i}" if count > 1 else name] = digest(piece, self._seed)
        return table

    def _write(self, line):
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()
