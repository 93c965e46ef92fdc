"""The contests of bench for the norm; contests.py has the others, and what a contest is."""

import jax.numpy as jnp

from pallas_kernels.add_norm import add_norm, add_norm_reference
from pallas_kernels.contest import HALF, NATS, Contest, normal, wide, with_gradients
from pallas_kernels.norm_xla import normalise_gpu


def norm_contest(size: tuple[int, int], interpret: bool) -> Contest:
    """Returns the contest of a residual add and an RMS norm of [N,D]."""
    N, D = size
    reference = lambda h, y, gain: add_norm_reference(h, y, gain, None, "rms", 1e-6)

    def kernel(tiles):
        fused = lambda h, y, gain: add_norm(h, y, gain, None, "rms", 1e-6, interpret, tiles=tiles)
        return with_gradients(fused, 3, 3)

    def arrays(key):
        h, y, ds, dn = normal(key, *[(N, D)] * 4)
        return [h, y, jnp.ones(D), ds, dn]

    def exact(h, y, *rest):  # starts from the rounded sum, as all implementations do
        h, y, *rest = wide(h + y, jnp.zeros_like(y), *rest)
        return with_gradients(reference, 3, 3)(h, y, *rest)

    return Contest(
        "norm",
        f"norm both ways {N}x{D}",
        (D,),
        arrays,
        kernel,
        {"xla": with_gradients(reference, 3, 3)},
        exact,
        (HALF, HALF, HALF, HALF, NATS),
        0,
        16 * N * D,
    )


def layer_norm_contest(size: tuple[int, int], interpret: bool) -> Contest:
    """Returns the contest of layer norm with a bias and a bias of y, as GPT-2 has them."""
    N, D = size

    def reference(h, y, gain, bias, y_bias):
        return add_norm_reference(h, y, gain, bias, "layer", 1e-6, y_bias)

    def as_the_model(h, y, gain, bias, y_bias):
        s = h + (y.astype(y_bias.dtype) + y_bias).astype(y.dtype)
        return s, normalise_gpu(s, gain, bias, "layer", (-1,), 1e-6)

    def kernel(tiles):
        fused = lambda h, y, gain, bias, y_bias: add_norm(
            h, y, gain, bias, "layer", 1e-6, interpret, y_bias, tiles
        )
        return with_gradients(fused, 5, 5)

    def arrays(key):
        h, y, ds, dn, *vectors = normal(key, *[(N, D)] * 4, *[(D,)] * 2)
        bias, y_bias = (x.astype(jnp.float32) for x in vectors)
        return [h, y, jnp.ones(D), bias, y_bias, ds, dn]

    return Contest(
        "norm",
        f"layer norm both ways {N}x{D}",
        (D,),
        arrays,
        kernel,
        {"xla": with_gradients(as_the_model, 5, 5)},
        lambda *arrays: with_gradients(reference, 5, 5)(*wide(*arrays)),
        (HALF,) * 7,  # sums start from a rounded s, and y's bias gets that of rounded gradients
        0,
        16 * N * D,
    )
