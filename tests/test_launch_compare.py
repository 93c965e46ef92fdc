"""The normalised comparison: its invariants, its refusals, and a published pair of figures."""

import json
import random
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from types import SimpleNamespace

import pytest
from run_directories import A40, curve, series, write_run

from jaxtrain.config.train_config import REPORT_SECTIONS
from launch import compare
from launch.report.comparable import match_losses
from launch.report.ratios import SPEEDS, normalise, ratios, verdict_on
from launch.report.sides import NOT_WORK_SECTIONS, read_external, read_side, work_of
from launch.report.stats import bootstrap, noise, percentile, t_quantile

ROOT = Path(__file__).parent.parent
RECORD = ROOT / "docs" / "track3_record44.toml"
H100 = A40 | {"name": "h100", "kind": "NVIDIA H100 80GB HBM3", "hbm_bytes_per_s": 3352e9}
H100 |= {"peak_flops_per_s": {"bfloat16": 989.4e12}}


@pytest.fixture
def sides(tmp_path):
    write_run(tmp_path / "a", series(200))
    write_run(tmp_path / "b", series(200, 0.4, seed=1), curve(200, 0), chip=H100)
    return read_side(tmp_path / "a"), read_side(tmp_path / "b")


def run(*argv, capsys):
    code = compare.main([str(part) for part in argv])
    captured = capsys.readouterr()
    return code, captured.out + captured.err


def test_the_published_pair_gives_the_published_ratios(capsys):
    code, out = run("--external", RECORD, "--json", capsys=capsys)
    found = json.loads(out)
    assert code == 0 and found["b"]["times"] == 14
    a, b = read_external(RECORD)
    assert [round(1e3 * fmean(side.times_s[0]), 1) for side in (a, b)] == [1033.2, 326.6]
    rounded = {
        name: round(row["tokens_per_s"]["ratio"], 3)
        for name, row in found["rows"].items()
        if "missing" not in row
    }
    assert rounded == {"raw": 0.316, "peak_flops": 2.089, "hbm_bytes": 1.522}
    verdicts = {name: found["rows"][name]["verdict"]["verdict"] for name in rounded}
    assert verdicts == {"raw": "behind", "peak_flops": "ahead", "hbm_bytes": "ahead"}
    assert found["verdict"] == "ahead" and found["by"] == "peak_flops"


def test_one_rounded_step_time_per_side_gives_the_same_ratios_without_intervals():
    sides = [
        replace(side, times_s=[[seconds]])
        for side, seconds in zip(read_external(RECORD), (1.0331, 0.3266), strict=True)
    ]
    rows = normalise(*sides, ratios(*sides), 0.05)
    found = [rows[name]["tokens_per_s"] for name in ("raw", "peak_flops", "hbm_bytes")]
    assert [round(row["ratio"], 2) for row in found] == [0.32, 2.09, 1.52]
    assert [row["low"] for row in found] == [None] * 3
    assert compare.compare(*sides)["interval"].startswith("no intervals")


def test_a_side_against_itself_has_ratio_1_and_swapped_sides_have_the_inverse_ratio(sides):
    a, b = sides
    assert all(row["ratio"] == 1 for row in ratios(a, a).values())
    forth, back = (normalise(*pair, ratios(*pair), 0.05) for pair in ((a, b), (b, a)))
    for name in ("raw", "peak_flops", "hbm_bytes", "roofline"):
        for speed in SPEEDS:
            product = forth[name][speed]["ratio"] * back[name][speed]["ratio"]
            assert product == pytest.approx(1, rel=1e-12)


def test_a_device_with_twice_the_peaks_that_is_twice_as_fast_counts_as_equal(sides):
    a, _ = sides
    times = [[seconds / 2 for seconds in run] for run in a.times_s]
    able = replace(a, times_s=times, peak_flops_per_s=2 * a.peak_flops_per_s)
    able = replace(able, hbm_bytes_per_s=2 * a.hbm_bytes_per_s, roofline_s=a.roofline_s / 2)
    rows = normalise(able, a, ratios(able, a), 0.05)
    assert rows["raw"]["tokens_per_s"]["ratio"] == pytest.approx(2, rel=1e-12)
    for name in ("peak_flops", "hbm_bytes", "roofline"):
        assert rows[name]["tokens_per_s"]["ratio"] == pytest.approx(1, rel=1e-12)
        assert rows[name]["verdict"]["words"] == "equal within 5 %"


def test_ratios_do_not_depend_on_the_unit_of_time_or_the_number_of_devices(sides):
    a, b = sides
    scaled = [
        replace(s, times_s=[[1e3 * t for t in run] for run in s.times_s], devices=3 * s.devices)
        for s in sides
    ]
    for name, row in ratios(a, b).items():
        assert ratios(*scaled)[name] == pytest.approx(row, rel=1e-9)


def test_measured_ceilings_must_belong_to_the_sides_devices(tmp_path, sides, capsys):
    files = []
    for side, flops in zip(sides, (1.2e14, 6e14), strict=True):
        found = {"device": side.device_kind, "matmul_flops_per_s": flops, "copy_bytes_per_s": 5e11}
        files.append(tmp_path / f"{side.device}.json")
        files[-1].write_text(json.dumps(found))
    argv = (tmp_path / "a", tmp_path / "b", "--json", "--ceilings")
    code, out = run(*argv, *files, capsys=capsys)
    rows = json.loads(out)["rows"]
    raw = rows["raw"]["tokens_per_s"]["ratio"]
    assert code == 0
    assert rows["ceiling_flops"]["tokens_per_s"]["ratio"] == pytest.approx(raw * 5)
    assert rows["ceiling_bytes"]["tokens_per_s"]["ratio"] == pytest.approx(raw)
    code, out = run(*argv, *files[::-1], capsys=capsys)
    assert code == 1 and "Give the file of A first" in out
    code, out = run(*argv, tmp_path / "a" / "config.json", files[1], capsys=capsys)
    assert code == 1 and "--ceilings must be a file of" in out


def test_runs_on_an_unknown_chip_are_compared_only_without_normalisation(tmp_path, capsys):
    for name in "ab":
        write_run(tmp_path / name, series(200, seed=ord(name)), chip=None, device="cpu")
    code, out = run(tmp_path / "a", tmp_path / "b", capsys=capsys)
    assert code == 0 and "no peak is known for cpu" in out
    assert "verdict, raw, per device: equal within 5 %" in out


@pytest.mark.parametrize(
    "change, words",
    [
        ({"data": {"fingerprint": "0" * 32, "tokens": 1}}, "data fingerprint"),
        (
            {"config_hash": "ba9876543210"},
            None,
        ),  # only the seed differs
        ({"work": {"tokens_per_step": 1}}, "tokens a step: 524288 against 1"),
    ],
)
def test_different_work_is_refused_and_the_difference_is_named(tmp_path, capsys, change, words):
    write_run(tmp_path / "a", series(60))
    write_run(tmp_path / "b", series(60), **change)
    code, out = run(tmp_path / "a", tmp_path / "b", capsys=capsys)
    assert code == (1 if words else 0)
    assert words is None or ("not comparable" in out and words in out)


def test_a_differing_setting_is_named_and_can_be_allowed(tmp_path, capsys):
    write_run(tmp_path / "a", series(60))
    write_run(tmp_path / "b", series(60), log_every=2, config_hash="ba9876543210")
    argv = (tmp_path / "a", tmp_path / "b")
    code, out = run(*argv, capsys=capsys)
    assert code == 1 and "not comparable: config: log_every 1 against 2" in out
    assert run(*argv, "--may_differ=log_every", capsys=capsys)[0] == 0


def test_runs_may_differ_in_what_they_report():
    assert NOT_WORK_SECTIONS == REPORT_SECTIONS
    runs = [SimpleNamespace(settings={"notify": {"events": text}}) for text in ("failed", "done")]
    assert work_of(runs[0]) == work_of(runs[1]) == {}


def test_loss_curves_of_different_seeds_agree_and_a_worse_curve_does_not(tmp_path, capsys):
    refused = 0
    for seed in range(1, 9):
        write_run(tmp_path / f"seed{seed}", series(200), curve(200, seed))
    sides = [read_side(tmp_path / f"seed{seed}") for seed in range(1, 9)]
    for i, a in enumerate(sides):
        for b in sides[i + 1 :]:
            match = match_losses(a, b)
            refused += match.errors > match.limit
    assert refused == 0
    write_run(tmp_path / "worse", series(200), curve(200, 1, shift=0.05))
    code, out = run(tmp_path / "seed2", tmp_path / "worse", capsys=capsys)
    assert code == 1 and "not comparable: losses" in out


def test_the_spread_between_repetitions_decides_whether_a_gap_is_noise(tmp_path, capsys):
    """A gap of 0.03 is noise for runs that differ by 0.05, but not for runs that agree."""
    shifts = {"steady": (0.0, 0.001, -0.001), "wild": (0.0, 0.05, -0.05), "other": (0.03, 0.031)}
    for name, values in shifts.items():
        for i, shift in enumerate(values):
            losses = curve(200, 7, shift)
            write_run(tmp_path / name / str(i), series(200, seed=i), losses)
    argv = ("--resamples=100", tmp_path / "other")
    assert run(tmp_path / "wild", *argv, capsys=capsys)[0] == 0
    code, out = run(tmp_path / "steady", *argv, capsys=capsys)
    assert code == 1 and "not comparable: losses" in out
    write_run(tmp_path / "wild" / "third", series(200))
    config = tmp_path / "wild" / "third" / "config.json"
    config.write_text(config.read_text().replace('"batch": 512', '"batch": 256'))
    code, out = run(tmp_path / "wild", *argv, capsys=capsys)
    assert code == 1 and "must be repetitions of one" in out


@pytest.mark.parametrize("counts", [(1, 1), (1, 2), (2, 2), (3, 2), (4, 4)])
def test_any_number_of_runs_detects_a_large_gap_and_accepts_equal_losses(tmp_path, counts):
    """The noise is 0.03 nats a step, so 0.004 nats in a mean of 50 steps; the gap is 0.05."""
    for name, shift, seeds in (("a", 0.0, 0), ("same", 0.0, 10), ("worse", 0.05, 20)):
        for i in range(counts[name != "a"]):
            losses = curve(200, seeds + i, shift)
            write_run(tmp_path / name / str(i), series(200), losses)
    a, same, worse = (read_side(tmp_path / name) for name in ("a", "same", "worse"))
    assert match_losses(a, same).errors < match_losses(a, same).limit
    refused = match_losses(a, worse)
    assert refused.errors > refused.limit and (sum(counts) < 7 or "8 runs" in refused.noise)


def test_a_comparison_of_step_times_with_window_means_is_reported(tmp_path, capsys):
    write_run(tmp_path / "a", series(60), processes=2)
    write_run(tmp_path / "b", series(60), log_every=5, config_hash="ba9876543210")
    argv = (tmp_path / "a", tmp_path / "b", "--may_differ=log_every")
    code, out = run(*argv, capsys=capsys)
    assert code == 0 and "p50 and p95 differ in kind" in out


@pytest.mark.parametrize(
    "low, high, verdict",
    [
        (0.97, 1.04, "equal"),
        (1.06, 1.2, "ahead"),
        (0.7, 0.9, "behind"),
        (0.9, 1.2, "equal"),  # within the wider margin of 20 %
        (1.02, 1.08, "undecided"),
    ],
)
def test_a_verdict_depends_on_the_whole_interval(low, high, verdict):
    found = {"ratio": (low * high) ** 0.5, "low": low, "high": high}
    inverse = {"ratio": 1 / found["ratio"], "low": 1 / high, "high": 1 / low}
    other = {"ahead": "behind", "behind": "ahead"}.get(verdict, verdict)
    assert verdict_on(found, 0.05)["verdict"] == verdict
    assert verdict_on(inverse, 0.05)["verdict"] == other
    if (low, high) == (0.9, 1.2):
        assert verdict_on(found, 0.05)["margin"] == pytest.approx(0.2)


def test_the_block_bootstrap_covers_the_mean_of_autocorrelated_steps():
    """At least 85 of 100 intervals of 95 % contain the mean, with a lag-one correlation of 0.5."""
    covered = 0
    for seed in range(100):
        rng, value, values = random.Random(seed), 0.0, []
        for _ in range(400):
            value = 0.5 * value + rng.gauss(0, 1)
            values.append(10 + value)
        bounds = bootstrap(lambda sides: {"mean": fmean(sides[0][0])}, [[values]], 150)
        covered += bounds["mean"][0] <= 10 <= bounds["mean"][1]
    assert covered >= 85


def test_the_same_seed_gives_the_same_interval_and_another_seed_does_not(sides):
    assert ratios(*sides) == ratios(*sides) != ratios(*sides, seed=1)


def test_noise_percentiles_and_t_quantiles_have_known_values():
    rng = random.Random(0)
    values = [rng.gauss(0, 2) for _ in range(2_000)]
    straight = [0.3 * i + value for i, value in enumerate(values)]
    assert noise(straight) == pytest.approx(noise(values)) == pytest.approx(2, rel=0.1)
    assert percentile([4, 1, 3, 2], 0.5) == 2.5 and percentile([0, 10], 0.95) == 9.5
    tables = {(0.975, 1): 12.706, (0.975, 10): 2.228, (0.99, 4): 3.747, (0.975, 10_000): 1.960}
    for (share, freedom), expected in tables.items():
        assert t_quantile(share, freedom) == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize(
    "line, words",
    [
        ("", "must have name"),
        ("colour = 1", "has no key 'colour'"),
        ("devices = 8.5", "devices must be a positive integer; got 8.5"),
        ("devices = 0", "devices must be a positive integer; got 0"),
        ("tokens_per_step = 0", "tokens_per_step must be a positive integer"),
        ("tokens_per_step = true", "tokens_per_step must be a positive integer; got True"),
        ("name = ''", "name must be a text"),
        (
            "peak_flops_per_s = -1",
            "peak_flops_per_s must be a positive number up to 1e+100; got",
        ),
        (
            "hbm_bytes_per_s = inf",
            "hbm_bytes_per_s must be a positive number up to 1e+100",
        ),
        ("roofline_s = nan", "roofline_s must be a positive number up to 1e+100"),
        ("step_time_s = []", "step_time_s must be a list with an entry or more"),
        ("step_time_s = [1.0, nan]", "step_time_s must be positive numbers of seconds, up to"),
        ("step_time_s = ['1']", "step_time_s must be positive numbers of seconds, up to"),
        ("clock_s = [[1, 2.0]]", "clock_s must be two or more pairs"),
        (
            "clock_s = [[1, 2.0], [2, 1.0]]",
            "[step, seconds], both rising",
        ),
        ("loss_nats = [[[1, nan]]]", "loss_nats must be a list of pairs [step, finite loss]"),
        ("loss_nats = [1, 2]", "loss_nats must be a list of pairs"),
        (f"devices = {'9' * 400}", "devices must be a positive integer"),
        ("loss_nats = [[[1, 1e308]]]", "loss_nats must be a list of pairs"),
    ],
)
def test_an_error_in_a_file_of_published_figures_is_named(tmp_path, capsys, line, words):
    path = tmp_path / "figures.toml"
    path.write_text(f"[[side]]\n{line}\n")
    code, out = run("--external", path, capsys=capsys)
    assert code == 1 and words in out


def test_a_comparison_needs_two_sides(tmp_path, capsys):
    write_run(tmp_path / "a", series(60))
    code, out = run(tmp_path / "a", capsys=capsys)
    assert code == 1 and "two sides must be given; got 1" in out
    code, out = run(tmp_path / "a", tmp_path / "b", capsys=capsys)
    assert code == 1 and "DIR must be a run directory" in out
