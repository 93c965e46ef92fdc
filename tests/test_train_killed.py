import signal

import runs


def test_runs_killed_and_preempted_equal_one_that_was_not(tmp_path):
    text = runs.write_text(tmp_path)
    cache = f"--config.compile_cache={tmp_path / 'cache'}"
    flags = ("--config.steps=200", "--config.save_every=20", "--config.sample.tokens=0", cache)
    runs.finish(runs.start(tmp_path / "whole", text, *flags))
    broken = tmp_path / "broken"
    process = runs.start(broken, text, *flags)
    runs.signal_at(process, broken, 47, signal.SIGKILL)
    runs.finish(process, -signal.SIGKILL)
    process = runs.start(broken, text, *flags)
    runs.signal_at(process, broken, 90, signal.SIGTERM)
    out = runs.finish(process, 75)
    assert "resume" in out and "the same command resumes it" in out
    assert 90 <= runs.losses(broken)[-1][0] < 200
    process = runs.start(broken, text, *flags)
    runs.signal_at(process, broken, 140, signal.SIGINT)
    runs.finish(process, 130)
    runs.finish(runs.start(broken, text, *flags))
    assert runs.losses(broken) == runs.losses(tmp_path / "whole")
