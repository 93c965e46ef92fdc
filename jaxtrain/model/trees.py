"""Leaves of parameter trees by name."""

import jax


def named_leaves(tree) -> dict:
    """`{"blocks.wq": leaf}`; None is a leaf, so that a missing one is seen."""
    leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf=lambda x: x is None)
    return {jax.tree_util.keystr(path, simple=True, separator="."): x for path, x in leaves}
