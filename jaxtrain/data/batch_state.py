"""The sizes of a run's batches in a checkpoint, and what may change when the run resumes.

The batches that a run has read must stay as they were. Later ones may have other sizes.
"""

from typing import Any

from jaxtrain.config.batch_schedule import BatchPhase, BatchSchedule
from jaxtrain.data.batch_source import Origin, count_places

StoredSizes = int | dict[str, Any]


def store_sizes(sizes: BatchSchedule, origin: Origin) -> StoredSizes:
    """Returns the sizes and the origin for JSON: one number if all batches have one size."""
    if sizes.is_constant and origin == Origin():
        return sizes.largest
    phases = [list(phase) for phase in sizes.phases]
    return {"phases": phases, "origin": list(origin)}


def read_sizes(stored: StoredSizes) -> tuple[BatchSchedule, Origin]:
    """Returns what store_sizes was given."""
    if isinstance(stored, int):
        return BatchSchedule((BatchPhase(0, stored),)), Origin()
    phases = tuple(BatchPhase(*phase) for phase in stored["phases"])
    return BatchSchedule(phases), Origin(*stored["origin"])


def stored_places(stored: StoredSizes, batches: int) -> int:
    """Returns how many places of the endless list a checkpoint's first `batches` batches read."""
    return count_places(*read_sizes(stored), batches)


def describe_changes(stored: StoredSizes, sizes: BatchSchedule, batches: int) -> list[str]:
    """Returns sentences on what differs in the batches that a run has read.

    Args:
        sizes: the sizes now.
        batches: number of batches read.
    """
    before, origin = read_sizes(stored)
    if before.is_constant and sizes.is_constant:
        sizes_differ = before.largest != sizes.largest
        return [f"batch={before.largest}, now {sizes.largest} (--data.batch)"] * sizes_differ
    span = origin.step, origin.step + batches
    if not batches or before.between(*span) == sizes.between(*span):
        return []
    texts = (_describe(schedule, span) for schedule in (before, sizes))
    return [f"sequences {', now '.join(texts)} (--data.batch_schedule)"]


def _describe(sizes: BatchSchedule, span: tuple[int, int]) -> str:
    return ", ".join(f"{p.sequences} from step {p.first + 1}" for p in sizes.between(*span))
