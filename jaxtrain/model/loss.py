"""Head and cross-entropy in one op: [B,T,D], [V,D], targets -> nats, never holding [B,T,V].

Time is cut in chunks; each chunk's logits live only while its loss and, under differentiation, its
gradients are made (in the forward pass: the loss is the end of the network, so its cotangent is
a number, and a second pass over the head is saved). Bound: compute, 6*B*T*D*V FLOPs with gradients.
"""

import functools

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from jaxtrain.distributed.mesh import BATCH_AXES
from jaxtrain.ops import fused

MIN_CHUNKS = 4  # so that even a small vocabulary never makes [B,T,V]


def chunk_steps(B, T, V, chunk_bytes):
    """Time steps a chunk holds: at most chunk_bytes of float32 logits, at most T / MIN_CHUNKS.

    As many chunks as that takes, of even length: 2,048 in 25 are 82 steps and 2 of padding, where
    83 would pad 27, each of which costs what a token costs.
    """
    most = max(1, min(chunk_bytes // (4 * B * V), -(-T // MIN_CHUNKS)))
    return -(-T // -(-T // most))


def _chunks(x, steps):
    """[B,T,...] -> [chunks,B,steps,...], time padded with zeros."""
    pad = -x.shape[1] % steps
    x = jnp.pad(x, ((0, 0), (0, pad)) + ((0, 0),) * (x.ndim - 2))
    return jnp.moveaxis(x.reshape(x.shape[0], -1, steps, *x.shape[2:]), 1, 0)


class _Softmax:
    """Sums over the vocabulary, of which this device holds V rows from `first` on."""

    def __init__(self, axis, V):
        self.axis, self.V = axis, V
        self.first = jax.lax.axis_index(axis) * V if axis else 0

    def sum(self, x):
        return jax.lax.psum(x, self.axis) if self.axis else x

    def max(self, x):
        return jax.lax.pmax(x, self.axis) if self.axis else x

    def onehot(self, targets, dtype):
        return jax.nn.one_hot(targets - self.first, self.V, dtype=dtype)


class _Plain:
    """Logits of a chunk by XLA, and what the loss wants of them."""

    def __init__(self, h, w_VD, targets, vocabulary, softcap, keep):
        del keep  # they are made either way
        wide = jnp.promote_types(h.dtype, jnp.float32)
        self.logits = jnp.einsum("BTD,VD->BTV", h, w_VD, preferred_element_type=wide)
        if softcap:
            self.logits = softcap * jnp.tanh(self.logits / softcap)
        self.top = self.logits.max(-1)
        self.e = jnp.exp(self.logits - self.top[..., None])
        self.total = self.e.sum(-1)
        self.hit = (vocabulary.onehot(targets, wide) * self.logits).sum(-1)

    def softmax(self, top, total):
        return self.e * jnp.exp(self.top - top)[..., None] / total[..., None]


class _Fused:
    """The same, out of the kernel that makes the logits."""

    def __init__(self, h, w_VD, targets, vocabulary, softcap, keep, scores):
        found = scores(
            h.reshape(-1, h.shape[-1]), w_VD, (targets - vocabulary.first).ravel(), softcap, keep
        )
        shaped = lambda x: x.reshape(*targets.shape, *x.shape[1:])
        self.logits = shaped(found.logits_NV) if keep else None
        self.top, self.total, self.hit = map(shaped, found[1:])

    def softmax(self, top, total):
        return jnp.exp(self.logits - top[..., None]) / total[..., None]


def _local(h_BTD, w_VD, targets_BT, weights_BT, *, head, softcap, z_loss, chunk_bytes, axis, grads):
    """Weighted sums (objective, nats) over this device's rows; with grads also dh and dw."""
    (B, T, D), V = h_BTD.shape, w_VD.shape[0]
    wide = jnp.promote_types(h_BTD.dtype, jnp.float32)  # losses and softmax in float32
    vocabulary = _Softmax(axis, V)
    einsum = functools.partial(jnp.einsum, preferred_element_type=wide)

    def one(carry, chunk):
        h, targets, weights = chunk
        here = head(h, w_VD, targets, vocabulary, softcap, keep=grads)
        top = vocabulary.max(here.top)
        total = vocabulary.sum(here.total * jnp.exp(here.top - top))
        lse = top + jnp.log(total)
        nll = lse - vocabulary.sum(here.hit)
        nats = (weights * nll).sum()
        sums = (carry[0] + nats + z_loss * (weights * lse**2).sum(), carry[1] + nats)
        if not grads:
            return sums, None
        p, onehot = here.softmax(top, total), vocabulary.onehot(targets, wide)
        d = weights[..., None] * (p * (1 + 2 * z_loss * lse[..., None]) - onehot)
        if softcap:
            d = d * (1 - (here.logits / softcap) ** 2)
        d = d.astype(h.dtype)
        dw = carry[2] + einsum("BTV,BTD->VD", d, h)
        return (*sums, dw), vocabulary.sum(einsum("BTV,VD->BTD", d, w_VD)).astype(h.dtype)

    steps = chunk_steps(B, T, V, chunk_bytes)
    chunks = tuple(_chunks(x, steps) for x in (h_BTD, targets_BT, weights_BT))
    count = chunks[0].shape[0]
    zero = jnp.zeros((), wide)
    carry = (zero, zero, jnp.zeros((V, D), wide)) if grads else (zero, zero)
    carry, dh = jax.lax.scan(one, carry, chunks, unroll=count if count <= MIN_CHUNKS else 1)
    if not grads:
        return carry
    return (*carry, jnp.moveaxis(dh, 0, 1).reshape(B, -1, D)[:, :T])


def build_loss(cfg, softcap, dtype, mesh=None, route=None):
    """loss(h_BTD, w_VD, targets_BT, weights_BT) -> (objective, nats), sums over weighted tokens.

    Weights that sum to one over the batch make both a mean. `objective` adds z_loss * lse^2, and
    is what to differentiate. w_VD is the master; it is used in `dtype`, its gradient is wide.

    Args:
        cfg: a LossConfig.
        softcap: c in c*tanh(logits/c), or 0.
        mesh: rows of h lie over (replica, fsdp) and, where it divides V, w over tensor.
        route: the head's, from jaxtrain.ops.routes.choose_routes; None is XLA's.
    """
    head = _Plain
    if route is not None and route.tiles:
        head = functools.partial(_Fused, scores=fused.build_scores(route))
    options = dict(head=head, softcap=softcap, z_loss=cfg.z_loss, chunk_bytes=cfg.chunk_bytes)

    def run(h_BTD, w_VD, targets_BT, weights_BT, grads):
        w_VD = w_VD.astype(dtype)
        if mesh is None or mesh.size == 1:
            return _local(h_BTD, w_VD, targets_BT, weights_BT, **options, axis=None, grads=grads)
        split = w_VD.shape[0] % mesh.shape["tensor"] == 0
        w_spec = P("tensor") if split else P()

        def local(*args):
            out = _local(*args, **options, axis="tensor" if split else None, grads=grads)
            return tuple(jax.lax.psum(x, BATCH_AXES) for x in out[:3]) + out[3:]

        return jax.shard_map(
            local,
            mesh=mesh,
            in_specs=(P(BATCH_AXES), w_spec, P(BATCH_AXES), P(BATCH_AXES)),
            out_specs=(P(), P(), w_spec, P(BATCH_AXES)) if grads else (P(), P()),
            check_vma=False,
        )(h_BTD, w_VD, targets_BT, weights_BT)

    @jax.custom_vjp
    def loss(h_BTD, w_VD, targets_BT, weights_BT):
        return run(h_BTD, w_VD, targets_BT, weights_BT, grads=False)

    def forward(h_BTD, w_VD, targets_BT, weights_BT):
        objective, nats, dw, dh = run(h_BTD, w_VD, targets_BT, weights_BT, grads=True)
        return (objective, nats), (dh, dw.astype(w_VD.dtype))

    def backward(residuals, cotangents):
        dh, dw = residuals
        g = cotangents[0]  # nats is a report of the same sum, never differentiated
        return (dh * g).astype(dh.dtype), dw * g, None, None

    loss.defvjp(forward, backward)
    return loss
