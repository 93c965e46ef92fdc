"""A chunk's logits, their reductions over the vocabulary, and their gradients.

Each class computes them in another way; loss.py chooses one by the route of the head. All arguments
and results are of one device: its rows, and its part of the vocabulary.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from jaxtrain.model.dense import wide_dtype
from jaxtrain.model.logits import cap_logits, cap_slope
from jaxtrain.ops.fused import FusedHead
from pallas_kernels.tile_order import LOG2E, MOST


class Vocabulary:
    """Reductions over the whole vocabulary, of which this device has V rows from `first` on."""

    def __init__(self, axis: str | None, V: int):
        self.axis, self.V = axis, V
        self.first = jax.lax.axis_index(axis) * V if axis else 0

    def sum(self, x: jax.Array) -> jax.Array:
        return jax.lax.psum(x, self.axis) if self.axis else x

    def max(self, x: jax.Array) -> jax.Array:
        return jax.lax.pmax(x, self.axis) if self.axis else x

    def onehot(self, targets: jax.Array, dtype: DTypeLike) -> jax.Array:
        return jax.nn.one_hot(targets - self.first, self.V, dtype=dtype)

    def pick(self, targets: jax.Array, logits: jax.Array) -> jax.Array:
        return (self.onehot(targets, logits.dtype) * logits).sum(-1)


def _compute_logits(h, w_VD, b_V, softcap, form):
    logits = jnp.einsum("BTD,VD->BTV", h, w_VD, preferred_element_type=wide_dtype(h.dtype))
    return cap_logits(logits if b_V is None else logits + b_V, softcap, form)


class PlainScores:
    """A chunk's logits, computed by XLA, with their max, sum of exp and target's on this device.

    Args:
        h: [B,steps,D].
        head: (w_VD, b_V or None).
        targets: [B,steps], of the whole vocabulary.
        softcap, form: as in build_loss.
    """

    def __init__(
        self,
        h: jax.Array,
        head: tuple[jax.Array, jax.Array | None],
        targets: jax.Array,
        vocabulary: Vocabulary,
        softcap: float,
        form: str,
    ):
        self.h, self.head, self.targets, self.vocabulary = h, head, targets, vocabulary
        self.softcap, self.form = softcap, form
        self.compute()

    def compute(self) -> None:
        """Sets logits, and of each row top, total (the sum of exp(logits - top)) and target."""
        self.logits = _compute_logits(self.h, *self.head, self.softcap, self.form)
        self.top, self.total = self.reduce()
        self.target = self.vocabulary.pick(self.targets, self.logits)

    def reduce(self):
        """Returns each row's (max, sum of exp(logits - max))."""
        top = self.logits.max(-1)
        self.e = jnp.exp(self.logits - top[..., None])
        return top, self.e.sum(-1)

    def softmax(self, top, total):
        return self.e * jnp.exp(self.top - top)[..., None] / total[..., None]

    def gradients(
        self, weights: jax.Array, boost: jax.Array, top: jax.Array, total: jax.Array
    ) -> tuple[tuple[jax.Array, jax.Array | None], jax.Array]:
        """Returns this device's gradients of (w, b or None), and of h before its sum over V.

        That of the logits is weights * (boost * softmax - onehot), times the softcap's slope.

        Args:
            top, total: of the whole vocabulary.
        """
        wide, (w_VD, b_V) = self.logits.dtype, self.head
        p, onehot = self.softmax(top, total), self.vocabulary.onehot(self.targets, wide)
        d = weights[..., None] * (p * boost[..., None] - onehot)
        if self.softcap:
            d = d * cap_slope(self.logits, self.softcap, self.form)
        db = None if b_V is None else d.sum((0, 1))
        d = d.astype(self.h.dtype)
        einsum = functools.partial(jnp.einsum, preferred_element_type=wide)
        return (einsum("BTV,BTD->VD", d, self.h), db), einsum("BTV,VD->BTD", d, w_VD)


def max_and_sum(logits: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns (max, sum of exp(logits - max)) over V in a single pass over the logits [...,V]."""

    def merge(a, b):
        top = jnp.maximum(a[0], b[0])
        # Where `top` is infinite, exp(top - top) would be NaN.
        rescaled = lambda x: jnp.where(x[0] == top, x[1], x[1] * jnp.exp(x[0] - top))
        return top, rescaled(a) + rescaled(b)

    start = jnp.asarray(-jnp.inf, logits.dtype), jnp.zeros((), logits.dtype)
    return jax.lax.reduce((logits, jnp.ones_like(logits)), start, merge, (logits.ndim - 1,))


class OnePassScores(PlainScores):
    """PlainScores for GPUs, where storing exponentials takes longer than computing them twice.

    XLA reads them once for the maximum and the sum of exp, and once for the softmax and target.
    """

    def reduce(self):
        return max_and_sum(self.logits)

    def softmax(self, top, total):
        return jnp.exp(self.logits - top[..., None]) / total[..., None]


ROW_BLOCK = 64  # of the kernel's copies


class FusedScores(PlainScores):
    """PlainScores, computed by the kernel, which also stores what a gradient needs if `keep`.

    That is the logits in float32 if there is a softcap, whose slope needs them, or if the model is
    in float32; else exponentials in bfloat16, which are half as many bytes and need no softmax.
    Instead of a maximum each row has a reference, which all devices share.
    """

    def __init__(self, *args: Any, keep: bool, fused_head: FusedHead):
        self.keep, self.fused_head = keep, fused_head
        super().__init__(*args)

    def compute(self) -> None:
        w_VD, b_V = self.head
        assert b_V is None and self.form == "tanh", "choose_routes selects no kernel for these"
        # In whole blocks of rows, so that the kernel need not pad and slice what it keeps.
        self.h_ND = self.flatten(self.h)
        self.targets_N = self.flatten(self.targets - self.vocabulary.first, -1)
        target_N = self.fused_head.target_logits(self.h_ND, w_VD, self.targets_N, self.softcap)
        # Only the device that has a row's target adds to the sum.
        reference_N = self.vocabulary.sum(target_N) + self.fused_head.reference_shift
        wide = self.softcap or self.h.dtype.itemsize > 2
        self.kept = ("logits" if wide else "exponentials") if self.keep else ""
        scores = self.fused_head.scores(self.h_ND, w_VD, reference_N, self.softcap, self.kept)
        self.kept_NV = scores.kept_NV
        self.top, self.total, self.target = map(
            self.unflatten, (reference_N, scores.total_N, target_N)
        )
        if self.kept == "logits":
            self.logits = self.unflatten(self.kept_NV)

    def flatten(self, x, padding=0):
        """[B,T,...] -> [N,...], padded to whole blocks of rows."""
        x = x.reshape(-1, *x.shape[2:])
        widths = ((0, -len(x) % ROW_BLOCK),) + ((0, 0),) * (x.ndim - 1)
        return jnp.pad(x, widths, constant_values=padding)

    def unflatten(self, x):
        return x[: self.targets.size].reshape(*self.targets.shape, *x.shape[1:])

    def softmax(self, top, total):
        # As the kernel computed the total: exp(logits - top) alone may overflow.
        e = jnp.exp2((self.logits - top[..., None]) * LOG2E)
        return jnp.minimum(e, MOST) / total[..., None]

    def gradients(self, weights, boost, top, total):
        if self.kept == "logits":
            return super().gradients(weights, boost, top, total)
        weight_N, unit_N = self.flatten(weights), self.flatten(total / boost, 1)
        dh_ND, dw_VD = self.fused_head.gradients(
            self.kept_NV, self.h_ND, self.head[0], self.targets_N, weight_N, unit_N
        )
        return (dw_VD, None), self.unflatten(dh_ND)
