"""Names the dims of a parameter, which decides how the parameter is treated.

Initialisation, sharding, the choice of optimizer and the metrics all read this description.

`"L|D->HK"` is a stack of L matrices, each from D inputs to H*K outputs. Without an arrow the dims
after the bar are vectors: `"V|D"` is V vectors of width D (an embedding), `"L|D"` one vector for
each layer. `"|V<-D"` is a matrix from D to V whose array has its outputs first (a head). The
names stand in the order of the array's dims. Any letter may be used, also twice (`"|D->D"`).
Longer names are written as a tuple of stack, inputs and outputs, such as
`(("layers",), ("height", "width", "in"), ("out",))`, or in parentheses: `"(layers)|D->(out)"`.

Four letters have a meaning, and longer names have none:

- V, the vocabulary: a matrix to V is a head, and vectors stacked on V are an embedding.
- T, positions: vectors stacked on T are an embedding of positions.
- H and G, query heads and key/value heads: with optim.per_head each is a separate matrix.

On a mesh, D, F, G, H and V are split over devices, and all other dims are whole on each
(distributed/mesh.py). ModelConfig explains the letters of the trainer's own model.
"""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias, TypeVar

HEAD_LETTERS = ("H", "G")  # query heads and key/value heads
TABLE_LETTERS = ("T", "V")  # a table's vectors are looked up, by position or by token
Array = Any  # a JAX or NumPy array; this module must not import JAX
Names: TypeAlias = tuple[str, ...]
Entry = TypeVar("Entry")


def _read_names(text: str) -> Names:
    """Splits `"HK"` or `"(height)(width)"` into names; Axes refuses those of a malformed text."""
    names = re.findall(r"\((\w+)\)|(.)", text)
    return tuple(long or letter for long, letter in names)


def _write_names(names: Names) -> str:
    return "".join(name if len(name) == 1 else f"({name})" for name in names)


@dataclass(frozen=True)
class Axes:
    """Dims of one parameter: `stack` dims, then `inputs`, then `outputs` (empty for vectors).

    outputs_first: the array's dims are stack, outputs, inputs.

    Raises:
        ValueError: a name is not an identifier, or there are outputs without inputs.
    """

    stack: Names
    inputs: Names
    outputs: Names = ()
    outputs_first: bool = False

    def __post_init__(self):
        parts = self.stack, self.inputs, self.outputs
        names = [name for part in parts for name in part]
        valid = all(isinstance(name, str) and name.isidentifier() for name in names)
        if not valid or not all(isinstance(part, tuple) for part in parts):
            raise ValueError(
                "axes must name dims by letters or other identifiers, as 'L|D->F' or "
                f"(('layers',), ('in',), ('out',)); got {parts!r}."
            )
        if self.outputs and not self.inputs:
            raise ValueError(f"axes must have inputs beside outputs; got {parts!r}.")

    @classmethod
    def parse(cls, axes: "str | tuple[Names, ...] | Axes") -> "Axes":
        """Reads `stack|inputs->outputs`, `stack|outputs<-inputs`, or a tuple of these parts.

        A tuple of two parts describes vectors. Axes are returned unchanged.

        Raises:
            ValueError: there is not exactly one bar, a part is missing, or a name is invalid.
        """
        if isinstance(axes, Axes):
            return axes
        if not isinstance(axes, str):
            parts = axes if isinstance(axes, tuple) else ()
            if not (2 <= len(parts) <= 3 and all(isinstance(part, tuple) for part in parts)):
                raise ValueError(
                    f"axes must be tuples of names: stack, inputs and outputs; got {axes!r}."
                )
            stack, inputs, outputs = (*parts, ())[:3]
            return cls(stack, inputs, outputs)
        if axes.count("|") != 1:
            raise ValueError(f"axes must contain one '|' between stack and dims; got {axes!r}.")
        stack, dims = axes.split("|")
        outputs_first = "<-" in dims
        inputs, arrow, outputs = dims.partition("<-" if outputs_first else "->")
        if outputs_first:
            inputs, outputs = outputs, inputs
        if (arrow and not (inputs and outputs)) or (stack and not inputs):
            raise ValueError(f"axes must have dims after the '|', as 'L|D->F'; got {axes!r}.")
        return cls(_read_names(stack), _read_names(inputs), _read_names(outputs), outputs_first)

    def __str__(self) -> str:
        stack, inputs, outputs = map(_write_names, (self.stack, self.inputs, self.outputs))
        if self.outputs_first:
            return f"{stack}|{outputs}<-{inputs}"
        return f"{stack}|{inputs}" + (f"->{outputs}" if outputs else "")

    @property
    def letters(self) -> Names:
        """The names of all dims, in the array's order."""
        if self.outputs_first:
            return self.stack + self.outputs + self.inputs
        return self.stack + self.inputs + self.outputs

    def split(self, dims: Sequence[Entry]) -> tuple[Sequence[Entry], ...]:
        """Splits a sequence with an entry for each dim into those of stack, inputs and outputs."""
        first = len(self.stack) + len(self.outputs if self.outputs_first else self.inputs)
        sides = dims[len(self.stack) : first], dims[first:]
        return dims[: len(self.stack)], *(sides[::-1] if self.outputs_first else sides)

    def check_shape(self, name: str, shape: Sequence[int]) -> None:
        """Checks that an array has one dim for each name, and one size for a repeated name.

        A matrix must have entries, as steps divide by its sides.

        Raises:
            ValueError: it does not fit; the message has the name, the shape and the axes.
        """
        where = f"got {name or 'one array'} of shape {tuple(shape)} with axes {str(self)!r}"
        if len(shape) != len(self.letters):
            raise ValueError(
                f"axes must name each dim of a parameter; {where}, which name {len(self.letters)}."
            )
        if self.is_matrix and 0 in shape:
            raise ValueError(
                f"a matrix must have entries; {where}. Declare axes without an arrow, such as "
                f"'{'L' * (len(shape) - 1)}|D', or leave it out."
            )
        sizes: dict[str, int] = {}
        for letter, size in zip(self.letters, shape, strict=True):
            if sizes.setdefault(letter, size) != size:
                raise ValueError(
                    f"dims of one name must have one size; {where}, where {letter} is both "
                    f"{sizes[letter]} and {size}."
                )

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
        """Returns the array's shape, given each name's size.

        Raises:
            ValueError: a name has no size.
        """
        if unknown := set(self.letters) - set(sizes):
            raise ValueError(
                f"axes must use names of known size, {', '.join(sizes)}; got {str(self)!r} with "
                f"{', '.join(sorted(unknown))}."
            )
        return tuple(sizes[letter] for letter in self.letters)

    def fan_in(self, sizes: Mapping[str, int]) -> int:
        """Returns how many inputs are summed in one output; 1 for vectors."""
        return math.prod(sizes[letter] for letter in self.inputs) if self.is_matrix else 1

    def matrix_shape(self, shape: Sequence[int]) -> tuple[int, int, int]:
        """Returns `[X,I,O]` for an array of this shape: stack, inputs and outputs, each flattened.

        An embedding is one matrix whose inputs are its entries; a vector has one input.
        """
        stack, inputs, outputs = map(math.prod, self.split(shape))
        if self.role == "embedding":
            return 1, stack, inputs
        return (stack, inputs, outputs) if self.outputs else (stack, 1, inputs)

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
        sides = ("outputs", "inputs") if self.outputs_first else ("inputs", "outputs")
        side = next(side for side in sides if head in getattr(self, side))
        names = getattr(self, side)
        others = names[: names.index(head)] + names[names.index(head) + 1 :]
        return replace(self, stack=(*self.stack, head), **{side: others})

    def _heads_first(self) -> list[int] | None:
        """Returns the order of dims that puts the heads after the stack; None without heads."""
        stack, letters = len(self.stack), self.letters
        heads = [i for i in range(stack, len(letters)) if letters[i] in HEAD_LETTERS]
        # If the heads are the only inputs or outputs, the slice of a head is not a matrix.
        if not (heads and self.is_matrix) or {self.inputs, self.outputs} & {("H",), ("G",)}:
            return None
        others = [i for i in range(stack, len(letters)) if i != heads[0]]
        return [*range(stack), heads[0], *others]
