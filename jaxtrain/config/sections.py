"""The sections of a TrainConfig on kernels, loss and optimizer: each field and its bounds."""

from dataclasses import dataclass

from jaxtrain.config.fields import INT64_MAX, Section, knob

# What the rules of optim.parametrisation=spectral are known for.
SPECTRAL_CHOICES = {
    "name": ("muon", "accelerated_lmo", "adamw"),
    "geometry": ("spectral",),
    "per_head": (False,),
}
NORM_PRESERVING = "muon_h", "adam_h"  # values of optim.name whose matrices keep their norms
DECAY_GROUPS = ("matrices", "embedding", "positions", "head", "vectors")


@dataclass(frozen=True)
class KernelsConfig(Section):
    PREFIX = "kernels."

    strict: bool = knob(False, "raise an error if a fused kernel exists but cannot run")
    interpret: bool = knob(False, "run fused kernels without a GPU, slowly, op by op (for tests)")


@dataclass(frozen=True)
class LossConfig(Section):
    PREFIX = "loss."

    z_loss: float = knob(0.0, "weight of the z-loss, logsumexp(logits)^2", low=0.0)
    chunk_bytes: int = knob(
        64 << 20,
        "memory per device for the float32 logits that exist at one time",
        unit="bytes",
        low=1_024,
        high=INT64_MAX,
    )


@dataclass(frozen=True)
class OptimConfig(Section):
    PREFIX = "optim."

    name: str = knob(
        "muon",
        "optimizer of the hidden matrices",
        choices=(
            "muon",
            "normuon",
            "soap",
            "soap_muon",
            "accelerated_lmo",
            "muon_h",
            "adam_h",
            "muown",
            "adamw",
        ),
    )
    rest: str = knob(
        "adamw",
        "optimizer of embeddings, head and vectors; lmo takes unit steps in a norm",
        choices=("adamw", "lmo"),
    )
    learning_rate: float = knob(
        0.02,
        "peak learning rate of Muon and lmo; with muon_h and adam_h, the share of its norm that a "
        "matrix moves by in a step",
        low=0.0,
    )
    adam_learning_rate: float = knob(
        3e-3, "peak learning rate of AdamW's and SOAP's parameters", low=0.0
    )
    embedding_learning_rate: float = knob(
        0.0, "AdamW's peak rate for embeddings and positions; 0 is adam_learning_rate", low=0.0
    )
    head_learning_rate: float = knob(
        0.0, "AdamW's peak rate for the output head; 0 is adam_learning_rate", low=0.0
    )
    vector_learning_rate: float = knob(
        0.0, "AdamW's peak rate for biases and gains; 0 is adam_learning_rate", low=0.0
    )
    weight_decay: float = knob(0.0, "decoupled weight decay of optim.decay_groups", low=0.0)
    adam_weight_decay: float = knob(
        0.0,
        "weight decay of the decay_groups other than matrices, where AdamW steps them; 0 is "
        "weight_decay",
        low=0.0,
    )
    decay_groups: str = knob(
        "matrices,embedding,head",
        f"parameters that weight_decay applies to: any of {', '.join(DECAY_GROUPS)}, joined by "
        "commas; vectors are biases and gains of norms",
    )
    parametrisation: str = knob(
        "standard",
        "spectral also scales rates and initial values with the model's size, so that the best "
        "rates at base_width and base_depth stay the best",
        choices=("standard", "spectral"),
    )
    base_width: int = knob(256, "spectral: model.D at which it equals standard", low=1)
    base_depth: int = knob(4, "spectral: model.L at which it equals standard", low=1)
    cautious_decay: bool = knob(
        False, "apply weight_decay only to entries that the step moves towards zero"
    )
    momentum: float = knob(0.95, "decay of Muon's and SOAP's momentum", low=0.0, high=0.9999)
    nesterov: bool = knob(True, "use Nesterov momentum in Muon")
    geometry: str = knob(
        "spectral",
        "norm in which the matrices' steps are steepest descent",
        choices=("spectral", "sign", "column_norm", "row_norm", "frobenius"),
    )
    scale: str = knob(
        "spectral_max",
        "factor of the matrices' steps, in the order of the choices: sqrt(max(1, out/in)), "
        "sqrt(out/in), 0.2*sqrt(max(in, out)), 1",
        choices=("spectral_max", "spectral", "match_rms", "none"),
    )
    per_head: bool = knob(False, "orthogonalise the slice of each head separately")
    final_radius: float = knob(
        0.0,
        "muown: norm of a row's direction at the end of the run; the larger, the less a step turns "
        "the row; 0 keeps the row's norm at the start",
        low=0.0,
    )
    neuron_decay: float = knob(0.95, "normuon: decay of the second moment", low=0.0, high=0.9999)
    precondition_every: int = knob(
        10,
        "soap, soap_muon: steps from one update of the eigenbases to the next; soap_muon's source "
        "uses 1",
        unit="steps",
        low=1,
    )
    precondition_decay: float = knob(
        0.95,
        "soap, soap_muon: decay of the second moment and of the matrices whose eigenvectors are "
        "the bases; soap_muon's source uses 0.9",
        low=0.0,
        high=0.9999,
    )
    precondition_max_side: int = knob(
        10_000,
        "soap, soap_muon: a longer side of a matrix gets no eigenbasis, which bounds memory",
        low=1,
    )
    accelerated: bool = knob(
        False, "take gradients ahead of the weights; accelerated_lmo, which is muon, always does"
    )
    acceleration: str = knob(
        "transport",
        "accelerated: point at which the gradient is taken",
        choices=("transport", "ema_lookahead"),
    )
    strength: float = knob(
        0.25,
        "accelerated: how far ahead the gradient is taken, as a multiple of momentum/(1-momentum) "
        "last steps (transport) or of the averaged step (ema_lookahead, whose paper uses 0.6)",
        low=0.0,
        high=1.0,
    )
    lookahead_decay: float = knob(0.99, "ema_lookahead: decay of the average", low=0.0, high=0.9999)
    accelerate_all: bool = knob(False, "accelerated: include embeddings, head and vectors")
    tail_average: float = knob(
        0.0,
        "share of the run, at its end, whose weights are averaged for evaluation, sampling and "
        "export; 0 evaluates the last weights",
        low=0.0,
        high=1.0,
    )
    tail_horizon: int = knob(
        150, "horizon of the average: a step adds (weights - average) / tail_horizon", low=1
    )
    tail_weight: float = knob(
        1.0,
        "share of the average in the evaluated weights; the rest is the last weights",
        low=0.0,
        high=1.0,
    )
    narrow_buffers: bool = knob(False, "store momentum and acceleration in bfloat16")
    ns_coefficients: str = knob(
        "jordan",
        "coefficients of the Newton-Schulz polynomials; torch.optim.Muon uses jordan",
        choices=("jordan", "quintic", "convergent", "polar_express", "aol4"),
    )
    ns_steps: int = knob(0, "Newton-Schulz iterations; 0 is one per polynomial", low=0, high=20)
    ns_dtype: str = knob(
        "bfloat16",
        "type of the Newton-Schulz products; torch.optim.Muon uses bfloat16",
        choices=("bfloat16", "float32", "float64"),
    )
    ns_form: str = knob(
        "auto",
        "Newton-Schulz multiplies the matrix (standard) or its Gram matrix (gram); auto takes the "
        "cheaper; torch is standard with the roundings of torch.optim.Muon",
        choices=("auto", "standard", "gram", "torch"),
    )
    adam_b1: float = knob(0.9, "decay of AdamW's first moment", low=0.0, high=0.9999)
    adam_b2: float = knob(0.95, "decay of AdamW's second moment", low=0.0, high=0.99999)
    adam_eps: float = knob(
        1e-8, "constant added to the root of AdamW's and SOAP's second moment", low=1e-30
    )
    clip_norm: float = knob(1.0, "clip the gradient to this global norm; 0 never clips", low=0.0)
    clip_eps: float = knob(
        0.0,
        "constant added to the global norm before dividing by it; torch's clip_grad_norm_ adds "
        "1e-6",
        low=0.0,
    )
    schedule: str = knob(
        "wsd", "learning-rate schedule after warm-up", choices=("wsd", "cosine", "constant")
    )
    warmup_steps: int = knob(10, "steps of linear rise from 0 to the peak", unit="steps", low=0)
    batch_scaling: str = knob(
        "sqrt",
        "factor of all rates in a step of another size than data.batch: the ratio's square root, "
        "the ratio (linear), or 1 (none)",
        choices=("sqrt", "linear", "none"),
    )
    noise_scale: float = knob(
        0.0,
        "scale of heavy-tailed gradient noise, relative to the first gradient's RMS",
        low=0.0,
    )
    noise_tail: float = knob(
        1.5, "tail index of the noise; at 2 and below, its variance is infinite", low=1.01
    )
    total_steps: int = knob(
        200, "last step of the schedule; --steps unless set", unit="steps", low=1
    )
    decay_fraction: float = knob(0.4, "wsd: final fraction of steps that decay", low=0.0, high=1.0)
    final_scale: float = knob(0.0, "final rate as a fraction of the peak", low=0.0, high=1.0)

    def __post_init__(self):
        super().__post_init__()
        if self.acceleration == "ema_lookahead" and self.strength == 1:
            self.fail("strength", "must be below 1 with optim.acceleration=ema_lookahead")
        if self.ns_form == "torch" and self.ns_coefficients != "jordan":
            self.fail("ns_coefficients", "must be jordan with optim.ns_form=torch")
        if self.name == "soap_muon" and self.geometry != "spectral":
            self.fail("geometry", "must be spectral with optim.name=soap_muon")
        if set(self.decaying) - set(DECAY_GROUPS):
            known = ", ".join(DECAY_GROUPS)
            self.fail("decay_groups", f"must be some of {known}, joined by commas")
        if self.parametrisation == "spectral":
            for field, allowed in SPECTRAL_CHOICES.items():
                if getattr(self, field) not in allowed:
                    known = " or ".join(map(repr, allowed))
                    self.fail(field, f"must be {known} with optim.parametrisation=spectral")

    @property
    def adam_rates(self) -> dict[str, float]:
        """The peak rates under AdamW of embeddings, head and vectors, by role; 0 if not set."""
        roles = ("embedding", "head", "vector")
        return {role: getattr(self, f"{role}_learning_rate") for role in roles}

    @property
    def accelerates(self) -> bool:
        """Whether gradients are taken ahead of the weights."""
        return self.accelerated or self.name == "accelerated_lmo"

    @property
    def orthogonalizes(self) -> bool:
        """Whether the matrices' steps are computed by Newton-Schulz."""
        return self.geometry == "spectral" and self.name not in ("adamw", "adam_h", "soap")

    @property
    def decaying(self) -> list[str]:
        """The names in decay_groups."""
        return [name.strip() for name in self.decay_groups.split(",") if name.strip()]
