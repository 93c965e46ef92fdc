"""TrainConfig: every field of a run, with its type, default, unit and check.

A config file in `configs/` returns `to_config_dict(TrainConfig())` with some values set; flags
override them (`--model.L=6`); `freeze` turns it into the checked, frozen TrainConfig for the code.
This module and its sections do not import JAX.
"""

import dataclasses
import difflib
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar, overload

from ml_collections import ConfigDict

from jaxtrain.config.data_section import DataConfig
from jaxtrain.config.fields import INT64_MAX, Section, field_error, find_fault, knob
from jaxtrain.config.model_section import ModelConfig
from jaxtrain.config.run_sections import (
    CheckpointConfig,
    EvalConfig,
    ExportConfig,
    MeasureConfig,
    MeshConfig,
    NotifyConfig,
    ProfileConfig,
    SampleConfig,
    SitesConfig,
)
from jaxtrain.config.sections import (
    NORM_PRESERVING,
    KernelsConfig,
    LossConfig,
    OptimConfig,
)

REPORT_SECTIONS = ("eval.", "measure.", "profile.", "export.", "notify.")  # change no weights
NOT_MATRICES = ("embed", "positions", "head")  # names in model.init_std that are no hidden matrices
MAX_FIELDS = 162  # a test enforces it
SectionType = TypeVar("SectionType", bound=Section)


@dataclass(frozen=True)
class TrainConfig(Section):
    """All fields of a run. Sections check their own values; this class checks across them."""

    seed: int = knob(0, "seed of the initial weights and of the data order", low=0)
    steps: int = knob(200, "optimizer steps of the run", unit="steps", low=1)
    workdir: str = knob("runs/default", "folder of the run, which resumes from a checkpoint in it")
    weights: str = knob(
        "",
        "weights to start from, unless workdir has a checkpoint: a Hugging Face folder, an llm.c "
        "file, a run's folder, or its checkpoints/STEP; the optimizer may differ from that run's",
    )
    accumulation: int = knob(1, "microbatches that a step's batch is split into", low=1)
    log_every: int = knob(10, "steps from one logged step to the next", unit="steps", low=1)
    eval_every: int = knob(
        0, "steps from one evaluation to the next; 0 evaluates at the end only", unit="steps", low=0
    )
    eval_from: int = knob(
        0,
        "first step that eval_every applies to: set it to evaluate often only near the end",
        unit="steps",
        low=0,
    )
    eval_tokens: int = knob(
        1 << 20,
        "held-out tokens that an evaluation reads, at most as many as the run trains on; 0 reads "
        "all",
        unit="tokens",
        low=0,
        high=INT64_MAX,
    )
    save_every: int = knob(
        100,
        "steps from one checkpoint to the next; the last step is always saved",
        unit="steps",
        low=1,
    )
    keep_last: int = knob(2, "number of newest checkpoints to keep", unit="checkpoints", low=1)
    keep_every: int = knob(
        0, "also keep the checkpoints at multiples of this step; 0 keeps none", unit="steps", low=0
    )
    diagnose_every: int = knob(
        0,
        "steps from one diagnosis of the optimizer to the next, each of which takes about as long "
        "as two steps; 0 makes none",
        unit="steps",
        low=0,
    )
    max_bad_steps: int = knob(
        10, "stop after this many non-finite steps in a row; each is skipped", "steps", low=1
    )
    strict: bool = knob(False, "raise an error instead of using a slower fallback")
    deterministic: bool = knob(
        False,
        "exclude XLA's operations whose results vary between runs on GPUs; slower ones replace "
        "them. Another compilation may still round differently: keep compile_cache",
    )
    compile_cache: str = knob(
        "~/.cache/jaxtrain/xla",
        "folder that stores compiled programs for later starts; empty stores none",
    )
    model: ModelConfig = field(default_factory=ModelConfig)
    kernels: KernelsConfig = field(default_factory=KernelsConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    sites: SitesConfig = field(default_factory=SitesConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    sample: SampleConfig = field(default_factory=SampleConfig)
    measure: MeasureConfig = field(default_factory=MeasureConfig)
    profile: ProfileConfig = field(default_factory=ProfileConfig)
    export: ExportConfig = field(default_factory=ExportConfig)
    notify: NotifyConfig = field(default_factory=NotifyConfig)

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
        if optim.parametrisation == "spectral" and not model.norm_gain:
            if model.tied or model.norm_place != "pre":  # these gains have the factors of size
                reason = "must be true with optim.parametrisation=spectral unless model.tied=false"
                model.fail("norm_gain", f"{reason} and model.norm_place=pre")
        if model.init_std and optim.parametrisation != "standard":
            model.fail(
                "init_std", f"must be empty with optim.parametrisation={optim.parametrisation}"
            )
        zero = [n for n, std in model.initial_stds.items() if not std and n not in NOT_MATRICES]
        if zero and optim.name in NORM_PRESERVING:
            reason = (
                f"must not be 0 for {', '.join(zero)} with optim.name={optim.name}, as a matrix"
            )
            model.fail("init_std", f"{reason} that keeps a norm of 0 never moves")
        if data.batch % self.accumulation:
            data.fail("batch", f"must be a multiple of accumulation={self.accumulation}")
        if data.batch_schedule:
            self._check_batch_schedule()
        if [self.mesh.replica, self.mesh.fsdp, self.mesh.tensor].count(-1) > 1:
            self.mesh.fail("fsdp", "may be -1 only if no other axis is")
        for name in ("replica", "fsdp", "tensor"):
            if getattr(self.mesh, name) == 0:
                self.mesh.fail(name, "must be positive or -1")
        if self.sites.period:
            self._check_sites()

    @property
    def microbatch(self) -> int:
        """The number of sequences that a step computes at once, on all devices together."""
        return self.data.batch // self.accumulation

    def _check_batch_schedule(self) -> None:
        """Raises ValueError if a size is not a whole number of microbatches."""
        for phase in self.data.sizes.phases:
            if phase.sequences % self.microbatch:
                reason = f"must have multiples of data.batch / accumulation = {self.microbatch}"
                self.data.fail("batch_schedule", f"{reason}, unlike {phase.sequences}")
        if self.sites.period:
            reason = "must be empty with sites.period: sites count their steps by equal sizes"
            self.data.fail("batch_schedule", reason)

    def _check_sites(self) -> None:
        """Raises ValueError if several sites could not train together with this config."""
        sites, optim = self.sites, self.optim
        if sites.fragments > sites.period:
            sites.fail("fragments", f"must be at most sites.period={sites.period}")
        if sites.delay >= sites.period:
            sites.fail("delay", f"must be below sites.period={sites.period}")
        if sites.blend and not sites.delay:
            sites.fail("blend", "must be 0 with sites.delay=0, where all continue from the result")
        if optim.tail_average:
            optim.fail("tail_average", "must be 0 with sites.period, as it would differ by site")
        if optim.name == "muown":  # its state repeats the rows' lengths
            optim.fail("name", "must not be muown with sites.period, as it stores lengths of rows")
        if self.model.dtype == "float64":
            self.model.fail("dtype", "must not be float64 with sites.period: sites send float32")


def to_config_dict(config: TrainConfig) -> ConfigDict:
    """Returns the mutable form for config files and flags, in which types are checked.

    `optim.total_steps` is a reference to `steps` until it is set itself.
    """
    config_dict = ConfigDict(dataclasses.asdict(config))
    optim: Any = config_dict.optim
    optim.total_steps = config_dict.get_oneway_ref("steps")
    return config_dict


@overload
def freeze(values: Any) -> TrainConfig: ...
@overload
def freeze(values: Any, cls: type[SectionType]) -> SectionType: ...
def freeze(values: Any, cls: type = TrainConfig) -> Any:
    """Returns the checked, frozen form of a ConfigDict or of a plain nested dict.

    Raises:
        ValueError: a key is unknown (the error names the nearest), or a value fails its check.
    """
    fields = {f.name: f for f in dataclasses.fields(cls)}
    prefix = getattr(cls, "PREFIX", "")
    for key in values:
        if key not in fields:
            near = difflib.get_close_matches(key, fields, 1, cutoff=0.4)
            hint = f" Did you mean {prefix}{near[0]}?" if near else ""
            raise ValueError(f"config has no field {prefix}{key}.{hint} --help lists them all.")
        # Checked before the sections are built, so that the error names the field that was set, not
        # one that is derived from it: optim.total_steps is a reference to steps.
        if reason := find_fault(fields[key], values[key]):
            raise field_error(cls, key, reason, values[key])
    arguments = {}
    for key in values:
        is_section = dataclasses.is_dataclass(fields[key].type)
        section: Any = fields[key].type
        arguments[key] = freeze(values[key], section) if is_section else values[key]
    return cls(**arguments)


def to_dict(config: TrainConfig) -> dict[str, Any]:
    """Returns the config as a plain nested dict, which `freeze` reads."""
    return dataclasses.asdict(config)


def flatten(config: TrainConfig) -> dict[str, Any]:
    """Returns {flag: value} of all fields: `{"seed": 0, "model.L": 4, ...}`."""
    flat = {}
    for key, value in dataclasses.asdict(config).items():
        section = isinstance(value, dict)
        flat |= {f"{key}.{k}": v for k, v in value.items()} if section else {key: value}
    return flat


def flatten_without(config: TrainConfig, names: Sequence[str]) -> dict[str, Any]:
    """Returns {flag: value} without the named fields and sections; `optim.` names a section."""
    sections = tuple(name for name in names if name.endswith("."))
    flat = flatten(config).items()
    return {k: v for k, v in flat if k not in names and not k.startswith(sections)}


def describe_changes(stored: Mapping[str, Any], config: TrainConfig) -> list[str]:
    """Returns a line for each field that differs: `optim.learning_rate 0.02, was 0.01`.

    Args:
        stored: the `flatten` of an earlier config. A field that it lacks did not exist yet; the
            default of a new field changes nothing.
    """
    stored = flatten(TrainConfig()) | dict(stored)
    return [
        f"{name} {value!r}, was {stored[name]!r}"
        for name, value in flatten(config).items()
        if stored[name] != value
    ]


def config_hash(config: TrainConfig) -> str:
    """Returns 12 hex digits that are equal for two configs if they train the same weights.

    Fields that set where results are written, or what is measured, are left out.
    """
    # Without several sites, sources or sizes, the hash is what it was before there were any.
    unused = [] if config.sites.period else ["sites."]
    unused += [] if config.data.batch_schedule else ["data.batch_schedule", "optim.batch_scaling"]
    unused += [] if config.data.mixture else ["data.mixture", "data.stages", "data.max_epochs"]
    return _hash(config, "checkpoint.storage", *REPORT_SECTIONS, *unused)


def start_hash(config: TrainConfig) -> str:
    """Returns 12 hex digits of all fields that must be equal on every process of a run."""
    return _hash(config)


def _hash(config: TrainConfig, *without: str) -> str:
    without = ("workdir", "compile_cache", *without)  # hosts may have these folders elsewhere
    values = flatten_without(config, without)
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:12]
