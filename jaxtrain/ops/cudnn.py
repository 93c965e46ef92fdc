"""Finds out whether cuDNN's attention can run. Without these checks, JAX fails when it compiles."""

import jax

from jaxtrain.config.model_section import ModelConfig

OLDEST = 80  # compute capability; cuDNN's flash attention needs Ampere


def cudnn_version() -> int | None:
    """Returns cuDNN's version as 90800; None if it cannot be loaded."""
    try:
        from jax._src.lib import cuda_versions

        return cuda_versions.cudnn_get_version() if cuda_versions else None
    except Exception:  # this private module of JAX may be missing, or not find cuDNN
        return None


def explain_missing_cudnn() -> str:
    """Returns what is missing if this process uses a GPU and has no cuDNN; otherwise ""."""
    # Without a GPU, a program is only compiled, for one that is not present.
    if jax.default_backend() != "gpu" or cudnn_version():
        return ""
    return "cuDNN cannot be loaded; python -m jaxtrain doctor shows what is installed"


def find_cudnn_obstacle(
    model: ModelConfig, document_mask: bool, platform: str, arch: str, tensor: int
) -> str:
    """Returns why cuDNN's attention does not support a model on a GPU; "" if it does.

    Args:
        platform, arch, tensor: as in choose_routes.
    """
    if platform != "gpu":
        return f"it needs a GPU; got platform={platform}"
    if model.dtype != "bfloat16":
        return f"it has bfloat16 products only; got model.dtype={model.dtype}"
    if document_mask:
        return "its route has no document mask; got data.document_mask=true"
    if model.attention_softcap:
        return f"it has no soft-cap; got model.attention_softcap={model.attention_softcap}"
    capability = int(number) if (number := arch.removeprefix("sm_")).isdecimal() else None
    if capability is not None and capability < OLDEST:
        return f"it needs sm_{OLDEST} or later; got {arch}"
    widest = 256 if capability is not None and capability >= 90 else 128
    if model.K > widest or model.K % 8:
        where = arch or "a GPU of unknown kind"
        return f"model.K must be a multiple of 8, at most {widest} on {where}; got {model.K}"
    if model.G % tensor:
        return f"mesh.tensor={tensor} must divide model.G={model.G}"
    return ""
