"""Compares the tensor names of two traces: removes wrappers' prefixes, explains what differs."""

import re
from collections.abc import Iterable

from jaxtrain.crosscheck.trace import QUANTITIES, StepRecord, Trace, TraceError

NAMED = QUANTITIES[1:]  # quantities whose tensors are parameters
HEADS = ("lm_head.weight", "head", "head.weight", "output.weight", "embed_out.weight")
MOST_NAMES = 4  # that a message lists


def _prefixes(names: set[str]) -> list[str]:
    """Returns "" and the prefixes up to a dot that all names share, the shortest first."""
    first = min(names, default="")
    found = [first[: match.end()] for match in re.finditer(r"\.", first)]
    return ["", *(prefix for prefix in found if all(name.startswith(prefix) for name in names))]


def find_prefixes(a: set[str], b: set[str]) -> tuple[str, str]:
    """Returns the prefixes to remove from each side's names so that most of them are equal.

    Wrappers add them: a LightningModule whose model is called `model` adds "model.", and the
    transformers model without its head lacks "transformer." or "model.".
    """
    pairs = [(p, q) for p in _prefixes(a) for q in _prefixes(b)]
    strip = lambda names, prefix: {name.removeprefix(prefix) for name in names}
    return max(pairs, key=lambda pair: len(strip(a, pair[0]) & strip(b, pair[1])))


def align_names(
    first: list[StepRecord], second: list[StepRecord]
) -> tuple[list[StepRecord], list[StepRecord]]:
    """Returns the records of two traces with equal prefixes of their tensors' names.

    Those of the first trace that measured tolerances stay, as the tolerances have these names.
    """
    if "tolerance" in second[-1] and "tolerance" not in first[-1]:
        b, a = align_names(second, first)
        return a, b
    tables = (records[-1].get("parameter", {}) for records in (first, second))
    prefix, old_prefix = find_prefixes(*map(set, tables))
    if prefix == old_prefix:
        return first, second
    renamed = []
    for record in second:
        tables = {
            quantity: {prefix + name.removeprefix(old_prefix): x for name, x in table.items()}
            for quantity, table in record.items()
            if quantity in NAMED
        }
        renamed.append(record | tables)
    return first, renamed


def check_like(ours: StepRecord, trace: Trace) -> None:
    """Raises TraceError if a trace names its parameters differently from the first record of ours.

    Called before training: a folder of another model would otherwise be found at the end.
    """
    if "parameter" in trace.steps[0]:
        a, b = align_names([ours], trace.steps[:1])
        check_names(a[0], b[0], ("jaxtrain", trace.name))


def check_names(x: StepRecord, y: StepRecord, names: tuple[str, str]) -> list[str]:
    """Returns the quantities that only one of two steps has.

    Raises:
        TraceError: the two name their tensors differently; the message has the likely causes.
    """
    for quantity in reversed(NAMED):  # parameters first: a frozen one has no gradient
        a, b = x.get(quantity), y.get(quantity)
        if a is not None and b is not None and a.keys() != b.keys():
            causes = explain_names(set(a), set(b), names)
            if quantity == "gradient":
                missing = list_names(a.keys() ^ b.keys())
                causes = [
                    f"only one side has a gradient of {missing}: are they frozen or unused, or was "
                    "backward() not called"
                ]
            raise TraceError(
                f"both traces must name their tensors alike; of the names of {quantity}, "
                f"{'; '.join(causes)}."
            )
    present = [{q for q in (*QUANTITIES, "grad_norm") if record.get(q)} for record in (x, y)]
    return sorted(present[0] ^ present[1])


def explain_names(a: set[str], b: set[str], names: tuple[str, str]) -> list[str]:
    """Returns sentences that name the differing tensors and the likely causes."""
    if not a & b:
        return [
            f"none is in both: {names[0]} has {list_names(a)}, {names[1]} {list_names(b)}. Set "
            "--names=hf for the names of transformers, or --names=jaxtrain for ours"
        ]
    found = []
    for mine, other, owner, whose in ((b, a, names[1], names[0]), (a, b, names[0], names[1])):
        only = mine - other
        for name in sorted(only & set(HEADS)):
            only.remove(name)
            found.append(
                f"{owner} has {name} of its own and {whose} does not: the head of {owner} is not "
                f"tied to its embedding. Tie it, or set --model.tied=false"
            )
        fused = {name for name in only if f"{name}/0" in other}
        for part in sorted({_module(name) for name in fused}):
            name = min(name for name in fused if _module(name) == part)
            count = sum(other_name.startswith(f"{name}/") for other_name in other)
            found.append(
                f"{owner} has {name} where {whose} has {name}/0 to {name}/{count - 1}: its "
                f'queries, keys and values are fused. Pass Recorder(split={{"{part}": {count}}})'
            )
        only -= fused | {name for name in only if name.rpartition("/")[0] in other}
        kinds = (
            ("biases", "model.bias", [name for name in only if name.endswith(".bias")]),
            ("QK-norms", "model.qk_norm", [n for n in only if re.search(r"[qk]_norm\.", n)]),
            (
                "layers",
                "model.L",
                [name for name in only if _layer(name) not in map(_layer, other)],
            ),
        )
        for noun, flag, group in kinds:
            if group := set(group) & only:
                only -= group
                found.append(
                    f"{owner} has {noun} that {whose} lacks: {list_names(group)}. Check --{flag}, "
                    "or whether --weights is the folder of the recorded model"
                )
        if only:
            found.append(f"only {owner} has {list_names(only)}")
    return found


def _module(name: str) -> str:
    """Returns the module that owns a tensor: "c_attn" of "transformer.h.0.attn.c_attn.weight"."""
    return name.split(".")[-2] if "." in name else name


def _layer(name: str) -> str:
    """Returns the number in a name, or "" for a tensor outside the layers."""
    match = re.search(r"\.(\d+)\.", name)
    return match[1] if match else ""


def list_names(names: Iterable[str]) -> str:
    """Returns the first names, in alphabetical order, and the number of the others."""
    names = sorted(names)
    more = f" and {len(names) - MOST_NAMES} more" if len(names) > MOST_NAMES else ""
    return ", ".join(names[:MOST_NAMES]) + more


def describe_float32(record: StepRecord, owner: str) -> list[str]:
    """Returns a sentence about the modules of a step that compute in float32, if there are any."""
    if not record.get("float32") or record.get("float32_skipped"):
        return []
    by_class: dict[str, list[str]] = {}
    for name, kind in record["float32"].items():
        by_class.setdefault(kind, []).append(name or "the model itself")
    modules = "; ".join(f"{kind} ({list_names(names)})" for kind, names in by_class.items())
    return [
        f"{owner} computes in float32 in a float64 run, in {modules}, so that it is compared with "
        "the tolerances of float32. For those of float64, record it with Recorder(..., "
        "skip_float32=True), which computes these in float64"
    ]
