"""The model section of a TrainConfig: the fields that define the transformer."""

from dataclasses import dataclass

from jaxtrain.config.fields import Section, knob

INITIALISED = ("embed", "positions", "q", "k", "v", "o", "gate", "up", "down", "head")


def _to_float(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return float("nan")


@dataclass(frozen=True)
class ModelConfig(Section):
    PREFIX = "model."

    L: int = knob(4, "number of transformer layers", low=1)
    D: int = knob(256, "model width: size of the residual stream", low=1)
    H: int = knob(4, "number of query heads", low=1)
    G: int = knob(4, "number of key/value heads; fewer than H is grouped-query attention", low=1)
    K: int = knob(64, "width of each head", low=1)
    F: int = knob(768, "hidden width of the feed-forward block", low=1)
    V: int = knob(256, "number of vocabulary entries", low=2)
    norm: str = knob("rms", "kind of normalisation", choices=("rms", "layer"))
    norm_eps: float = knob(1e-6, "constant added to the mean square or variance in a norm", low=0.0)
    position: str = knob("rope", "kind of position embedding", choices=("rope", "learned"))
    rope_theta: float = knob(10_000.0, "base of RoPE's wavelengths", low=1.0)
    rope_fraction: float = knob(
        1.0,
        "fraction of each head's pairs of entries that RoPE rotates, the first ones; the others "
        "ignore the position (0.5 is half-truncated RoPE)",
        low=0.0,
        high=1.0,
    )
    rope_scaling: str = knob(
        "none",
        "how RoPE's wavelengths are lengthened: linear, all by rope_factor; llama3, only the long "
        "ones",
        choices=("none", "linear", "llama3"),
    )
    rope_factor: float = knob(1.0, "factor that rope_scaling lengthens wavelengths by", low=1.0)
    rope_low_freq: float = knob(
        1.0,
        "llama3: a wavelength that turns fewer times than this in rope_original_positions is "
        "lengthened by the whole rope_factor",
        low=0.0,
    )
    rope_high_freq: float = knob(
        4.0,
        "llama3: a wavelength that turns more often than this in rope_original_positions is not "
        "lengthened",
        low=0.0,
    )
    rope_original_positions: int = knob(
        8_192, "llama3: length of the sequences before scaling", unit="tokens", low=1
    )
    rope_local_theta: float = knob(
        0.0,
        "base of the wavelengths in layers with a window, which are then never scaled; 0 uses "
        "rope_theta and rope_scaling",
        low=0.0,
    )
    nope_every: int = knob(0, "layers n, 2n, ... have no RoPE; 0 gives all layers RoPE", low=0)
    window: int = knob(
        0,
        "how many of the last tokens, itself included, a token attends to; 0 is all of them",
        unit="tokens",
        low=0,
    )
    global_every: int = knob(
        0, "layers n, 2n, ... have no window; 0 gives all layers the window", low=0
    )
    positions: int = knob(1_024, "longest sequence with position=learned", unit="tokens", low=1)
    norm_place: str = knob(
        "pre",
        "normalise the input of each attention and MLP (pre), its output (post) or both",
        choices=("pre", "post", "both"),
    )
    norm_gain: bool = knob(True, "multiply the result of every norm by learned gains")
    mlp: str = knob(
        "swiglu",
        "kind of feed-forward block",
        choices=("swiglu", "geglu", "gelu", "relu2"),
    )
    qk_norm: bool = knob(False, "RMS-normalise the queries and keys of attention")
    qk_norm_gain: bool = knob(
        True, "give qk_norm learned gains, too; without model.norm_gain no norm has any"
    )
    qk_norm_over: str = knob(
        "head",
        "what qk_norm normalises together: the entries of each head, or of all heads",
        choices=("head", "all"),
    )
    attention_scale: float = knob(
        0.0, "factor of the attention scores, queries x keys; 0 uses 1/sqrt(K)", low=0.0
    )
    attention_softcap: float = knob(
        0.0, "c of the soft-cap c*tanh(s/c) of each attention score s; 0 turns it off", low=0.0
    )
    embed_scale: float = knob(1.0, "factor of the token embeddings", low=1e-6)
    embed_norm: bool = knob(False, "normalise the embeddings before the first layer")
    tied: bool = knob(False, "use the embedding as the output head, too")
    head_bias: bool = knob(False, "add a learned bias to the logits")
    bias: bool = knob(False, "add biases to every projection and, with norm=layer, to the norms")
    attention_bias: str = knob(
        "none",
        "which projections of attention have a bias without model.bias: none, those of query, key "
        "and value, or all four",
        choices=("none", "qkv", "all"),
    )
    logit_softcap: float = knob(0.0, "c of the soft-cap c*tanh(logits/c); 0 turns it off", low=0.0)
    logit_softcap_form: str = knob(
        "tanh",
        "form of that soft-cap of a logit x: tanh, c*tanh(x/c); or sqrt, c*x/sqrt(x^2 + c^2)",
        choices=("tanh", "sqrt"),
    )
    init_std: str = knob(
        "",
        "standard deviations of initial weights, as 'embed=1,o=0,down=0'; any of "
        f"{', '.join(INITIALISED)}; those not named follow the rules of "
        "jaxtrain/model/initialization.py",
    )
    dtype: str = knob(
        "bfloat16",
        "type of activations and matrix products; auto is bfloat16 on chips with fast bfloat16 "
        "products, else float32; stored parameters are float32, or float64 with float64",
        choices=("auto", "bfloat16", "float32", "float64"),
    )
    attention: str = knob(
        "auto",
        "attention implementation; auto chooses the fastest for the chip",
        choices=("auto", "reference", "blocked", "blocked_wide", "cudnn", "flash"),
    )
    unroll: int = knob(0, "layers per scan iteration; 0 chooses the chip's best value", low=0)
    remat: str = knob(
        "none",
        "activations to recompute in the backward pass instead of storing them: none, all but "
        "results of products and attention (dots), all but attention's, or all of a layer (full); "
        "auto is the first of none, attention and full that fits the device's memory",
        choices=("auto", "none", "dots", "attention", "full"),
    )

    def __post_init__(self):
        super().__post_init__()
        if self.bias and self.attention_bias != "none":
            self.fail("attention_bias", "must be 'none' with model.bias=true, which includes it")
        for field in ("global_every", "rope_local_theta"):
            if getattr(self, field) and not self.window:
                self.fail(field, "must be 0 without a window (model.window)")
        for field in ("rope_local_theta", "nope_every"):
            if getattr(self, field) and self.position != "rope":
                self.fail(field, f"must be 0 with model.position={self.position}")
        if 0 < self.rope_local_theta < 1:
            self.fail("rope_local_theta", "must be 0 or at least 1")
        if self.rope_scaling != "none" and self.position != "rope":
            self.fail("rope_scaling", f"must be 'none' with model.position={self.position}")
        if self.rope_scaling == "none" and self.rope_factor != 1:
            self.fail("rope_factor", "must be 1 unless model.rope_scaling is linear or llama3")
        if self.rope_high_freq <= self.rope_low_freq:
            self.fail("rope_high_freq", f"must exceed model.rope_low_freq={self.rope_low_freq}")
        if self.qk_norm_over == "all" and not self.qk_norm:
            self.fail("qk_norm_over", "must be 'head' with model.qk_norm=false")
        if not (self.qk_norm_gain or self.qk_norm):
            self.fail("qk_norm_gain", "must be true with model.qk_norm=false")
        if self.logit_softcap_form != "tanh" and not self.logit_softcap:
            self.fail("logit_softcap_form", "must be 'tanh' without model.logit_softcap")
        if self.position != "rope" and self.rope_fraction != 1:
            self.fail("rope_fraction", f"must be 1 with model.position={self.position}")
        pairs = self.rope_fraction * self.K / 2
        if self.rope_fraction != 1 and not (pairs and pairs == self.rope_pairs):
            self.fail("rope_fraction", f"must be a multiple of 2/K, K={self.K}, and not 0")
        for name, std in self.initial_stds.items():
            if name not in INITIALISED or not 0 <= std < float("inf"):
                known = ", ".join(INITIALISED)
                self.fail("init_std", f"must be NAME=STD pairs joined by commas, of {known}")

    @property
    def has_gated_mlp(self) -> bool:
        """Whether the MLP multiplies `up` by an activation of a third matrix, `gate`."""
        return self.mlp in ("swiglu", "geglu")

    @property
    def initial_stds(self) -> dict[str, float]:
        """The standard deviations in init_std by name; NaN for one that is not a number."""
        pairs = (entry.partition("=") for entry in self.init_std.split(",") if entry.strip())
        return {name.strip(): _to_float(std) for name, _, std in pairs}

    @property
    def rope_pairs(self) -> int:
        """How many pairs of entries of each head RoPE rotates."""
        return round(self.rope_fraction * self.K / 2)
