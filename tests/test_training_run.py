import json

import jax
import jax.numpy as jnp
import pytest

from jaxtrain.distributed.program import is_out_of_memory, is_runtime_error, run_main
from jaxtrain.errors import REFUSED
from jaxtrain.run_directory.contents import load_train_config, read_config_json


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("UNKNOWN: Gloo AllGather failed: Connection closed by peer [10.77.222.1]:20881", True),
        ("UNAVAILABLE: failed to connect to all addresses", True),
        ("data.batch must divide over 2 devices; got 3. Set --data.batch.", False),
    ],
)
def test_the_death_of_a_peer_is_not_taken_for_bad_input(text, expected):
    assert is_runtime_error(ValueError(text)) == expected


def test_too_little_device_memory_ends_in_the_flags_that_take_less(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["train"])

    def main():
        whole = jax.jit(lambda x: jnp.sin(jnp.broadcast_to(x, 2**45))[::-1])  # 128 TiB
        jax.block_until_ready(whole(1.0))

    with pytest.raises(SystemExit) as ended:
        run_main(main)
    assert ended.value.code == REFUSED
    said = capsys.readouterr().err
    assert "got RESOURCE_EXHAUSTED: Out of memory allocating 140737488355328 bytes" in said
    for way in ("--accumulation", "--model.remat=full", "jaxtrain.plan --fit"):
        assert way in said


def test_a_full_disk_is_not_taken_for_a_full_device():
    assert not is_out_of_memory(ValueError("RESOURCE_EXHAUSTED: No space left on device"))


def test_a_bad_value_in_a_stored_config_names_the_file_and_no_flag(tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"config": {"steps": "a"}, "data": {}}))
    with pytest.raises(ValueError) as error:
        load_train_config(tmp_path)
    assert str(error.value) == (
        f"{path} (edit it, no flag does): steps must be of type int; got 'a'."
    )


def test_an_empty_run_folder_is_not_the_current_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"config": {}, "data": {}}))
    with pytest.raises(ValueError, match="--run must name a folder; got ''."):
        read_config_json("")
