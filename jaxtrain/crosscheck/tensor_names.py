"""Our parameters as a PyTorch model has them: one tensor a layer, by another's names.

"jaxtrain" is the twin's naming, `blocks.0.attention.q.weight` [outputs, inputs]; "hf" is Hugging
Face's of the family, in which a part of a fused tensor is called `...c_attn.weight/0`.
"""

import numpy as np

from jaxtrain.interop.families import TensorMapping, family_of_model
from jaxtrain.model.trees import named_leaves

STYLES = ("jaxtrain", "hf")
ENDS = {"w": "weight", "b": "bias"}  # ours -> nn.Linear's; the others are called alike


def _plain(axes):
    """The twin's names, in the order of the network."""
    order = {"embed": 0, "positions": 1, "blocks": 2}
    for path in sorted(axes, key=lambda path: order.get(path.split(".")[0], 3)):
        *rest, end = path.split(".")
        theirs = ".".join([*rest, ENDS.get(end, end)])
        layered = path.startswith("blocks.")
        theirs = theirs.replace("blocks.", "blocks.{}.", 1) if layered else theirs
        yield TensorMapping(path, theirs, transposed=layered and bool(axes[path].outputs))


def build_naming(style, cfg, axes):
    """naming(tree) -> yields (name, array) of a tree like the parameters, from front to back.

    Raises:
        InteropError: style is hf and the model is of no family that Hugging Face's names are
            known for.
    """
    axes = named_leaves(axes)
    rows = family_of_model(cfg).tensors(cfg) if style == "hf" else _plain(axes)
    rows = [row for row in rows if row.name in axes]

    layered = [row for row in rows if "{}" in row.hf_name]
    last = ("final", "head", "model.norm", "transformer.ln_f", "lm_head")
    front = [row for row in rows if row not in layered and not row.hf_name.startswith(last)]
    back = [row for row in rows if row not in layered and row not in front]

    def tensor(row, leaves, i=None):
        a, x = axes[row.name], np.asarray(leaves[row.name])
        part = f"/{row.part[0]}" if row.part[1] > 1 else ""
        if i is not None:
            x = x[i].reshape(a.matrix_shape(x.shape)[1:]) if a.outputs else x[i]
        return row.hf_name.format(i) + part, x.T if row.transposed else x

    def naming(tree):
        leaves = named_leaves(tree)
        yield from (tensor(row, leaves) for row in front)
        yield from (tensor(row, leaves, i) for i in range(cfg.L) for row in layered)
        yield from (tensor(row, leaves) for row in back)

    return naming
