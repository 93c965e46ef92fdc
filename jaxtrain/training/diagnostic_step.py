"""The diagnosis: a second compiled program that looks at a step and changes nothing.

It makes the batch's gradient again in microbatches, so that their spread shows, asks the optimizer
for the update it would make, and reports `optim.diagnostics` of both. The training step is not
touched: without `diagnose_every` no part of this is compiled.
"""

import jax
import jax.numpy as jnp

from jaxtrain.distributed.mesh import replicated
from jaxtrain.optim import diagnostics
from jaxtrain.training.step import build_gradient, microbatches

PARTS = 8  # most microbatches, unless accumulation makes more


def count_parts(batch: int, accumulation: int, mesh) -> int:
    """Microbatches of a diagnosis: none larger than the training step's.

    Raises:
        ValueError: the batch cannot be cut in two.
    """
    rows = mesh.shape["replica"] * mesh.shape["fsdp"]
    most = max(PARTS, accumulation)
    parts = max(n for n in range(1, most + 1) if batch % n == 0 and batch // n % rows == 0)
    if parts == 1:
        raise ValueError(
            f"diagnose_every needs two microbatches of replica x fsdp = {rows} rows; got "
            f"data.batch={batch}. Set --data.batch={2 * rows}, or --diagnose_every=0."
        )
    return parts


def build_diagnosis(run, parts):
    """diagnose(state, batch, rates) -> {"optim/GROUP/NAME": float32 []}, jitted.

    Arguments are the training step's; nothing is donated.
    """
    cfg, axes = run.cfg.optim, run.model.axes
    part_tokens = run.cfg.data.batch * run.cfg.data.seq_len // parts
    gradient = build_gradient(run.model, run.loss, 1)

    def look(state, batch):
        """Scan over parts: (mean gradient, mean of squared norms), sampled coordinates [P,n]."""

        def one(carry, part):
            _, _, grads = gradient(state.params, part)
            squares = diagnostics.squared_norms(cfg, axes, grads)
            carry = jax.tree.map(lambda c, x: c + x / parts, carry, (grads, squares))
            return carry, jax.tree.map(diagnostics.sampled, grads)

        zeros = jax.tree.map(jnp.zeros_like, state.params)
        nothing = diagnostics.squared_norms(cfg, axes, zeros)
        split = jax.tree.map(lambda x: microbatches(x, parts), batch)
        return jax.lax.scan(one, (zeros, nothing), split)

    def diagnose(state, batch, rates):
        (grads, squares), coordinates = look(state, batch)
        updates, opt_state = run.optimizer.update(
            grads, state.opt_state, state.params, good=True, rates=rates
        )
        moments = diagnostics.averaged_gradients(opt_state, state.params)
        pairs = parts // 2 * 2  # each microbatch in one difference: they stay independent
        apart = jax.tree.map(lambda x_Pn: x_Pn[1:pairs:2] - x_Pn[0:pairs:2], coordinates)
        whole = diagnostics.squared_norms(cfg, axes, grads)
        return (
            diagnostics.weight_and_update_sizes(cfg, axes, state.params, grads, updates)
            | diagnostics.dual_norms(cfg, axes, grads, run.mesh)
            | diagnostics.spectra(cfg, axes, moments, updates)
            | diagnostics.noise_scales(squares, whole, part_tokens, parts)
            | diagnostics.tail_indices(cfg, axes, apart)
        )

    return jax.jit(diagnose, out_shardings=replicated(run.mesh))
