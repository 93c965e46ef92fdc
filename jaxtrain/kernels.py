"""Which implementation of each fused op runs, and why: printed at start, stored with the run.

The one door to pallas_kernels: what they need of the chip and of the mesh is decided here.
"""

import functools
import platform as host
from dataclasses import dataclass
from pathlib import Path

import jax
from jax.sharding import PartitionSpec as P

from jaxtrain.config import KernelsConfig
from jaxtrain.mesh import BATCH
from pallas_kernels.tuned import BLOCKS

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


def arch_of(device) -> str:
    """A GPU's, as "sm_86"; empty of any other device."""
    capability = getattr(device, "compute_capability", None)
    return f"sm_{str(capability).replace('.', '')}" if capability else ""


def _no_flash(model, arch, tensor, interpret) -> str:
    """Why fused attention cannot run, or nothing."""
    if not interpret and arch not in BLOCKS:
        return f"it is compiled for {', '.join(BLOCKS)}; got {arch or 'no GPU'}"
    narrowest = 1 if interpret else 16  # of Triton's products
    if model.K & (model.K - 1) or model.K < narrowest:
        return f"model.K must be a power of two, at least {narrowest}; got model.K={model.K}"
    if model.dtype == "float64":
        return "its sums are float32; got model.dtype=float64"
    if model.G % tensor:
        return f"mesh.tensor={tensor} must divide model.G={model.G}"
    return ""


def _flash(model, arch, tensor, kernels) -> Route | None:
    """The fused route where it is asked for or must be; None where another may be taken."""
    wanted = model.attention == "flash" or kernels.interpret
    if not (wanted or kernels.strict):
        return None
    why_not = _no_flash(model, arch, tensor, kernels.interpret)
    if why_not:
        flag = "model.attention=flash" if wanted else "kernels.strict"
        raise ValueError(
            f"{flag} needs fused attention, which cannot run: {why_not}. Set "
            "--config.kernels.strict=false --config.model.attention=auto, or "
            "--config.kernels.interpret=true to try it without a GPU."
        )
    if kernels.interpret:
        return Route("attention", "flash:interpret", "kernels.interpret: op by op, for tests")
    return Route("attention", f"flash:{arch}", f"{arch}: asked for; not measured on a card yet")


def build_flash(arch, mesh=None):
    """attention(q_BTHK, k_BTGK, v_BTGK, docs_BT=None) by the fused kernel on each device's part.

    Args:
        arch: a key of BLOCKS, or "interpret".
        mesh: rows lie over (replica, fsdp), heads over tensor; None is one device.
    """
    from pallas_kernels.flash_attention import flash_attention  # imports Pallas

    interpret = arch == "interpret"
    blocks = BLOCKS["sm_86" if interpret else arch]

    def local(q, k, v, docs=None):
        return flash_attention(q, k, v, docs, docs, blocks, interpret)

    def attention(q_BTHK, k_BTGK, v_BTGK, docs_BT=None):
        given = (q_BTHK, k_BTGK, v_BTGK) + (() if docs_BT is None else (docs_BT,))
        if mesh is None or mesh.size == 1:
            return local(*given)
        heads = P(BATCH, None, "tensor")
        specs = (heads,) * 3 + (P(BATCH),) * (len(given) - 3)
        run = jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=heads, check_vma=False)
        return run(*given)

    return attention


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


def choose_routes(
    model,
    document_mask: bool,
    platform: str,
    strict: bool,
    kernels=KernelsConfig(),  # noqa: B008 - frozen
    arch: str = "",
    tensor: int = 1,
) -> dict[str, Route]:
    """The route of every op, from a ModelConfig and the platform ("cpu" or "gpu").

    Args:
        kernels: a KernelsConfig.
        arch: of the GPU, as arch_of has it.
        tensor: devices that the heads are split over.

    Raises:
        ValueError: the config asks for what the platform cannot serve, or strict and a fallback.
    """
    routes = {
        "attention": _flash(model, arch, tensor, kernels)
        or _attention(model, document_mask, platform),
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
