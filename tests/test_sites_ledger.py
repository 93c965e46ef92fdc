"""The ledger of rounds survives crashes, and a resumed run knows what to apply when."""

import dataclasses
import json

import pytest

from jaxtrain.sites import ledger
from jaxtrain.sites.ledger import Ledger, Round, read_ledger, split_ledger


def _round(number, applied=None, **changes):
    entry = Round(
        fragment=0,
        round=number,
        started_step=10 * number,
        applied_step=applied or 10 * number + 5,
        tokens={"a": 100, "b": 90},
        participants=("a", "b"),
        code_checksums={"a": 1, "b": 2},
        reference_checksum=3,
        payload_bytes=(4, 5),
        wire_bytes=(6, 7),
        seconds=0.1,
        waited_s=0.0,
    )
    return dataclasses.replace(entry, **changes)


def _write(folder, applied, *entries):
    book = Ledger(folder, [applied])
    differences = [book.write(entry) for entry in entries]
    book.close()
    return book, differences


def test_rounds_are_read_back_as_they_were_written(tmp_path):
    entries = [_round(1), _round(2, seconds=1 / 3)]
    assert _write(tmp_path, 0, *entries)[1] == ["", ""]
    assert read_ledger(tmp_path / ledger.FILE) == entries
    assert read_ledger(tmp_path / "missing.jsonl") == []


def test_a_resumed_run_replays_the_rounds_after_its_checkpoint_even_if_it_crashes_again(tmp_path):
    entries = [_round(number) for number in range(1, 6)]
    _write(tmp_path, 0, *entries)
    book, _ = _write(tmp_path, 2, entries[2])
    assert book.replay == {(0, n): entries[n - 1] for n in (3, 4, 5)}
    # It crashed after round 3; the next attempt starts from an even older checkpoint.
    assert split_ledger(tmp_path, [1])[0] == {(0, n): entries[n - 1] for n in (2, 3, 4, 5)}
    book, _ = _write(tmp_path, 1)
    assert book.replay == {(0, n): entries[n - 1] for n in (2, 3, 4, 5)}
    assert read_ledger(tmp_path / ledger.FILE) == entries[:1]
    # A checkpoint that was stored by another process of the replay covers more rounds.
    book, _ = _write(tmp_path, 3)
    assert read_ledger(tmp_path / ledger.FILE) == entries[:3]
    assert list(book.replay) == [(0, 4), (0, 5)]


def test_a_resumed_run_knows_since_when_a_site_has_had_no_part(tmp_path):
    alone = {"participants": ("a",)}
    _write(tmp_path, 0, _round(1), _round(2, **alone), _round(3, **alone), _round(4))
    ends = {applied: _write(tmp_path, applied)[0].absent for applied in (4, 3, 2, 1)}
    assert ends == {4: {}, 3: {"b": 2}, 2: {"b": 2}, 1: {}}


def test_a_round_that_is_pending_in_the_checkpoint_of_its_step_is_replayed(tmp_path):
    late = _round(1, applied=150)  # the run resumed from step 150, where it was pending, twice
    _write(tmp_path, 0, late)
    book, _ = _write(tmp_path, 0)
    assert book.replay == {(0, 1): late} and read_ledger(tmp_path / ledger.FILE) == []


@pytest.mark.parametrize("killed", ["between the two files", "in the middle of a line"])
def test_a_kill_while_the_ledger_is_truncated_or_written_loses_no_round(
    tmp_path, monkeypatch, killed
):
    entries = [_round(number) for number in range(1, 4)]
    _write(tmp_path, 0, *entries)
    if killed == "in the middle of a line":
        with open(tmp_path / ledger.FILE, "a") as file:
            file.write('{"fragment": 0, "rou')
    else:
        write = ledger.write_atomic

        def write_once(path, text):
            write(path, text)
            raise KeyboardInterrupt

        monkeypatch.setattr(ledger, "write_atomic", write_once)
        with pytest.raises(KeyboardInterrupt):
            Ledger(tmp_path, [1])
        monkeypatch.setattr(ledger, "write_atomic", write)
    book, _ = _write(tmp_path, 1)
    assert list(book.replay.values()) == entries[1:]
    assert read_ledger(tmp_path / ledger.FILE) == entries[:1]


def test_a_replayed_round_that_differs_is_named_with_what_differs(tmp_path):
    _write(tmp_path, 0, _round(1), _round(2), _round(3))
    again = [_round(2, seconds=9.0, wire_bytes=(1, 1)), _round(3, participants=("a",))]
    book, (same, different) = _write(tmp_path, 1, *again)
    assert same == ""
    assert "round 3 of fragment 0 on: participants ('a', 'b'), now ('a',)" in different


def test_a_run_without_a_checkpoint_replays_every_round(tmp_path):
    _write(tmp_path, 0, _round(1))
    book, _ = _write(tmp_path, 0)
    assert book.replay == {(0, 1): _round(1)} and read_ledger(tmp_path / ledger.FILE) == []


@pytest.mark.parametrize(
    "change, message",
    [
        ({"tokens": {"a": -1}}, "invalid tokens"),
        ({"round": True}, "invalid round"),
        ({"participants": "ab"}, "invalid participants"),
        ({"wire_bytes": [1]}, "invalid wire_bytes"),
        ({"colour": 1}, "the fields must be"),
    ],
)
def test_an_invalid_line_is_refused_by_file_line_and_field(tmp_path, change, message):
    _write(tmp_path, 0, _round(1), _round(2))
    path = tmp_path / ledger.FILE
    first, second = path.read_text().splitlines()
    path.write_text(f"{first}\n{json.dumps(json.loads(second) | change)}\n")
    with pytest.raises(ValueError, match=f"line 2: {message}"):
        Ledger(tmp_path, [1])
