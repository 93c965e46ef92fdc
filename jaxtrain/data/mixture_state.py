"""The identity of a mixture in a checkpoint, and what may change when a run resumes.

What a run has read must stay as it was: the sources that it read from and the weights so far.
Stages that lie ahead may change, and so may sources that were not read yet.
"""

from collections.abc import Callable
from typing import Any

from jaxtrain.data.sources import MixedCorpus


def stored_mixture(corpus: MixedCorpus, with_docs: bool) -> dict[str, Any]:
    """Returns the identity of a mixture, for JSON.

    Args:
        with_docs: whether the batches depend on where documents start.
    """
    sources = {}
    for name, part in corpus.sources.items():
        sources[name] = {"fingerprint": part.fingerprint}
        if with_docs:
            sources[name] |= {"eot": part.eot, "boundaries": part.boundaries_fingerprint()}
    stages = [
        {"start": start, "weights": {name: str(weight) for name, weight in stage.weights.items()}}
        for start, stage in zip(corpus.starts, corpus.stages, strict=True)
    ]
    return {"sources": sources, "stages": stages}


def describe_changes(
    stored: dict[str, Any] | None,
    now: dict[str, Any] | None,
    places: int,
    step_at: Callable[[int], int],
) -> list[str]:
    """Returns sentences on what differs in the part of a mixture that a run has read.

    Args:
        stored, now: from stored_mixture; None without a mixture.
        places: sequences that the run has read.
        step_at: returns the step before which so many sequences were read.
    """
    if not places or stored is None and now is None:
        return []
    if stored is None or now is None:
        names = [", ".join(mixture["sources"]) if mixture else "none" for mixture in (stored, now)]
        return [f"sources {names[0]}, now {names[1]} (--data.mixture)"]
    before, after = (_read_stages(mixture, places) for mixture in (stored, now))
    changed = []
    for i in range(max(len(before), len(after))):
        texts = [_stage_text(stages, i, step_at) for stages in (before, after)]
        if texts[0] != texts[1]:
            changed.append(f"stage {i + 1} was {texts[0]}, now {texts[1]} (--data.stages)")
    read = dict.fromkeys(name for stage in before for name in stage["weights"])
    for name in read:
        theirs, own = stored["sources"][name], now["sources"].get(name)
        if own is None:
            changed.append(f"source {name} is gone (--data.mixture)")
        elif theirs != own:
            parts = [
                f"{key} {theirs.get(key)!r}, now {own.get(key)!r}"
                for key in sorted(theirs.keys() | own.keys())
                if theirs.get(key) != own.get(key)
            ]
            changed.append(f"source {name} has {', '.join(parts)} (--data.mixture)")
    return changed


def _read_stages(mixture: dict[str, Any], places: int) -> list[dict[str, Any]]:
    return [stage for stage in mixture["stages"] if stage["start"] < places]


def _stage_text(stages: list[dict[str, Any]], i: int, step_at: Callable[[int], int]) -> str:
    """Returns `web 9/10, code 1/10 from step 80`."""
    if i >= len(stages):
        return "not reached"
    weights = ", ".join(f"{name} {weight}" for name, weight in stages[i]["weights"].items())
    return f"{weights} from step {step_at(stages[i]['start'])}"
