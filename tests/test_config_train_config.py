import dataclasses
import re

import pytest

from configs import debug
from jaxtrain.config import train_config as config_lib
from jaxtrain.config.fields import list_sections
from jaxtrain.config.help_text import describe_flags
from jaxtrain.config.train_config import DataConfig, ModelConfig, OptimConfig, TrainConfig


def test_the_number_of_fields_is_limited():
    assert len(config_lib.flatten(TrainConfig())) <= config_lib.MAX_FIELDS


def test_every_field_has_a_help_text_and_is_listed_in_the_help():
    text = describe_flags(TrainConfig)
    for prefix, cls in list_sections(TrainConfig):
        for field in dataclasses.fields(cls):
            if not dataclasses.is_dataclass(field.type):
                assert field.metadata["text"], field.name
                assert f"  {prefix}{field.name}=" in text


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"modle": {}}, "no field modle. Did you mean model?"),
        (
            {"optim": {"learning_rat": 1.0}},
            "no field optim.learning_rat. Did you mean optim.learning",
        ),
        ({"model": {"G": 3}}, r"model.G must divide model.H=4; got 3. Set --model.G."),
        ({"model": {"K": 7}}, "model.K must be even with position=rope; got 7"),
        ({"model": {"norm": "batch"}}, "model.norm must be one of 'rms', 'layer'; got 'batch'"),
        ({"steps": 0}, "steps must be at least 1; got 0. Set --steps."),
        ({"steps": 1.5}, "steps must be of type int; got 1.5"),
        ({"optim": {"learning_rate": float("nan")}}, "optim.learning_rate must be at least 0.0"),
        ({"steps": 2**31}, "steps must be at most 2147483647; got 2147483648. Set --steps."),
        ({"save_every": 10**20}, "save_every must be at most 2147483647; got 1000"),
        ({"optim": {"warmup_steps": 2**31}}, "optim.warmup_steps must be at most 2147483647"),
        ({"optim": {"total_steps": 2**31}}, "optim.total_steps must be at most 2147483647"),
        ({"eval_tokens": 2**63}, "eval_tokens must be at most 9223372036854775807"),
        (
            {"optim": {"learning_rate": float("inf")}},
            "optim.learning_rate must be a finite number; got inf. Set --optim.learning_rate.",
        ),
        ({"optim": {"clip_norm": 10**400}}, "optim.clip_norm must be a finite number; got 1000"),
        ({"workdir": ""}, "workdir must name a folder; got ''. Set --workdir."),
        ({"accumulation": 3}, "data.batch must be a multiple of accumulation=3; got 8"),
        ({"mesh": {"replica": -1}}, "mesh.fsdp may be -1 only if no other axis is"),
        ({"mesh": {"fsdp": 0}}, "mesh.fsdp must be positive or -1; got 0"),
        ({"model": {"position": "learned"}, "data": {"seq_len": 2048}}, "model.positions=1024"),
        ({"optim": {"adam_eps": 0.0}}, "optim.adam_eps must be at least 1e-30; got 0.0"),
        ({"optim": {"ns_dtype": "float64"}}, "optim.ns_dtype needs model.dtype=float64"),
        ({"model": {"bias": True, "attention_bias": "qkv"}}, "attention_bias must be 'none' with"),
        ({"model": {"global_every": 6}}, "model.global_every must be 0 without a window"),
        ({"model": {"rope_local_theta": 1e4}}, "model.rope_local_theta must be 0 without a window"),
        ({"model": {"rope_local_theta": 0.5, "window": 8}}, "rope_local_theta must be 0 or at le"),
        (
            {"model": {"nope_every": 4, "position": "learned"}},
            "model.nope_every must be 0 with model.position=learned; got 4. Set --model.nope_every",
        ),
        (
            {"model": {"rope_scaling": "linear", "position": "learned"}},
            "model.rope_scaling must be 'none' with model.position=learned; got 'linear'",
        ),
        ({"model": {"rope_factor": 4.0}}, "model.rope_factor must be 1 unless model.rope_scaling"),
        ({"model": {"rope_high_freq": 1.0}}, "rope_high_freq must exceed model.rope_low_freq=1.0"),
        (
            {"model": {"rope_fraction": 0.3}},
            "rope_fraction must be a multiple of 2/K, K=64, and not",
        ),
        ({"model": {"rope_fraction": 0.0}}, "model.rope_fraction must be a multiple of 2/K, K=64"),
        (
            {"model": {"rope_fraction": 0.5, "position": "learned"}},
            "model.rope_fraction must be 1 with model.position=learned; got 0.5",
        ),
        ({"model": {"qk_norm_gain": False}}, "qk_norm_gain must be true with model.qk_norm=false"),
        (
            {"model": {"logit_softcap_form": "sqrt"}},
            "model.logit_softcap_form must be 'tanh' without model.logit_softcap; got 'sqrt'",
        ),
        (
            {"model": {"init_std": "embed=1,w=0"}},
            "must be NAME=STD pairs joined by commas, of embed",
        ),
        (
            {"model": {"init_std": "o=0"}, "optim": {"parametrisation": "spectral"}},
            "model.init_std must be empty with optim.parametrisation=spectral; got 'o=0'",
        ),
        ({"model": {"init_std": "o"}}, "got 'o'. Set --model.init_std"),
        ({"model": {"init_std": "o=-1"}}, "got 'o=-1'. Set --model.init_std"),
        (
            {"optim": {"decay_groups": "matrices,embeddings"}},
            "optim.decay_groups must be some of matrices, embedding, positions, head, vectors, "
            "joined by commas; got 'matrices,embeddings'. Set --optim.decay_groups.",
        ),
        (
            {"optim": {"ns_form": "torch", "ns_coefficients": "aol4"}},
            "optim.ns_coefficients must be jordan with optim.ns_form=torch; got 'aol4'",
        ),
        ({"optim": {"clip_eps": -1e-6}}, "optim.clip_eps must be at least 0.0; got -1e-06"),
        (
            {"optim": {"acceleration": "ema_lookahead", "strength": 1.0}},
            "optim.strength must be below 1 with optim.acceleration=ema_lookahead",
        ),
    ],
)
def test_the_error_of_a_bad_value_names_its_flag(values, message):
    with pytest.raises(ValueError, match=re.escape(message).replace(r"\.learning", ".learning")):
        config_lib.freeze(values)


def test_numbers_of_tokens_and_bytes_may_exceed_int32():
    cfg = config_lib.freeze({"eval_tokens": 2**40, "loss": {"chunk_bytes": 2**40}})
    assert cfg.eval_tokens == cfg.loss.chunk_bytes == 2**40


def test_an_int_becomes_a_float_but_not_a_bool():
    assert config_lib.freeze({"optim": {"learning_rate": 1}}).optim.learning_rate == 1.0
    with pytest.raises(ValueError, match="of type bool"):
        ModelConfig(tied=1)


def test_total_steps_follows_steps_until_it_is_set():
    config = debug.get_config()
    config.steps = 7
    assert config_lib.freeze(config).optim.total_steps == 7
    config.optim.total_steps = 9
    assert config_lib.freeze(config).optim.total_steps == 9
    assert config_lib.freeze(config).steps == 7


def test_a_config_survives_the_round_trip_through_a_plain_dict():
    cfg = config_lib.freeze(debug.get_config())
    assert config_lib.freeze(config_lib.to_dict(cfg)) == cfg


def test_the_hash_depends_on_what_is_trained_and_not_on_the_folder():
    base = TrainConfig()
    assert config_lib.config_hash(base) == config_lib.config_hash(TrainConfig(workdir="/elsewhere"))
    others = (TrainConfig(seed=1), TrainConfig(data=DataConfig(batch=16)))
    others += (TrainConfig(optim=OptimConfig(momentum=0.9)),)
    assert len({config_lib.config_hash(cfg) for cfg in (base, *others)}) == 4


def test_the_hash_does_not_depend_on_what_is_measured():
    values = {"measure": {"phases": True}, "profile": {"steps": 3}, "export": {"port": 9}}
    measured = config_lib.freeze(values)
    assert config_lib.config_hash(measured) == config_lib.config_hash(TrainConfig())


def test_the_start_hash_depends_on_all_fields_except_folders():
    elsewhere = TrainConfig(workdir="/elsewhere", compile_cache="/tmp")
    assert config_lib.start_hash(elsewhere) == config_lib.start_hash(TrainConfig())
    others = [{"measure": {"phases": True}}, {"checkpoint": {"storage": "host0"}}, {"seed": 1}]
    hashes = {config_lib.start_hash(config_lib.freeze(values)) for values in ({}, *others)}
    assert len(hashes) == 4


def test_changes_list_the_fields_that_differ_from_the_stored_config():
    stored = config_lib.flatten(TrainConfig())
    assert config_lib.describe_changes(stored, TrainConfig()) == []
    now = config_lib.freeze({"seed": 1, "optim": {"learning_rate": 0.01}})
    changes = ["seed 1, was 0", "optim.learning_rate 0.01, was 0.02"]
    assert config_lib.describe_changes(stored, now) == changes
    del stored["model.window"]  # by a version without the field, whose models had no window
    assert config_lib.describe_changes(stored, now) == changes
    windowed = config_lib.freeze({"model": {"window": 8}})
    assert config_lib.describe_changes(stored, windowed) == ["model.window 8, was 0"]
