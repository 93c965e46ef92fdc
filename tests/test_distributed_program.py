import jax
import jax.numpy as jnp
import pytest

from jaxtrain.distributed.program import is_out_of_memory, is_runtime_error, run_main
from jaxtrain.errors import REFUSED


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("UNKNOWN: Gloo AllGather failed: Connection closed by peer [10.77.222.1]:20881", True),
        ("UNAVAILABLE: failed to connect to all addresses", True),
        ("data.batch must divide over 2 devices; got 3. Set --data.batch.", False),
    ],
)
def test_the_death_of_a_peer_is_a_runtime_error_and_not_bad_input(text, expected):
    assert is_runtime_error(ValueError(text)) == expected


def test_running_out_of_device_memory_names_the_flags_that_need_less(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["train"])

    def main():
        whole = jax.jit(lambda x: jnp.sin(jnp.broadcast_to(x, 2**45))[::-1])  # 128 TiB
        jax.block_until_ready(whole(1.0))

    with pytest.raises(SystemExit) as ended:
        run_main(main)
    assert ended.value.code == REFUSED
    message = capsys.readouterr().err
    assert "got RESOURCE_EXHAUSTED: Out of memory allocating 140737488355328 bytes" in message
    for way in ("--accumulation", "--model.remat=full", "jaxtrain.plan --fit"):
        assert way in message


def test_a_full_disk_is_not_reported_as_a_full_device():
    assert not is_out_of_memory(ValueError("RESOURCE_EXHAUSTED: No space left on device"))
