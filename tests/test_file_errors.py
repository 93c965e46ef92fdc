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


def test_an_error_of_the_system_is_one_line_with_the_path_and_the_reason(tmp_path):
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(OSError) as error:
        (file / "x").mkdir()
    text = f"{file / 'x'}: Not a directory ({file} is a file, not a folder)"
    assert describe_error(error.value) == text and is_file_error(error.value)
    with pytest.raises(OSError) as error:
        open(tmp_path / "missing")
    assert describe_error(error.value) == f"{tmp_path / 'missing'}: No such file or directory"


def test_an_error_that_names_no_file_is_of_files_by_its_number_alone():
    assert is_file_error(OSError(errno.ENOSPC, "No space left on device"))
    assert not is_file_error(ConnectionResetError(errno.ECONNRESET, "reset"))
    assert not is_file_error(BrokenPipeError(errno.EPIPE, "Broken pipe"))
    assert not is_file_error(ValueError("text"))


def test_a_block_adds_its_path_to_an_error_without_one():
    with (
        pytest.raises(OSError) as error,
        add_path_to_errors("/dev/full"),
        open("/dev/full", "wb", 0) as file,
    ):
        file.write(b"x")
    assert describe_error(error.value).startswith("/dev/full: No space left on device (")


def test_what_tensorstore_says_of_the_disk_becomes_the_folder_and_the_reason(tmp_path):
    said = (
        'RESOURCE_EXHAUSTED: Error writing "w/0.0" in ... Failed to write 70388 bytes to file 9: '
    )
    said += "No space left on device [os_error_code='28']"
    text = describe_storage_error(ValueError(said), tmp_path)
    assert text.startswith(f"{tmp_path}: No space left on device (a disk of ")
    assert describe_storage_error(ValueError("a bug"), tmp_path) is None


def test_closing_hides_no_earlier_error_and_passes_its_own_where_there_is_none():
    full = OSError(errno.ENOSPC, "No space left on device")
    with pytest.raises(OSError), keep_first_error(None):
        raise full
    with keep_first_error(KeyboardInterrupt()):
        raise full


def test_on_a_full_disk_a_line_is_appended_whole_or_not_at_all(disk):
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


def test_metrics_that_a_full_disk_has_cut_can_be_read_and_resumed(disk):
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


def test_a_step_log_on_a_full_disk_names_its_file_and_closes(disk):
    log = StepLog(disk.path, 0)
    disk.fill()
    for step in range(1, 200):
        log.add(step, 0.1, 0.0)
    with pytest.raises(OSError) as error:
        log.flush()
    assert f"{disk.path / 'hosts' / '0.jsonl'}: {disk.reason}" in describe_error(error.value)
    log.close()


def test_a_summary_on_a_full_disk_is_named_once_and_the_old_one_stays(disk, caplog, capfd):
    write_atomic(disk.path / "summary.json", "{}\n")
    with pytest.raises(OSError) as error, RunLogger(disk.path, 2, quiet=True) as report:
        report.write(1, METRICS)
        disk.fill()
        report.finish({"note": "x" * 100_000})
    assert describe_error(error.value).startswith(f"{disk.path / 'summary.json'}: {disk.reason}")
    assert (disk.path / "summary.json").read_text() == "{}\n"
    assert "Traceback" not in caplog.text + capfd.readouterr().err
    assert not list(disk.path.glob(".*.tmp"))


def test_encoding_onto_a_full_disk_ends_in_one_line(disk, tmp_path, capfd):
    text = tmp_path / "text.txt"
    text.write_text("a line of text\n" * 20_000)
    disk.fill(leave=1 << 16)
    with pytest.raises(SystemExit) as ended:
        argv = [f"--input={text}", f"--out={disk.path / 'out'}", "--tokenizer=bytes", "--workers=1"]
        encode.main(argv)
    said = str(ended.value)
    assert said.startswith(f"error: {disk.path}/out/") and disk.reason in said
    assert "\n" not in said and capfd.readouterr().err.count("\n") <= 1  # a bar's last line


def test_an_output_folder_that_cannot_be_made_is_named_in_one_line(tmp_path):
    (tmp_path / "file").touch()
    text = tmp_path / "text.txt"
    text.write_text("some text\n" * 100)
    with pytest.raises(SystemExit) as ended:
        out = tmp_path / "file" / "out"
        encode.main([f"--input={text}", f"--out={out}", "--tokenizer=bytes", "--workers=1"])
    assert f"{tmp_path / 'file'} is a file, not a folder" in str(ended.value)


@pytest.mark.parametrize("where", ["file", "file/below", "/dev/null/x", "/proc/none"])
def test_a_run_directory_that_cannot_be_made_is_named_with_its_flag(tmp_path, where):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError) as error, RunLock(tmp_path / where):
        pass
    said = str(error.value)
    assert str(tmp_path / where) in said and said.endswith("Set --workdir.")


def test_a_run_directory_on_a_full_disk_is_refused_and_not_left_behind(disk):
    disk.fill()
    with pytest.raises(ValueError, match=disk.reason), RunLock(disk.path / "run"):
        pass
    assert not os.path.exists(disk.path / "run" / ".lock") or not disk.mounted
