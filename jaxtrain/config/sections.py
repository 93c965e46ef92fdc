"""The sections of a TrainConfig: each checks its own values. No JAX in here."""

from dataclasses import dataclass

from jaxtrain.config.fields import INT64_MAX, Section, knob


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
        "compute type; auto is bfloat16 where the chip multiplies it fast, else float32; masters "
        "are float32, or float64 with float64",
        choices=("auto", "bfloat16", "float32", "float64"),
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
        64 << 20,
        "most float32 logits held at once on a device",
        unit="bytes",
        low=1_024,
        high=INT64_MAX,
    )


@dataclass(frozen=True)
class DataConfig(Section):
    PREFIX = "data."

    text: str = knob("", "text: file or folder; empty is Python's own standard library")
    text_field: str = knob("text", "key or column of the text, where data.text is JSON or tables")
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
    adam_eps: float = knob(1e-8, "added to the root of AdamW's second moment", low=1e-30)
    clip_norm: float = knob(1.0, "largest global gradient norm; 0 never clips", low=0.0)
    schedule: str = knob("wsd", "rate after warm-up", choices=("wsd", "cosine", "constant"))
    warmup_steps: int = knob(10, "linear rise from 0", unit="steps", low=0)
    noise_scale: float = knob(0.0, "heavy-tailed noise, of the first gradient's RMS", low=0.0)
    noise_tail: float = knob(1.5, "its tail index; 2 and less have no variance", low=1.01)
    total_steps: int = knob(200, "where the schedule ends; follows steps", unit="steps", low=1)
    decay_fraction: float = knob(0.4, "wsd: last share of the run that decays", low=0.0, high=1.0)
    final_scale: float = knob(0.0, "rate at the end, of the peak", low=0.0, high=1.0)

    def __post_init__(self):
        super().__post_init__()
        if self.acceleration == "ema_lookahead" and self.strength == 1:
            self.fail("strength", "must be below 1 with optim.acceleration=ema_lookahead")


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
class MeasureConfig(Section):
    """What is measured beside the training; no value changes what is trained."""

    PREFIX = "measure."

    phases: bool = knob(False, "time forward, backward, optimizer and exchange alone, once")
    details: bool = knob(
        False, "print at start what config.json holds: routes, optimizer groups, what is measured"
    )


@dataclass(frozen=True)
class ProfileConfig(Section):
    PREFIX = "profile."

    steps: int = knob(0, "steps to trace after warm-up into workdir/profile; 0 is none", low=0)


@dataclass(frozen=True)
class ExportConfig(Section):
    PREFIX = "export."

    port: int = knob(0, "of the newest metrics for Prometheus; 0 is none", low=0, high=65_535)
    address: str = knob("127.0.0.1", "that it listens on; 0.0.0.0 is every network")
