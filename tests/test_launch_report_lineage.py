"""The tree of a run, its branches and its averages."""

import json

import pytest
from run_directories import write_run

from launch.report.lineage import describe_lineage
from launch.report.run_folder import read_run

DECAY = ["steps 120, was 200", "optim.schedule 'wsd', was 'constant'"]


def family(folder):
    """Writes a trunk, a decay, a branch of that with other data, an average, and a stranger."""

    def write(name, last, **lineage):
        config = {"lineage": lineage} if lineage else {}
        losses = [3.0 - 0.01 * step for step in range(last)]
        write_run(folder / name, [1.0] * last, losses, log_every=10, **config)

    parent = str(folder / "trunk")
    write("trunk", 200)
    write("decay", 120, parent=parent, step=100, decay_steps=20, changes=DECAY)
    code = {"parent": str(folder / "decay"), "step": 110, "decay_steps": 0}
    write("code", 150, **code, changes=["data.shards 'b', was 'a'", "steps 150, was 120"])
    write("merged", 200, parent=parent, step=200, steps=[100, 200], scheme="uniform")
    write("stranger", 100)
    return folder


def draw(folder, *names):
    return describe_lineage([read_run(folder / name) for name in names])


def test_every_member_of_a_family_draws_the_same_tree(tmp_path):
    folder = family(tmp_path)
    want = [
        "trunk                               step 200  held-out 1.0300",
        "├─ at 100: decay                    step 120  held-out 2.0300  decay over 20 steps",
        "│  └─ at 110: code                  step 150  held-out 2.0300  other data.shards, steps",
        "└─ average of 100, 200: merged      step 200  held-out 1.0300  uniform",
    ]
    assert [" ".join(line.split()) for line in draw(folder, "trunk")] == [
        " ".join(line.split()) for line in want
    ]
    for names in (["decay"], ["code"], ["merged", "stranger"], ["trunk", "code"]):
        assert draw(folder, *names) == draw(folder, "trunk")


def test_a_run_without_relatives_draws_nothing(tmp_path):
    assert draw(family(tmp_path), "stranger") == []


def test_runs_that_were_moved_together_find_each_other(tmp_path):
    folder = family(tmp_path / "old")
    folder.rename(tmp_path / "new")
    assert len(draw(tmp_path / "new", "code")) == 4


@pytest.mark.parametrize("text", ["{", "[1]", '{"lineage": 3}', json.dumps({"lineage": {}})])
def test_a_damaged_neighbour_is_left_out(tmp_path, text):
    folder = family(tmp_path)
    (folder / "merged" / "config.json").write_text(text)
    assert len(draw(folder, "trunk")) == 3
