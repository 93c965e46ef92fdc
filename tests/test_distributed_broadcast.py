"""Checks what processes report when they differ, without starting several of them."""

import json

import pytest

from jaxtrain.distributed.broadcast import describe_difference, pad_text
from launch.host.restart_policy import Policy
from launch.host.root_cause import find_cause


@pytest.mark.parametrize(("texts", "odd"), [("abbb", 0), ("aab", 2), ("aabc", 2)])
def test_the_launcher_names_the_host_of_the_process_that_differs_from_most(texts, odd):
    """All ranks exit with the same text; the cause must be the one that differs."""
    message = describe_difference("the data", list(texts))
    lines = [f"error: {message}"[:300]]
    rank = {"stopped_s": 0.0, "code": 78, "step": None, "lines": lines}
    reports = {i: {"ranks": [rank | {"rank": i}]} for i in range(len(texts))}
    names, policy = [f"h{i}" for i in range(len(texts))], Policy()
    limits = policy.lost_s, policy.stopped_s
    cause = find_cause(reports, dict.fromkeys(reports, 0.0), names, *limits, {}, {})
    assert cause and cause.headline.startswith(f"h{odd} rank {odd} "), cause


def test_processes_that_agree_have_no_difference():
    assert describe_difference("the data", ["a", "a"]) == ""


def test_texts_of_any_length_are_broadcast_in_few_sizes_since_each_size_is_compiled_for_good():
    texts = [json.dumps({"value": "x" * n}).encode() for n in range(0, 1 << 16, 97)]
    assert len({len(pad_text(text)) for text in texts}) <= 8
    assert all(json.loads(pad_text(text)) == json.loads(text) for text in texts)
    assert all(len(pad_text(text)) <= max(1024, 2 * len(text)) for text in texts)
