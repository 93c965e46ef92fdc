import os
import socket
import subprocess
import sys

import pytest
import runs

from jaxtrain.config import TrainConfig
from jaxtrain.engine import World
from jaxtrain.runtime import DETERMINISTIC_FLAGS, start_runtime


@pytest.mark.parametrize("world", [("", 2, 0), ("host:1", 2, 2), ("host:1", 2, -1)])
def test_processes_without_a_place_in_the_world_are_refused(world):
    with pytest.raises(ValueError, match="Set --coordinator, --processes, --process"):
        start_runtime(TrainConfig(), World("flags", *world))


def test_a_process_that_lacks_a_promised_device_is_refused():
    start_runtime(TrainConfig(compile_cache=""), World(devices=8))
    with pytest.raises(ValueError, match="must have the 9 devices.*finds 8.*gpus in --hosts"):
        start_runtime(TrainConfig(compile_cache=""), World(devices=9))


def test_the_coordinator_listens_on_the_stated_address_alone():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    program = (
        "from jaxtrain.engine import World\nfrom jaxtrain.runtime import join\n"
        f"join(World('test', '127.0.0.1:{port}'))\nprint('joined', flush=True)\ninput()\n"
    )
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", program], cwd=runs.ROOT, **pipes) as process:
        assert "joined" in process.stdout.readline()
        socket.create_connection(("127.0.0.1", port), 5).close()
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.2", port), 5)
        process.kill()


def test_deterministic_sets_its_flags_once(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_force_host_platform_device_count=8")
    for _ in range(2):
        start_runtime(TrainConfig(deterministic=True, compile_cache=""))
    assert os.environ["XLA_FLAGS"].split() == [
        "--xla_force_host_platform_device_count=8",
        DETERMINISTIC_FLAGS,
    ]


def test_deterministic_runs_repeat_bitwise(tmp_path):
    text = runs.write_text(tmp_path)
    flags = ("--config.deterministic=true", "--config.steps=8", "--config.sample.tokens=0")
    cache = f"--config.compile_cache={tmp_path / 'cache'}"
    for name in ("a", "b"):
        runs.finish(runs.start(tmp_path / name, text, *flags, cache))
    assert len(runs.losses(tmp_path / "a")) == 8
    assert runs.losses(tmp_path / "a") == runs.losses(tmp_path / "b")
