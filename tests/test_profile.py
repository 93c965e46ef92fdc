import json
import types

import jax
import jax.numpy as jnp
import pytest

from jaxtrain import profile
from jaxtrain.reporting import profile_trace
from jaxtrain.reporting.profile_trace import (
    CAUSES,
    Device,
    TracedOp,
    find_traces,
    own_times,
    read_trace,
)
from jaxtrain.reporting.tracing import Tracer

STEPS = 3


@pytest.fixture(scope="module")
def traced(tmp_path_factory):
    """A folder with a trace of three steps, which multiply matrices of 256 x 256."""
    folder = tmp_path_factory.mktemp("traced")
    tracer = Tracer(folder, 0, STEPS + 1, STEPS)
    program = jax.jit(lambda x: jnp.tanh(x @ x))
    x = jax.device_put(jnp.ones((256, 256)), jax.devices()[0])
    for step in range(1, STEPS + 2):
        if tracer.switches_before(step):
            tracer.switch()
        with tracer.annotate_step(step):
            with tracer.annotate("dispatch"):
                y = program(x)
            with tracer.annotate("wait"):
                y.block_until_ready()
    tracer.switch()
    return folder


def test_a_trace_contains_each_operation_and_the_parts_of_the_host(traced):
    trace = read_trace(*find_traces(traced))
    assert "/host:CPU" in trace.read and trace.skipped
    [device] = trace.devices
    rows = device.by_op()
    assert {row.count % STEPS for row in rows} == {0}
    assert {row.module for row in rows} == {"jit__lambda"}
    assert 0 < device.busy_s <= device.span_s
    parts = trace.host.parts_s()
    assert len(trace.host.steps) == STEPS and parts.keys() == {"dispatch", "wait"}
    assert parts["dispatch"] + parts["wait"] <= trace.host.step_s


def test_the_command_prints_planes_devices_and_the_longest_operations(traced, capsys):
    profile.main([str(traced), "--top=1"])
    shown = capsys.readouterr().out
    assert "planes read: /host:CPU; skipped:" in shown and "% idle" in shown
    assert "host: 3 steps of" in shown and "1 others" not in shown.split("own ms")[0]


def test_the_time_by_cause_adds_up_to_the_time_of_all_operations(traced, tmp_path, capsys):
    trace = read_trace(*find_traces(traced))
    names = [row.op for row in trace.devices[0].by_op()]
    folder = find_traces(traced)[0].parents[3]
    (folder / CAUSES).write_text(json.dumps({names[0]: "products, forward"}))
    try:
        profile.main([str(traced), f"--json={tmp_path / 'rows.jsonl'}"])
    finally:
        (folder / CAUSES).unlink()
    [row] = map(json.loads, (tmp_path / "rows.jsonl").read_text().splitlines())
    total_s = sum(op.own_s for op in trace.devices[0].ops)
    assert sum(row["by_cause_s"].values()) == pytest.approx(total_s)
    assert set(row["by_cause_s"]) == {"products, forward", profile.OTHER_PROGRAM}
    assert row["idle_s"] == pytest.approx(row["span_s"] - row["busy_s"])
    assert "products, forward" in capsys.readouterr().out


def test_kernels_in_a_cuda_graph_have_the_causes_of_their_instructions():
    causes = {"loop_add_fusion.14": "element-wise", "custom-call.3": "attention, forward"}
    names = (
        "loop_add_fusion_14",
        "custom-call.3",
        "nvjet_hsh_128x256",
        "cudnn_sdpa_sm90",
        "MemcpyD2D",
        "add_norm_backward__1",
    )
    ops = tuple(TracedOp(name, "m", i, i + 1, 2.0**i) for i, name in enumerate(names))
    assert profile.time_by_cause(Device("gpu", ops), causes) == {
        "element-wise and reductions, backward": 32.0,
        profile.OTHER_PROGRAM: 16.0,
        "attention": 8.0,
        "products": 4.0,
        "attention, forward": 2.0,
        "element-wise": 1.0,
    }


def test_an_error_names_a_folder_without_a_trace(tmp_path):
    with pytest.raises(SystemExit, match="DIR must contain a trace"):
        profile.main([str(tmp_path)])


def test_own_time_excludes_nested_operations():
    assert own_times([(0, 10), (1, 4), (2, 3), (5, 6), (10, 12)]) == [6, 2, 1, 1, 2]


def test_overlapping_operations_are_counted_once_and_pauses_are_not_idle_time():
    ops = [TracedOp("a", "m", 0.0, 2.0, 2.0), TracedOp("b", "m", 1.0, 3.0, 2.0)]
    ops += [TracedOp("eval", "m", 5.0, 6.0, 1.0), TracedOp("all-reduce.1", "m", 9.0, 10.0, 1.0)]
    device = Device("d", tuple(ops)).without([(4.0, 8.0)])
    assert device.span_s == 6.0 and device.busy_s == 4.0 and device.collective_s == 1.0


def test_only_the_streams_of_a_gpu_are_read_not_the_lines_that_repeat_them():
    event = lambda name, start, **stats: types.SimpleNamespace(
        name=name, start_ns=start, duration_ns=10, stats=stats.items()
    )
    line = lambda name, *events: types.SimpleNamespace(name=name, events=events)
    kernel = event("void gemm", 0, hlo_op="dot.1", hlo_module="jit_step")
    graph = event("fusion_7", 40, hlo_op="command_buffer_1", hlo_module="jit_step")
    operations = kernel, event("MemcpyD2D", 20), graph
    lines = [line("Stream #1(Compute)", *operations), line("XLA Ops", kernel)]
    plane = types.SimpleNamespace(name="/device:GPU:0", lines=lines)
    device = profile_trace._read_gpu(plane)
    got = [(op.name, op.module) for op in device.ops]
    assert got == [("dot.1", "jit_step"), ("MemcpyD2D", ""), ("fusion_7", "jit_step")]


@pytest.mark.parametrize(
    "resume_step, last, steps, traced",
    [(0, 100, 10, (6, 15)), (0, 8, 5, (4, 8)), (20, 22, 9, (21, 22))],
)
def test_the_traced_steps_follow_the_warm_up_if_the_run_is_long_enough(
    tmp_path, resume_step, last, steps, traced
):
    tracer, switches = Tracer(tmp_path, resume_step, last, steps), []
    for step in range(resume_step + 1, last + 2):
        if tracer.switches_before(step):
            switches.append(step)
            tracer.is_on = not tracer.is_on
    assert switches == [traced[0], traced[1] + 1]
