"""Compiles programs for 8 devices whose collectives can be counted by hand."""

import functools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxtrain.config.train_config import MeshConfig
from jaxtrain.distributed.mesh import build_mesh
from jaxtrain.metrics.hlo_collectives import find_collectives, parse_groups
from pallas_kernels.hlo import Program

MESH = build_mesh(MeshConfig(2, 2, 2))
ROWS, COLUMNS = 64, 32
BYTES = ROWS * COLUMNS * 4  # of the whole array, float32


def collectives_of(local, in_spec, out_spec):
    program = jax.shard_map(local, mesh=MESH, in_specs=in_spec, out_specs=out_spec, check_vma=False)
    x = jax.ShapeDtypeStruct((ROWS, COLUMNS), jnp.float32, sharding=NamedSharding(MESH, in_spec))
    text = jax.jit(program).lower(x).compile().as_text()
    return find_collectives(Program(text), MESH)


CASES = {  # local function, in, out, kind, payload of a device, axes, size
    "a sum over one axis": (
        lambda x: jax.lax.psum(x, "fsdp"),
        P("fsdp"),
        P(),
        ("all-reduce", BYTES // 2, ("fsdp",), 2),
    ),
    "a sum over two axes": (
        lambda x: jax.lax.psum(x, ("replica", "tensor")),
        P(("replica", "tensor")),
        P(),
        ("all-reduce", BYTES // 4, ("replica", "tensor"), 4),
    ),
    "a gather": (
        lambda x: jax.lax.all_gather(x, "tensor", tiled=True),
        P("tensor"),
        P(),
        ("all-gather", BYTES, ("tensor",), 2),
    ),
    "a scattered sum": (
        lambda x: jax.lax.psum_scatter(x, "fsdp", tiled=True),
        P(),
        P("fsdp"),
        ("reduce-scatter", BYTES, ("fsdp",), 2),
    ),
    "an exchange": (
        lambda x: jax.lax.all_to_all(x, "replica", 1, 0, tiled=True),
        P("replica"),
        P(None, "replica"),
        ("all-to-all", BYTES // 2, ("replica",), 2),
    ),
    "a shift": (
        lambda x: jax.lax.ppermute(x, "tensor", [(0, 1), (1, 0)]),
        P("tensor"),
        P("tensor"),
        ("collective-permute", BYTES // 2, ("tensor",), 2),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_kind_payload_axes_and_size_of_a_collective_are_found(name):
    *program, want = CASES[name]
    (found,) = collectives_of(*program)
    assert found[:4] == want and found.times == 1 and not found.crosses_hosts


def test_a_collective_in_a_loop_counts_for_every_iteration():
    turn = lambda x, _: (jnp.sin(jax.lax.psum(x, "fsdp")), None)
    local = lambda x: jax.lax.scan(turn, x, length=7)[0]
    (found,) = collectives_of(local, P("fsdp"), P("fsdp"))
    assert found.times == 7
    assert found.wire_bytes == 7 * 2 * 0.5 * BYTES / 2  # each of two devices sends half twice


@pytest.mark.parametrize(
    "axis, names, rings", [("replica", "ab", 4), ("fsdp", "ab", 0), ("fsdp", "aa", 0)]
)
def test_a_host_sends_its_share_of_each_ring_that_crosses_hosts(axis, names, rings):
    """The first four of eight devices represent one process, the other four a second one."""
    devices = [SimpleNamespace(process_index=int(i >= 4)) for i in range(8)]
    mesh = SimpleNamespace(
        size=8,
        devices=np.array(devices, dtype=object).reshape(2, 2, 2),
        axis_names=MESH.axis_names,
    )
    program = jax.shard_map(
        lambda x: jax.lax.psum(x, axis), mesh=MESH, in_specs=P(axis), out_specs=P(), check_vma=False
    )
    x = jax.ShapeDtypeStruct((ROWS, COLUMNS), jnp.float32, sharding=NamedSharding(MESH, P(axis)))
    text = jax.jit(program).lower(x).compile().as_text()
    (found,) = find_collectives(Program(text), mesh, names)
    assert found.rings == max(rings, 1) * found.crosses_hosts
    assert found.host_bytes == rings * BYTES // 2  # a ring of two sends half its array twice


def test_a_program_without_communication_has_no_collectives():
    assert collectives_of(lambda x: x + 1, P(), P()) == []


@pytest.mark.parametrize(
    "text, groups",
    [
        ("replica_groups={{0,2},{1,3}}", [[0, 2], [1, 3]]),
        ("replica_groups=[2,4]<=[8]", [[0, 1, 2, 3], [4, 5, 6, 7]]),
        ("replica_groups=[4,2]<=[2,4]T(1,0)", [[0, 4], [1, 5], [2, 6], [3, 7]]),
        ("replica_groups=mesh['a'=2,'b'=4] {'b'}", [[0, 1, 2, 3], [4, 5, 6, 7]]),
        ("replica_groups=mesh['a'=2,'b'=4] {'a'}", [[0, 4], [1, 5], [2, 6], [3, 7]]),
        ("replica_groups=mesh['a'=2,'b'=4] {'b':(1)2}", [[0, 2], [1, 3], [4, 6], [5, 7]]),
        (
            "replica_groups=mesh['a'=2,'b'=4], device_ids=([4,2]T(1,0)) {'a'}",
            [[0, 1], [2, 3], [4, 5], [6, 7]],
        ),
        ("replica_groups={}", [list(range(8))]),
    ],
)
def test_groups_are_parsed_in_each_of_xlas_forms(text, groups):
    assert parse_groups(f"channel_id=1, {text}, dimensions=", 8) == groups


def test_groups_in_an_unknown_form_are_an_error():
    with pytest.raises(ValueError, match="must be in a known form"):
        parse_groups("replica_groups=new_form", 8)


FUSED = """
%slice (stack: f32[9,64], at: s32[]) -> f32[1,64] {
  %stack = f32[9,64]{1,0} parameter(0)
  %at = s32[] parameter(1)
  %zero = s32[] constant(0)
  ROOT %one = f32[1,64]{1,0} dynamic-slice(%stack, %at, %zero), dynamic_slice_sizes={1,64}
}

ENTRY %main (x: f32[9,64], i: s32[]) -> f32[1,64] {
  %x = f32[9,64]{1,0} parameter(0)
  %i = s32[] parameter(1)
"""
FORMS = {
    "sync": "ROOT %y = f32[1,64]{1,0} fusion(%x, %i), kind=kLoop, calls=%slice",
    "async": """%s = ((f32[9,64]{1,0}, s32[]), f32[1,64]{1,0}) fusion-start(%x, %i), calls=%slice
  ROOT %y = f32[1,64]{1,0} fusion-done(%s)""",
}


@pytest.mark.parametrize("form", FORMS)
def test_a_fusion_that_slices_an_operand_reads_only_the_slice(form):
    (work,) = Program(f"{FUSED}  {FORMS[form]}\n}}\n").work()
    assert work.hbm_bytes == 2 * 64 * 4 + 4  # the slice read and written, and its index


GATHERED = """
%rows (p: bf16[50304,768], i: s32[8,1]) -> f32[8,768] {
  %p = bf16[50304,768]{1,0} parameter(0)
  %i = s32[8,1]{1,0} parameter(1)
  %g = bf16[8,768]{1,0} gather(%p, %i), offset_dims={1}, slice_sizes={1,768}
  ROOT %c = f32[8,768]{1,0} convert(%g)
}

ENTRY %main (x: bf16[50304,768], i: s32[8,1]) -> f32[8,768] {
  %x = bf16[50304,768]{1,0} parameter(0)
  %i = s32[8,1]{1,0} parameter(1)
  ROOT %y = f32[8,768]{1,0} fusion(%x, %i), kind=kLoop, calls=%rows
}
"""


def test_a_gather_reads_only_its_rows():
    (work,) = Program(GATHERED).work()
    assert work.hbm_bytes == 8 * 768 * 2 + 8 * 4 + 8 * 768 * 4  # rows, indices, the result


SCATTERED = """
%changed (p: bf16[8,4096], i: s32[8,2], u: f32[8]) -> bf16[8,4096] {
  %p = bf16[8,4096]{1,0} parameter(0)
  %i = s32[8,2]{1,0} parameter(1)
  %u = f32[8]{0} parameter(2)
  %n = bf16[8]{0} convert(%u)
  ROOT %s = bf16[8,4096]{1,0} scatter(%p, %i, %n), update_window_dims={}, to_apply=%second
}

ENTRY %main (x: bf16[8,4096], i: s32[8,2], u: f32[8]) -> bf16[8,4096] {
  %x = bf16[8,4096]{1,0} parameter(0)
  %i = s32[8,2]{1,0} parameter(1)
  %u = f32[8]{0} parameter(2)
  ROOT %y = bf16[8,4096]{1,0} fusion(%x, %i, %u), kind=kInput, calls=%changed
}
"""


def test_a_scatter_moves_only_what_it_changes():
    (work,) = Program(SCATTERED).work()
    assert work.hbm_bytes == 8 * 2 * 4 + 8 * 4 + 8 * 2  # indices, new numbers, what is written


def test_flops_and_bytes_of_a_scan_are_those_of_its_products():
    """A scan of 5 products, each fused with what follows it."""
    x, w = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((64, 128), (5, 128, 128)))
    scan = functools.partial(jax.lax.scan, lambda x, w: (jnp.tanh(x @ w), None))
    work = Program(jax.jit(lambda x, w: scan(x, w)[0]).lower(x, w).compile().as_text()).work()
    assert sum(w.times * w.flops for w in work) == 5 * 2 * 64 * 128 * 128
    moved = sum(w.times * w.hbm_bytes for w in work)
    least = 5 * 4 * (128 * 128 + 2 * 64 * 128)
    assert least <= moved < 4 * least  # the stack of weights is read slice by slice
