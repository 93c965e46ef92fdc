"""Finds the layers of a PyTorch model, and where a float64 model computes in float32.

`recorder.py` uses it. It imports nothing but torch.
"""

import functools
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

Observe = Callable[[str, torch.Tensor], None]
uncompiled: Any = torch.compiler.disable  # torch.compile must not trace into a hook


def require(condition: Any, text: str) -> None:
    """Raises ValueError with a text unless the condition holds."""
    if not condition:
        raise ValueError(text)


def check_average(average: str) -> None:
    """Raises ValueError unless a Recorder knows this way to weigh micro-batches."""
    known = "micro_batches", "tokens"
    require(average in known, f"average must be one of {', '.join(known)}; got {average!r}.")


def check_batch(inputs: Any, targets: Any, loss: Any) -> None:
    """Raises ValueError unless a batch is integers [B,T] and its loss the tensor of backward()."""
    shapes = [tuple(getattr(x, "shape", ())) for x in (inputs, targets)]
    require(
        len(shapes[0]) == 2 and shapes[0] == shapes[1],
        f"inputs and targets must both be tensors [B,T]; got shapes {shapes[0]} and {shapes[1]}.",
    )
    require(
        isinstance(loss, torch.Tensor) and loss.numel() == 1,
        f"loss must be the tensor that backward() was called on; got {type(loss).__name__}.",
    )


def _find_blocks(model: nn.Module) -> list[nn.Module]:
    """Returns the layers of a transformer: the largest list of composite modules of one class."""
    lists = []
    for module in model.modules():
        if isinstance(module, (nn.ModuleList, nn.ModuleDict, nn.Sequential)):
            children = list(module.children())
            alike = len({type(child) for child in children}) == 1
            if alike and any(True for _ in children[0].children()):
                lists.append(children)
    size = lambda blocks: sum(p.numel() for block in blocks for p in block.parameters())
    return max(lists, key=size, default=[])


def observe_outputs(modules: dict[str, nn.Module], observe: Observe) -> None:
    """Calls observe(name, output) after each forward pass of the named modules."""

    @uncompiled
    def hook(name, module, args, output):  # transformers' modules may return tuples
        observe(name, output[0] if isinstance(output, tuple) else output)

    for name, module in modules.items():
        module.register_forward_hook(functools.partial(hook, name))


def observe_layers(model: nn.Module, observe: Observe) -> list[str]:
    """Observes "embed" (the first layer's input), "blocks.0", "blocks.1", ... and "logits".

    Returns what it did not find: "layers", "head" or both. A head is a Linear outside the layers
    with an output for each entry of an Embedding. If the model itself returns logits, these count,
    as it may have capped the head's.
    """
    blocks = _find_blocks(model)
    inside = {module for block in blocks for module in block.modules()}
    outside = [module for module in model.modules() if module not in inside]
    V = {m.num_embeddings for m in outside if isinstance(m, nn.Embedding)}
    heads = [m for m in outside if isinstance(m, nn.Linear) and m.out_features in V]

    @uncompiled
    def observe_input(module, args, kwargs):
        tensors = (x for x in (*args, *kwargs.values()) if torch.is_tensor(x))
        observe("embed", next(tensors))

    @uncompiled
    def observe_logits(module, args, output):
        found = output if isinstance(output, tuple) else (getattr(output, "logits", output),)
        found = [x for x in found if torch.is_tensor(x) and x.ndim == 3 and x.shape[-1] in V]
        for x in found[:1]:
            observe("logits", x)

    if blocks:
        blocks[0].register_forward_pre_hook(observe_input, with_kwargs=True)
    outputs = {f"blocks.{i}": block for i, block in enumerate(blocks)}
    observe_outputs(outputs | ({"logits": heads[-1]} if heads else {}), observe)
    model.register_forward_hook(observe_logits)
    return ["layers"] * (not blocks) + ["head"] * (not heads)


def warn_of_unlike(model: nn.Module) -> None:
    """Warns, at the first such training pass, of dropout and of padding by an attention mask."""
    warned = set()

    def warn_once(kind, text):
        if kind not in warned:
            warned.add(kind)
            warnings.warn(text, stacklevel=2)

    @uncompiled
    def check(module, args, kwargs):
        if not torch.is_grad_enabled():
            return
        for name, part in model.named_modules():
            rate = part.p if isinstance(part, nn.Dropout) else getattr(part, "attention_dropout", 0)
            if part.training and isinstance(rate, float) and rate > 0:
                warn_once(
                    "dropout",
                    f"{name} drops with rate {rate}, and jaxtrain trains without dropout: the "
                    "traces will differ. Call model.eval(), or set the rate to 0.",
                )
        mask = kwargs.get("attention_mask")
        if torch.is_tensor(mask) and mask.ndim == 2 and bool((mask == 0).any()):
            warn_once(
                "mask",
                "attention_mask hides tokens, and jaxtrain has only the causal mask: the "
                "activations will differ. Pad on the right with targets of -100 and do not pass "
                "the mask: the loss is the same. Padding on the left cannot be compared.",
            )

    model.register_forward_pre_hook(check, with_kwargs=True)


class Float32Watch(TorchDispatchMode):
    """Finds the modules of a model that ask for float32 in their forward pass.

    Attributes:
        found: {module's name: its class}.

    Args:
        skip: gives them float64 instead, and recomputes the buffers that transformers computed in
            float32, such as RoPE's frequencies.
    """

    def __init__(self, model: nn.Module, skip: bool):
        super().__init__()
        self.skip, self.found = skip, {}
        self._inside = [("", "")]
        for name, module in model.named_modules():
            module.register_forward_pre_hook(functools.partial(self._enter_module, name))
            leave = functools.partial(self._leave_module, name)
            module.register_forward_hook(leave, always_call=True)
            if skip:
                self._recompute_buffers(module)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if kwargs.get("dtype") is torch.float32:  # a cast, or a new tensor
            self.found.setdefault(*self._inside[-1])
            if self.skip:
                kwargs = kwargs | {"dtype": torch.float64}
        return func(*args, **kwargs)

    def _enter_module(self, name, module, args):
        if not name:
            self.__enter__()
        self._inside.append((name, type(module).__name__))

    def _leave_module(self, name, module, args, output):
        self._inside.pop()
        if not name:
            self.__exit__(None, None, None)

    def _recompute_buffers(self, module):
        """Rebuilds a module of transformers that has no parameters, and takes its new buffers."""
        buffers = dict(module.named_buffers(recurse=False))
        if not buffers or not hasattr(module, "config") or any(True for _ in module.parameters()):
            return
        with self:
            rebuilt = type(module)(module.config)
        for name, old in buffers.items():
            setattr(module, name, rebuilt.get_buffer(name).to(old.device))
