"""Infers likely causes of a divergence from linear relations between digests.

The projections of a digest are linear in the tensor. If theirs = r * ours + c * parameter holds for
whole tensors, it holds for their 16 projections, and a least-squares fit finds r and c: a ratio of
learning rates or of gradients, and a difference in weight decay. A relation that does not hold
leaves a residual about as large as the difference itself.
"""

import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import numpy as np

from jaxtrain.crosscheck.names import list_names
from jaxtrain.crosscheck.trace import StepRecord, digest_distance

FITTED = 0.02  # the largest residual, relative to the difference, of a relation that holds
NEAR = 1e-3  # of a ratio that has a known explanation
APPROXIMATE_GRADIENT = 0.1  # relative: more than an approximation of the forward pass changes it
CLIP_EPS = 1e-6  # that torch.nn.utils.clip_grad_norm_ adds to the norm


class Evidence(NamedTuple):
    """The records of the first step in which two traces differ."""

    ours: StepRecord  # of the first trace
    theirs: StepRecord  # of the second
    before: StepRecord  # the first trace's step before; empty if the traces do not share it
    sizes: dict[str, float]  # relative difference by tensor, of the stage's quantity
    exceeding: list[str]  # those of them that exceed their tolerance
    precision: str
    names: tuple[str, str]
    settings: dict[str, Any]  # OptimConfig's fields of the jaxtrain side; empty if unknown


def find_causes(stage: str, evidence: Evidence) -> list[str]:
    """Returns sentences with likely causes of a divergence in a stage of comparison.STAGES."""
    return FINDERS[stage](evidence)


class Fit(NamedTuple):
    """theirs = ratio * ours + shift * parameter, fitted to the projections of one tensor."""

    ratio: float
    shift: float
    residual: float  # relative to the difference of theirs and ours


def fit(ours: np.ndarray, theirs: np.ndarray, parameter: np.ndarray | None = None) -> Fit:
    """Fits a tensor's digests [19]. Without a parameter the shift is 0."""
    columns = [x[3:] for x in (ours, parameter) if x is not None]
    basis = np.stack(columns, 1)
    scales = np.linalg.norm(basis, axis=0)
    scales = np.where(scales > 0, scales, 1)
    solution = np.linalg.lstsq(basis / scales, theirs[3:], rcond=1e-9)[0] / scales
    distance = np.linalg.norm(theirs[3:] - ours[3:])
    residual = np.linalg.norm(theirs[3:] - basis @ solution) / max(distance, 1e-300)
    ratio, shift = (*solution.tolist(), 0.0)[:2]
    return Fit(ratio, shift, float(residual))


def common_ratio(ours: dict, theirs: dict, tensors: Iterable[str]) -> float | None:
    """Returns r if theirs = r * ours for all tensors, each weighed equally; None if not."""
    pairs = [(ours[n][3:], theirs[n][3:], ours[n][0]) for n in tensors if ours[n][0] > 0]
    if not pairs:
        return None
    x, y = (np.concatenate([pair[i] / pair[2] for pair in pairs]) for i in range(2))
    ratio = float(x @ y / (x @ x))
    holds = np.linalg.norm(y - ratio * x) <= FITTED * np.linalg.norm(y - x)
    return ratio if holds else None


def _counts(evidence: Evidence) -> tuple[list[int], int]:
    """Returns the targets that count in each micro-batch, and all targets with those ignored."""
    records = evidence.ours, evidence.theirs
    each = next((r["parts"]["targets_each"] for r in records if "parts" in r), [])
    tokens = next((r["tokens"] for r in records if "tokens" in r), [])
    return each, sum(len(row) - 1 for row in tokens)


def _explain_scale(ratio: float, evidence: Evidence) -> str:
    """Returns what explains a ratio of losses or gradients; "" if nothing is known to."""
    each, total = _counts(evidence)
    parts, targets = len(each), sum(each)
    known = []
    if parts > 1:
        text = f"the losses of the {parts} micro-batches are"
        known.append((parts, f"{text} added up: divide each by {parts}"))
        known.append((1 / parts, f"{text} divided by {parts} twice"))
    if targets:
        known.append((targets, f"the loss is the sum over the {targets} targets, not their mean"))
        if total > targets:
            text = f"the mean divides by all {total} targets, also by those that are ignored"
            known.append((targets / total, text))
    return next((text for value, text in known if math.isclose(ratio, value, rel_tol=NEAR)), "")


def _find_start(evidence: Evidence) -> list[str]:
    """Explains parameters that differ before the first step."""
    a, b = evidence.ours["parameter"], evidence.theirs["parameter"]
    close = lambda x, y: bool(np.abs(x[:3] - y[:3]).max() <= 1e-6 * x[0])
    permuted = [n for n in evidence.exceeding if close(a[n], b[n])]
    found = []
    if permuted:
        found.append(
            f"{list_names(permuted)} have equal entries in another order: transposed, or heads or "
            "rows permuted. Give `record` the trace, as --batches; it then transposes ours"
        )
    size = float(np.median([evidence.sizes[name] for name in evidence.exceeding]))
    for name, bits in (("bfloat16", 8), ("float16", 11)):
        if 2.0 ** -(bits + 2) < size < 2.0**-bits and not permuted:
            found.append(f"rounding to {name} causes such differences: load the weights in float32")
    return found


def _find_forward(evidence: Evidence) -> list[str]:
    """Explains activations that differ."""
    a, b = (r.get("activations", {}) for r in (evidence.ours, evidence.theirs))
    first = next(iter(evidence.exceeding), "")
    if not first:
        return []
    found, whole = [], fit(a[first], b[first])
    size = evidence.sizes[first]
    if whole.residual <= FITTED:
        found.append(f"{first} is {whole.ratio:.6g} times {evidence.names[0]}'s: check its scale")
    elif (
        evidence.precision == "float32"
        and 2e-5 < size < 5e-3
        and (_gradient_distance(evidence) or 0) < APPROXIMATE_GRADIENT
    ):
        found.append(
            f"differences of about {size:.0e} can come from an approximation (gelu for its tanh "
            "form, or the reverse) or from products in TF32 or bfloat16 (torch.backends.cuda."
            "matmul.allow_tf32, torch.set_float32_matmul_precision, torch.autocast)"
        )
    return found


def _gradient_distance(evidence: Evidence) -> float | None:
    """Returns the largest relative difference of a gradient; None if a trace has no gradients."""
    a, b = (r.get("gradient", {}) for r in (evidence.ours, evidence.theirs))
    sizes = [digest_distance(a[n], b[n]) for n in a.keys() & b.keys() if a[n][0] > 0]
    # The median: a bias whose gradient is only rounding errors differs by as much as it is.
    return float(np.median(sizes)) if sizes else None


def _find_loss(evidence: Evidence) -> list[str]:
    """Explains losses that differ where the logits agree."""
    x, y = evidence.ours, evidence.theirs
    distance, apart = _gradient_distance(evidence), abs(y["loss"] - x["loss"]) / abs(x["loss"] or 1)
    if distance is not None and distance < FITTED * apart:
        return [
            f"the gradients agree, so {evidence.names[1]} recorded another loss than the one that "
            "backward() was called on: pass that one to before_step or micro_batch"
        ]
    ratio = y["loss"] / x["loss"] if x["loss"] else 1.0
    if text := _explain_scale(ratio, evidence):
        return [text]
    if math.isclose(ratio, 1 / math.log(2), rel_tol=NEAR):
        return ["the loss is in bits, not in nats"]
    losses = [np.array(r.get("losses", [])) for r in (x, y)]
    each = np.array(_counts(evidence)[0], float)
    if len(each) > 1 and len(losses[0]) == len(losses[1]) == len(each) and each.all():
        shares = losses[1] / losses[0]
        by_tokens = each / each.mean()
        for expected, text in (
            (by_tokens, 'the mean of all targets together. Pass Recorder(average="tokens")'),
            (1 / by_tokens, 'the mean of the micro-batches\' means. Leave out average="tokens"'),
        ):
            if not np.allclose(expected, 1) and np.allclose(shares, expected, rtol=1e-3):
                return [f"the loss of {evidence.names[1]} is {text}"]
    return []


def _find_gradient(evidence: Evidence) -> list[str]:
    """Explains gradients that differ where the losses agree."""
    a, b = evidence.ours["gradient"], evidence.theirs["gradient"]
    whose, norm = evidence.names[1], evidence.theirs.get("grad_norm", 0.0)
    ratio = common_ratio(a, b, evidence.sizes)
    if ratio is not None:
        text = _explain_scale(ratio, evidence)
        power = math.log2(ratio) if ratio > 0 else 0.0
        if not text and power > 3 and math.isclose(2.0 ** round(power), ratio, rel_tol=NEAR):
            text = "a GradScaler's factor: call scaler.unscale_(optimizer) before before_step"
        clip = evidence.settings.get("clip_norm") or round(norm, 3)
        if not text and ratio < 1 and math.isclose(norm, clip, rel_tol=1e-4):
            text = f"they are clipped to a norm of {clip:g}: call before_step before clipping"
        ending = f"; {text}" if text else ""
        return [f"all gradients of {whose} are {ratio:.6g} times {evidence.names[0]}'s{ending}"]
    old = evidence.before.get("gradient", {})
    errors = [
        np.linalg.norm(b[n][3:] - a[n][3:] - old[n][3:]) / np.linalg.norm(b[n][3:] - a[n][3:])
        for n in evidence.exceeding
        if n in old
    ]
    if errors and max(errors) <= FITTED:
        return [f"{whose} adds the gradients of the step before: call optimizer.zero_grad()"]
    return []


def _find_optimizer(evidence: Evidence) -> list[str]:
    """Explains updates that differ where the gradients agree."""
    a, b = (r.get("update", {}) for r in (evidence.ours, evidence.theirs))
    weights = evidence.before.get("parameter", {})
    tensors = [name for name in evidence.exceeding if name in a]
    if not tensors:
        return []
    if found := _clip_eps(evidence):
        return found
    decayed: dict[float, list[str]] = {}
    scaled: dict[float, list[str]] = {}
    for name in tensors:
        p = weights.get(name)
        p = p if p is not None and p[0] > 0 else None
        ratio, shift, residual = fit(a[name], b[name], p)
        if residual <= FITTED:
            by_decay = abs(shift) * p[0] if p is not None else 0.0
            by_rate = abs(ratio - 1) * a[name][0]
            if by_rate > FITTED * by_decay:
                _add(scaled, ratio, name)
            else:
                _add(decayed, shift, name)
    found = [_describe_decay(shift, names, evidence) for shift, names in decayed.items()]
    found += [_describe_rate(ratio, names, evidence) for ratio, names in scaled.items()]
    found = found or _newton_schulz(evidence)
    if not found and evidence.ours["step"] == 2 and "update" in evidence.before:
        found.append(
            "the first updates agree, the second do not: check what the optimizer stores between "
            "steps (momentum, Nesterov, betas) and the schedule"
        )
    return found


def _add(groups: dict[float, list[str]], value: float, name: str) -> None:
    """Appends a name to the group with this value, up to 1 %, or to a new group."""
    key = next((k for k in groups if math.isclose(k, value, rel_tol=0.01)), value)
    groups.setdefault(key, []).append(name)


def _describe_decay(shift: float, tensors: list[str], evidence: Evidence) -> str:
    more = "decays" if shift < 0 else "does not decay"
    text = (
        f"{evidence.names[1]} {more} {list_names(tensors)} by {abs(shift):.3g} of the parameter a "
        f"step, and {evidence.names[0]} {'does not' if shift < 0 else 'does'} (learning rate * "
        "weight decay)"
    )
    return f"{text}: check which groups decay (--optim.decay_groups, --optim.weight_decay)"


def _describe_rate(ratio: float, tensors: list[str], evidence: Evidence) -> str:
    b1, b2 = (evidence.settings.get(name, 0.0) for name in ("adam_b1", "adam_b2"))
    text = "check the groups' learning rates and the schedule"
    if "muon" in evidence.settings.get("name", ""):
        text += ", and Muon's factor for the shape of a matrix (--optim.scale)"
    uncorrected = (1 - b1) / math.sqrt(1 - b2) if b2 else 0.0
    if evidence.ours["step"] == 1 and math.isclose(ratio, uncorrected, rel_tol=0.01):
        text = "as without Adam's bias correction"
    some = f" of {list_names(tensors)}" if len(tensors) < len(evidence.sizes) else ""
    return (
        f"{evidence.names[1]}'s updates{some} are {ratio:.6g} times {evidence.names[0]}'s: {text}"
    )


def _clip_eps(evidence: Evidence) -> list[str]:
    clip, norm = evidence.settings.get("clip_norm"), evidence.ours.get("grad_norm", 0.0)
    if not clip or norm <= clip or evidence.settings.get("clip_eps"):
        return []
    if max(evidence.sizes.values()) > 3 * CLIP_EPS / norm:
        return []
    return [
        f"torch.nn.utils.clip_grad_norm_ divides by the norm ({norm:.3g}) plus {CLIP_EPS:g}, which "
        f"changes gradients by {CLIP_EPS / norm:.0e}: set --optim.clip_eps={CLIP_EPS:g}"
    ]


def _newton_schulz(evidence: Evidence) -> list[str]:
    settings = evidence.settings
    orthogonal = "muon" in settings.get("name", "") and settings.get("ns_form") != "torch"
    if not orthogonal or settings.get("ns_dtype") == "bfloat16":
        return []
    sizes = [evidence.sizes[name] for name in evidence.exceeding]
    agree = set(evidence.sizes) - set(evidence.exceeding)
    if evidence.ours["step"] > 1 or not agree or min(sizes) < 1e-3 or max(sizes) > 0.2:
        return []
    return [
        "only updates of matrices differ, as if Newton-Schulz were computed in bfloat16, which "
        "torch.optim.Muon does: set --optim.ns_form=torch --optim.ns_dtype=bfloat16"
    ]


FINDERS: dict[str, Callable[[Evidence], list[str]]] = {
    "start": _find_start,
    "forward": _find_forward,
    "loss": _find_loss,
    "forward or loss": _find_loss,
    "gradient": _find_gradient,
    "optimizer": _find_optimizer,
}
