"""Training in one file of plain JAX: model, loss, Muon and step, as jaxtrain computes them.

    python docs/minimal.py FILE       trains on the bytes of a file for 20 steps

It imports nothing from jaxtrain. Model, initialisation, optimizer and schedule are those of
configs/debug.py, and so are the losses: tests/test_docs_minimal.py compares 20 steps. They agree
within 20 float32 ulps with `--optim.ns_dtype=float32`, and within 100 by default, where the trainer
multiplies Muon's matrices in half precision. The real stack adds speed, safety and measurement.

Letters in names are dimensions: B sequences, T tokens (S where they are keys), V vocabulary,
L layers, D width, H query heads, G key/value heads, K head width, F ffn width; X, I, O are the
stack, inputs and outputs of matrices.
"""

import math
import sys
import zlib

import jax
import jax.numpy as jnp
import numpy as np

L, D, H, G, K, F, V = 2, 32, 4, 2, 8, 64, 256  # 35,008 parameters
B, T, STEPS, SEED = 8, 32, 20, 0
NORM_EPS, ROPE_THETA = 1e-6, 10_000.0
MUON_RATE, MOMENTUM = 0.02, 0.95
ADAM_RATE, ADAM_B1, ADAM_B2, ADAM_EPS = 3e-3, 0.9, 0.95, 1e-8
CLIP_NORM, WARMUP_STEPS, DECAY_STEPS = 1.0, 2, 8

# Parameter -> (shape, initial standard deviation; None means ones). Layers are stacked on L.
SMALL, RESIDUAL = (2 / (5 * D)) ** 0.5, 2 / (L * D**0.5)
MATRICES = {  # stepped by Muon; [L, inputs..., outputs...]
    "blocks/attention/q/w": ((L, D, H, K), SMALL),
    "blocks/attention/k/w": ((L, D, G, K), SMALL),
    "blocks/attention/v/w": ((L, D, G, K), SMALL),
    "blocks/attention/o/w": ((L, H, K, D), RESIDUAL),
    "blocks/mlp/gate/w": ((L, D, F), SMALL),
    "blocks/mlp/up/w": ((L, D, F), SMALL),
    "blocks/mlp/down/w": ((L, F, D), RESIDUAL),
}
REST = {  # stepped by Adam
    "embed": ((V, D), SMALL),
    "blocks/attention_norm/gain": ((L, D), None),
    "blocks/attention/q_norm/gain": ((L, K), None),
    "blocks/attention/k_norm/gain": ((L, K), None),
    "blocks/mlp_norm/gain": ((L, D), None),
    "final_norm/gain": ((D,), None),
    "head": ((V, D), 1 / D),
}


def init_params(seed=SEED, dtype=jnp.float32):
    """Draws every parameter from a separate random stream, seeded by the parameter's name."""

    def draw(name, shape, std):
        if std is None:
            return jnp.ones(shape, dtype)
        key = jax.random.fold_in(jax.random.key(seed), zlib.crc32(name.encode()))
        return std * jax.random.normal(key, shape, dtype)

    return {name: draw(name, *spec) for name, spec in (MATRICES | REST).items()}


def rms_norm(x_XD, gain_D):
    """Divides by the root mean square. Source: https://arxiv.org/abs/1910.07467."""
    return x_XD * jax.lax.rsqrt((x_XD * x_XD).mean(-1, keepdims=True) + NORM_EPS) * gain_D


def rope(x_BTHK):
    """Rotates each pair (x[k], x[k + K/2]) by an angle that grows with the position.

    Scores q.k then depend only on distances. Source: Su et al. 2021, https://arxiv.org/abs/2104.09864.
    """
    dtype = x_BTHK.dtype
    wavelength = ROPE_THETA ** (jnp.arange(0, K, 2, dtype=dtype) / K)
    angle = jnp.arange(x_BTHK.shape[1], dtype=dtype)[:, None] / wavelength
    angle_TK = jnp.concatenate([angle, angle], -1)
    first, second = jnp.split(x_BTHK, 2, -1)
    rotated = jnp.concatenate([-second, first], -1)
    return x_BTHK * jnp.cos(angle_TK)[:, None] + rotated * jnp.sin(angle_TK)[:, None]


def attention(q_BTHK, k_BTGK, v_BTGK):
    """Computes causal attention; H/G query heads share a k/v head (arxiv.org/abs/2305.13245)."""
    k_BSHK, v_BSHK = (jnp.repeat(x, H // G, axis=2) for x in (k_BTGK, v_BTGK))
    scores_BHTS = jnp.einsum("BTHK,BSHK->BHTS", q_BTHK, k_BSHK) * K**-0.5
    causal_TS = jnp.tril(jnp.ones(scores_BHTS.shape[-2:], bool))
    probs_BHTS = jax.nn.softmax(jnp.where(causal_TS, scores_BHTS, -1e30), axis=-1)
    return jnp.einsum("BHTS,BSHK->BTHK", probs_BHTS, v_BSHK)


def block(h_BTD, layer):
    """Runs one pre-norm layer: h + attention(norm(h)), then h + mlp(norm(h)) with SwiGLU."""
    w = lambda name: layer[f"blocks/{name}"]
    x_BTD = rms_norm(h_BTD, w("attention_norm/gain"))
    q_BTHK = jnp.einsum("BTD,DHK->BTHK", x_BTD, w("attention/q/w"))
    k_BTGK = jnp.einsum("BTD,DGK->BTGK", x_BTD, w("attention/k/w"))
    v_BTGK = jnp.einsum("BTD,DGK->BTGK", x_BTD, w("attention/v/w"))
    q_BTHK = rope(rms_norm(q_BTHK, w("attention/q_norm/gain")))
    k_BTGK = rope(rms_norm(k_BTGK, w("attention/k_norm/gain")))
    o_BTHK = attention(q_BTHK, k_BTGK, v_BTGK)
    h_BTD = h_BTD + jnp.einsum("BTHK,HKD->BTD", o_BTHK, w("attention/o/w"))
    x_BTD = rms_norm(h_BTD, w("mlp_norm/gain"))
    gated_BTF = jax.nn.silu(x_BTD @ w("mlp/gate/w")) * (x_BTD @ w("mlp/up/w"))
    return h_BTD + gated_BTF @ w("mlp/down/w")


def loss_fn(params, tokens):
    """Computes the mean nats per predicted token. [B,T+1] int32 -> []"""
    inputs_BT, targets_BT = tokens[:, :-1], tokens[:, 1:]
    layers = {name: x for name, x in params.items() if name.startswith("blocks/")}
    h_BTD = params["embed"][inputs_BT]
    h_BTD, _ = jax.lax.scan(lambda h, layer: (block(h, layer), None), h_BTD, layers)
    h_BTD = rms_norm(h_BTD, params["final_norm/gain"])
    logits_BTV = jnp.einsum("BTD,VD->BTV", h_BTD, params["head"])
    log_probs_BTV = jax.nn.log_softmax(logits_BTV)
    return -jnp.take_along_axis(log_probs_BTV, targets_BT[..., None], -1).mean()


def orthogonalize(x_XIO):
    """Moves every singular value s of each matrix to about 1, using only matrix products.

    X <- aX + (bA + cA^2)X with A = XX^T maps s to as + bs^3 + cs^5 and leaves the singular vectors
    unchanged. Applied five times, these coefficients take every s in (0.01, 1] into (0.7, 1.2).
    Source: Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    tall = x_XIO.shape[-2] > x_XIO.shape[-1]
    x_XMN = x_XIO.mT if tall else x_XIO  # so that XX^T is small
    # The Frobenius norm is at least the largest singular value.
    x_XMN = x_XMN / jnp.maximum(jnp.linalg.norm(x_XMN, axis=(-2, -1), keepdims=True), 1e-30)
    for _ in range(5):
        gram_XMM = x_XMN @ x_XMN.mT
        x_XMN = a * x_XMN + (b * gram_XMM + c * gram_XMM @ gram_XMM) @ x_XMN
    return x_XMN.mT if tall else x_XMN


def muon_direction(name, momentum, grad):
    """Computes Muon's step for one stack of matrices: Nesterov momentum, orthogonalised."""
    ahead = MOMENTUM * momentum + (1 - MOMENTUM) * grad
    inputs = H * K if name.endswith("o/w") else grad.shape[1]
    x_XIO = ahead.reshape(L, inputs, -1)
    outputs = x_XIO.shape[-1]
    # With this scale a step changes the outputs' RMS equally in all matrices.
    scale = math.sqrt(max(1.0, outputs / inputs))
    return scale * orthogonalize(x_XIO).reshape(grad.shape)


def schedule(count):
    """Returns the share of the peak rate: warm-up, flat, then linear to 0 in DECAY_STEPS."""
    return jnp.minimum((count + 1) / WARMUP_STEPS, jnp.minimum((STEPS - count) / DECAY_STEPS, 1))


def init_state(params):
    zeros = jax.tree.map(jnp.zeros_like, params)
    return {"params": params, "mean": zeros, "square": zeros, "count": jnp.int32(0)}


@jax.jit
def train_step(state, tokens):
    """Makes one update; returns (new state, the loss before the update)."""
    params, count = state["params"], state["count"]
    loss, grads = jax.value_and_grad(loss_fn)(params, tokens)
    norm = jnp.sqrt(sum(jnp.sum(g * g) for g in grads.values()))
    grads = {name: g / jnp.maximum(norm / CLIP_NORM, 1) for name, g in grads.items()}
    params, means, squares, scale = dict(params), {}, {}, schedule(count)
    for name, grad in grads.items():
        decay = MOMENTUM if name in MATRICES else ADAM_B1
        means[name] = decay * state["mean"][name] + (1 - decay) * grad
        squares[name] = ADAM_B2 * state["square"][name] + (1 - ADAM_B2) * grad * grad
        if name in MATRICES:
            params[name] -= MUON_RATE * scale * muon_direction(name, means[name], grad)
        else:  # Adam; its averages start at 0, and the divisions correct for that
            mean = means[name] / -jnp.expm1((count + 1) * math.log(ADAM_B1))
            square = squares[name] / -jnp.expm1((count + 1) * math.log(ADAM_B2))
            params[name] -= ADAM_RATE * scale * mean / (jnp.sqrt(square) + ADAM_EPS)
    return {"params": params, "mean": means, "square": squares, "count": count + 1}, loss


def read_batches(path):
    """Yields [B,T+1] int32: windows of a file's bytes, in a random order."""
    data = np.fromfile(path, np.uint8)
    starts = np.random.default_rng(SEED).permutation((len(data) - 1) // T) * T
    for i in range(0, len(starts) - B + 1, B):
        yield np.stack([data[s : s + T + 1] for s in starts[i : i + B]]).astype(np.int32)


def train(batches, dtype=jnp.float32):
    """Trains for STEPS steps and returns their losses."""
    state, losses = init_state(init_params(dtype=dtype)), []
    for _, tokens in zip(range(STEPS), batches, strict=False):
        state, loss = train_step(state, tokens)
        losses.append(float(loss))
    return losses


if __name__ == "__main__":
    for step, loss in enumerate(train(read_batches(sys.argv[1])), 1):
        print(f"step {step:2}  loss {loss:.4f} nats/byte")
