"""Two processes of one loop, of which one really becomes slow: its loader, then its processor."""

import json
import os
import textwrap
import time

import pytest
import xla_flags

import runs
from jaxtrain.metrics.stragglers import WINDOW
from launch.host.ranks import RankProcess
from launch.operate import _describe

STEPS, SLOW_LOADER, SLOW_PROCESSOR_FROM = 64, range(6, 22), 26  # steps

# A loop over a small step with a collective, once without probes and once with one after each step.
PROGRAM = """
    import json, sys, time, zlib
    import jax, jax.numpy as jnp
    from jax.sharding import NamedSharding, PartitionSpec as P
    from configs import debug
    from jaxtrain.config.train_config import freeze
    from jaxtrain.distributed.broadcast import gather_texts
    from jaxtrain.distributed.cluster import World
    from jaxtrain.distributed.preemption import StopListener
    from jaxtrain.distributed.runtime import exit_together, start_runtime
    from jaxtrain.metrics import rank_watch
    from jaxtrain.metrics.collector import Collector
    from jaxtrain.metrics.mfu import StepWork
    from jaxtrain.metrics.step_log import StepLog
    from jaxtrain.reporting.run_logger import RunLogger
    from jaxtrain.training.loop import Loop
    from jaxtrain.training.programs import Program, Programs
    from jaxtrain.training.run import build_run
    from jaxtrain.training.step import TrainState

    address, process, steps, slow_from, slow_to, *folders = sys.argv[1:]
    config = debug.get_config()
    config.update({"steps": int(steps), "log_every": 1000, "save_every": 1000, "compile_cache": ""})
    start_runtime(freeze(config), World("flags", address, 2, int(process), None, 2))
    run = build_run(freeze(config))
    rank_watch.PROGRAM["cpu"] = (384, 1, 1 << 18, 1)  # a few milliseconds

    class Batches:
        step = 0

        def __next__(self):
            self.step += 1
            if process == "1" and int(slow_from) <= self.step < int(slow_to):
                time.sleep(0.2)
            return {}

        def source_metrics(self, batches):
            return {}

    @jax.jit
    def move(w):
        return w - 0.01 * jnp.sin(w @ w.T / w.size) @ w, jnp.int32(0)

    def step(state, batch, rates):
        w, bad_steps = move(state.params)
        return state._replace(step=state.step + 1, params=w), {"train/bad_steps": bad_steps}

    for folder, every in zip(folders, (0, 1)):
        config.workdir = folder
        config.measure.update(straggler_every=every, straggler_cost=1e3)
        cfg = freeze(config)
        split = NamedSharding(run.mesh, P("fsdp"))
        w = jax.jit(lambda: jnp.cos(jnp.arange(64.0 * 64)).reshape(64, 64), out_shardings=split)()
        state = TrainState(0, w, (), 0, 0)
        work = StepWork(256, 4, 1.0, 1.0, 1.0, None, None, (), 2, "float32")
        with (
            RunLogger(folder, cfg.steps, active=process == "0") as logger,
            StopListener(True) as stop,
            Collector(work, None, StepLog(folder, int(process)), None, lambda: False) as collector,
        ):
            collector.watch_ranks(cfg.measure, gather_texts("h" + process), 0)
            program = Program(run, step, None, {}, work)
            programs = Programs(cfg.data.sizes, {cfg.data.batch: program})
            parts = state, programs, Batches(), None, None, logger, collector
            loop = Loop(run._replace(cfg=cfg), *parts)
            loop.saved_step = cfg.steps  # nothing is saved
            collector.start({})
            loop.run_to_end(stop)
            stragglers = collector.total().get("stragglers", [])
        weights = jax.device_get(loop.state.params.addressable_shards[0].data).tobytes()
        print(f"weights {zlib.crc32(weights)}\\nfound {json.dumps(stragglers)}", flush=True)
    exit_together(0)
"""


@pytest.mark.long
def test_a_slow_loader_and_a_slow_processor_are_named_and_no_result_changes(tmp_path):
    folders, beats = (
        (tmp_path / "plain", tmp_path / "probed"),
        [tmp_path / f"beat{i}" for i in "01"],
    )
    address = f"127.0.0.1:{runs.free_port()}"
    values = [STEPS, SLOW_LOADER.start, SLOW_LOADER.stop, *folders]
    env = os.environ | {"XLA_FLAGS": xla_flags.flags(1)}
    pair = [
        runs.fork_program(
            textwrap.dedent(PROGRAM),
            address,
            i,
            *values,
            env=env | {"JAXTRAIN_BEAT": str(beats[i])},
        )
        for i in range(2)
    ]
    ranks = [RankProcess(i, pair[i], beats[i], b"") for i in range(2)]
    report = lambda i: ranks[i].report(time.monotonic())

    def is_slow_in(kind):
        return kind in report(1)["slow"]

    while pair[0].poll() is None and not (report(1)["slow"] or (report(1)["step"] or 0) > STEPS):
        time.sleep(0.01)
    shown = [_describe({"report": {"ranks": [report(i)]}}) for i in range(2)]
    while pair[0].poll() is None and (
        is_slow_in("data") or report(1)["step"] < SLOW_PROCESSOR_FROM
    ):
        time.sleep(0.01)
    ended = lambda: pair[1].poll() is not None
    runs.slow_down(pair[1].pid, lambda: ended() or is_slow_in("compute"), 0.001)
    outs = [runs.finish(process) for process in pair]

    assert "rank 1" in shown[1] and "(STRAGGLER in data; compute" in shown[1]
    assert "STRAGGLER" not in shown[0] and "data 1.00x" in shown[0]
    lines = [line for line in outs[0].splitlines() if line.startswith("straggler: rank 1 on h1:")]
    data, data_end, compute = lines[:3]
    assert "waits for batches" in data and "data is like the other ranks' again" in data_end
    assert "a fixed computation takes" in compute
    weights = [[line for line in out.splitlines() if line.startswith("weights")] for out in outs]
    assert all(len(lines) == 2 and len(set(lines)) == 1 for lines in weights)
    found = json.loads(outs[0].split("\nfound ")[-1].splitlines()[0])
    assert [(entry["host"], entry["kind"]) for entry in found] == [
        ("h1", "data"),
        ("h1", "compute"),
    ]
    assert SLOW_LOADER.start < found[0]["first_step"] <= SLOW_LOADER.start + WINDOW
    assert found[0]["last_step"] < found[1]["first_step"]
