"""Head and cross-entropy in one op: [B,T,D], [V,D], targets -> nats, without logits [B,T,V].

Logits are the largest activation of a small model: at V = 50,304 they have 65 times the entries of
h at D = 768. So time is cut into chunks, and each chunk's logits exist only while its loss and,
under differentiation, its gradients are computed. The gradients are computed in the forward pass,
so that the backward need not compute the logits again: the loss is the network's last op, and its
cotangent is one number by which the backward multiplies them.

Bound: compute, 6*B*T*D*V FLOPs with gradients.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike

from jaxtrain.config.sections import LossConfig
from jaxtrain.distributed.mesh import BATCH_AXES
from jaxtrain.model.dense import wide_dtype
from jaxtrain.model.logits import cap_logits, cap_slope
from jaxtrain.ops import fused
from jaxtrain.ops.routes import Route

MIN_CHUNKS = 4  # so that [B,T,V] never exists, even with a small vocabulary


def chunk_steps(B: int, T: int, V: int, chunk_bytes: int) -> int:
    """Returns the number of time steps in a chunk.

    A chunk has at most chunk_bytes of float32 logits and at most T / MIN_CHUNKS steps. Within these
    limits there are as few chunks as possible, of equal length: if 2,048 steps need 25 chunks, each
    has 82, which pads 2. Chunks of 83 would pad 27, and padding costs as much as real steps.
    """
    most = max(1, min(chunk_bytes // (4 * B * V), -(-T // MIN_CHUNKS)))
    return -(-T // -(-T // most))  # -(-a // b) rounds up


def split_time(x: jax.Array, steps: int) -> jax.Array:
    """[B,T,...] -> [chunks,B,steps,...], time padded with zeros."""
    pad = -x.shape[1] % steps
    x = jnp.pad(x, ((0, 0), (0, pad)) + ((0, 0),) * (x.ndim - 2))
    return jnp.moveaxis(x.reshape(x.shape[0], -1, steps, *x.shape[2:]), 1, 0)


class _Vocabulary:
    """Reductions over the whole vocabulary, of which this device has V rows from `first` on."""

    def __init__(self, axis, V):
        self.axis, self.V = axis, V
        self.first = jax.lax.axis_index(axis) * V if axis else 0

    def sum(self, x):
        return jax.lax.psum(x, self.axis) if self.axis else x

    def max(self, x):
        return jax.lax.pmax(x, self.axis) if self.axis else x

    def onehot(self, targets, dtype):
        return jax.nn.one_hot(targets - self.first, self.V, dtype=dtype)

    def pick(self, targets, logits):
        return (self.onehot(targets, logits.dtype) * logits).sum(-1)


def _compute_logits(h, w_VD, b_V, softcap, form):
    logits = jnp.einsum("BTD,VD->BTV", h, w_VD, preferred_element_type=wide_dtype(h.dtype))
    return cap_logits(logits if b_V is None else logits + b_V, softcap, form)


class _PlainScores:
    """A chunk's logits, computed by XLA, with their max, sum of exp and target's on this device."""

    def __init__(self, h, head, targets, vocabulary, softcap, form):
        self.h, self.head, self.targets, self.vocabulary = h, head, targets, vocabulary
        self.softcap, self.form = softcap, form
        self.logits = _compute_logits(h, *head, softcap, form)
        self.top, self.total = self.reduce()
        self.target = vocabulary.pick(targets, self.logits)

    def reduce(self):
        """Returns each row's (max, sum of exp(logits - max))."""
        top = self.logits.max(-1)
        self.e = jnp.exp(self.logits - top[..., None])
        return top, self.e.sum(-1)

    def softmax(self, top, total):
        return self.e * jnp.exp(self.top - top)[..., None] / total[..., None]

    def gradients(self, weights, boost, top, total):
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


class _OnePassScores(_PlainScores):
    """_PlainScores for GPUs, where reading the logits takes longer than computing them twice.

    XLA reads them once for the maximum and the sum of exp, and once for the softmax and target.
    """

    def reduce(self):
        return max_and_sum(self.logits)

    def softmax(self, top, total):
        return jnp.exp(self.logits - top[..., None]) / total[..., None]


ROW_BLOCK = 64  # of the kernel's copies


class _FusedScores(_OnePassScores):
    """_PlainScores, computed by the kernel, which also stores what a gradient needs if `keep`.

    That is the logits in float32 if there is a softcap, whose slope needs them, or if the model is
    in float32; else exponentials in bfloat16, which are half as many bytes and need no softmax.
    Instead of a maximum each row has a reference, which all devices share.
    """

    def __init__(self, h, head, targets, vocabulary, softcap, form, keep, fused_head):
        w_VD, b_V = head
        assert b_V is None and form == "tanh", "choose_routes never selects the kernel for these"
        self.h, self.head, self.targets, self.vocabulary = h, head, targets, vocabulary
        self.softcap, self.form, self.fused_head = softcap, form, fused_head
        # In whole blocks of rows, so that the kernel need not pad and slice what it keeps.
        self.h_ND = self.flatten(h)
        self.targets_N = self.flatten(targets - vocabulary.first, -1)
        target_N = fused_head.target_logits(self.h_ND, w_VD, self.targets_N, softcap)
        # Only the device that has a row's target adds to the sum.
        reference_N = vocabulary.sum(target_N) + fused_head.reference_shift
        wide = softcap or h.dtype.itemsize > 2
        self.kept = ("logits" if wide else "exponentials") if keep else ""
        scores = fused_head.scores(self.h_ND, w_VD, reference_N, softcap, self.kept)
        self.kept_NV = scores.kept_NV
        self.top, self.total, self.target = map(
            self.unflatten, (reference_N, scores.total_N, target_N)
        )
        self.logits = self.unflatten(self.kept_NV) if self.kept == "logits" else None

    def flatten(self, x, padding=0):
        """[B,T,...] -> [N,...], padded to whole blocks of rows."""
        x = x.reshape(-1, *x.shape[2:])
        widths = ((0, -len(x) % ROW_BLOCK),) + ((0, 0),) * (x.ndim - 1)
        return jnp.pad(x, widths, constant_values=padding)

    def unflatten(self, x):
        return x[: self.targets.size].reshape(*self.targets.shape, *x.shape[1:])

    def gradients(self, weights, boost, top, total):
        if self.kept == "logits":
            return super().gradients(weights, boost, top, total)
        weight_N, unit_N = self.flatten(weights), self.flatten(total / boost, 1)
        dh_ND, dw_VD = self.fused_head.gradients(
            self.kept_NV, self.h_ND, self.head[0], self.targets_N, weight_N, unit_N
        )
        return (dw_VD, None), self.unflatten(dh_ND)


def _local_loss(
    h_BTD,
    head,
    targets_BT,
    weights_BT,
    groups_BS,
    *,
    scores,
    softcap,
    form,
    z_loss,
    chunk_bytes,
    axis,
    grads,
):
    """Returns weighted sums (objective, nats) over this device's rows; with grads also dhead, dh.

    Args:
        head: (w_VD, b_V or None).
        groups_BS: as in build_loss.
    """
    w_VD, b_V = head
    (B, T, D), V = h_BTD.shape, w_VD.shape[0]
    wide = wide_dtype(h_BTD.dtype)  # for losses and softmax
    vocabulary = _Vocabulary(axis, V)

    def add_chunk(carry, chunk):
        h, targets, weights = chunk
        local = scores(h, head, targets, vocabulary, softcap, form)
        # Log-sum-exp over all devices' rows: each sum of exp is rescaled to the global maximum.
        top = vocabulary.max(local.top)
        total = vocabulary.sum(local.total * jnp.exp(local.top - top))
        lse = top + jnp.log(total)
        nll = lse - vocabulary.sum(local.target)
        weighted = weights * nll
        parts = nats = weighted.sum()
        if groups_BS is not None:
            parts = nats, (weighted.sum(1)[:, None] * groups_BS).sum(0)
        sums = (
            carry[0] + nats + z_loss * (weights * lse**2).sum(),
            jax.tree.map(jnp.add, carry[1], parts),
        )
        if not grads:
            return sums, None
        # The derivative of lse by the logits is the softmax p. So that of lse - target is
        # p - onehot, and that of z_loss * lse^2 is 2 * z_loss * lse * p.
        dhead, dh = local.gradients(weights, 1 + 2 * z_loss * lse, top, total)
        dhead = jax.tree.map(jnp.add, carry[2], dhead)
        return (*sums, dhead), vocabulary.sum(dh).astype(h.dtype)

    steps = chunk_steps(B, T, V, chunk_bytes)
    chunks = tuple(split_time(x, steps) for x in (h_BTD, targets_BT, weights_BT))
    count = chunks[0].shape[0]
    zero = jnp.zeros((), wide)
    dhead = (jnp.zeros((V, D), wide), None if b_V is None else jnp.zeros(V, wide))
    no_nats = zero if groups_BS is None else (zero, jnp.zeros(groups_BS.shape[1], wide))
    carry = (zero, no_nats, dhead) if grads else (zero, no_nats)
    carry, dh = jax.lax.scan(add_chunk, carry, chunks, unroll=count if count <= MIN_CHUNKS else 1)
    if not grads:
        return carry
    return (*carry, jnp.moveaxis(dh, 0, 1).reshape(B, -1, D)[:, :T])


def build_loss(
    cfg: LossConfig,
    softcap: float,
    dtype: DTypeLike,
    mesh: Mesh | None = None,
    route: Route | None = None,
    softcap_form: str = "tanh",
) -> Callable[..., tuple[jax.Array, Any]]:
    """Builds loss(h_BTD, w_VD, targets_BT, weights_BT, b_V=None, groups_BS=None).

    It returns (objective, nats). If groups_BS says, as 0 or 1, to which of S groups each row
    belongs, nats is a pair: that of all rows [], and those of each group [S].

    Both are weighted sums over tokens, and means if the weights sum to one over the batch.
    `objective` is nats plus z_loss * lse^2; differentiate it, as nats has no gradient. w_VD is the
    float32 master weight; it is cast to `dtype`, and its gradient is float32. b_V is added to the
    logits in float32.

    Args:
        softcap: c of `cap_logits`, or 0.
        mesh: splits rows of h over (replica, fsdp) and, if tensor divides V, w over tensor.
        route: the head's, from jaxtrain.ops.routes.choose_routes; None means XLA.
        softcap_form: form of `cap_logits`.
    """
    build_scores = lambda keep: _PlainScores
    if route is not None and route.is_fused:
        fused_head = fused.build_head(route)
        build_scores = lambda keep: functools.partial(
            _FusedScores, keep=keep, fused_head=fused_head
        )
    elif route is not None and route.implementation == "one_pass":
        build_scores = lambda keep: _OnePassScores
    options = dict(softcap=softcap, form=softcap_form, z_loss=cfg.z_loss)
    options |= dict(chunk_bytes=cfg.chunk_bytes)

    def compute(h_BTD, w_VD, targets_BT, weights_BT, b_V, groups_BS, grads) -> tuple[Any, ...]:
        args = h_BTD, (w_VD.astype(dtype), b_V), targets_BT, weights_BT, groups_BS
        scores = build_scores(keep=grads)
        if mesh is None or mesh.size == 1:
            return _local_loss(*args, **options, scores=scores, axis=None, grads=grads)
        split = w_VD.shape[0] % mesh.shape["tensor"] == 0
        head_spec = P("tensor") if split else P()

        def on_device(*args):
            axis = "tensor" if split else None
            out = _local_loss(*args, **options, scores=scores, axis=axis, grads=grads)
            # Losses and dhead are summed over the batch's shards; dh stays with its rows.
            total = lambda x: jax.lax.psum(x, BATCH_AXES)
            return (*jax.tree.map(total, out[:3]), *out[3:])

        return jax.shard_map(
            on_device,
            mesh=mesh,
            in_specs=(P(BATCH_AXES), head_spec, P(BATCH_AXES), P(BATCH_AXES), P(BATCH_AXES)),
            out_specs=(P(), P(), head_spec, P(BATCH_AXES)) if grads else (P(), P()),
            check_vma=False,
        )(*args)

    @jax.custom_vjp
    def loss(h_BTD, w_VD, targets_BT, weights_BT, b_V=None, groups_BS=None):
        return compute(h_BTD, w_VD, targets_BT, weights_BT, b_V, groups_BS, grads=False)

    def forward(h_BTD, w_VD, targets_BT, weights_BT, b_V, groups_BS):
        out = compute(h_BTD, w_VD, targets_BT, weights_BT, b_V, groups_BS, grads=True)
        objective, nats, (dw, db), dh = out
        return (objective, nats), (dh, dw.astype(w_VD.dtype), db)

    def backward(residuals, cotangents):
        dh, dw, db = residuals
        g = cotangents[0]  # nats is only reported, never differentiated
        db = None if db is None else db * g
        return (dh * g).astype(dh.dtype), dw * g, None, None, db, None

    loss.defvjp(forward, backward)
    return loss
