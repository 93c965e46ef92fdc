"""Writes a step trace of any PyTorch training loop.

Copy this file and model_hooks.py beside your loop; they need only torch. Then add three lines:

    recorder = Recorder("theirs.jsonl", model)
    for x, y in batches:
        loss = F.cross_entropy(model(x).flatten(0, 1), y.flatten())
        loss.backward()
        recorder.before_step(x, y, loss)  # after backward(), before clipping
        optimizer.step()
        recorder.after_step()  # before the gradients are cleared
        optimizer.zero_grad()

With gradient accumulation, call `micro_batch(x, y, loss)` after each backward(), with the loss that
backward() was called on, and then `before_step()` without arguments. With a GradScaler, call
`scaler.unscale_(optimizer)` before before_step. Targets of -100 are ignored, as in cross_entropy.

A trace is a file of JSON lines. The first line is {"trace": 2, "side", "precision", "seed"}. Each
later line is a step: {"step", "batch", "parts", "loss", "grad_norm", "activations", "gradient",
"update", "parameter"}. Step 0 has only the parameters, before any update.

- "batch": the first 16 hex digits of the SHA-256 of the inputs and then the targets, as int32
  little-endian, row by row. A step's micro-batches are joined, and padded to one length.
- "parts": such hashes of "inputs", "targets" (-100 where ignored) and "mask" (uint8), the rows of
  each of the "micro_batches", the number of "targets_each" has, and "weights": the digest of the
  weights [B,T] of the targets in the loss, scaled to a mean of 1, or null if they are equal.
- With keep_batches, "tokens" [B,T+1] has the inputs and the last targets. "targets" [B,T] and
  "weights" [B,T] are there if the targets are not the next tokens, or not weighted equally.
- "loss": the mean loss of the next token, in nats; "losses": each micro-batch's share of it.
  "grad_norm": the norm of all gradients together. "float32": {module: class} of the modules that
  compute in float32 in a float64 run; "float32_skipped" says that the recorder prevented it.
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
import warnings
from typing import Any

import torch
from torch import nn

try:
    from jaxtrain.crosscheck import model_hooks
except ImportError:  # copied beside a loop, where jaxtrain is not installed
    import model_hooks  # pyright: ignore[reportMissingImports]

require = model_hooks.require
FORMAT = 2
PROJECTIONS = 16
CHUNK = 1 << 18  # entries digested at once
LOW = 0xFFFFFFFF
IGNORED = -100  # a target that the loss ignores, as in torch's cross_entropy
WRAPPERS = ("_orig_mod", "module")  # in names under torch.compile, DistributedDataParallel


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
def _add_entries(sums, x, seed):
    """Adds a tensor's entries to (count, squares, total, largest, projections); None is empty."""
    count, square, total, largest, projections = sums or (0, 0.0, 0.0, 0.0, 0.0)
    flat = x.detach().reshape(-1)
    while flat.numel():
        first = count % CHUNK
        part, flat = flat[: CHUNK - first].to("cpu", torch.float64), flat[CHUNK - first :]
        signs = _signs(count - first, seed)[:, first : first + part.numel()]
        projections = projections + signs @ part
        square += float(part @ part)
        total += float(part.sum())
        largest = max(largest, float(part.abs().max()))
        count += part.numel()
    return count, square, total, largest, projections


def _finish_digest(sums):
    count, square, total, largest, projections = sums
    projections = projections.tolist() if count else [0.0] * PROJECTIONS
    return [square**0.5, total / max(count, 1), largest, *projections]


def digest(x: torch.Tensor, seed: int = 0) -> list[float]:
    """Returns [norm, mean, largest size, p0 ... p15] of a tensor, computed in float64."""
    return _finish_digest(_add_entries(None, x, seed))


def batch_hash(*arrays: torch.Tensor, dtype=torch.int32) -> str:
    """Returns 16 hex digits that identify arrays, such as a batch's inputs and targets [B,T]."""
    sha = hashlib.sha256()
    for x in arrays:
        sha.update(x.detach().to("cpu", dtype).contiguous().numpy().tobytes())
    return sha.hexdigest()[:16]


class Recorder:
    """Writes one trace, one line for each training step.

    Args:
        path: the trace; an existing file is replaced.
        model: any nn.Module. The trace uses its parameter names.
        split: {part of a name: count}. A tensor whose name contains the part is split along its
            longest dimension and written as `name/0`, `name/1`, ...: for fused queries, keys and
            values. By default {"c_attn": 3}, as in GPT-2.
        activations: {name: submodule} whose outputs are recorded. By default the recorder finds the
            layers of the model: "embed" (the input of the first layer), "blocks.0", "blocks.1", ...
            and "logits". Forward passes under torch.no_grad() are not recorded.
        precision: the type that the loop computes in: "float64", "float32" or "bfloat16". By
            default that of the parameters; state it if the loop uses torch.autocast.
        keep_batches: store the tokens of each batch.
        average: how the step's loss weighs its micro-batches: "micro_batches" if it is the mean of
            their means, "tokens" if it is the mean over all targets together.
        skip_float32: in a float64 run, compute in float64 where the model casts to float32.
    """

    def __init__(
        self,
        path: str | os.PathLike,
        model: nn.Module,
        split: dict[str, int] | None = None,
        activations: dict[str, nn.Module] | None = None,
        precision: str | None = None,
        keep_batches: bool = True,
        side: str = "pytorch",
        seed: int = 0,
        average: str = "micro_batches",
        skip_float32: bool = False,
    ):
        model_hooks.check_average(average)
        self._model, self._seed, self._keep_batches = model, seed, keep_batches
        self._split, self._average = {"c_attn": 3} if split is None else split, average
        self._step, self._micro_batches, self._sums, self._seen, self._line = 0, [], {}, {}, {}
        precision = precision or str(next(model.parameters()).dtype).removeprefix("torch.")
        self._file = open(path, "w", encoding="utf-8")
        self._write({"trace": FORMAT, "side": side, "precision": precision, "seed": seed})
        self._write({"step": 0, "parameter": self._digests(lambda name, p: p)})
        is_float64 = precision == "float64"
        self._watch = model_hooks.Float32Watch(model, skip_float32) if is_float64 else None
        model_hooks.warn_of_unlike(model)
        if activations is not None:
            model_hooks.observe_outputs(activations, self.observe)
        elif missing := model_hooks.observe_layers(model, self.observe):
            warnings.warn(
                f"found no {' and no '.join(missing)} in {type(model).__name__}: a fault of its "
                "forward pass cannot be located. Set Recorder(..., activations={name: module}).",
                stacklevel=2,
            )

    def observe(self, name: str, x: torch.Tensor) -> None:
        """Records an activation of the current micro-batch; the last value of a name counts."""
        if torch.is_grad_enabled():  # not in an evaluation
            self._seen[name] = _add_entries(self._sums.get(name), x, self._seed)

    def micro_batch(
        self,
        inputs: torch.Tensor,
        targets: torch.Tensor,
        loss: torch.Tensor,
        weights: torch.Tensor | None = None,
    ) -> None:
        """Records one of the step's micro-batches. Call it after its backward().

        Args:
            inputs: integer [B,T], the model's input.
            targets: integer [B,T], the tokens that it must predict, or -100. Labels as for
                transformers, which are the inputs themselves, are shifted by one.
            loss: what backward() was called on, in nats, so that the losses add up to the step's.
            weights: [B,T], of the targets in the micro-batch's mean; None weighs them equally.
        """
        model_hooks.check_batch(inputs, targets, loss)
        counts = targets != IGNORED
        if counts.any() and torch.equal(inputs[counts], targets[counts]):
            pad = lambda x, value: nn.functional.pad(x[:, 1:], (0, 1), value=value)
            targets = pad(targets, IGNORED)
            weights = None if weights is None else pad(weights, 0)
        weights = torch.ones(targets.shape) if weights is None else weights
        weights = weights.detach().to("cpu", torch.float64) * (targets != IGNORED).cpu()
        targets = targets.detach().cpu().masked_fill(weights == 0, IGNORED)
        self._micro_batches.append((inputs.detach().cpu(), targets, weights, float(loss.detach())))
        self._sums, self._seen = self._sums | self._seen, {}

    def _join_micro_batches(self):
        """Returns the fields of the step's line that describe its batch."""
        inputs, targets, weights, losses = zip(*self._micro_batches, strict=True)
        T = max(x.shape[1] for x in inputs)
        pad = lambda xs, value, T=T: torch.cat(
            [nn.functional.pad(x, (0, T - x.shape[1]), value=value) for x in xs]
        )
        counts = [int((w > 0).sum()) for w in weights]
        sums = [float(w.sum()) for w in weights]
        each = [sum(sums) / len(sums) if self._average == "tokens" else s for s in sums]
        mean = sum(counts) / len(sums)
        scaled = [w * (mean / max(s, 1e-30)) for w, s in zip(weights, each, strict=True)]
        last = [torch.cat((x, y[:, -1:].clamp(min=0)), 1) for x, y, *_ in self._micro_batches]
        tokens, targets, weights = pad(last, 0, T + 1), pad(targets, IGNORED), pad(scaled, 0)
        kept = weights[weights > 0]
        equal = not len(kept) or float(kept.min()) == float(kept.max())
        line = {
            "batch": batch_hash(tokens[:, :-1], targets),
            "parts": {
                "inputs": batch_hash(tokens[:, :-1]),
                "targets": batch_hash(targets),
                "mask": batch_hash(targets != IGNORED, dtype=torch.uint8),
                "weights": None if equal else digest(weights, self._seed),
                "micro_batches": [len(x) for x, *_ in self._micro_batches],
                "targets_each": counts,
            },
            "loss": sum(losses),
            "losses": list(losses),
        }
        if self._keep_batches:
            line["tokens"] = tokens.tolist()
            if not torch.equal(tokens[:, 1:], targets):
                line["targets"] = targets.tolist()
            if not equal:
                line["weights"] = weights.tolist()
        return line

    @torch.no_grad()
    def before_step(self, *batch: Any, **named: Any) -> None:
        """Records loss and gradients. Call it after backward() and before clipping.

        It takes the arguments of micro_batch, or none if that was called for each micro-batch.
        """
        if batch or named:
            self.micro_batch(*batch, **named)
        parts = self._micro_batches
        require(parts, "before_step needs inputs, targets and loss, or micro_batch before it.")
        require(not self._line, "after_step must follow each before_step; got two before_step.")
        self._step += 1
        self._line = {"step": self._step} | self._join_micro_batches()
        self._line["gradient"] = gradient = self._digests(lambda name, p: p.grad)
        self._line["grad_norm"] = sum(norm**2 for norm, *_ in gradient.values()) ** 0.5
        if len({x.shape[1] for x, *_ in parts}) == 1:
            done = {name: _finish_digest(sums) for name, sums in self._sums.items()}
            self._line["activations"] = done
        if self._watch and self._watch.found:
            self._line["float32"] = self._watch.found
            self._line["float32_skipped"] = self._watch.skip
        self._micro_batches, self._sums = [], {}
        self._before = {name: p.detach().clone() for name, p in self._model.named_parameters()}

    @torch.no_grad()
    def after_step(self) -> None:
        """Records updates and parameters. Call it after the optimizer's step."""
        require(self._line, "before_step must come before after_step, after each backward().")
        update = lambda name, p: p.double() - self._before[name].double()
        self._line["update"] = self._digests(update)
        self._line["parameter"] = self._digests(lambda name, p: p)
        self._write(self._line)
        self._line = {}

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
            name = ".".join(part for part in name.split(".") if part not in WRAPPERS)
            count = next((n for part, n in self._split.items() if part in name), 1)
            pieces = x.chunk(count, int(torch.tensor(x.shape).argmax())) if count > 1 else [x]
            for i, piece in enumerate(pieces):
                table[f"{name}/{i}" if count > 1 else name] = digest(piece, self._seed)
        return table

    def _write(self, line):
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()
