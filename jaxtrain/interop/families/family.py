"""Describes a transformers architecture by tables, and reads and writes its config.json with them.

Source: transformers 5.24, configuration_utils.py and models/*/configuration_*.py
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np

from jaxtrain.config.train_config import ModelConfig
from jaxtrain.interop.families.config_reader import KINDS, MISSING, ConfigReader
from jaxtrain.model.compatibility import same_value

# Fields of every config.json that change neither logits nor weights, by the reason why.
IGNORED = {
    "numbers are computed in model.dtype, and weights are read in the type that they have": (
        *("dtype", "torch_dtype", "use_bfloat16", "reorder_and_upcast_attn"),
    ),
    "describes the file or the program that wrote it": (
        *("transformers_version", "_name_or_path", "name_or_path", "_commit_hash"),
        *("is_llama_config", "transformers.js_config", "unsloth_fixed", "unsloth_version"),
    ),
    "chooses an implementation or what a call returns": (
        *("use_cache", "return_dict", "output_hidden_states", "output_attentions", "torchscript"),
        *("attn_implementation", "_attn_implementation", "_attn_implementation_autoset"),
        *("chunk_size_feed_forward", "gradient_checkpointing", "tf_legacy_loss"),
        *("tie_last_hidden_states", "is_decoder"),
    ),
    "training only. Dropout is off in evaluation, and jaxtrain trains without it": (
        *("initializer_range", "attention_dropout", "hidden_dropout", "embd_pdrop"),
        *("resid_pdrop", "attn_pdrop"),
    ),
    "special tokens. interop/hf_tokenizer.py reads the ids of bos, eos and pad": (
        *("bos_token_id", "eos_token_id", "pad_token_id", "sep_token_id", "tokenizer_class"),
        *("decoder_start_token_id", "prefix"),
    ),
    "heads of other tasks than language modelling": (
        *("id2label", "label2id", "num_labels", "_num_labels", "problem_type"),
        *("finetuning_task", "task_specific_params", "summary_type", "summary_use_proj"),
        *("summary_activation", "summary_proj_to_labels", "summary_first_dropout"),
    ),
    "defaults of sampling, from before generation_config.json": (
        *("assistant_confidence_threshold", "assistant_lookbehind", "bad_words_ids"),
        *("begin_suppress_tokens", "diversity_penalty", "do_sample", "early_stopping"),
        *("encoder_no_repeat_ngram_size", "encoder_repetition_penalty", "epsilon_cutoff"),
        *("eta_cutoff", "exponential_decay_length_penalty", "forced_bos_token_id"),
        *("forced_eos_token_id", "length_penalty", "max_length", "min_length"),
        *("no_repeat_ngram_size", "num_assistant_tokens", "num_assistant_tokens_schedule"),
        *("num_beam_groups", "num_beams", "num_return_sequences", "output_scores"),
        *("remove_invalid_values", "repetition_penalty", "return_dict_in_generate"),
        *("suppress_tokens", "target_lookbehind", "temperature", "top_k", "top_p", "typical_p"),
    ),
}
# Fields that any config.json may have, with the values that leave the model as its family has it.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "is_encoder_decoder": (False,),
    "add_cross_attention": (False,),
    "cross_attention_hidden_size": (None,),
    "tie_encoder_decoder": (False,),
    "pruned_heads": ({}, None),
    "per_layer_config": (None, {}),
    "quantization_config": (None,),
    "auto_map": (None,),  # transformers would run the folder's own code
    "sliding_window": (None,),
    "use_sliding_window": (False,),
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "pretraining_tp": (1,),  # parts of split matrix products, in transformers before 4.50
    "rope_interleaved": (False,),  # pairs of neighbours, as nanotron has them
    "use_mrope": (False,),  # RoPE of images
}
# Fields of ModelConfig that do not change what a model's weights compute.
IMPLEMENTATION = ("dtype", "attention", "unroll", "remat", "init_std")


class TensorMapping(NamedTuple):
    """One of our parameters and its tensor in a Hugging Face folder."""

    name: str  # "blocks.attention.q.w"
    hf_name: str  # "model.layers.{}.self_attn.q_proj.weight"; {} is the layer
    transposed: bool = False  # Hugging Face stores outputs first, [O,I]
    part: tuple[int, int] = (0, 1)  # i, n: ours is the i-th of n equal parts of its last dim
    swapped: int = 0  # K: the halves of each K outputs are exchanged, for RoPE that turns backwards
    offset: float = 0.0  # what ours is larger by; 1 for norms that multiply by 1 + w

    def to_stored(self, x: np.ndarray) -> np.ndarray:
        """Returns the values that Hugging Face stores for ours; outputs are the last dim."""
        x = self.swap(x)
        return x - np.asarray(self.offset, x.dtype) if self.offset else x

    def from_stored(self, x: np.ndarray) -> np.ndarray:
        """Undoes to_stored, up to rounding."""
        x = self.swap(x)
        return x + np.asarray(self.offset, x.dtype) if self.offset else x

    def swap(self, x: np.ndarray) -> np.ndarray:
        """Exchanges the halves of each `swapped` outputs, the last dim; its own inverse."""
        if not self.swapped:
            return x
        halves = x.reshape(*x.shape[:-1], -1, 2, self.swapped // 2)
        return halves[..., ::-1, :].reshape(x.shape)


class Part(NamedTuple):
    """Fields that one name and one value do not express, such as those of RoPE."""

    fields: tuple[str, ...]  # of ModelConfig
    read: Callable[[ConfigReader, dict[str, Any]], dict[str, Any]]  # gets the sizes read so far
    write: Callable[[ModelConfig], dict[str, Any]]


@dataclass(frozen=True, kw_only=True)
class Family:
    """How one transformers architecture describes and stores a model.

    The family does not have those fields of ModelConfig that neither `fields`, `requires`, `unused`
    nor a part names. They must have ModelConfig's defaults.
    """

    model_type: str  # as config.json names it
    architecture: str
    tensors: Callable[[ModelConfig], Iterator[TensorMapping]]
    prefix: str  # of tensor names; files of the model without its head leave it out
    buffers: tuple[str, ...]  # endings of tensors that are not parameters

    fields: Mapping[str, str]  # field of config.json -> field of ModelConfig, read and written
    # Field of ModelConfig -> its value, or a function that computes it from the other fields.
    requires: Mapping[str, Any]
    # Field of config.json -> the values that compute the same; the first is the default.
    fixed: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    # Value of a field that is missing, as the class in transformers has it. Others must be given.
    absent: Mapping[str, Any] = field(default_factory=dict)
    # Value of a field that is null, computed from the other fields of ModelConfig. It is also that
    # of a missing field which `absent` does not name.
    null: Mapping[str, Callable[[Any], Any]] = field(default_factory=dict)
    spellings: Mapping[str, tuple[str, ...]] = field(default_factory=dict)  # further names
    ignored: tuple[str, ...] = ()  # besides IGNORED
    parts: tuple[Part, ...] = ()
    unused: tuple[str, ...] = ()  # fields of ModelConfig that have no effect in these models
    # Returns what transformers does not accept, although each field's value is one of the family's.
    limits: Callable[[ModelConfig], list[str]] = lambda cfg: []


def read_model(family: Family, config: dict[str, Any], source: Any) -> ModelConfig:
    """Returns the model that a family's config.json describes.

    Every field is used, checked to have the value that jaxtrain computes, or one of IGNORED.

    Raises:
        InteropError: with all fields for which none of these is true, and their values.
    """
    reader = ConfigReader(config)
    values: dict[str, Any] = {k: x for k, x in family.requires.items() if not callable(x)}
    for name, ours in family.fields.items():
        default = family.absent.get(name, MISSING)
        if name in family.null and (default is MISSING or reader.look(name) is None):
            default = None
        spellings = (name, *family.spellings.get(name, ()))
        kind = KINDS[type(getattr(ModelConfig, ours))]
        values[ours] = reader.take(*spellings, kind=kind, default=default)
    for name, compute in family.null.items():
        if values[family.fields[name]] is None:
            values[family.fields[name]] = compute(SimpleNamespace(**values))
    for part in family.parts:
        values |= part.read(reader, values)
    for name, accepted in family.fixed.items():
        reader.expect(name, *accepted)
    reader.expect("model_type", family.model_type)
    reader.ignore(["architectures", *family.ignored])
    for names in IGNORED.values():
        reader.ignore(names)
    for name, accepted in NEUTRAL.items():
        if not reader.has_read(name):
            reader.expect(name, *accepted)
    for ours, compute in family.requires.items():
        if callable(compute):
            values[ours] = compute(SimpleNamespace(**values))
    reader.finish(family.architecture, source)
    cfg = ModelConfig(**values, dtype="float32")
    reader.faults += family.limits(cfg)
    reader.finish(family.architecture, source)
    return cfg


def write_config(family: Family, cfg: ModelConfig) -> dict[str, Any]:
    """Returns the config.json of a model, which must have no `differences` from the family."""
    config = {"architectures": [family.architecture], "model_type": family.model_type}
    config |= {name: getattr(cfg, ours) for name, ours in family.fields.items()}
    config |= {name: accepted[0] for name, accepted in family.fixed.items()}
    for part in family.parts:
        config |= part.write(cfg)
    return config


def differences(family: Family, cfg: ModelConfig) -> list[str]:
    """Returns the fields of a model that a family does not have, with the values that it has."""
    expressed = {*family.fields.values(), *(name for p in family.parts for name in p.fields)}
    faults = []
    for name in (f.name for f in dataclasses.fields(cfg)):
        free = name in (*IMPLEMENTATION, *family.unused) or name in expressed
        if free and name not in family.requires:
            continue
        value = family.requires.get(name, getattr(ModelConfig, name))
        value = value(cfg) if callable(value) else value
        if not same_value(getattr(cfg, name), value):
            faults.append(f"model.{name}={getattr(cfg, name)!r} (must be {value!r})")
    return faults + family.limits(cfg)
