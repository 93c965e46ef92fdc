import os
import shutil
import signal
import socket
import textwrap
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checkpoint_states import FSDP, abstract, mesh_of, truncate
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import runs
from jaxtrain.checkpoint.manager import Checkpoints

KILLED = """
    import sys, jax, jax.numpy as jnp
    from jaxtrain.checkpoint.manager import Checkpoints

    with Checkpoints(sys.argv[1], 1) as checkpoints:
        for step in (1, 2):
            state = {"w": jnp.full((12 << 20,), step, jnp.float32), "step": jnp.int32(step)}
            checkpoints.save(step, state, {"next": step})
            if step == 1:
                checkpoints.wait()
"""


def start(program, *args, **env):
    return runs.fork_program(textwrap.dedent(program), *args, env={**os.environ, **env})


@pytest.mark.long
def test_kill_9_in_the_middle_of_a_save_leaves_the_last_good_step(tmp_path):
    in_the_middle = 0
    for delay_s in (0.0, 0.03):
        folder = tmp_path / str(delay_s)
        child = start(KILLED, folder)
        while not list(folder.glob("2.*")) and not (folder / "2").exists():  # the save has begun
            assert child.poll() is None, child.communicate()[1]
            time.sleep(0.001)
        time.sleep(delay_s)
        child.send_signal(signal.SIGKILL)
        child.communicate()
        left = [path.name for path in folder.glob("2.*")]
        in_the_middle += bool(left)
        with Checkpoints(folder, 1) as checkpoints:
            template = abstract({"w": jnp.zeros(12 << 20), "step": jnp.int32(0)})
            step, state, meta = checkpoints.restore(template)
            assert step == (1 if left else 2) and meta == {"next": step} and state["step"] == step
            assert (np.asarray(state["w"]) == step).all() and checkpoints.rejected == []
            checkpoints.save(3, {"x": jnp.int32(3)}, {})
        assert [path.name for path in folder.iterdir()] == ["3"]  # nothing of the killed save
    assert in_the_middle


SEVERAL = """
    import itertools, os, signal, sys, jax, jax.numpy as jnp
    port, i, own, shared, private = sys.argv[1:]
    jax.distributed.initialize(f"localhost:{port}", 2, int(i))
    from jax.experimental.multihost_utils import reached_preemption_sync_point
    from jax.sharding import NamedSharding, PartitionSpec as P
    from jaxtrain.distributed.broadcast import broadcast_from_process_0
    from jaxtrain.checkpoint.manager import Checkpoints
    from jaxtrain.errors import CheckpointError
    from jaxtrain.config.train_config import MeshConfig
    from jaxtrain.checkpoint.process0_store import Process0Store
    from jaxtrain.distributed.mesh import build_mesh

    mesh = build_mesh(MeshConfig(1, 4, 1))
    split = NamedSharding(mesh, P("fsdp"))
    template = {"w": jax.ShapeDtypeStruct((8, 1024), jnp.float32, sharding=split)}
    with jax.set_mesh(mesh):
        with Checkpoints(own, 9) as checkpoints:
            step, state, meta = checkpoints.restore(template)
        assert (step, meta) == (1, {"next": 1}), (step, meta)
        [(step, reason)] = checkpoints.rejected
        assert step == 2 and reason.startswith("process 1: w cannot be read"), checkpoints.rejected
        with Checkpoints(shared, 9) as checkpoints:
            assert checkpoints.restore(template).step == 2
            checkpoints.save(3, jax.tree.map(lambda x: 3 * x, state), {"next": 3})
            checkpoints.wait()
            assert float(checkpoints.restore(template).state["w"].sum()) == 3 * 8 * 1024

        os.kill(os.getpid(), signal.SIGTERM)  # soon after a resume, before any other save
        asked = (step for step in itertools.count(4) if reached_preemption_sync_point(step))
        with Checkpoints(shared, 9) as checkpoints:
            stopped = next(asked)
            checkpoints.save(stopped, state, {})
            checkpoints.wait()
            assert checkpoints.restore(template).step == stopped

        zero, deep = state["w"] * -0.0, state["w"].reshape(8, 8, 128)
        state = {"w": zero, "step": jax.device_put(4, NamedSharding(mesh, P())), "deep": deep}
        template = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
        )
        with Checkpoints(private, 1) as checkpoints:
            try:
                checkpoints.save(4, state, {})
            except ValueError as error:
                assert "--checkpoint.storage=host0" in str(error), error
            else:
                raise AssertionError("two folders were taken for one")
        with Checkpoints(private, 1, storage="host0") as checkpoints:
            checkpoints.storage = Process0Store(checkpoints.folder, 1, 0, piece_bytes=4096)
            for step in (4, 5):
                checkpoints.save(step, state, {"next": step})
            step, _, meta = checkpoints.restore(template)  # compares the digests of all bits
            assert (step, meta) == (5, {"next": 5})
            assert broadcast_from_process_0(checkpoints.steps) == [5]
        with Checkpoints(private + "/5/record/metadata", 1, storage="host0") as checkpoints:
            try:
                checkpoints.save(6, state, {})
            except CheckpointError as error:
                assert "was not saved: process 0" in str(error), error
            else:
                raise AssertionError("a save into a file went through")
"""


def test_all_processes_skip_a_step_that_only_one_of_them_cannot_read(tmp_path):
    with Checkpoints(tmp_path / "shared", 9) as checkpoints:
        split = NamedSharding(mesh_of(FSDP), P("fsdp"))
        for step in (1, 2):
            state = {"w": jax.device_put(jnp.full((8, 1024), step, jnp.float32), split)}
            checkpoints.save(step, state, {"next": step})
    for i in "01":
        shutil.copytree(tmp_path / "shared", tmp_path / "own" / i)
    truncate(tmp_path / "own/1/2")
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
    children = [
        start(
            SEVERAL,
            port,
            i,
            tmp_path / "own" / i,
            tmp_path / "shared",
            tmp_path / i / "checkpoints",
            **flags,
        )
        for i in "01"
    ]
    errors = [child.communicate(timeout=120)[1] for child in children]
    assert [child.returncode for child in children] == [0, 0], "\n".join(errors)
    assert (tmp_path / "own/checkpoints_rejected/2").is_dir()  # only process 0 moves
    assert (tmp_path / "own/1/2").exists()
    assert (tmp_path / "0/checkpoints/5").is_dir()  # host0: only process 0 writes
    assert not (tmp_path / "1/checkpoints").exists()
    with Checkpoints(tmp_path / "shared", 9) as checkpoints:
        restored = checkpoints.restore(abstract(state))
        assert restored.step > 3 and (np.asarray(restored.state["w"]) == 1).all()
    whole = NamedSharding(mesh_of(FSDP), P())
    zero, step = (jax.device_put(x, whole) for x in (jnp.zeros((8, 1024)), jnp.int32(0)))
    template = abstract({"w": zero, "step": step, "deep": zero.reshape(8, 8, 128)})
    with Checkpoints(tmp_path / "0/checkpoints", 1) as checkpoints:  # saved by two processes
        restored = checkpoints.restore(template)  # compares the digests of all bits
        assert restored.step == 5 and np.signbit(np.asarray(restored.state["w"])).all()
