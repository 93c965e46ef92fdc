"""Baselines: passes, breaches and refusals of a check; and prices computed from them."""

import json
import re
from pathlib import Path

import pytest
from run_directories import A40, curve, series, write_run

from launch import slo
from launch.report.baseline import NOT_ENFORCED, check, record
from launch.report.price import price, read_span
from launch.report.run_folder import read_run
from launch.report.slo_figures import FIGURES

ROOT = Path(__file__).parent.parent
H100 = A40 | {"name": "h100", "kind": "NVIDIA H100 80GB HBM3"}


def slowed(times, factor):
    return [factor * seconds for seconds in times]


def run(*argv, capsys):
    code = slo.main([str(part) for part in argv])
    captured = capsys.readouterr()
    return code, captured.out + captured.err


def record_one(tmp_path, name, out, capsys):
    return run("record", tmp_path / name, "--provisional", f"--out={out}", capsys=capsys)


@pytest.fixture
def recorded(tmp_path, capsys):
    write_run(tmp_path / "good", series(200))
    code, out = run(
        "record", tmp_path / "good", "--provisional", f"--out={tmp_path}/base.json", capsys=capsys
    )
    assert code == 0 and "spread of 10 blocks of the run" in out
    return tmp_path / "base.json"


def test_the_recorded_run_passes_and_a_slower_run_breaches_step_p50(tmp_path, recorded, capsys):
    code, out = run("check", tmp_path / "good", f"--against={recorded}", capsys=capsys)
    assert code == 0 and "all bounds are met" in out
    write_run(tmp_path / "slow", slowed(series(200), 1.2))
    code, out = run("check", tmp_path / "slow", f"--against={recorded}", capsys=capsys)
    broken = out.splitlines()[-1]
    assert code == 1 and broken.startswith("BREACH: ") and "step p50" in broken
    assert "HBM headroom" not in broken and "goodput" not in broken


def test_a_faster_run_passes(tmp_path, recorded, capsys):
    write_run(tmp_path / "fast", slowed(series(200, seed=1), 0.5))
    code, out = run("check", tmp_path / "fast", f"--against={recorded}", "--json", capsys=capsys)
    rows = {row["figure"]: row for row in json.loads(out)}
    assert code == 0
    for name in ("tokens_per_s", "step_p50_s", "step_p95_s", "effective_bytes_per_s"):
        assert rows[name]["margin"] > 0.4


def test_a_baseline_of_one_run_passes_20_similar_runs_and_none_that_is_20_percent_slower(tmp_path):
    baseline = record([read_run(write_run(tmp_path / "base", series(200)))], 0.99)
    broken = {1.0: 0, 1.2: 0}
    for factor in broken:
        for seed in range(1, 21):
            times = slowed(series(200, seed=seed), factor)
            run = read_run(write_run(tmp_path / f"{factor}_{seed}", times))
            states = {row["figure"]: row["state"] for row in check(baseline, run)}
            broken[factor] += states["step_p50_s"] == "BREACH"
    assert broken == {1.0: 0, 1.2: 20}


def bounds(folder, medians, factor=1.0):
    """Returns {figure: bound over value} for a baseline of runs with these median step times."""
    paths = [
        write_run(folder / str(i), slowed(series(100, median, seed=i), factor))
        for i, median in enumerate(medians)
    ]
    figures = record([read_run(path) for path in paths], 0.99)["figures"]
    return {
        name: entry["bound"] / entry["value"]
        for name, entry in figures.items()
        if entry["bound"] is not None
    }


def test_the_tolerance_depends_on_the_spread_of_the_runs_and_not_on_their_speed(
    tmp_path,
):
    wide = bounds(tmp_path / "wide", (1.0, 1.03, 0.97, 1.02))
    narrow = bounds(tmp_path / "narrow", (1.0, 1.003, 0.997, 1.002))
    assert wide["step_p50_s"] - 1 > 4 * (narrow["step_p50_s"] - 1) > 0
    assert wide["tokens_per_s"] < narrow["tokens_per_s"] < 1
    scaled = bounds(tmp_path / "scaled", (1.0, 1.03, 0.97, 1.02), 7.0)
    assert scaled == pytest.approx(wide, rel=1e-9)


def test_the_tolerance_of_two_runs_comes_from_blocks_of_their_steps(tmp_path):
    assert 1.03 < bounds(tmp_path, (1.0, 1.03))["step_p50_s"] < 1.2


def test_runs_that_differ_too_much_are_refused_as_a_baseline(tmp_path):
    make = lambda i, median: write_run(tmp_path / str(i), series(99, median), chip=None)
    wild = [read_run(make(i, median)) for i, median in enumerate((1.0, 1.0, 9.0))]
    for run in wild:
        del run.figures["perf/goodput"]  # it is the same in all
    with pytest.raises(ValueError, match="too loose to enforce"):
        record(wild, 0.99)


def test_identical_runs_give_bounds_at_the_floors(tmp_path):
    times = series(100)
    runs = [read_run(write_run(tmp_path / str(i), times)) for i in range(3)]
    baseline = record(runs, 0.99)
    enforced = {k: e for k, e in baseline["figures"].items() if e["bound"] is not None}
    assert len(enforced) == 5
    for name, entry in enforced.items():
        tolerance = (1 + FIGURES[name].floor) ** -FIGURES[name].sign
        assert entry["bound"] == pytest.approx(entry["value"] * tolerance)
        assert "raised to the floor" in entry["how"]
    for factor, expected in ((1.0, False), (1.005, False), (1.02, True)):
        again = read_run(write_run(tmp_path / f"{factor}", slowed(times, factor)))
        assert ("BREACH" in {row["state"] for row in check(baseline, again)}) == expected
    text = (tmp_path / "1.0" / "metrics.jsonl").read_text()
    peak = max(value for _, value in runs[0].points("perf/hbm_peak_bytes"))
    assert str(int(peak)) in text
    more = text.replace(str(int(peak)), str(int(peak) + 512))
    (tmp_path / "1.0" / "metrics.jsonl").write_text(more)
    again = read_run(tmp_path / "1.0")
    assert "BREACH" not in {row["state"] for row in check(baseline, again)}


def test_a_provisional_baseline_states_its_assumed_false_alarms_in_both_commands(tmp_path, capsys):
    write_run(tmp_path / "a", series(60))
    out = f"--out={tmp_path}/base.json"
    code, text = run("record", tmp_path / "a", out, capsys=capsys)
    assert code == 2 and "three RUNs or more, or --provisional" in text
    code, recorded = run("record", tmp_path / "a", "--provisional", out, capsys=capsys)
    assert code == 0 and "to report a slow-down 9 times of 10, a baseline needs: 5% " in recorded
    code, text = run("check", tmp_path / "a", f"--against={tmp_path}/base.json", capsys=capsys)
    assert code == 0 and "provisional: recorded from one run" in text
    stated = "if runs differ by 5% in speed (assumed), a run that is "
    alarms = [re.search("([0-9.]+) of 100 equal runs are reported", x) for x in (recorded, text)]
    assert stated in recorded and stated in text
    assert [10 < float(alarm[1]) < 60 for alarm in alarms] == [True, True]
    runs = [write_run(tmp_path / str(i), series(60, seed=i)) for i in range(3)]
    assert run("record", *runs, out, capsys=capsys)[0] == 0
    text = run("check", runs[0], f"--against={tmp_path}/base.json", capsys=capsys)[1]
    assert "provisional: recorded" not in text and "(assumed)" not in text


def test_a_baseline_of_an_earlier_version_is_checked_and_its_false_alarms_are_not_stated(
    tmp_path, recorded, capsys
):
    old = json.loads(recorded.read_text())
    old |= {"version": 1, "power": {"between": None, "false_alarms": 0.0, "least_caught": 0.03}}
    recorded.write_text(json.dumps(old))
    code, out = run("check", tmp_path / "good", f"--against={recorded}", capsys=capsys)
    assert code == 0 and "an earlier version recorded this baseline" in out
    assert "by mistake" not in out and out.endswith("all bounds are met\n")
    recorded.write_text(json.dumps(old | {"version": 3}))
    code, out = run("check", tmp_path / "good", f"--against={recorded}", capsys=capsys)
    assert code == 2 and "must have version 1 or 2" in out


def test_a_percentile_is_enforced_only_with_enough_steps_beyond_it(tmp_path):
    for steps, p95, p99 in (
        (100, NOT_ENFORCED, NOT_ENFORCED),
        (300, "ok", NOT_ENFORCED),
        (1200, "ok", "ok"),
    ):
        run = read_run(write_run(tmp_path / str(steps), series(steps)))
        rows = {row["figure"]: row for row in check(record([run], 0.95), run)}
        assert (rows["step_p95_s"]["state"], rows["step_p99_over_p50"]["state"]) == (p95, p99)
        assert rows["step_p50_s"]["state"] == "ok"


def test_bounds_that_a_short_run_cannot_be_judged_by_are_named_and_change_the_exit_status(
    tmp_path, capsys
):
    long = write_run(tmp_path / "long", series(1200))
    short = write_run(tmp_path / "short", series(100))
    slow = write_run(tmp_path / "slow", slowed(series(100), 1.5))
    out = f"{tmp_path}/base.json"
    assert run("record", long, "--provisional", f"--out={out}", capsys=capsys)[0] == 0
    code, text = run("check", short, f"--against={out}", capsys=capsys)
    *rows, power, last = text.splitlines()
    assert (code, last) == (3, "5 of 7 bounds are met; not judged: step p95, step p99/p50")
    [p95] = [row for row in rows if row.startswith("step p95")]
    assert "not judged: the run has too few steps (6 steps at or above p95" in p95
    assert "not enforced" not in text and "is reported 9 times of 10" in power
    code, text = run("check", slow, f"--against={out}", capsys=capsys)
    assert code == 1 and text.splitlines()[-1].startswith("BREACH: tokens/s, step p50")
    assert text.endswith("; not judged: step p95, step p99/p50\n")
    code, text = run("check", long, f"--against={out}", capsys=capsys)
    assert code == 0 and text.splitlines()[-1] == "all bounds are met"


@pytest.mark.parametrize(
    "change, name",
    [
        ({"config_hash": "ba9876543210"}, "config_hash"),
        ({"chip": H100}, "device"),
        ({"devices": 16}, "devices"),
        ({"hosts": ["a", "b"]}, "hosts"),
        ({"versions": {"jax": "0.11.2"}}, "versions"),
    ],
)
def test_a_run_of_different_work_is_not_checked(tmp_path, recorded, capsys, change, name):
    write_run(tmp_path / "other", series(200), **change)
    argv = ("check", tmp_path / "other", f"--against={recorded}")
    code, out = run(*argv, capsys=capsys)
    assert code == 2 and f"{name}: the baseline has" in out and "BREACH" not in out
    if name == "versions":
        assert run(*argv, "--across=versions", capsys=capsys)[0] == 0
    code, out = run(*argv, "--across=weather", capsys=capsys)
    assert code == 2 and "--across must name some of" in out


def test_several_processes_on_one_host_count_as_one_host(tmp_path, recorded, capsys):
    write_run(tmp_path / "other", series(200), hosts=4 * ["a"])
    code, out = run("check", tmp_path / "other", f"--against={recorded}", capsys=capsys)
    assert code == 0, out


def test_runs_on_different_chips_are_refused_as_one_baseline(tmp_path, capsys):
    write_run(tmp_path / "a", series(60))
    write_run(tmp_path / "b", series(60), chip=H100)
    argv = ("record", tmp_path / "a", tmp_path / "b", f"--out={tmp_path}/base.json")
    code, out = run(*argv, capsys=capsys)
    assert code == 2 and "a and b differ in device" in out
    assert not (tmp_path / "base.json").exists()


def test_a_run_too_short_to_show_a_spread_is_refused(tmp_path, capsys):
    write_run(tmp_path / "a", series(12))
    code, out = run(
        "record", tmp_path / "a", "--provisional", f"--out={tmp_path}/base.json", capsys=capsys
    )
    assert code == 2 and "must have 15 step times or more" in out


def test_an_error_for_a_baseline_file_that_cannot_be_written_names_out(tmp_path, capsys):
    write_run(tmp_path / "a", series(60))
    code, out = run(
        "record", tmp_path / "a", "--provisional", f"--out={tmp_path}/no/base.json", capsys=capsys
    )
    assert code == 2 and "--out must be writable" in out


def test_a_figure_that_the_run_did_not_measure_is_a_breach(tmp_path, recorded, capsys):
    folder = write_run(tmp_path / "blind", series(200))
    text = (folder / "metrics.jsonl").read_text().replace("comm/effective", "comm/other")
    (folder / "metrics.jsonl").write_text(text)
    code, out = run("check", folder, f"--against={recorded}", capsys=capsys)
    assert code == 1 and "BREACH: effective bandwidth" in out and "(not measured)" in out


def test_a_record_names_the_figures_that_not_every_run_measured(tmp_path, capsys):
    runs = [write_run(tmp_path / str(i), series(60, seed=i)) for i in range(3)]
    text = (runs[1] / "metrics.jsonl").read_text().replace("comm/effective", "comm/other")
    (runs[1] / "metrics.jsonl").write_text(text)
    printed = run("record", *runs, f"--out={tmp_path}/base.json", capsys=capsys)[1]
    assert "not recorded, as not every run measured it: effective bandwidth\n" in printed


def test_a_breach_of_a_figure_that_was_not_measured_can_be_sent(recorded, monkeypatch, tmp_path):
    run = read_run(write_run(tmp_path / "again", series(200)))
    sent = []
    monkeypatch.setattr(slo.Webhook, "send", lambda self, event, text: sent.append(text))
    row = {"figure": "effective_bytes_per_s", "bound": 1e9, "run": None}
    slo.alert_breach("http://127.0.0.1:9/", run, [row], "base.json")
    assert "effective bandwidth not measured, must be >= " in sent[0]


def test_a_baseline_on_an_unknown_chip_has_no_hbm_headroom(tmp_path):
    run = read_run(write_run(tmp_path / "cpu", series(60), curve(60), chip=None, device="cpu"))
    found = record([run], 0.99)
    assert "hbm_headroom" not in found["figures"] and found["key"]["device"] == "cpu"


PRICES = {"currency": "USD", "per_gpu_hour": {"a40": 0.40}}


@pytest.fixture(scope="module")
def baselines(tmp_path_factory):
    folder = tmp_path_factory.mktemp("prices")
    once, twice = (write_run(folder / str(f), slowed(series(60), f)) for f in (1.0, 0.5))
    return [record([read_run(path)], 0.99) for path in (once, twice)]


def test_twice_the_speed_halves_the_cost_and_doubles_the_capacity(baselines):
    once, twice = (price(baseline, PRICES) for baseline in baselines)
    assert once["cost_per_1e9_tokens"] == pytest.approx(2 * twice["cost_per_1e9_tokens"])
    assert 2 * once["tokens_per_month"] == pytest.approx(twice["tokens_per_month"])
    gpu_hours = 1e9 / once["tokens_per_s_per_gpu"] / 3_600
    assert once["cost_per_1e9_tokens"] == pytest.approx(0.40 * gpu_hours)


def test_the_gpus_for_a_deadline_suffice_and_one_fewer_does_not(baselines):
    for availability in (1.0, 0.7):
        found = price(baselines[0], PRICES, availability, 3e12, read_span("30d"))
        each = found["tokens_per_month_per_gpu"]
        assert (found["gpus"] - 1) * each < 3e12 <= found["gpus"] * each
    fewer = price(baselines[0], PRICES, 1.0, 7 * each, read_span("30d"))
    assert fewer["gpus"] < 7  # each GPU trains on more tokens at availability 1


def test_a_model_twice_as_large_costs_twice_as_much(baselines):
    own = baselines[0]["params"]
    small, large = (price(baselines[0], PRICES, params=n * own) for n in (1, 2))
    assert large["cost_per_1e9_tokens"] == pytest.approx(2 * small["cost_per_1e9_tokens"])
    assert any("same MFU" in line for line in large["assumptions"])


def test_prices_are_printed_with_their_assumptions(recorded, capsys):
    prices = f"--prices={ROOT / 'docs' / 'prices.toml'}"
    argv = ("price", f"--against={recorded}", prices, "--tokens=2.5e9", "--deadline=1h")
    code, out = run(*argv, "--availability=0.9", capsys=capsys)
    assert code == 0 and "USD per 1e9 tokens" in out and "GPUs" in out
    assert "assumptions:" in out and "90.0% of the time" in out


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--tokens=1e9"], "--tokens and --deadline must come together"),
        (["--tokens=1e9", "--deadline=soon"], "--deadline must be like"),
        (["--prices=nowhere.toml"], "--prices must name a file"),
        (["--against=nowhere.json"], "--against must be a file of"),
    ],
)
def test_wrong_flags_are_named(recorded, capsys, flags, words):
    prices = f"--prices={ROOT / 'docs' / 'prices.toml'}"
    code, out = run("price", f"--against={recorded}", prices, *flags, capsys=capsys)
    assert code == 2 and words in out


def test_a_chip_without_a_price_is_named(baselines):
    with pytest.raises(ValueError, match="--prices must have 'a40'"):
        price(baselines[0], {"currency": "USD", "per_gpu_hour": {"h100": 2.5}})
