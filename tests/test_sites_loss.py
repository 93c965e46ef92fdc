"""Which runs tests/sites_loss.py makes, and what it says of them."""

import pytest
import sites_loss
from sites_loss import FEW, RUNS, TABLES, Run, Table

from jaxtrain.config.train_config import TrainConfig, flatten

ALL = next(table for table in TABLES if table.names == tuple(RUNS))
# Losses of the outer steps that are tried; the fourth is the best.
TRIED = [0.90, 0.89, 0.88, 0.86, 0.87, 0.91]


def row(run: Run, loss: float) -> dict:
    return {"name": run.name, "flags": run.flags, "loss_nats": loss}


@pytest.fixture
def rows() -> list[dict]:
    """Rows of the runs that choose the outer step."""
    return [row(run, loss) for run, loss in zip(sites_loss.tuning_runs(), TRIED, strict=True)]


def test_the_outer_step_is_chosen_before_any_other_run(rows):
    assert sites_loss.next_runs(rows[:-1], 2) == sites_loss.tuning_runs()[-1:]
    assert [run.name for run in sites_loss.next_runs(rows, 2)] == ["one", "one"]


def test_two_sites_get_the_best_outer_step_and_half_of_the_batch(rows):
    runs = {run.name: run for run in sites_loss.runs_of(ALL, rows)}
    best = {"sites.rate": 1.0, "sites.momentum": 0.3}
    assert list(runs) == list(RUNS)
    for name, run in runs.items():
        assert run.two_sites == name.startswith("period"), name
        own_step = "momentum" in name
        assert (best.items() <= run.flags.items()) == (run.two_sites and not own_step)
        assert run.flags["data.batch"] == (32 if name in ("one", "learning rate 0.02") else 16)
    assert runs["period 100"].flags["sites.period"] == 100
    assert runs["period 30, learning rate 0.02"].flags["optim.learning_rate"] == 0.02


def test_no_run_is_made_twice_for_two_tables(rows):
    made = []
    while runs := sites_loss.next_runs(rows, 2):
        assert len(runs) == 1 or not any(run.two_sites for run in runs)
        work = {(run.flags["steps"], run.flags["data.batch"]) for run in runs}
        assert len(work) == 1  # otherwise a core would wait for the other
        made += runs
        rows += [row(run, 1.0) for run in runs]
    assert len({str(sorted(run.flags.items())) for run in made}) == len(made)
    assert len(made) == 3 * len(RUNS) + 2 * 4 + 6 + 2 + 6 + 2  # a line of TABLES each


def test_a_row_with_other_flags_does_not_count(rows):
    rows[2]["flags"] = rows[2]["flags"] | {"steps": 10}
    assert sites_loss.next_runs(rows, 2) == [sites_loss.tuning_runs()[2]]


def test_rows_of_kinds_that_were_removed_are_ignored(rows):
    report = sites_loss.report(rows)
    run = sites_loss.runs_of(ALL, rows)[-1]
    rows.append(row(run._replace(name="removed", own=run.own | {"sites.removed": True}), 0.8))
    assert sites_loss.report(rows) == report
    assert [run.name for run in sites_loss.next_runs(rows, 2)] == ["one", "one"]


def test_every_flag_of_a_run_is_a_field(rows):
    fields = flatten(TrainConfig())
    for table in TABLES:
        for run in sites_loss.runs_of(table, rows):
            assert run.flags.keys() <= fields.keys(), run.name


def test_a_table_takes_the_seeds_whose_runs_are_all_there(rows):
    table = Table("Two", {}, FEW, (1, 2, 3))
    for run in sites_loss.runs_of(table, rows):
        if (run.name, run.seed) != (FEW[1], 2):
            rows.append(row(run, 0.8 + 0.01 * run.seed + (0.02 + 0.001 * run.seed) * run.two_sites))
    lines = sites_loss.format_table(table, rows)
    assert lines[1] == "Two; seeds [1, 3]; p is not corrected for the number of rows."
    assert lines[-2:] == [
        "| one | 0.8200 |  |  |  |",
        # Differences of 0.021 and 0.023: a standard error of 0.001, so t = 22 with one degree.
        "| period 30 | 0.8420 | +0.0220 | 0.0010 | 0.029 |",
    ]


def test_one_seed_shows_a_difference_without_an_error(rows):
    table = Table("Long", {"steps": 6}, FEW, (1,))
    rows += [row(run, 0.8 + 0.02 * run.two_sites) for run in sites_loss.runs_of(table, rows)]
    assert sites_loss.format_table(table, rows)[-1] == "| period 30 | 0.8200 | +0.0200 |  |  |"


def test_a_table_without_a_complete_seed_is_left_out(rows):
    assert sites_loss.format_table(ALL, rows) == []
    assert "| outer rate 1.0, momentum 0.3 | 0.8600 |" in sites_loss.report(rows)
