import json
import math
import os
import signal
import subprocess
import sys
import time

import jax.numpy as jnp
import numpy as np
import pytest

from jaxtrain import files
from jaxtrain.files import atomic_path, strict_json, write_atomic

REWRITE_FOREVER = """
import runpy, sys  # starts faster than importing the package
write_atomic = runpy.run_path(sys.argv[2])["write_atomic"]
contents = [bytes([65 + i]) * 300_000 for i in range(8)]
print("ready", flush=True)
while True:
    for content in contents:
        write_atomic(sys.argv[1], content)
"""


def test_a_writer_killed_at_any_time_leaves_one_complete_version(tmp_path):
    path = tmp_path / "file"
    write_atomic(path, b"A" * 300_000)
    delays = np.random.default_rng(0).uniform(0, 0.05, 12)
    for delay_s in delays:
        command = [sys.executable, "-c", REWRITE_FOREVER, str(path), files.__file__]
        with subprocess.Popen(command, stdout=subprocess.PIPE) as writer:
            assert writer.stdout.readline() == b"ready\n"
            time.sleep(delay_s)
            writer.send_signal(signal.SIGKILL)
        content = path.read_bytes()
        assert len(content) == 300_000 and len(set(content)) == 1


def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path):
    write_atomic(tmp_path / "file", "old")
    with pytest.raises(TypeError):
        write_atomic(tmp_path / "file", 7)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").read_text() == "old"


def test_a_folder_appears_with_all_its_files_or_not_at_all(tmp_path):
    with pytest.raises(ZeroDivisionError), atomic_path(tmp_path / "new") as hidden:
        hidden.mkdir()
        (hidden / "part").write_text("half")
        1 / 0  # noqa: B018
    assert not list(tmp_path.iterdir())
    with atomic_path(tmp_path / "new") as hidden:
        hidden.mkdir()
        (hidden / "part").write_text("whole")
        assert not (tmp_path / "new").exists()
    assert (tmp_path / "new" / "part").read_text() == "whole"
    assert [path.name for path in tmp_path.iterdir()] == ["new"]


def test_an_atomically_written_file_has_the_same_permissions_as_any_other(tmp_path):
    write_atomic(tmp_path / "atomic", "é")
    (tmp_path / "opened").write_text("é", encoding="utf-8")
    modes = {os.stat(tmp_path / name).st_mode for name in ("atomic", "opened")}
    assert len(modes) == 1
    assert (tmp_path / "atomic").read_bytes() == "é".encode()


def test_floats_survive_json_bit_for_bit():
    bits = np.random.default_rng(0).integers(0, 2**64, 10_000, dtype=np.uint64)
    numbers = bits.view(np.float64)
    back = [float(x) for x in json.loads(strict_json(numbers.tolist()))]
    finite = np.isfinite(numbers)
    assert np.array_equal(np.array(back)[finite].view(np.uint64), bits[finite])


def test_nan_and_infinity_become_strings_that_float_reads():
    refuse = {"parse_constant": lambda text: pytest.fail(f"{text} is not JSON")}
    back = json.loads(strict_json([math.nan, math.inf, -math.inf]), **refuse)
    assert math.isnan(float(back[0])) and [float(x) for x in back[1:]] == [math.inf, -math.inf]


@pytest.mark.parametrize("scalar", [np.float32(0.1), np.float64(0.1), jnp.float32(0.1)])
def test_scalars_of_arrays_are_written_exactly(scalar):
    assert json.loads(strict_json({"x": scalar}))["x"] == float(scalar)


def test_a_value_without_a_json_form_is_refused():
    with pytest.raises(TypeError):
        strict_json({"x": np.zeros(3)})
