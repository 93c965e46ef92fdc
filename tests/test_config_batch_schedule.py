import dataclasses
from fractions import Fraction

import numpy as np
import pytest

from jaxtrain.config.batch_schedule import BatchPhase, BatchSchedule, parse_schedule
from jaxtrain.config.train_config import (
    DataConfig,
    OptimConfig,
    SitesConfig,
    TrainConfig,
    config_hash,
)
from jaxtrain.distributed.cluster import World
from jaxtrain.distributed.runtime import fit_config_to_world
from jaxtrain.optim.batch_scaling import rate_factor
from jaxtrain.training.programs import schedule_lines, size_config

T = 32


def test_a_size_holds_from_the_first_step_at_or_after_its_tokens():
    schedule = parse_schedule("0:4 500:8 1024:16", 1, T)  # 128 and 256 tokens a step
    assert schedule.phases == (BatchPhase(0, 4), BatchPhase(4, 8), BatchPhase(6, 16))
    assert parse_schedule("0:4 512:8", 1, T).phases[1].first == 4
    assert parse_schedule("0:4 512.5:8", 1, T).phases[1].first == 5
    assert parse_schedule("0:128 2e8:256", 1, 1_024).phases[1].first == 1_526


def test_the_number_of_earlier_sequences_is_the_sum_of_the_sizes():
    schedule = BatchSchedule((BatchPhase(0, 3), BatchPhase(2, 5), BatchPhase(7, 2)))
    sizes = [schedule.sequences(step) for step in range(12)]
    assert sizes == [3] * 2 + [5] * 5 + [2] * 5
    before = [schedule.sequences_before(step) for step in range(12)]
    assert before == [0, *np.cumsum(sizes)[:-1].tolist()]
    assert [schedule.step_at(places) for places in before] == list(range(12))
    assert schedule.step_at(Fraction(17, 2)) == 2 and schedule.step_at(9) == 3  # the nearest
    later = schedule.from_step(4)
    assert [later.sequences(step) for step in range(8)] == sizes[4:]
    assert later.phases == parse_schedule(later.write(T), 1, T).phases
    assert schedule.between(1, 7) == (BatchPhase(1, 3), BatchPhase(2, 5))


def test_without_a_schedule_or_with_equal_sizes_all_steps_have_one_size():
    for text in ("", " ", "0:8", "0:8 256:8 1e9:8"):
        assert parse_schedule(text, 8, T).phases == (BatchPhase(0, 8),)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("128", "must be pairs TOKENS:SEQUENCES.*'128' is not one"),
        ("0:128 x:256", "must be pairs.*'x:256' is not one"),
        ("0:0", "must be pairs.*'0:0' is not one"),
        ("0:4 1e3:2.5", "must be pairs.*'1e3:2.5' is not one"),
        ("1e6:128", "must begin with 0:SEQUENCES; it begins with 1e6:128"),
        ("0:4 0:8", "ascending"),
        ("0:4 1e6:8 1e5:16", "ascending"),
        ("0:4 128:8 130:16 140:32", "at least one step of each size; the 16 .* before 140 tokens"),
        ("0:4 256:6", "multiples of data.batch / accumulation = 4, unlike 6"),
    ],
)
def test_a_malformed_schedule_is_refused_with_its_flag(text, reason):
    with pytest.raises(ValueError, match=f"data.batch_schedule .*{reason}.*--data.batch_schedule"):
        TrainConfig(accumulation=2, data=DataConfig(batch=8, seq_len=T, batch_schedule=text))


def test_a_schedule_is_refused_with_several_sites():
    with pytest.raises(ValueError, match="data.batch_schedule must be empty with sites.period"):
        TrainConfig(data=DataConfig(batch_schedule="0:8"), sites=SitesConfig(period=20))


def test_the_steps_of_each_size_keep_the_microbatch_and_scale_the_rates():
    plain = TrainConfig(accumulation=2, steps=12, data=DataConfig(batch=8, seq_len=T))
    data = dataclasses.replace(plain.data, batch_schedule="0:4 512:8 1e4:32")
    cfg = dataclasses.replace(plain, data=data)
    assert size_config(cfg, 8) == plain
    assert (size_config(cfg, 32).data.batch, size_config(cfg, 32).accumulation) == (32, 8)
    assert cfg.data.tokens_before(6) == 4 * 4 * T + 2 * 8 * T
    assert [cfg.data.tokens_of(step) for step in (4, 5)] == [4 * T, 8 * T]
    assert [text for _, text in schedule_lines(cfg, first=4)] == [
        "from step 1, after 0 tokens: 4 sequences in 1 x 4, rates x 0.7071; over",
        "from step 5, after 512 tokens: 8 sequences in 2 x 4, rates x 1",
        "from step 43, after 10,240 tokens: 32 sequences in 8 x 4, rates x 2; not reached in 12 "
        "steps",
    ]
    factors = {name: rate_factor(name, 32, 8) for name in ("sqrt", "linear", "none")}
    assert factors == {"sqrt": 2, "linear": 4, "none": 1}


def test_with_fewer_processes_every_size_is_a_whole_number_of_smaller_microbatches():
    plain = TrainConfig(accumulation=2, data=DataConfig(batch=48))
    growing = dataclasses.replace(plain, data=DataConfig(batch=48, batch_schedule="0:24 1e6:48"))
    world = World("flags", "", 3, 0, None, planned=4)  # of the 8 devices of a test
    assert fit_config_to_world(plain, world).accumulation == 3  # microbatches of 16
    assert fit_config_to_world(growing, world).accumulation == 6  # of 8, which divides 24, too


def test_only_a_schedule_changes_the_hash_of_a_config():
    plain, linear = TrainConfig(), TrainConfig(optim=OptimConfig(batch_scaling="linear"))
    assert config_hash(plain) == config_hash(linear)
    data = DataConfig(batch_schedule="0:8 1e6:16")
    hashes = {config_hash(dataclasses.replace(cfg, data=data)) for cfg in (plain, linear)}
    assert len(hashes | {config_hash(plain)}) == 3
