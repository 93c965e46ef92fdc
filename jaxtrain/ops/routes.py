"""Chooses which implementation of each op runs, and records why.

The routes are stored with the run, and its start prints the unusual ones. This module checks
whether chip, mesh and model suit a fused kernel; fused.py calls the kernels.
"""

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from jaxtrain.config.model_section import ModelConfig
from jaxtrain.config.sections import KernelsConfig
from jaxtrain.ops import tuning
from jaxtrain.ops.cudnn import find_cudnn_obstacle
from jaxtrain.ops.devices import cpu_multiplies_bf16
from jaxtrain.ops.kernel_limits import model_obstacle, scoring_obstacle, size_obstacle
from pallas_kernels.kernel_choice import BodyChoice, choose_body, find_body_obstacle
from pallas_kernels.tiles import TILES, default_tiles

REQUESTED = "requested by"  # the reason begins with it if a flag selects the route
CHOSEN = "auto:"  # the reason begins with it if the device's memory decided
RULED_OUT = "no fused kernel"  # the reason contains it if the model's attention rules one out
# The most layers that are unrolled: more gain less than they cost to compile. A scan copies all
# that it stores; gpt_774m (36 layers) compiles for an H200 in 44 s, gpt_1558m in 32 (2 cores).
UNROLLED_LAYERS = {"cpu": 12, "gpu": 48}


@dataclass(frozen=True)
class Route:
    """One op's implementation; `fallback` marks one that is slower than the chip's best."""

    op: str
    implementation: str
    reason: str
    fallback: bool = False
    tiles: Any = None  # a fused kernel's tile sizes, in the kernel's own format

    @property
    def is_fused(self) -> bool:
        return self.implementation.startswith(("flash:", "fused:"))

    @property
    def is_interpreted(self) -> bool:
        return self.implementation.endswith(":interpret")

    @property
    def is_usual(self) -> bool:
        """Returns whether this is the platform's default, at full speed."""
        wide = self.implementation in ("blocked_wide", "cpu_wide")
        explained = any(text in self.reason for text in (REQUESTED, CHOSEN, RULED_OUT))
        return not (self.fallback or self.is_fused or wide or explained)

    def __str__(self) -> str:
        mark = "FALLBACK: " if self.fallback else ""
        return f"{self.op:<10} {self.implementation:<10} {mark}{self.reason}"


PREFIX = {"attention": "flash"}  # op -> first word of its fused implementation; default "fused"


@dataclass(frozen=True)
class _KernelRoutes:
    """Routes to fused kernels, for one model on one device and mesh."""

    model: ModelConfig
    kernels: KernelsConfig
    arch: str
    chip: str
    tensor: int
    seq_len: int
    sequences: int
    documents: bool

    def shape(self, op: str) -> tuple[int, ...]:
        """Returns the shape of an op on one device, as in the kernel's BenchRow."""
        model, parts = self.model, self.tensor
        split = lambda size: size if size % parts else size // parts
        return {
            "attention": (self.sequences, self.seq_len, split(model.H), split(model.G), model.K),
            "norm": (model.D,),
            "qk_rope": (model.K,),
            "gelu": (split(model.F),),
            "head": (model.D, split(model.V)),
            "square": (model.D,),
        }[op]

    def obstacle(self, op: str) -> str:
        """Returns why op's kernel cannot run; "" if it can."""
        model = self.model
        if not self.kernels.interpret and self.arch not in TILES:
            return f"it is compiled for {', '.join(TILES)}; got {self.arch or 'no GPU'}"
        narrowest = 1 if self.kernels.interpret else 16  # Triton's smallest product
        if obstacle := model_obstacle(op, model, self.tensor, narrowest):
            return obstacle
        if obstacle := size_obstacle(op, model, self.tensor, self.sequences * self.seq_len):
            return obstacle
        tiles = None if self.kernels.interpret else self.measured(op).tiles
        outputs = model.F, model.H * model.K, model.G * model.K  # of matrices with D inputs
        matrices = {(min(model.D, n), max(model.D, n)) for n in outputs}
        return find_body_obstacle(op, tiles, matrices)

    def requesting_flag(self, op: str) -> str:
        """Returns the flag that requests op's kernel however slow it is; "" if none does."""
        if op == "attention" and self.model.attention == "flash":
            return "model.attention=flash"
        if self.kernels.interpret:
            return "kernels.interpret"
        return "kernels.strict" if self.kernels.strict else ""

    def windows(self) -> list[int]:
        """Returns the different windows of the model's layers, of which 0, all tokens, is first."""
        model = self.model
        if not 0 < model.window < self.seq_len or model.global_every == 1:
            return [0]
        return [0, model.window] if 1 < model.global_every <= model.L else [model.window]

    def measured(self, op: str) -> BodyChoice:
        """Returns the choice of a body; of attention's, the first that is not faster, if any.

        All layers use the tiles of those without a window, which take the most time.
        """
        where = self.arch, self.chip, self.model.dtype, self.shape(op)
        if op != "attention":
            return choose_body(op, *where)
        windows = self.windows()
        masks: Any = {"documents": self.documents, "other_window": any(windows)}
        choices = [choose_body(op, *where, window=window, **masks) for window in windows]
        return min(choices, key=lambda choice: choice.faster)

    def fused(self, op: str) -> Route | None:
        """Returns the route to op's kernel; None if XLA's implementation should run."""
        flag, obstacle = self.requesting_flag(op), self.obstacle(op)
        if flag and obstacle:
            raise ValueError(
                f"{flag} needs fused {op}, which cannot run: {obstacle}. Set "
                "--kernels.strict=false --model.attention=auto, or "
                "--kernels.interpret=true to try it without a GPU."
            )
        name = PREFIX.get(op, "fused")
        if self.kernels.interpret:
            reason = "kernels.interpret: interpreted, for tests"
            return Route(op, f"{name}:interpret", reason, tiles=default_tiles(op, "sm_86"))
        other_attention = op == "attention" and self.model.attention not in ("auto", "flash")
        if obstacle or (other_attention and not flag):
            return None
        if not ((choice := self.measured(op)).faster or flag):
            return None
        reason = f"{REQUESTED} {flag}; {choice.reason}" if flag else choice.reason
        return Route(op, f"{name}:{self.arch}", reason, tiles=choice.tiles)

    def fused_or_plain(self, op: str, plain: str = "plain") -> Route:
        """Returns the route to op's kernel, or to `plain` with the reason against the kernel."""
        if (route := self.fused(op)) is None:
            reason = self.obstacle(op) or self.measured(op).reason
            return Route(op, plain, f"XLA; no kernel: {reason}")
        if op == "qk_rope" and self.model.nope_every:
            return dataclasses.replace(route, reason=f"{route.reason}; XLA's norm where no RoPE is")
        return route

    def fused_or_other_attention(self, choose_other: Callable[[], Route]) -> Route:
        """Returns the route to attention's kernel, or another and what rules the kernel out."""
        if route := self.fused("attention"):
            return route
        other, obstacle = choose_other(), scoring_obstacle(self.model)
        if not obstacle or self.arch not in TILES:
            return other
        return dataclasses.replace(other, reason=f"{other.reason}; {RULED_OUT}: {obstacle}")


def _attention(model, document_mask, platform, arch, tensor, no_cudnn) -> Route:
    obstacle = find_cudnn_obstacle(model, document_mask, platform, arch, tensor) or no_cudnn
    if model.attention == "cudnn" and obstacle:
        raise ValueError(
            f"model.attention=cudnn must be able to run, but {obstacle}. "
            "Set --model.attention=auto."
        )
    if model.attention != "auto":
        return Route("attention", model.attention, f"{REQUESTED} model.attention")
    if platform != "gpu":
        reason = f"{platform}: query blocks without masked keys, hand-written backward"
        if platform == "cpu" and not cpu_multiplies_bf16() and model.dtype == "bfloat16":
            return Route("attention", "blocked_wide", f"{reason}, float32 products")
        return Route("attention", "blocked", reason)
    if obstacle:
        return Route("attention", "reference", f"cuDNN's cannot run: {obstacle}", fallback=True)
    return Route("attention", "cudnn", "gpu: flash attention, never materialises [T,T]")


def _dense(model, platform) -> Route:
    if platform != "cpu":
        return Route("dense", "plain", f"{platform}: XLA's own product and backward")
    if model.dtype == "bfloat16" and not cpu_multiplies_bf16():
        reason = "cpu without bf16 products: float32 products of bf16 values"
        return Route("dense", "cpu_wide", reason)
    return Route("dense", "cpu", "cpu: float32 results and unflattened dW reach XLA's fast kernels")


def _layers(model, platform, chip) -> Route:
    if model.unroll:
        return Route("layers", f"unroll={model.unroll}", f"{REQUESTED} model.unroll")
    if platform == "cpu" and model.L <= UNROLLED_LAYERS["cpu"]:
        return Route("layers", f"unroll={model.L}", "cpu: a rolled scan costs 8-28 % of the step")
    if platform != "cpu" and model.remat in ("none", "auto") and model.L <= UNROLLED_LAYERS["gpu"]:
        reason = f"{platform}: a scan would copy all that it stores for the backward"
        return Route("layers", f"unroll={model.L}", reason)
    reason = f"{platform}: a scan, with the unroll factor of jaxtrain.ops.tuning"
    return Route("layers", f"unroll={tuning.hint(chip, 'unroll', 1)}", reason)


def choose_routes(
    model: ModelConfig,
    document_mask: bool,
    platform: str,
    strict: bool,
    kernels: KernelsConfig = KernelsConfig(),  # noqa: B008 - frozen
    *,
    arch: str = "",
    chip: str = "",
    tensor: int = 1,
    seq_len: int = 1_024,
    sequences: int = 8,
    wants_gpu: bool = False,
    no_cudnn: str = "",
) -> dict[str, Route]:
    """Returns the route of every op on a platform, "cpu" or "gpu".

    Args:
        strict: raise if a route is a fallback.
        arch: from gpu_architecture.
        chip: from chip_name.
        tensor: devices that the heads are split over.
        seq_len: T of a batch.
        sequences: rows of a microbatch on one device.
        wants_gpu: the CPU counts as a fallback.
        no_cudnn: from explain_missing_cudnn.

    Raises:
        ValueError: a route that the config requests cannot run, or `strict` forbids a fallback.
    """
    kernel_routes = _KernelRoutes(
        model, kernels, arch, chip, tensor, seq_len, sequences, document_mask
    )
    routes = {
        "attention": kernel_routes.fused_or_other_attention(
            lambda: _attention(model, document_mask, platform, arch, tensor, no_cudnn)
        ),
        "dense": _dense(model, platform),
        "norm": kernel_routes.fused_or_plain("norm"),
        "head": kernel_routes.fused_or_plain("head", "plain" if platform == "cpu" else "one_pass"),
        "square": kernel_routes.fused_or_plain("square"),
        "layers": _layers(model, platform, chip),
    }
    if model.qk_norm and model.position == "rope" and model.nope_every != 1:
        routes["qk_rope"] = kernel_routes.fused_or_plain("qk_rope")
    if model.mlp == "gelu":
        routes["gelu"] = kernel_routes.fused_or_plain("gelu")
    if wants_gpu and platform == "cpu":
        reason = "JAX has a CUDA plugin but found no GPU; JAX_PLATFORMS=cpu allows that"
        routes = {"device": Route("device", platform, reason, fallback=True)} | routes
    fallbacks = [str(route) for route in routes.values() if route.fallback]
    if strict and fallbacks:
        raise ValueError(
            f"strict forbids fallbacks; got {'; '.join(fallbacks)}. Set --strict=false."
        )
    return routes


def describe_routes(routes: dict[str, Route]) -> Iterator[tuple[str, str]]:
    """Yields (label, text): each fallback, kernel and requested route, then one for all others."""
    for route in routes.values():
        if route.fallback:
            yield "FALLBACK", f"{route.op:<10} {route.implementation:<10} {route.reason}"
        elif not route.is_usual:
            yield "route", str(route)
    attention = routes["attention"]
    uses_cudnn = attention.is_usual and attention.implementation == "cudnn"
    others = uses_cudnn or not all(route.is_usual for route in routes.values())
    rest = "all others by XLA" if others else "all by XLA"
    yield "routes", f"attention by cuDNN, {rest}" if uses_cudnn else rest
