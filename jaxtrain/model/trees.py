"""Parameter trees: nested dicts of arrays, and dicts of the same structure with their Axes."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeAlias

import jax

if TYPE_CHECKING:
    from flax import nnx

ArrayTree: TypeAlias = Any  # pytree of arrays or ShapeDtypeStructs
AxesTree: TypeAlias = Any  # pytree of Axes


def named_leaves(tree: Any) -> dict[str, Any]:
    """Returns `{"blocks.wq": leaf}`; None counts as a leaf, so that a missing array is noticed."""
    leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf=lambda x: x is None)
    return {jax.tree_util.keystr(path, simple=True, separator="."): x for path, x in leaves}


def param_tree(state: "nnx.State", leaf: "Callable[[tuple, nnx.Variable], Any]") -> dict[str, Any]:
    """Returns leaf(path, variable) for each Param of an nnx state, as a plain nested dict."""
    from flax import nnx  # here, as the import is slow and jaxtrain.optim does without it

    tree: dict[Any, Any] = {}
    for path, variable in nnx.to_flat_state(state):
        node = tree
        for name in path[:-1]:
            node = node.setdefault(name, {})
        node[path[-1]] = leaf(path, variable)
    return tree
