import os
import pwd
import signal
import socket
import subprocess
import sys

import pytest

import runs
from jaxtrain.config.train_config import TrainConfig
from jaxtrain.distributed.cluster import World
from jaxtrain.distributed.runtime import (
    DETERMINISTIC_FLAGS,
    bind_address,
    find_compile_cache,
    start_runtime,
)


@pytest.mark.parametrize("world", [("", 2, 0), ("host:1", 2, 2), ("host:1", 2, -1)])
def test_a_process_without_coordinator_or_valid_index_is_refused(world):
    with pytest.raises(ValueError, match="Set --coordinator, --processes, --process"):
        start_runtime(TrainConfig(), World("flags", *world))


def test_a_process_with_fewer_devices_than_the_inventory_states_is_refused():
    start_runtime(TrainConfig(compile_cache=""), World(devices=8))
    with pytest.raises(ValueError, match="must have the 9 devices.*finds 8.*gpus in --hosts"):
        start_runtime(TrainConfig(compile_cache=""), World(devices=9))


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def test_the_coordinator_listens_on_the_given_address_only():
    port = free_port()
    program = (
        "from jaxtrain.distributed.cluster import World\n"
        "from jaxtrain.distributed.runtime import join_processes\n"
        f"join_processes(World('test', '127.0.0.1:{port}'))\nprint('joined', flush=True)\ninput()\n"
    )
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", program], cwd=runs.ROOT, **pipes) as process:
        assert "joined" in process.stdout.readline()
        socket.create_connection(("127.0.0.1", port), 5).close()
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.2", port), 5)
        process.kill()


@pytest.mark.parametrize(
    ("coordinator", "address"),
    [
        ("10.0.0.7:1234", "10.0.0.7:1234"),
        ("[fd00::7]:1234", "[fd00::7]:1234"),
        ("gpu03:1234", None),  # could be 127.0.1.1 on gpu03 itself
        ("localhost:1234", None),
    ],
)
def test_only_a_literal_ip_address_limits_where_the_coordinator_listens(coordinator, address):
    assert bind_address(coordinator) == address


RANK = """
import os, sys, time
import jax
from jaxtrain.distributed import runtime
from jaxtrain.config.train_config import TrainConfig
from jaxtrain.distributed.cluster import World

address, process = sys.argv[1:]
jax.config.update("jax_platforms", "cuda")  # pretends that there are GPUs; no device is used
runtime.start_runtime(TrainConfig(), World("test", address, 2, int(process), heartbeat_s=2))
print("cache:", jax.config.jax_compilation_cache_dir, flush=True)
if process == "0":
    time.sleep(60)  # like a collective that waits for a dead peer
os._exit(1)
"""


@pytest.mark.long
def test_on_gpus_all_processes_end_when_one_dies_and_none_uses_the_compile_cache():
    address, ranks = f"localhost:{free_port()}", []
    env = {k: v for k, v in os.environ.items() if k != "JAX_COMPILATION_CACHE_DIR"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "env": env}
    for process in "01":
        argv = [sys.executable, "-c", RANK, address, process]
        ranks.append(subprocess.Popen(argv, cwd=runs.ROOT, **pipes))
    outputs = [rank.communicate(timeout=45)[0] for rank in ranks]
    assert ranks[0].returncode == -signal.SIGABRT, outputs[0]
    assert all("cache: None" in output for output in outputs)


def test_the_deterministic_flag_of_xla_is_added_once(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_force_host_platform_device_count=8")
    for _ in range(2):
        start_runtime(TrainConfig(deterministic=True, compile_cache=""))
    assert os.environ["XLA_FLAGS"].split() == [
        "--xla_force_host_platform_device_count=8",
        DETERMINISTIC_FLAGS,
    ]


def test_deterministic_runs_keep_autotuning_and_use_a_flag_that_this_xla_has():
    assert "xla_gpu_deterministic_ops" not in DETERMINISTIC_FLAGS
    argv = [sys.executable, "-c", "import jax; jax.devices()"]
    env = os.environ | {"XLA_FLAGS": f"{DETERMINISTIC_FLAGS} --xla_gpu_no_such_flag=true"}
    done = subprocess.run(argv, env=env, capture_output=True, text=True, timeout=60, check=False)
    # XLA lists the flags that it does not know, and ends the process.
    assert "Unknown flag in XLA_FLAGS: --xla_gpu_no_such_flag=true" in done.stderr, done.stderr


def test_a_user_without_a_home_directory_has_no_compile_cache_and_is_warned(monkeypatch, caplog):
    monkeypatch.delenv("HOME")
    monkeypatch.setattr(pwd, "getpwuid", {}.__getitem__)  # raises KeyError, as for a bare user id
    assert find_compile_cache("~/.cache/jaxtrain/xla") is None
    assert "no compile cache" in caplog.text and "--compile_cache=~/.cache" in caplog.text


def test_a_compile_cache_that_cannot_be_created_is_a_warning(tmp_path, caplog):
    (tmp_path / "file").write_text("")
    assert find_compile_cache(str(tmp_path / "file" / "cache")) is None
    assert "no compile cache" in caplog.text
    assert (
        find_compile_cache(str(tmp_path / "cache")) == tmp_path / "cache"
        and find_compile_cache("") is None
    )
