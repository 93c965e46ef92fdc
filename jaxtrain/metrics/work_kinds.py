"""Sorts the instructions of a compiled step by their kind and by the part of the step they do."""

import re

from pallas_kernels.hlo import Program, Work

# What limits an instruction's time, for the roofline: see jaxtrain.metrics.mfu.Roofline.
CLASSES = PRODUCTS, ATTENTION, MEMORY = "products", "attention", "memory"
COLLECTIVES, OTHER_KERNELS, COPIES = "collectives", "other kernels", "copies"
ELEMENT_WISE = "element-wise and reductions"
KINDS = PRODUCTS, ATTENTION, COLLECTIVES, OTHER_KERNELS, COPIES, ELEMENT_WISE  # of instructions
_COLLECTIVE = re.compile(r"all-|reduce-scatter|collective-|send|recv")
_ATTENTION = re.compile(r"flash_attention_|fmha")  # our kernels, and cuDNN's custom call
_OP_NAME = re.compile(r'op_name="([^"]*)"')


def kind_of(work: Work) -> str:
    """Returns what an instruction is: products, attention, collectives, copies and so on."""
    i = work.instruction
    if _COLLECTIVE.match(i.op):
        return COLLECTIVES
    if i.op == "custom-call" and _ATTENTION.search(i.rest):
        return ATTENTION
    if work.flops:
        return PRODUCTS
    if i.op == "custom-call":
        return OTHER_KERNELS
    return COPIES if i.op in ("copy", "copy-start", "transpose") else ELEMENT_WISE


def part_of(work: Work) -> str:
    """Returns the part of a training step that an instruction does: forward, backward, optimizer.

    JAX names the transposed program `transpose(jvp())` and the differentiated one `jvp()`. The
    chunked loss computes its gradients in the forward pass, so they count there. Instructions that
    XLA adds, such as copies, have no name: their part is "".
    """
    match = _OP_NAME.search(work.instruction.rest)
    if not match:
        return ""
    if "transpose(" in match[1]:
        return "backward"
    return "forward" if "jvp(" in match[1] else "optimizer"


def find_causes(program: Program) -> dict[str, str]:
    """Returns {instruction: its kind and part}, such as "products, backward"."""
    return {
        work.instruction.name: ", ".join(filter(None, (kind_of(work), part_of(work))))
        for work in program.work()
    }
