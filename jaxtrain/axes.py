"""Axes: the one description of a parameter, from which everything else about it follows.

`"L|D->HK"` reads: stacked over L; a matrix from D inputs to H*K outputs. Without an arrow the dims
after the bar are plain vectors: `"V|D"` is V vectors of width D (an embedding), `"L|D"` a vector a
layer. `"|V<-D"` is a map from D to V whose array has its outputs first (a head). One letter a dim,
in the order of the array's dims.
"""

import math
from dataclasses import dataclass

LETTERS = "DFGHKLTV"
HEADS = "HG"
TABLE = "TV"  # letters whose vectors are looked up, by position or token


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
            ValueError: there is not exactly one bar, or a letter is unknown or stands twice.
        """
        if text.count("|") != 1:
            raise ValueError(f"axes must hold one '|' between stack and dims; got {text!r}.")
        stack, dims = text.split("|")
        outputs_first = "<-" in dims
        inputs, arrow, outputs = dims.partition("<-" if outputs_first else "->")
        if outputs_first:
            inputs, outputs = outputs, inputs
        letters = stack + inputs + outputs
        unknown = sorted(set(letters) - set(LETTERS))
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
        """All dims, in the array's order."""
        if self.outputs_first:
            return self.stack + self.outputs + self.inputs
        return self.stack + self.inputs + self.outputs

    @property
    def role(self) -> str:
        """What the parameter does: "matrix" between hidden widths, "embedding", "head", "vector".

        A map to the vocabulary is a head, and never a matrix to an optimizer.
        """
        if "V" in self.outputs:
            return "head"
        if self.outputs:
            return "matrix"
        return "embedding" if set(self.stack) & set(TABLE) else "vector"

    @property
    def is_matrix(self) -> bool:
        return self.role == "matrix"

    def shape(self, sizes: dict[str, int]) -> tuple[int, ...]:
        """The array's shape, given each letter's size."""
        return tuple(sizes[letter] for letter in self.letters)

    def fan_in(self, sizes: dict[str, int]) -> int:
        """Number of inputs that one output sums over; 1 for vectors."""
        return math.prod(sizes[letter] for letter in self.inputs) if self.is_matrix else 1

    def matrix_shape(self, shape: tuple[int, ...]) -> tuple[int, int, int]:
        """`[X,I,O]` of an array of this shape: stack, inputs, outputs, each flattened.

        A looked-up table is one matrix from its entries; a vector has one input.
        """
        stack, dims = shape[: len(self.stack)], shape[len(self.stack) :]
        if self.role == "embedding":
            return 1, math.prod(stack), math.prod(dims)
        if not self.outputs:
            return math.prod(stack), 1, math.prod(dims)
        if self.outputs_first:
            O, I = math.prod(dims[: len(self.outputs)]), math.prod(dims[len(self.outputs) :])  # noqa: E741
        else:
            I, O = math.prod(dims[: len(self.inputs)]), math.prod(dims[len(self.inputs) :])  # noqa: E741
        return math.prod(stack), I, O

    def to_matrices(self, x):
        """The matrix view of x, [X,I,O]; x may be one device's part."""
        X, I, O = self.matrix_shape(x.shape)  # noqa: E741
        return x.reshape(X, O, I).swapaxes(1, 2) if self.outputs_first else x.reshape(X, I, O)

    def from_matrices(self, y_XIO, shape):
        """Undoes `matrices` for an array of this shape."""
        return (y_XIO.swapaxes(1, 2) if self.outputs_first else y_XIO).reshape(shape)

    def on_matrices(self, function, x):
        """function: [X,I,O] -> [X,I,O], applied to the matrix view of x."""
        return self.from_matrices(function(self.to_matrices(x)), x.shape)

    def split_heads(self, x):
        """(Axes, x) with the heads among the stack: each head's slice is a matrix of its own."""
        dims = self._heads_first()
        return (self, x) if dims is None else (self.head_axes(), x.transpose(dims))

    def merge_heads(self, x):
        """Undoes by_head."""
        dims = self._heads_first()
        return x if dims is None else x.transpose(sorted(range(len(dims)), key=dims.__getitem__))

    def head_axes(self) -> "Axes":
        """The Axes that by_head gives."""
        dims = self._heads_first()
        if dims is None:
            return self
        head = self.letters[dims[len(self.stack)]]
        without = lambda letters: letters.replace(head, "")
        return Axes(self.stack + head, without(self.inputs), without(self.outputs))

    def _heads_first(self) -> list[int] | None:
        """The order of dims that puts the heads after the stack; None where there are none."""
        at = [i for i, letter in enumerate(self.letters) if letter in HEADS]
        if not at or not self.is_matrix or self.inputs in HEADS or self.outputs in HEADS:
            return None
        stack = len(self.stack)
        return [*range(stack), at[0], *(i for i in range(stack, len(self.letters)) if i != at[0])]
