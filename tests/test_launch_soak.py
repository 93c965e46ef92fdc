"""Checks that tests/launch_soak.py finds leaks, and only leaks."""

import numpy as np
import pytest
import soak_trends

MIB, SAMPLES = 1 << 20, 400


def sample_series(**values_of):
    """Returns samples every 3 s of figures; `values_of` gives each as a function of the sample."""
    return [
        {"time_s": 3.0 * i} | {name: values(i) for name, values in values_of.items()}
        for i in range(SAMPLES)
    ]


def leaks(**values_of):
    return soak_trends.leaks(soak_trends.summarize(sample_series(**values_of)))


def test_what_only_warms_up_or_varies_is_no_leak():
    random = np.random.default_rng(0)
    noise = random.normal(0, 2 * MIB, SAMPLES)
    warm = lambda i: 400 * MIB + 90 * MIB * (1 - np.exp(-i / 30)) + noise[i]
    sawtooth = lambda i: (400 + i % 17) * MIB  # garbage that is collected now and then
    saving = lambda i: 40 + 12 * (i % 25 == 0)  # while a checkpoint is written
    files = lambda i: 50 + random.integers(5)  # of checkpoints
    assert leaks(rss_bytes=warm, anonymous_bytes=sawtooth, descriptors=saving, files=files) == []


@pytest.mark.parametrize(
    ("figure", "values"),
    [
        ("rss_bytes", lambda i: 400 * MIB + i * 25_000),  # 5 MB over the second half: 1.2 %
        ("rss_bytes", lambda i: 12 * MIB + i * 700 + (i % 7) * 4096),  # a small process
        ("anonymous_bytes", lambda i: 400 * MIB + (i // 50) * MIB * 2),  # in steps, at each save
        ("rss_bytes", lambda i: (400 + (i // 130) * 5) * MIB),  # a staircase of two steps
        ("rss_bytes", lambda i: (400 + (i > 300) * 5 + i % 3) * MIB),  # one step
        ("descriptors", lambda i: 40 + i // 20 + 12 * (i % 25 == 0)),  # one at every evaluation
        ("threads", lambda i: 20 + i // 40),
        ("files", lambda i: 9 + i // 60),
    ],
)
def test_a_leak_is_found_though_it_is_slow_and_the_series_varies(figure, values):
    assert leaks(**{figure: values}) == [figure]


def test_known_growth_is_allowed_only_to_processes_that_report_their_memory_in_use():
    rank = lambda i: {"rss_bytes": (400 + i // 100 * 5) * MIB, "malloc_bytes": 100 * MIB}
    leaking = lambda i: rank(i) | {"malloc_bytes": (100 + i // 130 * 2) * MIB}
    other = lambda i: {"rss_bytes": rank(i)["rss_bytes"]}
    samples_of = {
        name: [{"time_s": 3.0 * i} | values(i) for i in range(SAMPLES)]
        for name, values in {"rank": rank, "leaking rank": leaking, "keeper": other}.items()
    }
    problems = soak_trends.judge(samples_of, [], {"rss_bytes": 15 * MIB})[1]
    assert problems == ["leaking rank: malloc_bytes grow", "keeper: rss_bytes grow"]
    assert "rank: rss_bytes grow" in soak_trends.judge(samples_of, [])[1]


def test_a_report_names_what_leaks_and_what_was_sampled_too_rarely():
    samples_of = {
        "h0 rank, pid 1": sample_series(files=lambda i: i, threads=lambda i: 9),
        "h0 keeper, pid 2": sample_series(files=lambda i: 1)[:19],
        "operator": sample_series(status_s=lambda i: 0.1 * i),
    }
    figures, problems = soak_trends.judge(samples_of, ["h0 rank", "h0 keeper", "h1 rank"])
    assert figures.keys() == {"h0 rank, pid 1", "operator"}
    assert figures["operator"]["samples"] == SAMPLES
    assert problems == ["h0 rank, pid 1: files grow"] + [
        f"{name}: fewer than 20 samples" for name in ("h0 keeper", "h1 rank")
    ]


def test_a_series_that_is_too_short_is_refused():
    with pytest.raises(ValueError, match="needs 20 samples; got 19"):
        soak_trends.summarize(sample_series(files=lambda i: 1)[:19])
