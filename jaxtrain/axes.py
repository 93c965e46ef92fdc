"""Names the dims of a parameter by letters, which decide how the parameter is treated.

Initialisation, sharding, the choice of optimizer and the metrics all read this description.

`"L|D->HK"` is a stack of L matrices, each from D inputs to H*K outputs. Without an arrow the dims
after the bar are vectors: `"V|D"` is V vectors of width D (an embedding), `"L|D"` one vector for
each layer. `"|V<-D"` is a matrix from D to V whose array has its outputs first (a head). The
letters stand in the order of the array's dims; ModelConfig explains them.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

LETTERS = "DFGHKLTV"
HEAD_LETTERS = "HG"  # query heads and key/value heads
TABLE_LETTERS = "TV"  # a table's vectors are looked up, by position or by token
Array = Any  # a JAX or NumPy array; this module must not import JAX


@dataclass(frozen=True)
class Axes:
    """Dims of one parameter: `stack` dims, then `inputs`, then `outputs` (empty for vectors).

    outputs_first: the array's dims are stack, outputs, inputs.
    """

    stack: str
    inputs: str
    outputs: str = ""
    outputs_first: bool = False

    @classmethod
    def parse(cls, text: str) -> "Axes":
        """Reads `stack|inputs->outputs` or `stack|outputs<-inputs`.

        Raises:
            ValueError: there is not exactly one bar, or a letter is unknown or repeated.
        """
        if text.count("|") != 1:
            raise ValueError(f"axes must contain one '|' between stack and dims; got {text!r}.")
        stack, dims = text.split("|")
        outputs_first = "<-" in dims
        inputs, arrow, outputs = dims.partition("<-" if outputs_first else "->")
        if outputs_first:
            inputs, outputs = outputs, inputs
        letters = stack + inputs + outputs
        unknown = set(letters) - set(LETTERS)
        if unknown or not inputs or (arrow and not outputs) or len(set(letters)) < len(letters):
            raise ValueError(
                f"axes must be distinct letters of {LETTERS}, as 'L|D->F'; got {text!r}."
            )
        return cls(stack, inputs, outputs, outputs_first)

    def __str__(self) -> str:
        if self.outputs_first:
            return f"{self.stack}|{self.outputs}<-{self.inputs}"
        return f"{self.stack}|{self.inputs}" + (f"->{self.outputs}" if self.outputs else "")

    @property
    def letters(self) -> str:
        """The letters of all dims, in the array's order."""
        if self.outputs_first:
            return self.stack + self.outputs + self.inputs
        return self.stack + self.inputs + self.outputs

    @property
    def role(self) -> str:
        """What the parameter does: "matrix" between hidden widths, "embedding", "head", "vector".

        A map to the vocabulary is a head; optimizers never treat it as a matrix.
        """
        if "V" in self.outputs:
            return "head"
        if self.outputs:
            return "matrix"
        return "embedding" if set(self.stack) & set(TABLE_LETTERS) else "vector"

    @property
    def is_matrix(self) -> bool:
        return self.role == "matrix"

    def shape(self, sizes: Mapping[str, int]) -> tuple[int, ...]:
        """Returns the array's shape, given each letter's size."""
        return tuple(sizes[letter] for letter in self.letters)

    def fan_in(self, sizes: Mapping[str, int]) -> int:
        """Returns how many inputs are summed in one output; 1 for vectors."""
        return math.prod(sizes[letter] for letter in self.inputs) if self.is_matrix else 1

    def matrix_shape(self, shape: Sequence[int]) -> tuple[int, int, int]:
        """Returns `[X,I,O]` for an array of this shape: stack, inputs and outputs, each flattened.

        An embedding is one matrix whose inputs are its entries; a vector has one input.
        """
        stack, dims = shape[: len(self.stack)], shape[len(self.stack) :]
        if self.role == "embedding":
            return 1, math.prod(stack), math.prod(dims)
        if not self.outputs:
            return math.prod(stack), 1, math.prod(dims)
        first = len(self.outputs if self.outputs_first else self.inputs)
        before, after = math.prod(dims[:first]), math.prod(dims[first:])
        inputs, outputs = (after, before) if self.outputs_first else (before, after)
        return math.prod(stack), inputs, outputs

    def to_matrices(self, x: Array) -> Array:
        """Returns x, a parameter or one device's shard of it, as [X,I,O]."""
        X, I, O = self.matrix_shape(x.shape)  # noqa: E741
        return x.reshape(X, O, I).swapaxes(1, 2) if self.outputs_first else x.reshape(X, I, O)

    def from_matrices(self, y_XIO: Array, shape: Sequence[int]) -> Array:
        """Undoes `to_matrices` for an array of this shape."""
        return (y_XIO.swapaxes(1, 2) if self.outputs_first else y_XIO).reshape(shape)

    def on_matrices(self, function: Callable[[Array], Array], x: Array) -> Array:
        """Applies a function of [X,I,O] -> [X,I,O] to x, in the shape of x."""
        return self.from_matrices(function(self.to_matrices(x)), x.shape)

    def split_heads(self, x: Array) -> tuple["Axes", Array]:
        """Moves the heads to the stack, so that each head is one matrix.

        Returns:
            The Axes and the array after the move; both unchanged if x has no heads.
        """
        order = self._heads_first()
        return (self, x) if order is None else (self.head_axes(), x.transpose(order))

    def merge_heads(self, x: Array) -> Array:
        """Undoes `split_heads`."""
        order = self._heads_first()
        if order is None:
            return x
        return x.transpose(sorted(range(len(order)), key=order.__getitem__))  # the inverse order

    def head_axes(self) -> "Axes":
        """Returns the Axes of an array from `split_heads`."""
        order = self._heads_first()
        if order is None:
            return self
        head = self.letters[order[len(self.stack)]]
        return Axes(
            self.stack + head, self.inputs.replace(head, ""), self.outputs.replace(head, "")
        )

    def _heads_first(self) -> list[int] | None:
        """Returns the order of dims that puts the heads after the stack; None without heads."""
        heads = [i for i, letter in enumerate(self.letters) if letter in HEAD_LETTERS]
        # If the heads are the only inputs or outputs, the slice of a head is not a matrix.
        if not (heads and self.is_matrix) or {self.inputs, self.outputs} & set(HEAD_LETTERS):
            return None
        stack = len(self.stack)
        others = [i for i in range(stack, len(self.letters)) if i != heads[0]]
        return [*range(stack), heads[0], *others]
