"""The tables that suite first-day writes, from a folder as it leaves one on an H100."""

import json
import re
import shutil
from pathlib import Path

import pytest

from jaxtrain import bench
from jaxtrain.benchmarks import first_day_tables
from jaxtrain.benchmarks.first_day_figures import Figure, kernel_figures
from jaxtrain.benchmarks.first_day_stages import STAGES
from jaxtrain.benchmarks.first_day_tables import (
    HEADER,
    TableError,
    TableRow,
    make_row,
    parse_table,
    write_tables,
)
from pallas_kernels.targets import read_targets

ROOT = Path(__file__).parent.parent
CARD = "NVIDIA H100 80GB HBM3"
# Results of three slices, each at another commit; the record names only the last.
FIRST = {"date": "2026-11-25T16:00:00Z", "commit": "b121ec7d0000"}
SECOND = {"date": "2026-11-26T16:00:00Z", "commit": "2ec02d000000"}
THIRD = {"date": "2026-11-27T16:00:00Z", "commit": "3a57000f0000"}
MACHINE = {"device": CARD, "driver": "580.65", "cudnn": 90_800, "clocks": "1980 MHz"}
MACHINE |= {"versions": {"jax": "0.11.2", "torch": "2.11.0"}, **FIRST}
MACHINE |= {"matmul_flops_per_s": 7.13e14, "copy_bytes_per_s": 2.67e12}
STEP = FIRST | {
    "suite": "gpu",
    "case": "gpt_124m muon",
    "variant": "jaxtrain",
    "what": "step",
    "rows": 32,
}
STEP |= {"tokens_per_s": 512_345.0, "mfu": 0.453, "optimizer_share_at_524288": 0.021}
STEP |= {"idle_share": 0.03, "step_s": 0.128, "peak_bytes": 5 * 2**30, "first_step_s": 51.0}
STEP |= {"targets": {"mfu": "target >= 0.5 MISSED"}}
SLOWER = STEP | {"rows": 16, "half": True, "tokens_per_s": 400_000.0, "first_step_s": 9.0} | SECOND
RATIO = SECOND | {"suite": "gpu", "case": "gpt_124m muon", "what": "ratio", "value": 1.234}
RATIO |= {"targets": {"ratio": "target >= 1.1 met"}}
FAILED = {"suite": "gpu", "case": "gpt_350m muon", "variant": "jaxtrain", "what": "step"}
FAILED |= {"error": "exit status 1"}
TIMING = {"median_s": 2e-4, "low_s": 1e-4, "high_s": 3e-4, "fault": ""}
KERNELS = {
    "attention both ways 8x2048x16:16x128": {
        "contestants": {"triton": TIMING, "cudnn": TIMING | {"median_s": 3e-4}},
        "done": True,
        **FIRST,
    },
    "attention both ways 8x1024x12:12x64": {
        "contestants": {"tuned": TIMING, "cudnn": TIMING | {"median_s": 3e-4}},
        "tried": {"dq triton 64x64": 2e-4},
        "done": True,
        **SECOND,
    },
    "norm both ways 8192x768": {
        "contestants": {"triton": "wrong: off by 0.3", "xla": TIMING},
        "done": True,
        **FIRST,
    },
}
TUNED = dict(op="norm", chip="h100", dtype="bfloat16", shape=[768], jax="0.11.2")
TUNED |= dict(
    tiles=None, kernel_s=2e-4, other="cudnn", other_s=3e-4, date="2026-11-26", command="x"
)
HALF = {"rows": 3, "variant": "jaxtrain", "what": "step", "step_s": 1.0}  # fields are missing
PLAN = {"case": "gpt_124m muon, 32 rows, step", "measured_s": 0.128, "bound_s": 0.09}
PLAN |= {"calibrated_s": 0.127, "measured_bytes": 5 * 2**30, "planned_bytes": 4 * 2**30}
PROFILE = {"trace": "gpt_124m_muon_jaxtrain_step", "span_s": 0.4, "idle_s": 0.02}
PROFILE |= {"by_cause_s": {"products": 0.3, "attention": 0.1}}
PROFILE_OF_SLOWER = PROFILE | {"trace": f"{PROFILE['trace']}_half", "span_s": 0.6}

UNMEASURED = {
    "machine": ("ceilings",),
    "profile": ("time by cause",),
    "training": ("gpt_124m with muon", "gpt_350m with muon"),
}
UNMEASURED |= {"kernels": ("attention both ways", "norm"), "plan": ()}
TABLE = re.compile(
    r"(<!-- first day: (\w+) -->\n).*?(<!-- end of first day: \2 -->\n)", flags=re.DOTALL
)


@pytest.fixture
def day(tmp_path):
    """A folder of the suite."""
    folder = tmp_path / "day"
    (folder / "tuned").mkdir(parents=True)
    stages = {
        stage.name: {"state": "done", "calls": [THIRD | {"seconds": 1.0}]} for stage in STAGES
    }
    write(folder / "first_day.json", {"tiny": False, "card": CARD, "stages": stages})
    write(folder / "machine.json", MACHINE)
    write(folder / "training.jsonl", MACHINE, STEP, SLOWER, FAILED, RATIO)
    write(folder / "kernels.json", {"contests": KERNELS})
    write(
        folder / "plan.json",
        {"chip": "h100", "rows": [PLAN], "calibration": "products 70%"} | THIRD,
    )
    write(folder / "profile.jsonl", PROFILE, PROFILE_OF_SLOWER)
    write(folder / "tuned" / "h100.json", [TUNED])
    return folder


@pytest.fixture
def checkout(tmp_path):
    """The pages of this checkout, without its code; nothing in their tables is measured."""
    root = tmp_path / "checkout"

    def unmeasured(match):
        rows = [TableRow(what, "unmeasured", "-", "-") for what in UNMEASURED[match[2]]]
        return f"{match[1]}\n{HEADER}{''.join(map(str, rows))}\n{match[3]}"

    for name in ("README.md", "docs/results.md"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(TABLE.sub(unmeasured, (ROOT / name).read_text()))
    (root / "pallas_kernels").mkdir()
    return root


def write(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def outside(text):
    """Returns a page without its tables."""
    return TABLE.sub("", text)


def table(root, name, block):
    text = (root / name).read_text()
    inside = text.partition(first_day_tables.START.format(block))[2]
    rows = parse_table(inside.partition(first_day_tables.END.format(block))[0])
    return {row.what: row for row in rows}


def test_results_replace_what_was_unmeasured_with_card_versions_date_and_commit(day, checkout):
    before = {p: (checkout / p).read_text() for p in ("README.md", "docs/results.md")}
    write_tables(day, checkout)
    for page in before:
        rows = table(checkout, page, "training")
        row = rows["gpt_124m with muon"]
        for part in ("512,345 tokens/s", "MFU 45.3% (target >= 0.5 MISSED)", "1.23x compiled"):
            assert part in row.figure
        assert "first step after 51 s" in row.figure and "peak 5.0 GiB" in row.figure
        source = f"{CARD}, driver 580.65, cuDNN 9.8.0, jax 0.11.2, torch 2.11.0"
        assert row.source == f"{source}, 2026-11-25, b121ec7"  # as in its slice
        assert row.command.startswith("`jaxtrain bench --suite=first-day --stages=training")
        assert "unmeasured" in rows["gpt_350m with muon"].figure  # it failed
    kernels = table(checkout, "docs/results.md", "kernels")
    attention = kernels["attention both ways 8x2048x16:16x128"]
    assert attention.figure == "triton 200 us, 1.50x as fast as cudnn (300 us)"
    assert attention.source.endswith("2026-11-25, b121ec7")
    assert "--stages=kernels --out" in attention.command
    tuned = kernels["attention both ways 8x1024x12:12x64"]
    assert tuned.figure.startswith("tuned 200 us") and tuned.source.endswith("26, 2ec02d0")
    assert "--stages=kernels,tune --out" in tuned.command
    assert "attention both ways" not in kernels and "unmeasured" in kernels["norm"].figure
    plan = table(checkout, "docs/results.md", "plan")
    assert "bound 0.0900 s, calibrated 0.1270 s; peak 5.0 GiB, planned 4.0" in str(plan)
    assert all(row.source.endswith("2026-11-27, 3a57000") for row in plan.values())
    (ceilings,) = table(checkout, "docs/results.md", "machine").values()
    assert ceilings.figure == "product 713.00 TFLOP/s, copy 2670.0 GB/s; clocks as found: 1980 MHz"
    assert ceilings.source == f"{source}, 2026-11-25, b121ec7"
    (profile,) = table(checkout, "docs/results.md", "profile").values()
    assert profile.what == "time by cause of gpt_124m_muon_jaxtrain_step"
    assert profile.figure == "400.0 ms, 5.0% idle: products 75.0%; attention 25.0%"
    assert profile.source.endswith("2026-11-25, b121ec7")  # its step's, whichever slice read it
    assert json.loads((checkout / "pallas_kernels/tuned/h100.json").read_text()) == [TUNED]
    for page, text in before.items():  # nothing else of the pages has changed
        assert outside((checkout / page).read_text()) == outside(text) != text


def test_the_time_by_cause_is_that_of_the_step_in_the_table_of_the_training(day, checkout):
    write_tables(day, checkout)
    faster = SLOWER | {"tokens_per_s": 600_000.0}
    write(day / "training.jsonl", MACHINE, STEP, faster)
    write_tables(day, checkout)
    assert "600,000 tokens/s" in str(table(checkout, "docs/results.md", "training"))
    (profile,) = table(checkout, "docs/results.md", "profile").values()  # it has replaced the first
    assert profile.figure.startswith("600.0 ms") and profile.source.endswith("26, 2ec02d0")


def test_a_figure_of_an_earlier_version_has_no_commit():
    figure = Figure("norm", "1 us", {"date": "2026-11-25T16:00:00Z"}, "kernels")
    assert make_row(CARD, figure).source == f"{CARD}, 2026-11-25, commit unknown"


def test_writing_twice_changes_nothing_and_another_card_adds_rows(day, checkout):
    write_tables(day, checkout)
    once = (checkout / "docs/results.md").read_text()
    write_tables(day, checkout)
    assert (checkout / "docs/results.md").read_text() == once
    write(day / "machine.json", MACHINE | {"device": "NVIDIA A40"})
    write_tables(day, checkout)
    inside = (checkout / "README.md").read_text().partition("first day: training")[2]
    cards = [row.card for row in parse_table(inside) if row.what == "gpt_124m with muon"]
    assert cards == ["NVIDIA A40", CARD]


def test_rows_of_a_trial_or_of_interpreted_kernels_are_never_written(day, checkout):
    pages = [(checkout / name).read_text() for name in ("README.md", "docs/results.md")]
    write(day / "training.jsonl", *(row | {"tiny": True} for row in (MACHINE, STEP, RATIO)))
    write(day / "kernels.json", {"contests": KERNELS, "trial": "interpreted"})
    write(day / "machine.json", MACHINE | {"tiny": True})
    (day / "plan.json").unlink()
    write_tables(day, checkout)
    assert [(checkout / name).read_text() for name in ("README.md", "docs/results.md")] == pages
    record = json.loads((day / "first_day.json").read_text())
    write(day / "first_day.json", record | {"tiny": True})
    with pytest.raises(TableError, match="which is a trial's"):
        write_tables(day, checkout)
    with pytest.raises(SystemExit, match="which is a trial's"):
        bench.main(["--suite=first-day", f"--out={day}", "--write"])


def test_a_page_without_marks_and_a_damaged_tuned_table_are_errors(day, checkout):
    write(day / "tuned" / "h100.json", {"op": "attention"})
    with pytest.raises(ValueError, match="h100.json"):
        write_tables(day, checkout)
    shutil.rmtree(day / "tuned")
    (checkout / "README.md").write_text("# jaxtrain\n")
    before = (checkout / "docs/results.md").read_text()
    with pytest.raises(TableError, match="README.md: the page must have the marks <!-- first day"):
        write_tables(day, checkout)
    assert (checkout / "docs/results.md").read_text() == before


@pytest.mark.parametrize("name", ["first_day.json", "machine.json", "training.jsonl", "plan.json"])
@pytest.mark.parametrize("damage", ["missing", "{", json.dumps(HALF)])
def test_a_missing_or_damaged_result_is_an_error_before_a_page_changes(name, damage, day, checkout):
    before = (checkout / "docs/results.md").read_text()
    (day / name).unlink() if damage == "missing" else (day / name).write_text(damage)
    may_be_missing = name in ("training.jsonl", "plan.json")  # of a stage that has not run
    if not (damage == "missing" and may_be_missing):
        with pytest.raises(ValueError, match=f"--(write|out) .*{name}"):
            write_tables(day, checkout)
    assert (checkout / "docs/results.md").read_text() == before


def test_the_suite_without_a_gpu_runs_only_what_needs_none(day):
    day_now = bench.first_day.FirstDay(day / "new", 1.0, False, print)
    assert not any(map(day_now.is_open, day_now.stages))
    shutil.copy(day / "training.jsonl", day / "new")
    assert [stage.name for stage in day_now.stages if day_now.is_open(stage)] == ["plan"]


@pytest.mark.parametrize("share, verdict", [(0.9, "met"), (1.1, "MISSED")])
def test_a_kernels_time_is_compared_with_the_target_of_its_card(share, verdict):
    name = "attention both ways 4x2048x16:4x128"
    figures = []
    for chip in ("a40", "h100"):
        target = read_targets()[chip][name]
        timing = {"median_s": share * target.serial_s}
        contest = {"contestants": {"triton": timing}, "done": True}
        result = {"chip": chip, "contests": {name: contest}}
        figures += [figure.text for figure in kernel_figures([result])]
        assert f"(target <= {1e6 * target.serial_s:.0f} {verdict})" in figures[-1]
    assert figures[0] != figures[1]


@pytest.mark.parametrize(
    "ending", [{"cut": "after 9 s"}, {"error": "exit status -6"}, {"error": "hung", "hung": {}}]
)
def test_a_contest_that_was_not_finished_has_no_figure(ending):
    contest = {"contestants": {"triton": TIMING, "cudnn": TIMING}}
    assert list(kernel_figures([{"contests": {"attention": contest | {"done": True}}}]))
    assert not list(kernel_figures([{"contests": {"attention": contest | ending}}]))
