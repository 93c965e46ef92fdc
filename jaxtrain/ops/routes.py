"""Which implementation of each op runs, and why: stored with the run; what is unusual is printed.

What a fused kernel needs of the chip and of the mesh is decided here; fused.py calls it.
"""

import functools
import platform as host
from dataclasses import dataclass
from pathlib import Path

from jaxtrain.config.train_config import KernelsConfig
from jaxtrain.ops import tuning
from pallas_kernels.chip import CHIPS
from pallas_kernels.kernel_choice import choose_body
from pallas_kernels.tiles import TILES, default_tiles

ASKED = "asked for by"  # in the reason of a route that the config names
UNROLLED_LAYERS = 12  # on CPU; past it compile time and memory grow more than the step shrinks


@dataclass(frozen=True)
class Route:
    """One op's implementation; `fallback` marks a slower one than the chip could have had."""

    op: str
    implementation: str
    reason: str
    fallback: bool = False
    tiles: tuple | dict | None = None  # of a fused kernel

    @property
    def is_usual(self) -> bool:
        """Whether it is what this platform takes by default, at full speed."""
        wide = self.implementation in ("blocked_wide", "cpu_wide")
        return not (self.fallback or self.tiles or wide or ASKED in self.reason)

    def __str__(self) -> str:
        mark = "FALLBACK: " if self.fallback else ""
        return f"{self.op:<10} {self.implementation:<10} {mark}{self.reason}"


@functools.cache
def cpu_flags() -> frozenset[str]:
    """Returns the words of this host's /proc/cpuinfo, none where it is not Linux."""
    cpuinfo = Path("/proc/cpuinfo")
    return frozenset(cpuinfo.read_text().split() if cpuinfo.exists() else ())


def cpu_multiplies_bf16() -> bool:
    """Whether this host's processor has bf16 products (AVX512-BF16, AMX or Arm's BF16)."""
    if not cpu_flags():  # not Linux: Apple's processors since M2 have them
        return host.machine() == "arm64"
    return bool(cpu_flags() & {"avx512_bf16", "amx_bf16", "bf16"})


def gpu_architecture(device) -> str:
    """A GPU's, as "sm_86"; empty of any other device."""
    capability = getattr(device, "compute_capability", None)
    return f"sm_{str(capability).replace('.', '')}" if capability else ""


def chip_name(device) -> str:
    """The chip table's name of a device; empty of any other."""
    return next((name for name, chip in CHIPS.items() if chip.kind == device.device_kind), "")


def _no_flash(model, tensor, interpret) -> str:
    """Why fused attention cannot run, or nothing."""
    narrowest = 1 if interpret else 16  # of Triton's products
    if model.K & (model.K - 1) or model.K < narrowest:
        return f"model.K must be a power of two, at least {narrowest}; got model.K={model.K}"
    if model.G % tensor:
        return f"mesh.tensor={tensor} must divide model.G={model.G}"
    return ""


# op -> the sizes that a measured row is found by
SHAPES = {
    "attention": lambda model, seq_len: (seq_len, model.H, model.G, model.K),
    "norm": lambda model, seq_len: (model.D,),
    "qk_rope": lambda model, seq_len: (model.K,),
    "head": lambda model, seq_len: (model.D, model.V),
    "square": lambda model, seq_len: (model.D,),
}
PREFIX = {"attention": "flash"}  # of the implementation's name; others are "fused"


class _Fused:
    """Routes to fused kernels, for one model on one device and mesh."""

    def __init__(self, model, kernels, arch, chip, tensor, seq_len):
        self.model, self.kernels, self.arch, self.chip = model, kernels, arch, chip
        self.tensor, self.seq_len = tensor, seq_len

    def why_not(self, op) -> str:
        if not self.kernels.interpret and self.arch not in TILES:
            return f"it is compiled for {', '.join(TILES)}; got {self.arch or 'no GPU'}"
        if self.model.dtype == "float64":
            return "its sums are float32; got model.dtype=float64"
        if op == "attention":
            return _no_flash(self.model, self.tensor, self.kernels.interpret)
        if op == "qk_rope" and self.model.G % self.tensor:
            return f"mesh.tensor={self.tensor} must divide model.G={self.model.G}"
        return ""

    def asked_by(self, op) -> str:
        """The flag that wants op's kernel, whatever was measured; or nothing."""
        if op == "attention" and self.model.attention == "flash":
            return "model.attention=flash"
        if self.kernels.interpret:
            return "kernels.interpret"
        return "kernels.strict" if self.kernels.strict else ""

    def route(self, op) -> Route | None:
        """None where another than the kernel is to be taken."""
        asked, why_not = self.asked_by(op), self.why_not(op)
        if asked and why_not:
            raise ValueError(
                f"{asked} needs fused {op}, which cannot run: {why_not}. Set "
                "--kernels.strict=false --model.attention=auto, or "
                "--kernels.interpret=true to try it without a GPU."
            )
        name = PREFIX.get(op, "fused")
        if self.kernels.interpret:
            why = "kernels.interpret: op by op, for tests"
            return Route(op, f"{name}:interpret", why, tiles=default_tiles(op, "sm_86"))
        if why_not or op == "attention" and self.model.attention != "auto" and not asked:
            return None
        choice = self.measured(op)
        if not (asked or choice.faster):
            return None
        why = f"{ASKED} {asked}; {choice.reason}" if asked else choice.reason
        return Route(op, f"{name}:{self.arch}", why, tiles=choice.tiles)

    def measured(self, op):
        shape = SHAPES[op](self.model, self.seq_len)
        return choose_body(op, self.arch, self.chip, self.model.dtype, shape)

    def xla(self, op, what) -> Route:
        """XLA's own, with the reason why the kernel is not taken."""
        why_not = self.why_not(op) or self.measured(op).reason
        return Route(op, what, f"XLA's; of a kernel: {why_not}")


def _no_cudnn(model, document_mask, platform, arch, tensor) -> str:
    """Why cuDNN's attention cannot run, or nothing; JAX itself would say so in the compile."""
    if platform != "gpu":
        return f"it needs a GPU; got platform={platform}"
    if model.dtype != "bfloat16":
        return f"it has bfloat16 products alone; got model.dtype={model.dtype}"
    if document_mask:
        return "its route has no documents; got data.document_mask=true"
    capability = arch.removeprefix("sm_")
    widest = 256 if capability.isdecimal() and int(capability) >= 90 else 128
    if model.K > widest or model.K % 8:
        where = arch or "a GPU of unknown kind"
        return f"model.K must be a multiple of 8, at most {widest} on {where}; got {model.K}"
    if model.G % tensor:
        return f"mesh.tensor={tensor} must divide model.G={model.G}"
    return ""


def _attention(model, document_mask, platform, arch, tensor) -> Route:
    asked = model.attention
    why_not = _no_cudnn(model, document_mask, platform, arch, tensor)
    if asked == "cudnn" and why_not:
        raise ValueError(
            f"model.attention=cudnn must be a route that can run: {why_not}. "
            "Set --model.attention=auto."
        )
    if asked != "auto":
        return Route("attention", asked, f"{ASKED} model.attention")
    if platform != "gpu":
        wide = platform == "cpu" and not cpu_multiplies_bf16() and model.dtype == "bfloat16"
        why = "query blocks over their prefix, own backward" + (
            ", float32 products" if wide else ""
        )
        return Route("attention", "blocked_wide" if wide else "blocked", f"{platform}: {why}")
    if why_not:
        return Route("attention", "reference", f"cuDNN's cannot run: {why_not}", fallback=True)
    return Route("attention", "cudnn", "gpu: flash attention, nothing of size [T,T]")


def _dense(model, platform) -> Route:
    if platform != "cpu":
        return Route("dense", "plain", f"{platform}: XLA's own product and backward")
    if model.dtype == "bfloat16" and not cpu_multiplies_bf16():
        return Route(
            "dense", "cpu_wide", "cpu without bf16 products: float32 products of bf16 values"
        )
    return Route("dense", "cpu", "cpu: float32 results and unflattened dW reach XLA's fast kernels")


def _unroll(model, platform, chip) -> Route:
    if model.unroll:
        return Route("layers", f"unroll={model.unroll}", f"{ASKED} model.unroll")
    if platform == "cpu" and model.L <= UNROLLED_LAYERS:
        return Route("layers", f"unroll={model.L}", "cpu: a rolled scan costs 8-28 % of the step")
    turn = tuning.hint(chip, "unroll", 1)
    return Route(
        "layers", f"unroll={turn}", f"{platform}: a scan, layers a turn by jaxtrain.ops.tuning"
    )


def _device(platform) -> Route:
    why = "JAX has a CUDA plugin and found no GPU; JAX_PLATFORMS=cpu says that this is meant"
    return Route("device", platform, why, fallback=True)


def choose_routes(
    model,
    document_mask: bool,
    platform: str,
    strict: bool,
    kernels=KernelsConfig(),  # noqa: B008 - frozen
    *,
    arch: str = "",
    chip: str = "",
    tensor: int = 1,
    seq_len: int = 1_024,
    wants_gpu: bool = False,
) -> dict[str, Route]:
    """The route of every op, from a ModelConfig and the platform ("cpu" or "gpu").

    Args:
        kernels: a KernelsConfig.
        arch: of the GPU, as gpu_architecture has it.
        chip: as chip_name has it.
        tensor: devices that the heads are split over.
        seq_len: T of a batch.
        wants_gpu: a CPU is a fallback.

    Raises:
        ValueError: the config asks for what the platform cannot serve, or strict and a fallback.
    """
    fused = _Fused(model, kernels, arch, chip, tensor, seq_len)
    routes = {
        "attention": fused.route("attention")
        or _attention(model, document_mask, platform, arch, tensor),
        "dense": _dense(model, platform),
        "norm": fused.route("norm") or fused.xla("norm", "plain"),
        "head": fused.route("head") or fused.xla("head", "plain"),
        "square": fused.route("square") or fused.xla("square", "plain"),
        "layers": _unroll(model, platform, chip),
    }
    if model.qk_norm and model.position == "rope":
        routes["qk_rope"] = fused.route("qk_rope") or fused.xla("qk_rope", "plain")
    if wants_gpu and platform == "cpu":
        routes = {"device": _device(platform)} | routes
    fallbacks = [str(route) for route in routes.values() if route.fallback]
    if strict and fallbacks:
        raise ValueError(
            f"strict forbids fallbacks; got {'; '.join(fallbacks)}. Set --strict=false."
        )
    return routes


def describe_routes(routes: dict[str, Route]):
    """Yields (name, text): each route that is a kernel, a fallback or asked for, then the rest."""
    for route in routes.values():
        if route.fallback:
            yield "FALLBACK", f"{route.op:<10} {route.implementation:<10} {route.reason}"
        elif not route.is_usual:
            yield "route", str(route)
    found = routes["attention"]
    cudnn = found.is_usual and found.implementation == "cudnn"
    others = cudnn or not all(route.is_usual for route in routes.values())
    rest = "all others by XLA" if others else "all by XLA"
    yield "routes", f"attention by cuDNN, {rest}" if cudnn else rest
