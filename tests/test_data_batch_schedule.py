"""Batches of different sizes are cut from the same endless list of sequences."""

import dataclasses
from contextlib import contextmanager

import jax
import numpy as np
import pytest

from jaxtrain.config.train_config import DataConfig, MeshConfig
from jaxtrain.data.loader import build_batches
from jaxtrain.data.shard_writer import ShardWriter
from jaxtrain.data.sources import open_split
from jaxtrain.distributed.mesh import build_mesh
from jaxtrain.training.resume import place_in_data

T, EOT, STEPS = 16, 1_000, 12
SCHEDULE = "0:4 256:8 768:16"  # 4 steps of 4, 4 of 8, then 16
SIZES = [4] * 4 + [8] * 4 + [16] * 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Token shards of two sources, in which every token is unique."""
    folder = tmp_path_factory.mktemp("sources")
    for name, first in (("web", 2_000), ("code", 20_000)):
        (folder / name).mkdir()
        for split, tokens in (("train", 1_700), ("val", 100)):
            writer = ShardWriter(folder / name, "x", split, "<u2", 1_500)
            writer.append(first + np.arange(tokens), [(tokens, 0)])
            writer.close()
    return folder


@contextmanager
def open_batches(folder, schedule=SCHEDULE, mesh=(1, 1, 1), mixture=False, batch=4, **options):
    seed = options.pop("seed", 3)
    cfg = DataConfig(batch=batch, seq_len=T, eot=EOT, batch_schedule=schedule, **options)
    sources = {"shards": str(folder / "web")}
    if mixture:
        stages = "web 0.75, code 0.25 until 512 tokens; web 0.5, code 0.5"
        sources = {"mixture": f"web={folder}/web code={folder}/code", "stages": stages}
    cfg = dataclasses.replace(cfg, **sources)
    corpus = open_split(cfg, "train", 65_536, folder, STEPS)
    devices = jax.devices()[: int(np.prod(mesh))]
    with build_batches(cfg, corpus, build_mesh(MeshConfig(*mesh), devices), seed) as batches:
        yield batches


def read(batches, steps):
    return [np.asarray(next(batches)["tokens"]) for _ in range(steps)]


def equal(a, b):
    return len(a) == len(b) and all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("mixture", [False, True])
def test_the_stream_of_sequences_is_that_of_equal_batches(folder, mixture):
    with open_batches(folder, mixture=mixture) as batches:
        got = read(batches, STEPS)
    assert [len(batch) for batch in got] == SIZES
    with open_batches(folder, "", mixture=mixture) as batches:
        whole = np.concatenate(read(batches, sum(SIZES) // 4))
    assert np.array_equal(np.concatenate(got), whole)


@pytest.mark.parametrize("options", [{"mixture": True}, {"prefetch": 0}, {"prefetch": 4}])
def test_batch_n_is_the_same_on_any_mesh_and_after_any_restart(folder, options):
    with open_batches(folder, **options) as batches:
        whole, states = [], []
        for _ in range(STEPS):
            states.append(batches.state())
            whole += read(batches, 1)
    for step in (3, 4, 5, 9):
        with open_batches(folder, mesh=(2, 2, 1), **options) as batches:
            batches.restore(states[step])
            assert equal(read(batches, STEPS - step), whole[step:])
            assert batches.state()["step"] == STEPS


def test_the_counts_of_sources_are_those_of_the_sequences_read(folder):
    with open_batches(folder, mixture=True) as batches:
        read_so_far = 0
        for step, size in enumerate(SIZES, start=1):
            [batch] = read(batches, 1)
            read_so_far += np.sum(batch[:, 0] < 20_000)
            figures = batches.sources.read_by(step)
            assert figures["web"]["tokens"] == read_so_far * T
            assert sum(f["tokens"] for f in figures.values()) == sum(SIZES[:step]) * T
            assert len(batch) == size
        assert batches.sources.planned() == figures


def test_a_resumed_run_may_change_later_sizes_but_not_earlier_ones(folder):
    with open_batches(folder) as batches:
        read(batches, 6)
        state, rest = batches.state(), read(batches, 4)
    later = "0:4 256:8 512:4"  # after 6 steps
    with open_batches(folder, later) as batches:
        batches.restore(state)
        changed = read(batches, 6)
    assert [len(batch) for batch in changed] == [4] * 6
    assert np.array_equal(np.concatenate(changed[:4]), np.concatenate(rest[:2]))
    pattern = "sequences 4 from step 1, 8 from step 5, now 4 from step 1 .*--data.batch_schedule"
    for other in ("0:4 640:8", "", "0:4"):
        with open_batches(folder, other) as batches:
            with pytest.raises(ValueError, match=pattern):
                batches.restore(state)
    with open_batches(folder, "") as batches:  # a run of equal sizes may begin to grow
        read(batches, 3)
        state, rest = batches.state(), read(batches, 3)
    assert state["batch"] == 4
    with open_batches(folder) as batches:
        batches.restore(state)
        assert equal(read(batches, 1), rest[:1])
        assert np.array_equal(*(np.concatenate(x) for x in (read(batches, 1), rest[1:])))


def branch(state, step, **values):
    """Returns the lineage of a branch, see jaxtrain.run_directory.lineage."""
    return {"data": state, "step": step, "new_data": True, "new_optimizer": False} | values


def test_a_branch_keeps_the_sizes_of_its_steps_and_reads_what_the_trunk_has_not_read(folder):
    with open_batches(folder) as batches:
        whole = np.concatenate(read(batches, STEPS))
        batches.restore(batches.state() | {"step": 6})
        state = batches.state()
    place = sum(SIZES[:6])

    def begin(*args, **lineage):
        with open_batches(folder, *args, seed=lineage.pop("seed", 3)) as batches:
            place_in_data(batches, branch(state, 6, **lineage))
            got = read(batches, 4)
            stored = batches.state()
        with open_batches(folder, *args, seed=stored["seed"]) as batches:  # a branch resumes, too
            batches.restore(stored | {"step": stored["step"] - 1})
            assert equal(read(batches, 1), got[-1:])
            batches.check_step(10 - lineage.get("new_optimizer", False) * 6)
        return [len(batch) for batch in got], np.concatenate(got)

    def is_next(rows):
        return np.array_equal(rows, whole[place : place + len(rows)])

    sizes, rows = begin(new_data=False)
    assert sizes == SIZES[6:10] and is_next(rows)
    sizes, rows = begin("0:4 256:8 512:4")
    assert sizes == [4] * 4 and is_next(rows)
    sizes, rows = begin("0:16 1e4:8")  # other sizes of the steps before
    assert sizes == [16] * 4 and is_next(rows)
    sizes, rows = begin("0:8 256:16", new_optimizer=True)  # as branching.schedule writes it
    assert sizes == [8, 8, 16, 16] and is_next(rows)
    sizes, rows = begin(seed=4)  # other data, from their beginning
    assert sizes == SIZES[6:10] and not is_next(rows)


def test_a_branch_with_other_data_refuses_a_schedule_that_it_did_not_begin_with(folder):
    with open_batches(folder, "") as batches:
        place_in_data(batches, branch(batches.state() | {"seed": 4}, 6))
        read(batches, 2)
        state = batches.state()
    with open_batches(folder) as batches:
        batches.restore(state)
        with pytest.raises(ValueError, match="must be set when a branch .* at step 8, .*step 2"):
            batches.check_step(8)
