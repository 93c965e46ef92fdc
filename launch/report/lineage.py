"""Draws a run, its branches and its averages as a tree: the step and the final loss of each.

A run names its parent in config.json["lineage"], see jaxtrain.run_directory.lineage.
"""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from launch.host.run_files import CONFIG
from launch.report.json_files import read_json
from launch.report.run_folder import EVAL_LOSS, LOSS, NoRun, RunFolder, read_run

SCHEDULE = ("steps", "optim.schedule", "optim.total_steps", "optim.decay_fraction")


def describe_lineage(runs: Sequence[RunFolder]) -> list[str]:
    """Returns a tree for each family of the runs; nothing if none has a branch or a parent.

    Members are searched in the folders that contain the runs and their ancestors.
    """
    found = {run.folder.resolve(): _lineage(run.folder) for run in runs}
    for folder in list(found):
        while (parent := _parent(folder, found[folder])) and parent not in found:
            folder, found[parent] = parent, _lineage(parent)
    for around in {folder.parent for folder in found}:
        found |= {path.parent: _lineage(path.parent) for path in sorted(around.glob(f"*/{CONFIG}"))}
    children: dict[Path | None, list[Path]] = {}
    for folder, lineage in found.items():
        children.setdefault(_parent(folder, lineage), []).append(folder)
    for branches in children.values():
        branches.sort(key=lambda folder: (_step(found[folder]), folder.name))
    wanted = {_root(run.folder.resolve(), found) for run in runs}
    lines = []
    for root in sorted(root for root in wanted if root in children):
        rows = [(root.name, root), *_rows(root, children, found, "")]
        width = max(len(label) for label, _ in rows)
        lines += [f"{label:<{width}}  {_figures(folder, found)}" for label, folder in rows]
    return lines


def _lineage(folder: Path) -> dict:
    """Returns config.json["lineage"]; {} if the run has none or cannot be read."""
    try:
        config = read_json(folder / CONFIG)
    except (OSError, ValueError):
        return {}
    lineage = config.get("lineage") if isinstance(config, dict) else None
    if not isinstance(lineage, dict) or not isinstance(lineage.get("parent"), str):
        return {}
    return lineage


def _parent(folder: Path, lineage: dict) -> Path | None:
    """Returns the parent's folder; None if there is none, or it cannot be found.

    Runs that were copied to another place together have the parent beside them.
    """
    if not lineage:
        return None
    recorded = Path(lineage["parent"])
    places = (recorded, folder.parent / recorded.name)
    return next((p.resolve() for p in places if p != folder and (p / CONFIG).is_file()), None)


def _root(folder: Path, found: dict[Path, dict]) -> Path:
    seen = set()
    while folder not in seen and (parent := _parent(folder, found[folder])):
        seen.add(folder)
        folder = parent
    return folder


def _step(lineage: dict) -> int:
    step = lineage.get("step")
    return step if isinstance(step, int) else 0


def _rows(
    folder: Path, children: dict[Path | None, list[Path]], found: dict[Path, dict], indent: str
) -> Iterator[tuple[str, Path]]:
    """Yields (label, folder) of all descendants, in the order of the tree."""
    branches = children.get(folder, [])
    for i, branch in enumerate(branches):
        last = i == len(branches) - 1
        lineage = found[branch]
        steps = lineage.get("steps")
        origin = f"at {_step(lineage)}"
        if isinstance(steps, list):
            origin = f"average of {', '.join(map(str, steps))}"
        yield f"{indent}{'└─' if last else '├─'} {origin}: {branch.name}", branch
        yield from _rows(branch, children, found, indent + ("   " if last else "│  "))


def _figures(folder: Path, found: dict[Path, dict]) -> str:
    """Returns `step 440  held-out 3.0512  decay over 40 steps`."""
    try:
        run = read_run(folder)
    except (NoRun, ValueError):
        return "cannot be read"
    texts = [f"step {run.step or _step(found[folder])}"]
    for metric, name in ((EVAL_LOSS, "held-out"), (LOSS, "loss")):
        if points := run.points(metric):
            texts.append(f"{name} {points[-1][1]:.4f}")
            break
    return "  ".join([*texts, *_changes(found[folder])])


def _changes(lineage: dict) -> Iterable[str]:
    """Yields what a branch changed, or the weights of an average."""
    if isinstance(lineage.get("scheme"), str):
        yield lineage["scheme"]
    steps = lineage.get("decay_steps")
    if steps:
        yield f"decay over {steps} steps"
    changes = lineage.get("changes")
    names = [str(change).split()[0] for change in changes] if isinstance(changes, list) else []
    others = [name for name in names if not (steps and name in SCHEDULE)]
    if others:
        yield f"other {', '.join(others)}"
