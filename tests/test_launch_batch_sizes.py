import json

from run_directories import TOKENS, series, write_run

from launch import summary
from launch.report.batch_sizes import NOISE, SIGNAL, propose_schedule
from launch.report.figures import progress
from launch.report.run_folder import read_run
from launch.report.step_tokens import StepTokens

PHASES = [{"step": 1, "tokens": 100}, {"step": 4, "tokens": 300}]


def with_phases(folder, steps=8):
    """Writes a run with 100 tokens in each of three steps of 1 s, and 300 in five of 2 s."""
    write_run(folder, [1.0] * 3 + [2.0] * (steps - 3), processes=2)
    config = json.loads((folder / "config.json").read_text())
    config["work"]["batch_phases"] = PHASES
    (folder / "config.json").write_text(json.dumps(config))
    lines = (folder / "hosts" / "0.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines if "perf/step_time_s" in line]
    for record in records:
        record["perf/step_time_s"] = 1.0 if record["step"] < 4 else 2.0
        record |= {"first": True} if record["step"] in (1, 4) else {}
    text = "".join(json.dumps(record) + "\n" for record in records)
    (folder / "hosts" / "0.jsonl").write_text(text)
    return read_run(folder)


def test_tokens_are_counted_by_the_size_of_each_step(tmp_path):
    tokens = StepTokens([(1, 100), (4, 300)])
    assert [tokens.before(step) for step in (1, 2, 4, 5, 9)] == [0, 100, 300, 600, 1_800]
    assert tokens.of([1, 4, 5]) == 700
    run = with_phases(tmp_path / "run")
    assert run.tokens_per_step == 1_800 / 8
    assert run.figures["perf/tokens_per_s"] == (2 * 100 + 4 * 300) / (2 * 1 + 4 * 2)
    plain = read_run(write_run(tmp_path / "plain", series(20)))
    assert plain.tokens_per_step == TOKENS and plain.step_tokens.before(21) == 20 * TOKENS


def test_the_time_left_is_that_of_the_tokens_left(tmp_path):
    run = with_phases(tmp_path / "run")
    run.config["config"]["steps"] = 11  # 900 more tokens at 140 tokens/s
    run.summary.clear()
    run.metrics[-1]["time"] = 4e9
    assert progress(run) == "8 of 11, 6 s left"


def write_noise(folder, scales, signal=1e-3, every=10, jitter=0.0):
    """Writes a run that was diagnosed every 10 steps, with these noise scales in tokens."""
    write_run(folder, series(every * len(scales)))
    config = json.loads((folder / "config.json").read_text())
    config["config"] |= {"accumulation": 64}  # microbatches of 512 / 64 = 8 sequences
    (folder / "config.json").write_text(json.dumps(config))
    with open(folder / "metrics.jsonl", "a") as file:
        for i, scale in enumerate(scales, 1):
            measured = signal + (jitter if i % 2 else -jitter)
            record = {"step": every * i, "time": 1.7e9, NOISE: scale * signal, SIGNAL: measured}
            file.write(json.dumps(record) + "\n")
    return read_run(folder)


def test_the_proposed_batch_is_the_noise_scale_in_powers_of_two(tmp_path, capsys):
    T = 1_024
    run = write_noise(tmp_path / "a", [20 * T] * 16 + [70 * T] * 16)
    # 16 sequences are the largest power of two times 8 below 20; the diagnosis of step 170 is the
    # first with the larger scale, after 169 steps.
    assert propose_schedule(run) == f"0:16 {169 * TOKENS}:64"
    assert summary.main([str(tmp_path / "a")]) == 0
    assert f'--data.batch_schedule="0:16 {169 * TOKENS}:64"' in capsys.readouterr().out
    low = write_noise(tmp_path / "low", [T] * 8)
    assert propose_schedule(low) == "0:8"  # never below the microbatch


def test_a_falling_or_noisy_scale_proposes_the_ratio_of_the_means(tmp_path):
    T = 1_024
    falling = write_noise(tmp_path / "falling", [96 * T] * 16 + [32 * T] * 16)
    assert propose_schedule(falling) == "0:64"
    negative = write_noise(tmp_path / "negative", [64 * T] * 8, signal=-1e-3)
    assert propose_schedule(negative) == ""
    unknown = write_noise(tmp_path / "unknown", [64 * T] * 8, jitter=3e-3)
    assert propose_schedule(unknown) == ""  # the mean is within its error of 0
    known = write_noise(tmp_path / "known", [64 * T] * 8, jitter=0.5e-3)
    assert propose_schedule(known) == "0:64"
    few = write_noise(tmp_path / "few", [64 * T] * 7)
    assert propose_schedule(few) == ""
    assert summary.as_json(few)["proposed_batch_schedule"] is None
