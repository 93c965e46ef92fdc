import pytest

from jaxtrain.reporting.progress_text import closing_lines, format_seconds, step_text

METRICS = {"train/loss_nats": 2.413, "perf/tokens_per_s": 6842.0, "perf/step_time_s": 0.299}


@pytest.mark.parametrize(
    ("columns", "text"),
    [
        (None, "loss  2.413      6 842 tok/s     299 ms/step  eta 0:54"),
        (55, "loss  2.413      6 842 tok/s     299 ms/step  eta 0:54"),
        (40, "loss  2.413  6 842 tok/s  eta 0:54"),
        (25, "loss  2.413  eta 0:54"),
        (5, "loss  2.413  eta 0:54"),
    ],
)
def test_a_narrow_terminal_gets_fewer_figures_and_none_that_is_cut(columns, text):
    assert step_text(METRICS, 54, columns) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.00867, "8.67 ms"),
        (0.0583, "58.3 ms"),
        (0.299, "299 ms"),
        (1.2, "1.20 s"),
        (481.2, "481 s"),
        (0.0, "0 ms"),
    ],
)
def test_step_times_have_three_digits(seconds, text):
    assert format_seconds(seconds) == text


SUMMARY = {"step": 200, "steps": 200, "train/loss_nats": 1.5, "eval/loss_nats": 1.7}


def test_which_weights_are_evaluated_is_printed_only_where_they_are_not_the_parameters():
    plain = closing_lines(SUMMARY | {"eval_at": "the parameters"})
    assert plain[1] == "eval  loss 1.700 nats/token"
    ahead = closing_lines(SUMMARY | {"eval_at": "the iterate, not the look-ahead point"})
    assert ahead[1] == "eval  loss 1.700 nats/token  at the iterate, not the look-ahead point"


def test_a_run_that_a_signal_stopped_after_its_last_step_is_not_done():
    assert closing_lines(SUMMARY)[0].startswith("done  step 200/200")
    assert closing_lines(SUMMARY | {"stopped_by": "SIGTERM"})[0].startswith("stopped step 200/200")
