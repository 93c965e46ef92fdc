import re
import shutil

import jax.numpy as jnp
import numpy as np
import pytest
from checkpoint_states import (
    abstract,
    assert_same,
    bits,
    build_state,
    data_files,
    rewrite_record,
    saved,
    truncate,
)

from jaxtrain.checkpoint.manager import Checkpoints
from jaxtrain.errors import CheckpointError


@pytest.fixture(scope="module")
def two_steps(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two_steps") / "checkpoints"
    saved(folder, [1, 2])
    return folder


@pytest.fixture
def folder(two_steps, tmp_path):
    """A copy, to be damaged, of a folder with good steps 1 and 2."""
    return shutil.copytree(two_steps, tmp_path / "checkpoints")


def flip(file, offset):
    raw = bytearray(file.read_bytes())
    raw[offset] ^= 16
    file.write_bytes(raw)


def flip_a_weight(step_folder):
    """Flips a bit of a stored number of params.w, which Orbax does not detect."""
    raw = np.asarray(build_state(seed=2)["params"]["w"]).tobytes()
    [(file, at)] = [(f, f.read_bytes().find(raw)) for f in data_files(step_folder)
                    if raw in f.read_bytes()]  # fmt: skip
    flip(file, at + 123)


def empty(step_folder):
    shutil.rmtree(step_folder)
    step_folder.mkdir()


def swap_arrays_for_another_dtype(step_folder):
    with Checkpoints(step_folder.parent.parent / "other", 1) as checkpoints:
        state = build_state(seed=2)
        state["params"]["w"] = state["params"]["w"].astype(jnp.bfloat16)
        checkpoints.save(2, state, {})
    shutil.rmtree(step_folder / "state")
    shutil.copytree(step_folder.parent.parent / "other/2/state", step_folder / "state")


CORRUPTIONS = {
    "flipped": (flip_a_weight, r"params\.w has digest \w{16}; \w{16} was saved"),
    "truncated": (truncate, "cannot be read"),
    "no manifest": (lambda s: (s / "state/manifest.ocdbt").unlink(), "manifest.ocdbt is missing"),
    "no metadata": (lambda s: (s / "state/_METADATA").unlink(), "_METADATA is missing"),
    "no data": (lambda s: [f.unlink() for f in data_files(s)], "cannot be read"),
    "empty": (empty, "folder is empty"),
    "no record": (lambda s: (s / "record/metadata").unlink(), "record/metadata is missing"),
    "broken json": (
        lambda s: (s / "record/metadata").write_text('{"format": 1,'),
        "is not valid JSON",
    ),
    "edited json": (lambda s: flip(s / "record/metadata", 60), "record/metadata"),
    "of another step": (lambda s: rewrite_record(s, step=1), "its record is that of step 1"),
    "other dtype": (swap_arrays_for_another_dtype, r"params\.w cannot be read: stored as bfloat16"),
}


@pytest.mark.parametrize("kind", CORRUPTIONS)
def test_a_damaged_step_is_reported_skipped_and_moved_aside(folder, kind, caplog):
    corrupt, reason = CORRUPTIONS[kind]
    corrupt(folder / "2")
    broken = sorted(p.relative_to(folder / "2") for p in (folder / "2").rglob("*"))
    with Checkpoints(folder, 9) as checkpoints:
        restored = checkpoints.restore(abstract(build_state()))
        assert (restored.step, restored.meta) == (1, {"next": 1})
        assert_same(restored.state, build_state(seed=1))
        [(step, message)] = checkpoints.rejected
        assert step == 2
        assert re.search(reason, message), message
        assert f"Checkpoint at step 2 rejected: {message}" in caplog.text
        aside = folder.parent / "checkpoints_rejected/2"
        assert sorted(p.relative_to(aside) for p in aside.rglob("*")) == broken
        checkpoints.save(2, build_state(seed=2), {"next": 2})
        checkpoints.wait()
        assert_same(checkpoints.restore(abstract(build_state())).state, build_state(seed=2))


def test_no_flipped_byte_in_any_file_is_restored_silently(folder):
    files = [p for p in (folder / "2").rglob("*") if p.is_file() and p.stat().st_size]
    rng = np.random.default_rng(0)
    with Checkpoints(folder, 9, read_only=True) as checkpoints:
        for file in [*files, *rng.choice(files, 60)]:
            offset = rng.integers(0, file.stat().st_size)
            flip(file, offset)
            restored = checkpoints.restore(abstract(build_state()))
            assert_same(restored.state, build_state(seed=restored.step))
            assert restored.meta == {"next": restored.step}
            flip(file, offset)


def test_rejected_folders_of_the_same_step_get_different_names(folder):
    for k in range(3):
        empty(folder / "2")
        with Checkpoints(folder, 9) as checkpoints:
            assert checkpoints.restore(abstract(build_state())).step == 1
        assert not (folder / "2").exists()
        (folder / "2").mkdir()
        names = sorted(p.name for p in (folder.parent / "checkpoints_rejected").iterdir())
        assert names == ["2", "2.1", "2.2"][: k + 1]


def test_read_only_checkpoints_change_no_file(folder):
    flip_a_weight(folder / "2")
    (folder / "3.orbax-checkpoint-tmp").mkdir()
    before = sorted(folder.parent.rglob("*"))
    with Checkpoints(folder, 1, read_only=True) as checkpoints:
        assert checkpoints.restore(abstract(build_state())).step == 1
        with pytest.raises(ValueError, match="read_only"):
            checkpoints.save(3, build_state(), {})
    assert sorted(folder.parent.rglob("*")) == before


def test_if_every_step_is_damaged_restore_raises_and_moves_nothing(folder):
    truncate(folder / "1")
    empty(folder / "2")
    for _ in range(2):  # the second start must not find an empty folder
        with Checkpoints(folder, 9) as checkpoints, pytest.raises(CheckpointError) as error:
            checkpoints.restore(abstract(build_state()))
        assert "step 2: its folder is empty" in str(error.value)
        assert "step 1: " in str(error.value)
    assert not (folder.parent / "checkpoints_rejected").exists()


def test_without_the_digest_check_a_flipped_bit_is_restored(folder):
    flip_a_weight(folder / "2")
    with Checkpoints(folder, 9) as checkpoints:
        step, state, _ = checkpoints.restore(abstract(build_state()), device_check=False)
    assert step == 2 and bits(state) != bits(build_state(seed=2))
