"""Axes: the one description of a parameter, from which everything else about it follows.

`"L|D->HK"` reads: stacked over L; a matrix from D inputs to H*K outputs. Without `->` the dims
after the bar are plain vectors: `"V|D"` is V vectors of width D (an embedding), `"L|D"` a vector a
layer. One letter a dim, in the order of the array's dims.
"""

import math
from dataclasses import dataclass

LETTERS = "DFGHKLTV"


@dataclass(frozen=True)
class Axes:
    """Dims of one parameter: `stack` dims, then `inputs`, then `outputs` (empty for vectors)."""

    stack: str
    inputs: str
    outputs: str = ""

    @classmethod
    def parse(cls, text: str) -> "Axes":
        """Reads `stack|inputs->outputs`.

        Raises:
            ValueError: there is not exactly one bar, or a letter is unknown or stands twice.
        """
        if text.count("|") != 1:
            raise ValueError(f"axes must hold one '|' between stack and dims; got {text!r}.")
        stack, dims = text.split("|")
        inputs, arrow, outputs = dims.partition("->")
        letters = stack + inputs + outputs
        unknown = sorted(set(letters) - set(LETTERS))
        if unknown or not inputs or (arrow and not outputs) or len(set(letters)) < len(letters):
            raise ValueError(
                f"axes must be distinct letters of {LETTERS}, as 'L|D->F'; got {text!r}."
            )
        return cls(stack, inputs, outputs)

    def __str__(self) -> str:
        return f"{self.stack}|{self.inputs}" + (f"->{self.outputs}" if self.outputs else "")

    @property
    def letters(self) -> str:
        """All dims, in the array's order."""
        return self.stack + self.inputs + self.outputs

    @property
    def is_matrix(self) -> bool:
        return bool(self.outputs)

    def shape(self, sizes: dict[str, int]) -> tuple[int, ...]:
        """The array's shape, given each letter's size."""
        return tuple(sizes[letter] for letter in self.letters)

    def fan_in(self, sizes: dict[str, int]) -> int:
        """Number of inputs that one output sums over; 1 for vectors."""
        return math.prod(sizes[letter] for letter in self.inputs) if self.is_matrix else 1

    def matrix_shape(self, shape: tuple[int, ...]) -> tuple[int, int, int]:
        """`[X,I,O]` of an array of this shape: stack, inputs, outputs, each flattened."""
        assert self.is_matrix, f"{self} has no matrix view"
        i, o = len(self.stack), len(self.stack) + len(self.inputs)
        return math.prod(shape[:i]), math.prod(shape[i:o]), math.prod(shape[o:])

    def on_matrices(self, function, x):
        """function: [X,I,O] -> [X,I,O], applied to the matrix view of x."""
        return function(x.reshape(self.matrix_shape(x.shape))).reshape(x.shape)
