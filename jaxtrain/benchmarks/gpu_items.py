"""What the GPU suite measures and in which order, and how long a row will likely take."""

import itertools
from collections.abc import Sequence
from typing import NamedTuple

from jaxtrain.benchmarks.batch_size import STEP_S
from jaxtrain.config.model_section import ModelConfig
from jaxtrain.ops.routes import choose_routes
from jaxtrain.ops.tuning import TuningChoice

SIZES = ("gpt_124m", "gpt_350m", "gpt_774m", "llama_1400m")
OPTIMIZERS = ("muon", "adamw", "accelerated_lmo")
VARIANTS = ("jaxtrain", "pytorch")
TORCH_OPTIMIZERS = ("muon", "adamw")  # torch has no accelerated_lmo, so that is compared with Muon

# Estimates, used only to plan the minutes. On an H100 and an H200 our first step came after 28 to
# 32 s, both with 12 unrolled layers and with a scan, and PyTorch's of 12 layers after 36 to 38 s.
# Our trace, the optimizer's own program and the end took about 8 s (gpt_124m, H200).
START_S, COMPILE_S, UNROLLED_LAYER_S, TORCH_LAYER_S = 20.0, 25.0, 1.0, 2.0
OTHER_STEPS = 6  # not counted: the first, two to warm up, one before and after, one for clocks


class Item(NamedTuple):
    """One row to measure."""

    size: str
    variant: str
    optimizer: str
    what: str = "step"  # or "warm start", or the name of the XLA option that is tried
    half: bool = False  # whether at half the micro-batch size of the first row

    def __str__(self) -> str:
        name = f"{self.size} {self.optimizer} {self.variant} {self.what}"
        return f"{name} half" if self.half else name


def build_items(
    sizes: Sequence[str],
    optimizers: Sequence[str],
    variants: Sequence[str],
    choices: Sequence[TuningChoice] = (),
    halves: bool = True,
) -> list[Item]:
    """Returns all rows to measure, the most valuable first: Muon at each size in both frameworks.

    Args:
        choices: XLA options among them that are not applied yet are tried at the first size.
        halves: whether half the micro-batch size is tried too, after every size has one row. Later
            rows have the faster size.
    """
    steps = [
        Item(size, variant, optimizer)
        for optimizer, size, variant in itertools.product(optimizers, sizes, variants)
        if variant == "jaxtrain" or optimizer in TORCH_OPTIMIZERS
    ]
    first = [item for item in steps if item.optimizer == optimizers[0]]
    items = [*first]
    if "jaxtrain" in variants:
        items.append(Item(sizes[-1], "jaxtrain", optimizers[0], "warm start"))
    items += [item._replace(half=True) for item in first if halves]
    items += [item for item in steps if item not in first]
    if "jaxtrain" in variants:
        untried = [choice for choice in choices if choice.is_option and not choice.applied]
        items += [Item(sizes[0], "jaxtrain", optimizers[0], choice.name) for choice in untried]
    return items


def guess_seconds(variant: str, model: ModelConfig, chip_name: str, most_s: float) -> float:
    """Returns the time that a row will likely take, with most_s for the counted steps."""
    if variant == "jaxtrain":
        layers = choose_routes(model, False, "gpu", False, chip=chip_name)["layers"]
        unrolled = int(layers.implementation.removeprefix("unroll="))
        compile_s = COMPILE_S + UNROLLED_LAYER_S * unrolled
    else:
        compile_s = TORCH_LAYER_S * model.L
    return START_S + compile_s + most_s + OTHER_STEPS * STEP_S
