"""What fused kernels do not compute, so that a model that needs it uses XLA instead."""

from jaxtrain.config.model_section import ModelConfig


def scoring_obstacle(model: ModelConfig) -> str:
    """Returns which score of the model attention's kernel does not compute; "" if none."""
    for field in ("attention_scale", "attention_softcap"):
        if value := getattr(model, field):
            return f"its scores are only q k / sqrt(K); got model.{field}={value}"
    return ""


def model_obstacle(op: str, model: ModelConfig, tensor: int, narrowest_head: int) -> str:
    """Returns what of the model op's kernel does not compute; "" if it computes all of it.

    Args:
        tensor: devices that heads, F and V are split over.
        narrowest_head: the least K of attention's kernel.
    """
    if model.dtype == "float64":
        return "its sums are float32; got model.dtype=float64"
    if op == "attention":
        if model.K & (model.K - 1) or model.K < narrowest_head:
            return f"model.K must be a power of two, at least {narrowest_head}; got {model.K=}"
        if obstacle := scoring_obstacle(model):
            return obstacle
    if op in ("norm", "qk_rope") and not model.norm_gain:
        return "it multiplies by a gain; got model.norm_gain=false"
    if op == "norm" and model.norm_place == "post":
        return "it normalises h + y, but model.norm_place=post normalises only y"
    if op == "qk_rope" and model.qk_norm_over == "all":
        return "it normalises each head; got model.qk_norm_over=all"
    if op == "qk_rope" and not model.qk_norm_gain:
        return "it multiplies by a gain; got model.qk_norm_gain=false"
    if op == "head" and model.head_bias:
        return "it adds no bias; got model.head_bias=true"
    if op == "head" and model.logit_softcap_form != "tanh":
        return f"its soft-cap is a tanh; got {model.logit_softcap_form=}"
    if op in ("attention", "qk_rope") and model.G % tensor:
        return f"mesh.tensor={tensor} must divide {model.G=}"
    if op == "gelu" and model.F % tensor:
        return f"mesh.tensor={tensor} must divide {model.F=}"
    return ""


def size_obstacle(op: str, model: ModelConfig, tensor: int, tokens: int) -> str:
    """Returns why op's kernel cannot index a micro-batch; "" if it can.

    Args:
        tokens: of a micro-batch on one device.
    """
    widths = {"gelu": model.F // tensor, "norm": model.D}
    if (elements := tokens * widths.get(op, 0)) >= 2**31:
        return f"it counts elements in int32; got {elements:,} on a device. Raise --accumulation"
    return ""
