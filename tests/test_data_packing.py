import numpy as np
import pytest

from jaxtrain.data.packing import best_fit, pack

KINDS = ["short", "long_tail", "half_rows", "one_size"]


def draw(kind, n, room, seed=0):
    rng = np.random.default_rng(seed)
    if kind == "short":
        return rng.integers(1, room // 3, n)
    if kind == "long_tail":
        return 1 + rng.lognormal(np.log(room / 3), 1.2, n).astype(np.int64)
    if kind == "half_rows":
        return rng.integers(room // 3, room // 2 + 4, n)
    return np.full(n, room // 3 - 1)


def documents(lengths):
    """Returns (shard, start, length) of documents end to end in two shards."""
    shard = (np.arange(len(lengths)) >= len(lengths) // 2).astype(np.int64)
    starts = np.cumsum(lengths) - lengths
    return shard, np.where(shard, starts - starts[len(lengths) // 2], starts), lengths


def rows_of_first_fit(lengths, room):
    rooms = []
    for length in lengths:
        fit = next((i for i, left in enumerate(rooms) if left >= length), None)
        if fit is None:
            rooms.append(room)
            fit = len(rooms) - 1
        rooms[fit] -= length
    return len(rooms)


def rows_of_best_fit_decreasing(lengths, room):
    """The textbook's loop over single documents."""
    rooms = []
    for length in sorted(lengths, reverse=True):
        fitting = [left for left in rooms if left >= length]
        if fitting:
            rooms.remove(min(fitting))
        rooms.append((min(fitting) if fitting else room) - length)
    return len(rooms)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("room", [33, 129])
def test_every_token_is_in_exactly_one_row_and_no_row_overflows(kind, room):
    lengths = draw(kind, 2_000, room)
    shard, start, length = documents(lengths)
    packing = pack((shard, start, length), room)
    seen = [np.zeros(lengths[shard == s].sum(), int) for s in (0, 1)]
    for s, first, size in zip(packing.shard, packing.start, packing.length, strict=True):
        seen[s][first : first + size] += 1
    assert all((times == 1).all() for times in seen)
    fill = np.add.reduceat(packing.length, packing.first[:-1])
    assert fill.max() <= room and fill.min() >= 1 and packing.first[-1] == len(packing.length)


@pytest.mark.parametrize("kind", KINDS)
def test_only_documents_longer_than_a_row_are_cut(kind):
    lengths = draw(kind, 500, 65)
    packing = pack(documents(lengths), 65)
    assert len(packing.length) == np.sum(-(-lengths // 65))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", range(3))
def test_packing_needs_as_many_rows_as_the_textbook_and_no_more_than_first_fit(kind, seed):
    room = 65
    lengths = np.minimum(draw(kind, 600, room, seed), room)
    rows = best_fit(lengths, room).max() + 1
    assert rows == rows_of_best_fit_decreasing(lengths.tolist(), room)
    assert rows <= rows_of_first_fit(lengths.tolist(), room)


def test_packing_is_the_same_every_time():
    lengths = draw("long_tail", 5_000, 257)
    once, again = (pack(documents(lengths), 257) for _ in range(2))
    assert all((a == b).all() for a, b in zip(once, again, strict=True))


def test_a_million_documents_fill_their_rows():
    lengths = draw("long_tail", 10**6, 1_025)
    packing = pack(documents(lengths), 1_025)
    assert lengths.sum() / (packing.rows * 1_025) > 0.999


@pytest.mark.parametrize(("lengths", "rows"), [([], 0), ([1], 1), ([5], 1), ([6], 2), ([5, 5], 2)])
def test_the_smallest_inputs_are_packed(lengths, rows):
    lengths = np.array(lengths, np.int64)
    shard = np.zeros_like(lengths)
    assert pack((shard, np.cumsum(lengths) - lengths, lengths), 5).rows == rows
