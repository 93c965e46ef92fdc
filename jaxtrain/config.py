"""TrainConfig: every knob of a run, with its type, default, unit and check. No JAX in here.

A config file in `configs/` returns `to_config_dict(TrainConfig())` with values set; flags override
it (`--config.model.L=6`); `freeze` turns it into the checked, frozen TrainConfig that code takes.
"""

import dataclasses
import difflib
import hashlib
import json
from dataclasses import dataclass, field

from ml_collections import ConfigDict

from jaxtrain.knobs import Section, knob

MAX_FIELDS = 100


@dataclass(frozen=True)
class ModelConfig(Section):
    PREFIX = "model."

    L: int = knob(4, "transformer layers", low=1)
    D: int = knob(256, "model width", low=1)
    H: int = knob(4, "query heads", low=1)
    G: int = knob(4, "key/value heads; fewer than H is grouped-query attention", low=1)
    K: int = knob(64, "width of a head", low=1)
    F: int = knob(768, "ffn width", low=1)
    V: int = knob(256, "vocabulary entries", low=2)
    norm: str = knob("rms", "normalisation", choices=("rms", "layer"))
    norm_eps: float = knob(1e-6, "added to the mean square", low=0.0)
    position: str = knob("rope", "how position enters", choices=("rope", "learned"))
    rope_theta: float = knob(10_000.0, "base of RoPE's wavelengths", low=1.0)
    positions: int = knob(1_024, "longest sequence of position=learned", unit="tokens", low=1)
    mlp: str = knob("swiglu", "ffn form", choices=("swiglu", "gelu", "relu2"))
    qk_norm: bool = knob(False, "RMS-normalise queries and keys per head")
    tied: bool = knob(False, "head shares the embedding")
    bias: bool = knob(False, "biases in every projection and, with norm=layer, the norms")
    logit_softcap: float = knob(0.0, "c in c*tanh(logits/c); 0 is none", low=0.0)
    dtype: str = knob(
        "bfloat16",
        "compute type; masters are float32, or float64 with float64",
        choices=("bfloat16", "float32", "float64"),
    )
    attention: str = knob(
        "auto",
        "attention's route",
        choices=("auto", "reference", "blocked", "blocked_wide", "cudnn", "flash"),
    )
    unroll: int = knob(0, "layers per scan iteration; 0 takes the chip's best", low=0)
    remat: str = knob(
        "none",
        "activations to recompute in backward",
        choices=("none", "dots", "attention", "full"),
    )


@dataclass(frozen=True)
class KernelsConfig(Section):
    PREFIX = "kernels."

    strict: bool = knob(False, "what has a fused kernel must run it; an error says why it cannot")
    interpret: bool = knob(False, "fused kernels run without a GPU, op by op and slowly: for tests")


@dataclass(frozen=True)
class LossConfig(Section):
    PREFIX = "loss."

    z_loss: float = knob(0.0, "weight of logsumexp(logits)^2", low=0.0)
    chunk_bytes: int = knob(
        64 << 20, "most float32 logits held at once on a device", unit="bytes", low=1_024
    )


@dataclass(frozen=True)
class DataConfig(Section):
    PREFIX = "data."

    text: str = knob("", "text file or folder; empty is Python's own standard library")
    shards: str = knob("", "token shards: folder, file or glob; empty encodes data.text")
    shard_format: str = knob(
        "auto", "what the shards are", choices=("auto", "llmc", "nanogpt", "megatron")
    )
    tokenizer: str = knob("bytes", "'bytes', 'gpt2' or the path of a tokenizer.json")
    val_fraction: float = knob(0.05, "share of data.text held out", low=0.0, high=0.5)
    batch: int = knob(8, "sequences a step, over all devices and microbatches", low=1)
    seq_len: int = knob(256, "tokens a sequence", unit="tokens", low=1)
    pack: bool = knob(False, "best-fit documents into sequences instead of cutting them")
    document_mask: bool = knob(False, "no attention across documents")
    eot: int = knob(
        -1, "token that starts a document in the shards; -1 asks their tokenizer", low=-1
    )
    prefetch: int = knob(2, "batches read ahead of the step; 0 reads in the loop", low=0)


@dataclass(frozen=True)
class OptimConfig(Section):
    PREFIX = "optim."

    name: str = knob(
        "muon",
        "optimizer of the matrices",
        choices=("muon", "normuon", "accelerated_lmo", "adamw"),
    )
    rest: str = knob(
        "adamw", "what embeddings, head and vectors follow; lmo: norms", choices=("adamw", "lmo")
    )
    learning_rate: float = knob(0.02, "peak rate of what follows a norm", low=0.0)
    adam_learning_rate: float = knob(3e-3, "peak rate of AdamW's parameters", low=0.0)
    weight_decay: float = knob(0.0, "decoupled decay of matrices and embeddings", low=0.0)
    momentum: float = knob(0.95, "Muon's momentum decay", low=0.0, high=0.9999)
    nesterov: bool = knob(True, "Muon mixes the gradient into its average once more")
    geometry: str = knob(
        "spectral",
        "norm of the matrices' steps",
        choices=("spectral", "sign", "column_norm", "row_norm", "frobenius"),
    )
    scale: str = knob(
        "spectral_max",
        "size of their steps: sqrt(max(1, out/in)), sqrt(out/in), 0.2*sqrt(max(in, out)), 1",
        choices=("spectral_max", "spectral", "match_rms", "none"),
    )
    per_head: bool = knob(False, "every head's slice is a matrix of its own")
    neuron_decay: float = knob(0.95, "normuon: decay of each output's square", low=0.0, high=0.9999)
    acceleration: str = knob(
        "transport",
        "accelerated_lmo: where the gradient is taken",
        choices=("transport", "ema_lookahead"),
    )
    strength: float = knob(
        0.25,
        "accelerated_lmo: transport is momentum/(1-momentum) steps ahead at 1; ema_lookahead "
        "that many averaged steps, its source's is 0.6",
        low=0.0,
        high=1.0,
    )
    lookahead_decay: float = knob(0.99, "ema_lookahead: of the averaged step", low=0.0, high=0.9999)
    accelerate_all: bool = knob(False, "accelerated_lmo: embeddings, head and vectors as well")
    narrow_buffers: bool = knob(False, "momentum and acceleration buffers in bfloat16")
    ns_coefficients: str = knob(
        "jordan",
        "Newton-Schulz polynomials; torch.optim.Muon's are jordan",
        choices=("jordan", "quintic", "polar_express", "aol4"),
    )
    ns_steps: int = knob(0, "Newton-Schulz iterations; 0 is as the table has", low=0, high=20)
    ns_dtype: str = knob(
        "bfloat16",
        "type of the Newton-Schulz products; torch.optim.Muon's is bfloat16",
        choices=("bfloat16", "float32", "float64"),
    )
    adam_b1: float = knob(0.9, "AdamW's first moment decay", low=0.0, high=0.9999)
    adam_b2: float = knob(0.95, "AdamW's second moment decay", low=0.0, high=0.99999)
    adam_eps: float = knob(1e-8, "added to the root of AdamW's second moment", low=0.0)
    clip_norm: float = knob(1.0, "largest global gradient norm; 0 never clips", low=0.0)
    schedule: str = knob("wsd", "rate after warm-up", choices=("wsd", "cosine", "constant"))
    warmup_steps: int = knob(10, "linear rise from 0", unit="steps", low=0)
    noise_scale: float = knob(0.0, "heavy-tailed noise, of the first gradient's RMS", low=0.0)
    noise_tail: float = knob(1.5, "its tail index; 2 and less have no variance", low=1.01)
    total_steps: int = knob(200, "where the schedule ends; follows steps", unit="steps", low=1)
    decay_fraction: float = knob(0.4, "wsd: last share of the run that decays", low=0.0, high=1.0)
    final_scale: float = knob(0.0, "rate at the end, of the peak", low=0.0, high=1.0)


@dataclass(frozen=True)
class MeshConfig(Section):
    PREFIX = "mesh."

    replica: int = knob(1, "copies of the parameters; -1 is the rest of the devices", low=-1)
    fsdp: int = knob(-1, "devices that share one copy; -1 is the rest", low=-1)
    tensor: int = knob(1, "devices that share each matrix product; -1 is the rest", low=-1)


@dataclass(frozen=True)
class CheckpointConfig(Section):
    PREFIX = "checkpoint."

    storage: str = knob(
        "shared", "workdir is one disk for all, or process 0's own", choices=("shared", "host0")
    )


@dataclass(frozen=True)
class SampleConfig(Section):
    PREFIX = "sample."

    prompt: str = knob("", "text to continue at the end of a run; empty takes held-out text")
    tokens: int = knob(256, "tokens to sample at the end of a run; 0 samples none", low=0)
    temperature: float = knob(0.7, "0 takes the likeliest token", low=0.0)
    top_k: int = knob(50, "likeliest tokens to draw from; 0 is all", low=0)


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

    def __post_init__(self):
        super().__post_init__()
        model, data = self.model, self.data
        if model.H % model.G:
            model.fail("G", f"must divide model.H={model.H}")
        if model.position == "rope" and model.K % 2:
            model.fail("K", "must be even with position=rope")
        if model.position == "learned" and data.seq_len > model.positions:
            data.fail("seq_len", f"must be at most model.positions={model.positions}")
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


def config_hash(config) -> str:
    """12 hex digits that name what is trained; where it is written does not count."""
    places = ("workdir", "compile_cache", "checkpoint.storage")
    values = {k: v for k, v in flatten(config).items() if k not in places}
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:12]
