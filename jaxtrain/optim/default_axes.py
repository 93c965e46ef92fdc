"""Axes of any parameter tree: as declared, otherwise by the parameter's name and rank.

A parameter's name is its path, joined by dots: `layers.0.weight`. The rule knows the names that
Flax, Equinox, Haiku and PyTorch give, and splits them into words at `.`, `/`, `_`, digits and
capitals. Without declared axes a parameter is, in this order,

- a vector, with no dim or one;
- an error, with three dims or more, as no rule could tell its inputs from its outputs;
- a stack of vectors, `L|D`, if it is a bias or gain, or belongs to a norm (NORM_WORDS);
- a head, `|I->V`, if a part of the path ends in a word of HEAD_WORDS, or starts with "unembed";
- an embedding, `V|D` (of positions `T|D`), if the path has a word of EMBEDDING_WORDS;
- a matrix, `|I->O`.

A parameter called `weight` has its outputs first, `|O<-I` or `|V<-I`, as in PyTorch and Equinox.
"""

import difflib
import functools
import re
import sys
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxtrain.axes import Axes
from jaxtrain.model.trees import ArrayTree, AxesTree
from jaxtrain.optim.explicit_mesh import explain_split_matrices

GAIN_WORDS = {"b", "beta", "bias", "gain", "gamma", "offset", "scale"}  # last word of the name
NORM_WORDS = re.compile(r"(\w*norm|ln)$")
HEAD_WORDS = {"classifier", "head", "logits", "readout"}
EMBEDDING_WORDS = re.compile(r"(emb|embed\w*|wte|wpe)$")
POSITION_WORDS = {"pos", "position", "positional", "positions", "wpe"}


def _split_words(part: str) -> list[str]:
    return [word.lower() for word in re.findall(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])", part)]


def _is_head(words: Sequence[str]) -> bool:
    ends = words[-1:] and words[-1] in HEAD_WORDS and words[-2:-1] not in (["multi"], ["attention"])
    return bool(ends) or any(word.startswith("unembed") for word in words)


@functools.cache
def default_axes_of(name: str, rank: int) -> Axes | None:
    """Returns the axes of a parameter by its name and number of dims; None with three or more."""
    if rank < 2:
        return Axes.parse("|D" if rank else "|")
    if rank > 2:
        return None
    parts = [words for part in re.split(r"[./]", name) if (words := _split_words(part))]
    words = {word for part in parts for word in part}
    outputs_first = re.split(r"[./]", name)[-1] == "weight"
    if (parts and parts[-1][-1] in GAIN_WORDS) or any(map(NORM_WORDS.match, words)):
        return Axes.parse("L|D")
    if any(map(_is_head, parts)):
        return Axes.parse("|V<-I" if outputs_first else "|I->V")
    if any(map(EMBEDDING_WORDS.match, words)) or any(set(part) <= POSITION_WORDS for part in parts):
        return Axes.parse("T|D" if words & POSITION_WORDS else "V|D")
    return Axes.parse("|O<-I" if outputs_first else "|I->O")


def _is_axes(x) -> bool:
    """Returns whether x describes one parameter: Axes, a string, or a tuple of tuples of names.

    So does a list or tuple with a bare name in it, which Axes.parse refuses. Otherwise each of its
    letters would be taken for the axes of a parameter.
    """
    is_bare = lambda name: isinstance(name, str) and bool(re.fullmatch(r"\w*", name))
    is_names = lambda part: (
        isinstance(part, tuple)
        and not any(not isinstance(name, str) or "|" in name for name in part)
    )
    if isinstance(x, (Axes, str)) or (type(x) in (list, tuple) and any(map(is_bare, x))):
        return True
    return isinstance(x, tuple) and bool(x) and all(map(is_names, x))


def is_variable(x: Any) -> bool:
    """Returns whether x is an nnx.Variable, without an import of Flax, which is slow."""
    nnx = sys.modules.get("flax.nnx")
    return nnx is not None and isinstance(x, nnx.Variable)


def _named(tree: Any, is_leaf: Callable[[Any], bool]) -> list[tuple[str, Any]]:
    """Returns [(name, leaf)]; an nnx.Variable is a leaf, so that names have no `.value`."""
    is_end = lambda x: x is None or isinstance(x, optax.MaskedNode) or is_variable(x)
    stop = lambda x: is_end(x) or is_leaf(x)
    leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf=stop)
    return [(jax.tree_util.keystr(path, simple=True, separator="."), x) for path, x in leaves]


def named_params(params: ArrayTree) -> tuple[list[tuple[str, Any]], set[str]]:
    """Returns ([(name, array)] in the order of the leaves, names without an array).

    The latter are None, as in a filtered Equinox module, or masked, as by optax.partition.
    """
    arrays, absent = [], set()
    for name, x in _named(params, lambda x: False):
        inside = jax.tree.leaves(x)
        arrays += [(name, leaf) for leaf in inside]
        if not inside:
            absent.add(name)
    return arrays, absent


def _listed(entries: Sequence[str], most: int = 5) -> str:
    """Joins entries by commas; those after the first few are only counted."""
    rest = len(entries) - most
    return ", ".join(entries[:most]) + (f", and {rest} more" if rest > 0 else "")


def check_floating(params: ArrayTree) -> None:
    """Raises ValueError unless every parameter is an array of a real floating type.

    Steps of integers would be rounded to zero, and those of complex numbers are not defined here.
    """
    for name, x in named_params(params)[0]:
        dtype: Any = getattr(x, "dtype", type(x).__name__)
        is_floating = hasattr(x, "dtype") and jnp.issubdtype(dtype, jnp.floating)
        if not is_floating or dtype.itemsize < 2:  # JAX promotes no type of 8 bits to another
            raise ValueError(
                f"parameters must be arrays of a real floating type; got {name or 'one'} of type "
                f"{dtype}. Leave it out of params (equinox.filter, nnx.Param), or mask it by "
                "optax.masked or optax.multi_transform."
            )


def _check_gradients(grads: Any, params: ArrayTree) -> None:
    """Raises ValueError unless gradients have the names and shapes of the parameters."""
    given, wanted = (
        {name: jnp.shape(x) for name, x in named_params(tree)[0]} for tree in (grads, params)
    )
    wrong = [name for name in wanted | given if given.get(name) != wanted.get(name)]
    if wrong:
        shapes = _listed([f"{n or 'one'} of {given.get(n)}, not {wanted.get(n)}" for n in wrong])
        raise ValueError(
            f"gradients must have the parameters' names and shapes (None: absent); got {shapes}."
        )


def _read_declared(axes: Any) -> dict[str, Axes | None]:
    """Returns {name: Axes}; None as in an Equinox module that was filtered like the parameters."""
    declared = {}
    for name, x in _named({} if axes is None else axes, _is_axes):
        x = x.get_value() if is_variable(x) else x
        if _is_axes(x):
            try:
                declared[name] = Axes.parse("".join(x.split()) if isinstance(x, str) else x)
            except ValueError as error:
                raise ValueError(f"{name}: {error}" if name else str(error)) from None
        elif not name and x is not None and not isinstance(x, optax.MaskedNode):
            raise ValueError(
                f"axes must be a pytree of Axes or strings; got {x!r}. Pass other arguments by "
                "name, such as learning_rate=0.02."
            )
        elif not isinstance(x, optax.MaskedNode):
            declared[name] = None
    return declared


def _expand_stars(declared: dict[str, Axes | None], params: ArrayTree) -> dict[str, Axes | None]:
    """Returns {name: axes}, where each declared name with a star is replaced by those it matches.

    One that matches nothing stays, unless parameters are masked: it may be meant for these.
    """
    is_masked = lambda x: isinstance(x, optax.MaskedNode)
    has_masked = any(map(is_masked, jax.tree.leaves(params, is_leaf=is_masked)))
    found = {name: a for name, a in declared.items() if "*" not in name}
    source: dict[str, str] = {}
    for star in declared.keys() - found.keys():
        pattern = re.compile(".*".join(map(re.escape, star.split("*"))))
        names = [name for name, _ in named_params(params)[0] if pattern.fullmatch(name)]
        if not (names or has_masked):
            found[star] = declared[star]
        for name in names:
            other = source.setdefault(name, star)
            if declared[other] != declared[star]:
                pair = " and ".join(repr(s) for s in sorted((other, star)))
                raise ValueError(
                    "names with a star that match one parameter must give it the same axes; got "
                    f"different axes for {name} from {pair}. Declare {name} by its full name, "
                    "which takes precedence."
                )
    return {name: declared[star] for name, star in source.items()} | found


def resolve_axes(axes: Any, params: ArrayTree) -> AxesTree:
    """Returns a pytree of Axes like params: those declared, and the default rule's for the rest.

    Args:
        axes: None, a pytree like params or of any other containers with the same names, or a dict
            {name: axes}. It may leave parameters out. Its leaves are strings, tuples or Axes. A
            star in a name stands for any characters, also dots; a name without one takes
            precedence.
        params: arrays or ShapeDtypeStructs in any pytree: dicts, FrozenDict, nnx.State, Equinox
            modules. Leaves that are None or an optax.MaskedNode need no axes.

    Raises:
        ValueError: axes name no parameter, do not fit its shape, differ between two names with a
            star, or are missing where the rule needs them; the message has the parameter's name.
    """
    declared = _expand_stars(_read_declared(axes), params)
    arrays, absent = named_params(params)
    inside = lambda name: any(
        name == top or name.startswith(f"{top}.") or not top for top in absent
    )
    unknown = set(declared) - {name for name, _ in arrays}
    if unknown := sorted(name for name in unknown if not inside(name)):
        near = difflib.get_close_matches(
            unknown[0], [name for name, _ in arrays], max(len(arrays), 1), 0
        )
        names = _listed(near)
        got = _listed([name or f"{declared[name]} for the whole tree" for name in unknown])
        raise ValueError(f"axes must name parameters, of {names}; got {got}.")
    for name in dict(arrays):
        if name in declared and declared[name] is None:
            raise ValueError(
                f"axes must be strings, tuples of names or Axes; got another value for {name}. Set "
                "its axes, or leave it out for the default rule."
            )
    axes_of = lambda name, x: declared.get(name) or default_axes_of(name, len(x.shape))
    missing = [f"{name} of shape {tuple(x.shape)}" for name, x in arrays if not axes_of(name, x)]
    if missing:
        raise ValueError(
            f"parameters of three or more dims must have axes; got none for {_listed(missing)}. "
            "Set axes={'conv.kernel': '|HWI->O', '*.query.kernel': '|D->HK'}: the stack, a bar, "
            "inputs -> outputs, one letter for each dim. Without an arrow AdamW steps it."
        )
    found = []
    for name, x in arrays:
        if a := axes_of(name, x):
            a.check_shape(name, x.shape)
            found.append(a)
    return jax.tree.unflatten(jax.tree.structure(params), found)


def build_for_params(
    build: Callable[[AxesTree], optax.GradientTransformation], axes: Any
) -> optax.GradientTransformationExtraArgs:
    """Builds an optimizer that needs Axes of every parameter once the parameters are known.

    Args:
        build: builds it from a pytree of Axes, like params.
        axes: see `resolve_axes`.
    """
    build({})  # raises on wrong arguments here, not at init; so does the next line
    _read_declared(axes)

    def init(params):
        check_floating(params)
        return build(resolve_axes(axes, params)).init(params)

    def update(updates, state, params=None, **extra):
        if params is not None:
            _check_gradients(updates, params)
        resolved = resolve_axes(axes, updates if params is None else params)
        optimizer = optax.with_extra_args_support(build(resolved))
        with explain_split_matrices(named_params(updates)[0], jax.tree.leaves(resolved)):
            return optimizer.update(updates, state, params, **extra)

    return optax.GradientTransformationExtraArgs(init, update)


def build_for_matrices(
    recipe: str, build: Callable[[AxesTree], optax.GradientTransformation], axes: Any
) -> optax.GradientTransformationExtraArgs:
    """Does what `build_for_params` does, for a bare transform that steps matrices only.

    Args:
        recipe: name of the optimizer that steps other parameters too; with scale_by_ before it,
            the transform's name.
    """

    def build_checked(axes):
        for name, a in named_params(axes)[0]:
            if not a.is_matrix:
                raise ValueError(
                    f"scale_by_{recipe} steps matrices only; got {name} with axes {str(a)!r}, "
                    f"role {a.role}. Use {recipe}, which steps the rest by AdamW, or optax.masked."
                )
        return build(axes)

    return build_for_params(build_checked, axes)
