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
from jaxtrain.model.loss_scores import FusedScores, OnePassScores, PlainScores, Vocabulary
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
    scaled,
):
    """Returns weighted sums (objective, nats) over this device's rows; with grads also dhead, dh.

    Args:
        head: (w_VD, b_V or None).
        groups_BS: as in build_loss.
        scaled: whether gradients are computed for weights of about 1, and then multiplied by a
            power of two. So the kernel's factors of rows do not underflow.
    """
    w_VD, b_V = head
    (B, T, D), V = h_BTD.shape, w_VD.shape[0]
    wide = wide_dtype(h_BTD.dtype)  # for losses and softmax
    vocabulary = Vocabulary(axis, V)
    scale = _power_of_two(weights_BT.max()) if scaled and grads else 1

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
        dhead, dh = local.gradients(weights / scale, 1 + 2 * z_loss * lse, top, total)
        dhead = jax.tree.map(jnp.add, carry[2], dhead)
        return (*sums, dhead), vocabulary.sum(dh).astype(h.dtype)

    steps = chunk_steps(B, T, V, chunk_bytes)
    chunks = tuple(split_time(x, steps) for x in (h_BTD, targets_BT, weights_BT))
    count = chunks[0].shape[0]
    zero = jnp.zeros((), wide)
    dhead = (jnp.zeros((V, D), wide), None if b_V is None else jnp.zeros(V, wide))
    no_nats = zero if groups_BS is None else (zero, jnp.zeros(groups_BS.shape[1], wide))
    carry: Any = (zero, no_nats, dhead) if grads else (zero, no_nats)
    unroll = count if count <= MIN_CHUNKS else 1
    carry, dh = jax.lax.scan(add_chunk, carry, chunks, unroll=unroll)
    if dh is None:
        return carry
    objective, nats, dhead = carry
    dh_BTD = jnp.moveaxis(dh, 0, 1).reshape(B, -1, D)[:, :T]
    dhead = jax.tree.map(lambda x: x * scale, dhead)
    return objective, nats, dhead, (dh_BTD * scale).astype(dh_BTD.dtype)


def _power_of_two(x: jax.Array) -> jax.Array:
    """Returns the largest power of two that is at most a positive x; 1 for other numbers."""
    return jnp.where(x > 0, jnp.exp2(jnp.floor(jnp.log2(jnp.where(x > 0, x, 1)))), 1)


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
    build_scores = lambda keep: PlainScores
    if route is not None and route.is_fused:
        fused_head = fused.build_head(route)
        build_scores = lambda keep: functools.partial(FusedScores, keep=keep, fused_head=fused_head)
    elif route is not None and route.implementation == "one_pass":
        build_scores = lambda keep: OnePassScores
    options = dict(softcap=softcap, form=softcap_form, z_loss=cfg.z_loss)
    options |= dict(chunk_bytes=cfg.chunk_bytes, scaled=route is not None and route.is_fused)

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
