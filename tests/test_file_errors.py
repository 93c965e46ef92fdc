import errno
import json
import os

import pytest
from small_disk import small_disk

from jaxtrain.data import encode
from jaxtrain.file_errors import (
    Appender,
    add_path_to_errors,
    describe_error,
    describe_storage_error,
    is_file_error,
    keep_first_error,
)
from jaxtrain.files import write_atomic
from jaxtrain.metrics.jsonl import MetricsFile, read_metrics
from jaxtrain.metrics.step_log import StepLog
from jaxtrain.reporting.run_logger import RunLogger
from jaxtrain.run_directory.lock import RunLock

METRICS = {"train/loss_nats": 2.5}


@pytest.fixture
def disk(tmp_path):
    with small_disk(tmp_path / "disk", megabytes=1) as disk:
        yield disk


def test_the_text_of_a_file_error_is_one_line_with_the_path_and_the_reason(tmp_path):
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(OSError) as error:
        (file / "x").mkdir()
    text = f"{file / 'x'}: Not a directory ({file} is a file, not a folder)"
    assert describe_error(error.value) == text and is_file_error(error.value)
    with pytest.raises(OSError) as error:
        open(tmp_path / "missing")
    assert describe_error(error.value) == f"{tmp_path / 'missing'}: No such file or directory"


def test_an_error_that_names_no_file_is_recognised_by_its_errno():
    assert is_file_error(OSError(errno.ENOSPC, "No space left on device"))
    assert not is_file_error(ConnectionResetError(errno.ECONNRESET, "reset"))
    assert not is_file_error(BrokenPipeError(errno.EPIPE, "Broken pipe"))
    assert not is_file_error(ValueError("text"))


def test_the_path_is_added_to_an_error_that_has_none():
    with (
        pytest.raises(OSError) as error,
        add_path_to_errors("/dev/full"),
        open("/dev/full", "wb", 0) as file,
    ):
        file.write(b"x")
    assert describe_error(error.value).startswith("/dev/full: No space left on device (")


def test_an_error_of_tensorstore_is_reduced_to_the_folder_and_the_reason(tmp_path):
    error = (
        'RESOURCE_EXHAUSTED: Error writing "w/0.0" in ... Failed to write 70388 bytes to file 9: '
        "No space left on device [os_error_code='28']"
    )
    text = describe_storage_error(ValueError(error), tmp_path)
    assert text.startswith(f"{tmp_path}: No space left on device (a disk of ")
    assert describe_storage_error(ValueError("a bug"), tmp_path) is None


def test_an_error_while_closing_is_raised_unless_there_was_an_earlier_one():
    full = OSError(errno.ENOSPC, "No space left on device")
    with pytest.raises(OSError), keep_first_error(None):
        raise full
    with keep_first_error(KeyboardInterrupt()):
        raise full


def test_on_a_full_disk_a_line_is_appended_completely_or_not_at_all(disk):
    path = disk.path / "lines"
    appender, line = Appender(path), b"x" * 1000 + b"\n"
    disk.fill(leave=1 << 14)
    with pytest.raises(OSError) as error:
        for _ in range(2_000):
            appender.write(line)
    appender.close()
    assert describe_error(error.value).startswith(f"{path}: {disk.reason}")
    written = path.read_bytes()
    assert written and written == line * (len(written) // len(line))


def test_metrics_cut_off_by_a_full_disk_can_be_read_and_resumed(disk):
    log = MetricsFile(disk.path)
    log.write(1, 0.0, METRICS)
    disk.fill(leave=1 << 13)
    with pytest.raises(OSError) as error:
        for step in range(2, 10_000):
            log.write(step, 0.0, METRICS)
    assert f"{disk.path}/" in describe_error(error.value) and disk.reason in describe_error(
        error.value
    )
    log.close()
    lines = (disk.path / "metrics.jsonl").read_text().splitlines()
    steps = [json.loads(line)["step"] for line in lines]
    assert steps == list(range(1, len(steps) + 1))
    disk.free()
    log = MetricsFile(disk.path, resume_step=1)
    log.write(2, 0.0, METRICS)
    log.close()
    assert [record["step"] for record in read_metrics(disk.path / "metrics.jsonl")] == [1, 2]


def test_the_error_of_a_step_log_on_a_full_disk_names_its_file(disk):
    log = StepLog(disk.path, 0)
    disk.fill()
    for step in range(1, 200):
        log.add(step, 0.1, 0.0)
    with pytest.raises(OSError) as error:
        log.flush()
    assert f"{disk.path / 'hosts' / '0.jsonl'}: {disk.reason}" in describe_error(error.value)
    log.close()


def test_a_summary_that_a_full_disk_refuses_is_named_once_and_the_old_one_stays(
    disk, caplog, capfd
):
    write_atomic(disk.path / "summary.json", "{}\n")
    with pytest.raises(OSError) as error, RunLogger(disk.path, 2, quiet=True) as report:
        report.write(1, METRICS)
        disk.fill()
        report.finish({"note": "x" * 100_000})
    assert describe_error(error.value).startswith(f"{disk.path / 'summary.json'}: {disk.reason}")
    assert (disk.path / "summary.json").read_text() == "{}\n"
    assert "Traceback" not in caplog.text + capfd.readouterr().err
    assert not list(disk.path.glob(".*.tmp"))


def test_encoding_to_a_full_disk_ends_in_one_line(disk, tmp_path, capfd):
    text = tmp_path / "text.txt"
    text.write_text("a line of text\n" * 20_000)
    disk.fill(leave=1 << 16)
    with pytest.raises(SystemExit) as ended:
        argv = [f"--input={text}", f"--out={disk.path / 'out'}", "--tokenizer=bytes", "--workers=1"]
        encode.main(argv)
    error = str(ended.value)
    assert error.startswith(f"error: {disk.path}/out/") and disk.reason in error
    assert "\n" not in error and capfd.readouterr().err.count("\n") <= 1  # the progress bar's


def test_an_output_folder_that_cannot_be_created_is_named_in_one_line(tmp_path):
    (tmp_path / "file").touch()
    text = tmp_path / "text.txt"
    text.write_text("some text\n" * 100)
    with pytest.raises(SystemExit) as ended:
        out = tmp_path / "file" / "out"
        encode.main([f"--input={text}", f"--out={out}", "--tokenizer=bytes", "--workers=1"])
    assert f"{tmp_path / 'file'} is a file, not a folder" in str(ended.value)


@pytest.mark.parametrize("where", ["file", "file/below", "/dev/null/x", "/proc/none"])
def test_a_run_directory_that_cannot_be_created_is_named_with_its_flag(tmp_path, where):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError) as error, RunLock(tmp_path / where):
        pass
    text = str(error.value)
    assert str(tmp_path / where) in text and text.endswith("Set --workdir.")


def test_a_run_directory_on_a_full_disk_is_refused_and_removed(disk):
    disk.fill()
    with pytest.raises(ValueError, match=disk.reason), RunLock(disk.path / "run"):
        pass
    assert not os.path.exists(disk.path / "run" / ".lock") or not disk.mounted
