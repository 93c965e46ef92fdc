"""TrainConfig: every knob of a run, with its type, default, unit and check. No JAX in here.

A config file in `configs/` returns `to_config_dict(TrainConfig())` with values set; flags override
it (`--model.L=6`); `freeze` turns it into the checked, frozen TrainConfig that code takes.
"""

import dataclasses
import difflib
import hashlib
import json
from dataclasses import dataclass, field

from ml_collections import ConfigDict

from jaxtrain.config.fields import INT64_MAX, Section, field_error, find_fault, knob
from jaxtrain.config.sections import (
    CheckpointConfig,
    DataConfig,
    ExportConfig,
    KernelsConfig,
    LossConfig,
    MeasureConfig,
    MeshConfig,
    ModelConfig,
    OptimConfig,
    ProfileConfig,
    SampleConfig,
)

MAX_FIELDS = 100


@dataclass(frozen=True)
class TrainConfig(Section):
    """A whole run. Sections check themselves; facts across sections are checked here."""

    seed: int = knob(0, "of initialisation and data order", low=0, high=2**31 - 1)
    steps: int = knob(200, "optimizer steps", unit="steps", low=1)
    workdir: str = knob("runs/default", "folder of the run; a checkpoint in it is resumed")
    weights: str = knob(
        "", "Hugging Face folder or llm.c file to start from; a checkpoint in workdir comes first"
    )
    accumulation: int = knob(1, "microbatches a step", low=1)
    log_every: int = knob(10, "between logged steps", unit="steps", low=1)
    eval_every: int = knob(0, "between evaluations; 0 is at the end only", unit="steps", low=0)
    eval_tokens: int = knob(
        1 << 20,
        "held-out tokens an evaluation reads, at most those that the run trains on; 0 is all",
        unit="tokens",
        low=0,
        high=INT64_MAX,
    )
    save_every: int = knob(100, "between checkpoints; the last step is always one", low=1)
    keep_last: int = knob(2, "newest checkpoints kept", low=1)
    keep_every: int = knob(
        0, "checkpoints at multiples are kept too; 0 is none", unit="steps", low=0
    )
    diagnose_every: int = knob(
        0,
        "between diagnoses of the optimizer, each at the price of about two steps; 0 is never",
        unit="steps",
        low=0,
    )
    max_bad_steps: int = knob(10, "skipped steps in a row that stop the run", unit="steps", low=1)
    strict: bool = knob(False, "a slower fallback is an error")
    deterministic: bool = knob(False, "bitwise repeatable on GPU, slower")
    compile_cache: str = knob("~/.cache/jaxtrain/xla", "compiled programs kept; empty is none")
    model: ModelConfig = field(default_factory=ModelConfig)
    kernels: KernelsConfig = field(default_factory=KernelsConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    sample: SampleConfig = field(default_factory=SampleConfig)
    measure: MeasureConfig = field(default_factory=MeasureConfig)
    profile: ProfileConfig = field(default_factory=ProfileConfig)
    export: ExportConfig = field(default_factory=ExportConfig)

    def __post_init__(self):
        super().__post_init__()
        model, data, optim = self.model, self.data, self.optim
        if not self.workdir.strip():
            self.fail("workdir", "must name a folder")
        if model.H % model.G:
            model.fail("G", f"must divide model.H={model.H}")
        if model.position == "rope" and model.K % 2:
            model.fail("K", "must be even with position=rope")
        if model.position == "learned" and data.seq_len > model.positions:
            data.fail("seq_len", f"must be at most model.positions={model.positions}")
        if optim.ns_dtype == "float64" and model.dtype != "float64":
            optim.fail("ns_dtype", f"needs model.dtype=float64, not {model.dtype}")
        if data.batch % self.accumulation:
            data.fail("batch", f"must be a multiple of accumulation={self.accumulation}")
        if [self.mesh.replica, self.mesh.fsdp, self.mesh.tensor].count(-1) > 1:
            self.mesh.fail("fsdp", "may be -1 only where no other axis is")
        for name in ("replica", "fsdp", "tensor"):
            if getattr(self.mesh, name) == 0:
                self.mesh.fail(name, "must be positive or -1")


def to_config_dict(config) -> ConfigDict:
    """The mutable, type-safe form for config files and flags; `optim.total_steps` follows steps."""
    config_dict = ConfigDict(dataclasses.asdict(config))
    config_dict.optim.total_steps = config_dict.get_oneway_ref("steps")
    return config_dict


def freeze(values, cls=TrainConfig):
    """Checked, frozen form of a ConfigDict or plain nested dict.

    Raises:
        ValueError: a key is unknown (the nearest is named), or a value fails its check.
    """
    fields = {f.name: f for f in dataclasses.fields(cls)}
    prefix = getattr(cls, "PREFIX", "")
    kwargs = {}
    for key in values:
        if key not in fields:
            near = difflib.get_close_matches(key, fields, 1, cutoff=0.4)
            hint = f" Did you mean {prefix}{near[0]}?" if near else ""
            raise ValueError(f"config has no field {prefix}{key}.{hint} --help lists them all.")
        # Before the sections: their values may follow this one, as optim.total_steps does steps.
        if what := find_fault(fields[key], values[key]):
            raise field_error(cls, key, what, values[key])
    for key in values:
        nested = dataclasses.is_dataclass(fields[key].type)
        kwargs[key] = freeze(values[key], fields[key].type) if nested else values[key]
    return cls(**kwargs)


def to_dict(config) -> dict:
    """Plain nested dict, as `freeze` takes it."""
    return dataclasses.asdict(config)


def flatten(config) -> dict:
    """`{"model.L": 4, ...}`, every leaf by its flag's name."""
    flat = {}
    for key, value in dataclasses.asdict(config).items():
        nested = value if isinstance(value, dict) else None
        flat |= {f"{key}.{k}": v for k, v in nested.items()} if nested else {key: value}
    return flat


def describe_changes(stored: dict, config) -> list[str]:
    """`optim.learning_rate 0.02, was 0.01` of each field that is not as in an earlier `flatten`."""
    return [
        f"{name} {value!r}, was {repr(stored[name]) if name in stored else 'not known'}"
        for name, value in flatten(config).items()
        if name not in stored or stored[name] != value
    ]


def config_hash(config) -> str:
    """12 hex digits that name what is trained; where it goes and who looks on do not count."""
    return _hash(config, "checkpoint.storage", "measure.", "profile.", "export.")


def start_hash(config) -> str:
    """12 hex digits of all that processes of one run must be started alike with."""
    return _hash(config)


def _hash(config, *without) -> str:
    without = ("workdir", "compile_cache", *without)  # folders may be named otherwise elsewhere
    values = {k: v for k, v in flatten(config).items() if not k.startswith(without)}
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:12]
