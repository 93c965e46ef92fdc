"""NaN reaches the results although a GPU's maximum returns the operand that is not NaN.

The compiled bodies use such a maximum (FMNMX in the machine code), the interpreter one that keeps
NaN; a stand-in takes its place here.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_kernels_nonfinite import draw, finite

from pallas_kernels import mosaic
from pallas_kernels.flash_attention import flash_attention
from pallas_kernels.head_scores import head_scores
from pallas_kernels.tile_order import LOWEST
from pallas_kernels.tiles import AttentionTiles, FlashAttentionTiles, ProductTiles

BLOCKS = FlashAttentionTiles(*(AttentionTiles(32, 16, 4, 1),) * 3)
TILES = ProductTiles(32, 32, 16, 4, 1)
pytestmark = pytest.mark.filterwarnings("ignore:invalid value")


class DroppingMaximum:
    """jax.numpy with the maximum of a GPU's max.f32, which returns the operand that is not NaN."""

    maximum, minimum = staticmethod(jnp.fmax), staticmethod(jnp.fmin)
    max = staticmethod(lambda x, axis: jax.lax.reduce(x, -np.inf, jnp.fmax, (axis,)))

    def __getattr__(self, name):
        return getattr(jnp, name)


def test_nan_reaches_the_results_where_the_maximum_drops_it(monkeypatch):
    """The compiled Triton bodies use max.f32, the interpreter a maximum that keeps NaN.

    This is interpreted on a GPU too, as Triton cannot compile the stand-in.
    """
    monkeypatch.setattr("pallas_kernels.flash_attention.jnp", DroppingMaximum())
    monkeypatch.setattr("pallas_kernels.head_scores.jnp", DroppingMaximum())
    q, k, h, w = draw((1, 32, 1, 16), (1, 32, 1, 16), (4, 16), (70, 16))
    k[0, 12, 0, 3] = np.nan
    o = flash_attention(q, k, k, None, None, BLOCKS, True)
    assert not finite(o)[0, 12:, 0].any()
    assert finite(o)[0, :12, 0, :3].all()
    w[40, 3] = np.nan
    scores = head_scores(h, w, jnp.zeros(4), TILES, interpret=True)
    assert np.isnan(scores.total_N).all()


class DroppingScores:
    """Scores whose maximum drops NaN too."""

    def __init__(self, s):
        self.s, self.shape = s, s.shape

    def max(self, axis):
        return DroppingMaximum.max(self.s, axis)

    def __sub__(self, x):
        return self.s - x

    def __mul__(self, x):
        return self.s * x


@pytest.mark.skipif(not mosaic.USABLE, reason=mosaic.REASON)
@pytest.mark.parametrize("scale", [None, 0.18])
def test_nan_reaches_the_sums_of_mosaics_softmax_where_the_maximum_drops_it(scale, monkeypatch):
    from pallas_kernels import flash_attention_mosaic

    monkeypatch.setattr(flash_attention_mosaic, "jnp", DroppingMaximum())
    s, acc = (jnp.asarray(x, jnp.float32) for x in draw((3, 8), (3, 16)))
    scores = DroppingScores(s.at[1, 3].set(np.nan).at[2].set(-np.inf))
    start = jnp.full(3, LOWEST), jnp.zeros(3)
    _, m, total, p = flash_attention_mosaic._softmax(scores, acc, *start, jnp.bfloat16, scale)
    assert finite(m).all()  # the stand-in is in use
    assert finite(total).tolist() == [True, False, True] and total[2] == 0
    assert np.isnan(np.asarray(p, np.float32)).any(1).tolist() == [False, True, False]
