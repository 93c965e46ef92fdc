"""Which implementation of each fused op runs, and why: printed at start, stored with the run."""

import functools
import platform as host
from dataclasses import dataclass
from pathlib import Path

UNROLLED_LAYERS = 12  # on CPU; past it compile time and memory grow more than the step shrinks


@dataclass(frozen=True)
class Route:
    """One op's implementation; `fallback` marks a slower one than the chip could have had."""

    op: str
    implementation: str
    reason: str
    fallback: bool = False

    def __str__(self) -> str:
        mark = "FALLBACK: " if self.fallback else ""
        return f"{self.op:<10} {self.implementation:<10} {mark}{self.reason}"


@functools.cache
def cpu_multiplies_bf16() -> bool:
    """Whether this host's processor has bf16 products (AVX512-BF16, AMX or Arm's BF16)."""
    cpuinfo = Path("/proc/cpuinfo")
    if not cpuinfo.exists():  # not Linux: Apple's processors since M2 have them
        return host.machine() == "arm64"
    flags = set(cpuinfo.read_text().split())
    return bool(flags & {"avx512_bf16", "amx_bf16", "bf16"})


def _attention(model, document_mask, platform) -> Route:
    asked = model.attention
    if asked == "cudnn":
        if platform != "gpu" or model.dtype != "bfloat16" or document_mask:
            raise ValueError(
                "model.attention=cudnn needs a GPU, model.dtype=bfloat16 and no document mask; got "
                f"platform={platform}, model.dtype={model.dtype}, data.document_mask="
                f"{document_mask}. Set --config.model.attention=auto."
            )
    if asked != "auto":
        return Route("attention", asked, "asked for by model.attention")
    if platform != "gpu":
        wide = platform == "cpu" and not cpu_multiplies_bf16() and model.dtype == "bfloat16"
        why = "query blocks over their prefix, own backward" + (
            ", float32 products" if wide else ""
        )
        return Route("attention", "blocked_wide" if wide else "blocked", f"{platform}: {why}")
    if model.dtype != "bfloat16":
        return Route("attention", "reference", f"cuDNN has no {model.dtype}", fallback=True)
    if document_mask:
        return Route("attention", "reference", "cuDNN's route has no document mask", fallback=True)
    return Route("attention", "cudnn", "gpu: flash attention, nothing of size [T,T]")


def _dense(model, platform) -> Route:
    if platform != "cpu":
        return Route("dense", "plain", f"{platform}: XLA's own product and backward")
    if model.dtype == "bfloat16" and not cpu_multiplies_bf16():
        return Route(
            "dense", "cpu_wide", "cpu without bf16 products: float32 products of bf16 values"
        )
    return Route("dense", "cpu", "cpu: float32 results and unflattened dW reach XLA's fast kernels")


def _unroll(model, platform) -> Route:
    if model.unroll:
        return Route("layers", f"unroll={model.unroll}", "asked for by model.unroll")
    if platform == "cpu" and model.L <= UNROLLED_LAYERS:
        return Route("layers", f"unroll={model.L}", "cpu: a rolled scan costs 8-28 % of the step")
    return Route("layers", "unroll=1", f"{platform}: one compiled layer, scanned")


def choose_routes(model, document_mask: bool, platform: str, strict: bool) -> dict[str, Route]:
    """The route of every op, from a ModelConfig and the platform ("cpu" or "gpu").

    Raises:
        ValueError: the config asks for what the platform cannot serve, or strict and a fallback.
    """
    routes = {
        "attention": _attention(model, document_mask, platform),
        "dense": _dense(model, platform),
        "loss": Route(
            "head+loss", "chunked", "XLA; logits of one chunk of time at once, grad in forward"
        ),
        "layers": _unroll(model, platform),
    }
    fallbacks = [str(route) for route in routes.values() if route.fallback]
    if strict and fallbacks:
        raise ValueError(
            f"strict forbids fallbacks; got {'; '.join(fallbacks)}. Set --config.strict=false."
        )
    return routes
