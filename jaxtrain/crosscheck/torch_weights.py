"""Copies weights between jaxtrain's nested dict and the PyTorch model of torch_model.py."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import nn

LINEAR_NAMES = {"w": "weight", "b": "bias"}  # jaxtrain's -> nn.Linear's; other names are the same


def _flatten(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yields (name, leaf) of a nested dict; a name is the keys on its path, joined by dots."""
    for key, x in tree.items():
        if isinstance(x, dict):
            yield from _flatten(x, f"{prefix}{key}.")
        else:
            yield prefix + key, x


def _tensors(model: nn.Module, name: str) -> tuple[list[nn.Parameter], bool]:
    """Returns the tensors that one jaxtrain leaf stacks, and whether they are transposed, [O,I]."""
    *parents, last = name.removeprefix("blocks.").split(".")
    torch_name = ".".join([*parents, LINEAR_NAMES.get(last, last)])
    if not name.startswith("blocks."):
        return [model.get_parameter(torch_name)], False
    return [
        block.get_parameter(torch_name) for block in model.get_submodule("blocks").children()
    ], last == "w"


@torch.no_grad()
def load_params(model: nn.Module, params: dict[str, Any]) -> None:
    """Copies jaxtrain's dict of arrays, nested or flat with dotted names, into the model.

    Raises:
        ValueError: the dict does not have exactly the model's parameters.
    """
    arrays = {name: np.asarray(x) for name, x in _flatten(params)}
    count, wanted = sum(x.size for x in arrays.values()), sum(p.numel() for p in model.parameters())
    if count != wanted:
        raise ValueError(
            f"params must have the PyTorch model's {wanted} weights; got {count}. "
            "Build both from one config."
        )
    for name, array in arrays.items():
        tensors, transposed = _tensors(model, name)
        for tensor, x in zip(tensors, array.reshape(len(tensors), -1), strict=True):
            shape = tensor.shape[::-1] if transposed else tensor.shape
            matrix = torch.from_numpy(x.reshape(shape).copy())
            tensor.copy_(matrix.T if transposed else matrix)


def read_params(model: nn.Module, like: dict[str, Any], grads: bool = False) -> dict[str, Any]:
    """Returns weights, or their gradients, as NumPy arrays in the tree and shapes of `like`."""

    def read(x: Any, name: str) -> Any:
        if isinstance(x, dict):
            return {key: read(part, f"{name}.{key}" if name else key) for key, part in x.items()}
        tensors, transposed = _tensors(model, name)
        arrays = []
        for tensor in tensors:
            value = tensor.grad if grads else tensor.detach()
            assert value is not None, f"{name} has no gradient"
            arrays.append((value.T if transposed else value).numpy())
        return np.stack(arrays).reshape(x.shape)

    return read(like, "")
