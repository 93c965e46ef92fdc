"""What the probe reads from the hosts' answers and from the log of its collectives."""

import json
import re
import sys

import pytest

from launch import probe
from launch.probe import header_share, read_rows

ROW = {
    "collective": "all_reduce",
    "bytes": 4096,
    "processes": 4,
    "devices": 4,
    "seconds": 0.002,
    "spread_s": [0.001, 0.003],
    "algbw_bytes_per_s": 2.0e6,
    "busbw_bytes_per_s": 3.0e6,
    "wire_sent_bytes": 6200.5,
    "ideal_sent_bytes": 6144.0,
    "interface": "eth0",
}


@pytest.mark.parametrize("prefix", ["", "[0] ", "[12] "])
def test_a_measured_collective_is_found_whether_or_not_its_rank_is_printed_before_it(prefix):
    log = f"[1] other\n{prefix}{json.dumps(ROW)}\nthe program ended\n"
    assert read_rows(log) == [ROW]


@pytest.mark.parametrize(
    "change",
    [{"seconds": "x"}, {"algbw_bytes_per_s": None}, {"collective": "x\ny"}, {"bytes": 10**400}],
)
def test_a_log_line_with_an_invalid_figure_is_not_read_as_a_measurement(change):
    assert read_rows(f'{json.dumps(ROW | change)}\n{{"collective": [\n') == []


@pytest.mark.parametrize(
    ("code", "rows", "prefix"), [(0, 0, ""), (0, 1, "[0] "), (0, 2, "[0] "), (3, 2, "")]
)
def test_collectives_without_a_measurement_are_an_error(tmp_path, monkeypatch, code, rows, prefix):
    log, inventory = tmp_path / "log", tmp_path / "hosts.toml"
    log.write_text(rows * f"{prefix}{json.dumps(ROW)}\n")
    inventory.write_text('ranks = "gpu"\n[[hosts]]\nname = "a"\naddress = "10.0.0.1"\ngpus = 2\n')

    class Done:
        id, hosts = "1126-a", ("a",)

        def log(self, host):
            return log

    monkeypatch.setattr(probe.run, "start", lambda args, flags: ([Done()], code))
    argv = [f"--hosts={inventory}", "--cases=all_reduce:4096,all_gather:4096"]
    if rows == 2 and not code:
        assert probe.measure_collectives(probe.parse(argv)) == [ROW, ROW]
        return
    reason = f"ended with {code}" if code else f"each of 2 collectives; it has {rows}"
    with pytest.raises(probe.HostError, match=rf"{reason}\.") as error:
        probe.measure_collectives(probe.parse(argv))
    # Not the file, whose control characters a terminal would obey.
    assert "`python -m launch.run logs 1126-a`" in str(error.value) and str(log) not in str(
        error.value
    )


@pytest.mark.parametrize("out", ["no/network.json", "."])
def test_a_file_that_cannot_be_written_is_refused_before_the_measurement(
    tmp_path, monkeypatch, capsys, out
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["probe", "--hosts=hosts.toml", f"--out={out}"])
    measured = []
    monkeypatch.setattr(probe, "measure_hosts", lambda args: measured.append(args) or {"tcp": []})
    assert probe.main() == 1 and not measured
    assert f"--out must be a file in a writable folder; got {out}" in capsys.readouterr().err


def test_a_measurement_is_printed_even_if_its_file_cannot_be_written(tmp_path, monkeypatch, capsys):
    def fill_disk(path, value):
        raise OSError(28, "No space left on device")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["probe", "--hosts=hosts.toml"])
    result = {"tcp": [], "collectives": [ROW]}
    monkeypatch.setattr(probe, "measure_hosts", lambda args: result)
    monkeypatch.setattr(probe, "write_json", fill_disk)
    assert probe.main() == 1
    printed = capsys.readouterr()
    assert re.search(r"all_reduce +4,096", printed.out) and "No space left" in printed.err


def test_the_share_of_headers_is_that_of_full_segments():
    assert header_share(1500) == pytest.approx(66 / 1448)
