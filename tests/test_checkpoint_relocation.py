import json

import pytest

from jaxtrain.checkpoint.relocation import check_not_moved, describe_later_steps, find_earlier_start


def folder(root, **logs):
    """Returns a host's workdir; p0=50 means that hosts/0.jsonl ends at step 50."""
    (root / "hosts").mkdir(parents=True)
    for name, last in logs.items():
        lines = [json.dumps({"step": step, "time": 0.0}) for step in range(1, last + 1)]
        (root / "hosts" / f"{name.removeprefix('p')}.jsonl").write_text("\n".join(lines) + "\n")
    return root


def test_later_steps_on_a_former_process_0_are_found(tmp_path):
    a = find_earlier_start(folder(tmp_path / "a", p0=50), [20, 40])
    b = find_earlier_start(folder(tmp_path / "b", p1=49), [])
    assert "has logged step 50 and stores checkpoint 40" in describe_later_steps([b, a])
    c = find_earlier_start(folder(tmp_path / "c"), [])
    assert "has logged step 49" in describe_later_steps([b, c])
    assert "checkpoint" not in describe_later_steps([c, b])
    both = folder(tmp_path / "both", p0=9, p1=49)  # was process 0, then process 1
    assert "stores checkpoint 40" in describe_later_steps([find_earlier_start(both, []), a])


def test_a_run_that_ended_before_its_first_save_may_start_over_on_its_host(tmp_path):
    led = find_earlier_start(folder(tmp_path / "a", p0=0), [])  # killed before a line was written
    other = find_earlier_start(folder(tmp_path / "b", p1=8), [])
    fresh = find_earlier_start(folder(tmp_path / "c"), [])
    assert (
        describe_later_steps([led, other])
        == describe_later_steps([led, fresh])
        == describe_later_steps([fresh])
        == ""
    )


def test_the_error_of_a_moved_process_0_names_the_ways_out(tmp_path):
    with pytest.raises(ValueError, match="step 49. Start with the former process 0's host first"):
        check_not_moved(folder(tmp_path / "b", p1=49), [])
