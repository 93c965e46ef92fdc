import logging as std_logging
import resource
import shutil
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl import logging
from checkpoint_states import (
    FSDP,
    MIXED,
    ONE,
    abstract,
    assert_same,
    bits,
    build_state,
    mesh_of,
    rewrite_record,
    saved,
)
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from orbax.checkpoint._src.futures import synchronization

from jaxtrain.checkpoint.integrity import FORMAT
from jaxtrain.checkpoint.manager import Checkpoints
from jaxtrain.checkpoint.shared_store import SharedStore, _ArraysHandler
from jaxtrain.checkpoint.storage import STORAGE
from jaxtrain.errors import CheckpointError, SaveFailed


@pytest.fixture
def folder(tmp_path):
    """A folder with good steps 1 and 2."""
    saved(tmp_path / "checkpoints", [1, 2])
    return tmp_path / "checkpoints"


def test_without_a_stored_step_restore_returns_none(tmp_path):
    for folder in (tmp_path, tmp_path / "not" / "there"):
        with Checkpoints(folder, 1) as checkpoints:
            assert checkpoints.restore(abstract(build_state())) is None
            assert checkpoints.steps() == [] and checkpoints.read_meta() is None


def other_shape(state):
    state["params"]["w"] = jnp.zeros((16, 48))


def other_dtype(state):
    state["params"]["w"] = state["params"]["w"].astype(jnp.bfloat16)


MISMATCHES = {
    "shape": (other_shape, r"params\.w: stored float32\[16,32\], expected float32\[16,48\]"),
    "dtype": (other_dtype, r"params\.w: stored float32\[16,32\], expected bfloat16\[16,32\]"),
    "missing": (lambda s: s.pop("bad"), r"bad: stored bool\[\], expected nothing"),
    "extra": (lambda s: s.update(new=jnp.zeros(3)), r"new: stored nothing, expected float32\[3\]"),
}


LEAVES_WITHOUT_A_DIGEST = {
    lambda: jax.random.key(0): r"key<fry>\[\]\. Store jax\.random\.key_data\(key\)",
    lambda: jnp.zeros(2, jnp.int4): r"int4\[2\]\. Store x\.astype\(jnp\.int8\)\.",
    lambda: jnp.zeros(2, jnp.complex64): r"complex64\[2\]\. Store x\.real and x\.imag\.",
}
BAD_META = [
    ({"lr": jnp.float32(1.0)}, r"got meta\['lr'\]=Array\(1"),
    ({"a": [0, {"b": {1, 2}}]}, r"got meta\['a'\]\[1\]\['b'\]=\{1, 2\}"),
    ({"a": {(1, 2): 3}}, r"got meta\['a'\] with the key \(1, 2\)"),
    ({"rate": np.float32(1.0)}, r"got meta\['rate'\]=.*1\.0"),
]


@pytest.mark.parametrize("kind", MISMATCHES)
def test_a_template_of_another_state_is_refused_and_no_step_is_rejected(folder, kind):
    state = build_state()
    change, message = MISMATCHES[kind]
    change(state)
    with Checkpoints(folder, 9) as checkpoints, pytest.raises(ValueError, match=message):
        checkpoints.restore(abstract(state))
    assert checkpoints.rejected == [] and checkpoints.steps() == [1, 2]


def test_a_checkpoint_of_a_newer_format_is_refused(folder):
    rewrite_record(folder / "2", format=FORMAT + 1)
    with Checkpoints(folder, 9) as checkpoints:
        for read in (lambda: checkpoints.restore(abstract(build_state())), checkpoints.read_meta):
            with pytest.raises(ValueError, match=f"at most {FORMAT}; got format={FORMAT + 1}"):
                read()


def test_read_meta_needs_no_arrays_and_skips_damaged_records(folder):
    shutil.rmtree(folder / "2/state/ocdbt.process_0")
    with Checkpoints(folder, 9, read_only=True) as checkpoints:
        assert checkpoints.read_meta() == checkpoints.read_meta(2) == {"next": 2}
        (folder / "2/record/metadata").write_text("{")
        assert checkpoints.read_meta() == {"next": 1}
        with pytest.raises(CheckpointError, match="is not valid JSON"):
            checkpoints.read_meta(2)


@pytest.mark.parametrize(("before", "after"), [(ONE, FSDP), (FSDP, MIXED), (MIXED, ONE)])
def test_a_checkpoint_restores_on_another_mesh_bit_for_bit(tmp_path, before, after):
    saved(tmp_path, [3], before)
    template = abstract(build_state(after))
    with Checkpoints(tmp_path, 1) as checkpoints, jax.set_mesh(mesh_of(after)):
        state = checkpoints.restore(template).state
    assert_same(state, build_state(ONE, 3))
    assert [x.sharding for x in jax.tree.leaves(state)] == [
        x.sharding for x in jax.tree.leaves(template)
    ]


def test_double_precision_restores_bit_for_bit(tmp_path):
    with jax.enable_x64(True), Checkpoints(tmp_path, 1) as checkpoints:
        state = {"w": jax.random.normal(jax.random.key(0), (33,)), "n": jnp.int64(2**40 + 1)}
        assert state["w"].dtype == jnp.float64
        checkpoints.save(1, state, {})
        checkpoints.wait()
        assert_same(checkpoints.restore(abstract(state)).state, state)


@pytest.mark.parametrize("cfg", [ONE, FSDP])
def test_a_state_donated_right_after_save_is_stored_as_it_was(tmp_path, cfg):
    sharding = NamedSharding(mesh_of(cfg), P("fsdp"))
    w = jax.device_put(np.arange(1 << 21, dtype=np.float32).reshape(8, -1), sharding)
    step = jax.jit(lambda s: jax.tree.map(lambda x: x * 2 + 1, s), donate_argnums=0)
    state = {"w": w, "m": step(w + 0)}
    with Checkpoints(tmp_path, 1) as checkpoints:
        template, before = abstract(state), bits(state)
        checkpoints.save(1, state, {})
        for _ in range(4):
            state = step(state)
        jax.block_until_ready(state)
        checkpoints.wait()
        assert bits(checkpoints.restore(template).state) == before != bits(state)


def test_keep_last_and_keep_every_decide_which_steps_remain(tmp_path):
    with Checkpoints(tmp_path, keep_last=2, keep_every=4) as checkpoints:
        for step in range(1, 11):
            checkpoints.save(step, {"x": jnp.int32(step)}, {})
    assert checkpoints.steps() == [4, 8, 9, 10]


def test_a_step_must_be_newer_than_what_is_stored(folder):
    with Checkpoints(folder, 9) as checkpoints:
        for step in (0, 1, 2):
            with pytest.raises(ValueError, match=rf"above the newest one's, 2; got step={step}"):
                checkpoints.save(step, build_state(), {})


def test_leaves_that_cannot_be_stored_are_refused(tmp_path):
    with Checkpoints(tmp_path, 1) as checkpoints:
        for leaf in (3, np.zeros(2), "text"):
            with pytest.raises(ValueError, match="got a.x, "):
                checkpoints.save(1, {"a": {"x": leaf}}, {})
        with pytest.raises(ValueError, match=r"a, float32\[2,0\]"):
            checkpoints.save(1, {"a": jnp.zeros((2, 0))}, {})
        with pytest.raises(ValueError, match="must contain an array; got none"):
            checkpoints.save(1, {"w": None}, {})
        with pytest.raises(ValueError, match="unique"):
            checkpoints.save(1, {"a": {"x": jnp.zeros(1)}, "a.x": jnp.zeros(1)}, {})
        for leaf, hint in LEAVES_WITHOUT_A_DIGEST.items():
            with pytest.raises(ValueError, match=rf"got a\.x, {hint}"):
                checkpoints.save(1, {"a": {"x": leaf()}}, {})
    assert checkpoints.steps() == []


def test_a_leaf_of_meta_that_json_cannot_hold_is_named(tmp_path):
    with Checkpoints(tmp_path, 1) as checkpoints:
        for meta, name in BAD_META:
            with pytest.raises(ValueError, match=name):
                checkpoints.save(1, {"w": jnp.zeros(1)}, meta)
        checkpoints.save(1, {"w": jnp.zeros(1)}, {"rate": np.float64(0.5), "at": {2: (None, "x")}})
    assert checkpoints.read_meta() == {"rate": 0.5, "at": {"2": [None, "x"]}}


def test_options_that_do_not_exist_are_refused_with_what_is_allowed(tmp_path):
    for options, message in (
        ({"keep_last": 0}, "keep_last must be at least 1 .* got keep_last=0, keep_every=0"),
        ({"keep_last": 2, "keep_every": -1}, "got keep_last=2, keep_every=-1"),
        ({"keep_last": 2.5}, "got keep_last=2.5"),
        ({"keep_last": 1, "storage": "local"}, "storage must be shared or host0; got 'local'"),
    ):
        with pytest.raises(ValueError, match=message):
            Checkpoints(tmp_path, **options)


def test_a_template_is_the_state_or_structs_with_shardings(folder):
    state = build_state(seed=2)
    with Checkpoints(folder, 9) as checkpoints:
        assert_same(checkpoints.restore(state).state, state)
        with pytest.raises(ValueError, match=r"Pass the state itself, or .*sharding=x\.sharding"):
            checkpoints.restore(jax.eval_shape(lambda: state))


@pytest.fixture
def full_disk():
    """Limits files to 64 KiB, so that writes fail as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_the_error_of_a_background_save_is_raised_by_wait_and_on_exit(tmp_path, full_disk):
    state = {"w": jnp.arange(1 << 20)}
    with pytest.raises(Exception, match="File too large"):
        with Checkpoints(tmp_path, 1) as checkpoints:
            checkpoints.save(1, state, {})
    with pytest.raises(Exception, match="File too large"):
        with Checkpoints(tmp_path, 1) as checkpoints:
            checkpoints.save(1, state, {})
            checkpoints.wait()
    assert checkpoints.steps() == []


def test_a_process_that_cannot_write_does_not_wait_for_the_others(tmp_path, full_disk, monkeypatch):
    """Orbax ends a save when all processes have come so far; here the others never do."""
    others, set_value = threading.Event(), synchronization.MultihostSynchronizedValue.set

    def set_together(tracker, value):
        if value or others.wait(20):
            set_value(tracker, value)

    monkeypatch.setattr(synchronization.MultihostSynchronizedValue, "set", set_together)
    with pytest.raises(SaveFailed, match="File too large"):
        with Checkpoints(tmp_path, 1) as checkpoints:
            checkpoints.save(1, {"w": jnp.arange(1 << 20)}, {})
            started_s = time.monotonic()
            try:
                checkpoints.wait()
            finally:
                waited_s = time.monotonic() - started_s
                others.set()
    assert waited_s < 10


def test_a_failed_save_does_not_hide_the_error_that_ends_the_run(tmp_path, full_disk, caplog):
    with pytest.raises(ZeroDivisionError):
        with Checkpoints(tmp_path, 1) as checkpoints:
            checkpoints.save(1, {"w": jnp.arange(1 << 20)}, {})
            raise ZeroDivisionError
    assert "The last checkpoint was not saved" in caplog.text


def test_an_error_in_the_run_does_not_damage_the_save_before_it(tmp_path):
    state = {"w": jnp.arange(1 << 20)}
    with pytest.raises(KeyboardInterrupt):
        with Checkpoints(tmp_path, 1) as checkpoints:
            checkpoints.save(1, state, {})
            raise KeyboardInterrupt
    assert_same(Checkpoints(tmp_path, 1).restore(abstract(state)).state, state)


@pytest.mark.parametrize("storage", STORAGE)
def test_after_a_save_that_raised_no_call_waits_for_it(tmp_path, storage):
    state = {"w": jnp.arange(4)}
    delete = lambda: state["w"].delete()
    checkpoints = Checkpoints(tmp_path, 2, storage=storage, before_save=delete)
    with pytest.raises(Exception, match="deleted"):
        checkpoints.save(1, state, {})
    assert not checkpoints.is_saving()  # else wait, the next save and __exit__ would never return
    with checkpoints:
        checkpoints.wait()
    assert checkpoints.steps() == []


def test_after_ctrl_c_within_a_save_no_call_waits_for_it(tmp_path, monkeypatch):
    async def interrupt(*_, **__):
        raise KeyboardInterrupt

    checkpoints = Checkpoints(tmp_path, 2)
    with monkeypatch.context() as patch:
        patch.setattr(_ArraysHandler, "async_save", interrupt)
        with pytest.raises(KeyboardInterrupt):
            checkpoints.save(1, {"w": jnp.arange(4)}, {})
    assert not checkpoints.is_saving()
    with checkpoints:
        checkpoints.wait()
    assert checkpoints.steps() == []


def test_orbax_logs_nothing_and_our_own_lines_are_logged(tmp_path, caplog):
    caplog.set_level(std_logging.INFO, "absl")
    with Checkpoints(tmp_path, 1) as checkpoints:
        checkpoints.save(1, build_state(), {})
        checkpoints.wait()
        checkpoints.restore(abstract(build_state()))
    logging.info("a line of ours")
    assert [record.getMessage() for record in caplog.records] == ["a line of ours"]


def test_a_reader_takes_the_newer_step_if_the_run_deletes_the_one_it_reads(tmp_path):
    template = abstract(build_state())
    with Checkpoints(tmp_path, 1) as run, Checkpoints(tmp_path, 1, read_only=True) as reader:

        class Slow(SharedStore):
            """Reads so slowly that the run saves newer steps and deletes this one."""

            def read(self, folder, template):
                newest = int(folder.name)
                for step in range(newest + 1, 4):
                    run.save(step, build_state(seed=step), {"next": step})
                    run.wait()
                return super().read(folder, template)

        run.save(1, build_state(seed=1), {"next": 1})
        run.wait()
        reader.storage = Slow(tmp_path, 1, 0)
        restored = reader.restore(template)
        assert restored.step == 3 and reader.rejected == []
        assert_same(restored.state, build_state(seed=3))
