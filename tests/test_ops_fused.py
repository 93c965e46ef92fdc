"""Programs for GPUs, lowered without a GPU in subprocesses."""

import os
import subprocess
import sys

import pytest

pytest.importorskip("cramjam", reason='cramjam is missing: pip install "jaxtrain[offline]"')
pytest.importorskip("jax_cuda12_plugin", reason="the compiler for GPUs is missing: offline")

ATTENTION = """
import jax
import jax.numpy as jnp
from jax._src.cudnn import fused_attention_stablehlo as cudnn
from jax.sharding import NamedSharding, PartitionSpec as P
from jaxtrain.config.train_config import MeshConfig
from jaxtrain.ops.routes import Route
from jaxtrain.distributed.mesh import BATCH_AXES, build_mesh
from jaxtrain.model.attention import attend
from pallas_kernels.chip import find_chip
from pallas_kernels.offline import devices_of

cudnn.check_cudnn_version = lambda: 91_000  # lowering reads nothing else of the library
mesh = build_mesh(MeshConfig(1, 2, 2), devices_of(find_chip("h100"), 4))
heads = NamedSharding(mesh, P(BATCH_AXES, None, "tensor"))
x_BTHK = jax.ShapeDtypeStruct((4, 128, 4, 64), jnp.bfloat16, sharding=heads)
route = Route("attention", "cudnn", "")
loss = lambda *qkv: attend(route, *qkv, mesh=mesh).astype(jnp.float32).sum()
print(jax.jit(jax.grad(loss, (0, 1, 2))).lower(x_BTHK, x_BTHK, x_BTHK).as_text())
"""


def test_cudnns_attention_on_several_gpus_is_the_same_program_in_every_process():
    """JAX's own partitioner would add a memory address, and the compile cache would never hit."""
    env = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"} | {"JAX_PLATFORMS": "cpu"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "env": env}
    argv = [sys.executable, "-c", ATTENTION]
    pair = [subprocess.Popen(argv, **pipes) for _ in range(2)]
    (first, errors), (second, _) = (process.communicate(timeout=120) for process in pair)
    assert "__cudnn$fmhaSoftmax(" in first and "__cudnn$fmhaSoftmaxBackward(" in first, errors
    assert first == second
