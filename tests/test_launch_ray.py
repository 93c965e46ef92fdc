"""Runs the Ray driver on a cluster of two nodes, if ray is installed."""

import subprocess
import sys
from pathlib import Path

import pytest

import runs

ray = pytest.importorskip("ray", reason="ray is not installed: pip install ray")

from ray.cluster_utils import Cluster  # noqa: E402

ROOT = Path(__file__).parent.parent
EXACT = ["--config.model.dtype=float64", "--config.optim.ns_dtype=float32"]


def test_two_ray_nodes_have_the_losses_of_one_process(tmp_path, monkeypatch):
    text = runs.write_text(tmp_path)
    flags = ["--config.steps=3", "--config.sample.tokens=0", "--config.data.batch=4", *EXACT]
    runs.finish(runs.fork(tmp_path / "single", text, *flags))
    driver = ROOT / "launch" / "templates" / "ray_driver.py"
    argv, env = runs.command(tmp_path / "ray", text, *flags)
    flags = [*argv[3:], "--config.mesh.replica=-1", "--config.mesh.fsdp=1"]
    monkeypatch.setenv("XLA_FLAGS", env["XLA_FLAGS"])  # actors inherit their node's environment
    cluster = Cluster()
    try:
        for _ in range(2):
            cluster.add_node(num_cpus=1)
        env |= {"RAY_ADDRESS": cluster.address, "PYTHONPATH": str(ROOT)}
        subprocess.run(
            [sys.executable, driver, "--nodes=2", "--", *flags], cwd=ROOT, env=env, check=True
        )
    finally:
        cluster.shutdown()
    losses, single = (dict(runs.losses(tmp_path / name)) for name in ("ray", "single"))
    assert losses == pytest.approx(single, abs=1e-5) and list(losses) == [1, 2, 3]
