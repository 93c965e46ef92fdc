"""PyTorch's contestants of bench: SDPA's flash backend and torch.compile, on the same arrays.

DLPack shares JAX's arrays with PyTorch, so both read the same memory. On a GPU the calls are
captured in a CUDA graph whose replays are timed by events, so that the time that Python takes to
launch does not count against PyTorch. In a trial without a GPU, torch.compile only traces:
generating C++ would take minutes.
"""

import importlib.util
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax

from pallas_kernels.contest import Contest
from pallas_kernels.timing import Timing, first_line, time_calls


def import_torch() -> str:
    """Imports torch, which takes seconds. Returns why it cannot be imported; "" if it can."""
    if importlib.util.find_spec("torch") is None:
        return "torch is not installed"
    try:
        import torch  # noqa: F401
    except (ImportError, OSError) as error:  # a library that it needs is missing
        return first_line(error)
    return ""


def why_unavailable(device: str) -> str:
    """Returns why torch cannot run on "cuda" or "cpu"; "" if it can."""
    if reason := import_torch():
        return reason
    import torch

    if device == "cuda" and not torch.cuda.is_available():
        return f"torch {torch.__version__} finds no CUDA device"
    return ""


def _compile(function):
    import torch

    backend = "inductor" if torch.cuda.is_available() else "aot_eager"
    return torch.compile(function, backend=backend)


def _sdpa(q, k, v):
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.nn.functional import scaled_dot_product_attention

    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    grouped = k.shape[1] < q.shape[1]
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        o = scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped)
    return o.transpose(1, 2)


def _with_gradients(forward, count):
    """Returns a function that computes `forward` and the gradients of its first `count` inputs."""
    import torch

    def both_ways(inputs, cotangents):
        wanted = [x.detach().requires_grad_(i < count) for i, x in enumerate(inputs)]
        out = forward(*wanted)
        return out, torch.autograd.grad(out, wanted[:count], cotangents)

    return both_ways


def _attention(contest):
    if "forward" in contest.name:
        return {"torch sdpa": lambda q, k, v, do: _sdpa(q, k, v)}
    both = _with_gradients(_sdpa, 3)
    return {"torch sdpa": lambda q, k, v, do: both((q, k, v), do)}


def _norm(contest):
    from torch.nn.functional import layer_norm, rms_norm

    if contest.name.startswith("layer norm"):

        def add_layer_norm(h, y, gain, bias, y_bias):
            s = (h.float() + (y.float() + y_bias)).to(h.dtype)
            return s, layer_norm(s.float(), gain.shape, gain, bias, 1e-6).to(s.dtype)

        both = _with_gradients(_compile(add_layer_norm), 5)
        return {"torch compiled": lambda *arrays: both(arrays[:5], arrays[5:])}

    def add_norm(h, y, gain):
        s = h + y
        return s, rms_norm(s.float(), gain.shape, gain, 1e-6).to(s.dtype)

    both = _with_gradients(_compile(add_norm), 3)
    return {"torch compiled": lambda h, y, gain, ds, dn: both((h, y, gain), (ds, dn))}


def _qk_rope(contest):
    import torch

    def norm_and_rotate(x, gain, cos, sin):
        n = torch.nn.functional.rms_norm(x.float(), gain.shape, gain, 1e-6)
        first, second = n.chunk(2, -1)
        rotated = torch.cat((-second, first), -1)
        return (n * cos[:, None] + rotated * sin[:, None]).to(x.dtype)

    both = _with_gradients(_compile(norm_and_rotate), 2)
    return {"torch compiled": lambda x, gain, cos, sin, dy: both((x, gain, cos, sin), dy)}


def _gelu(contest):
    import torch

    def gelu_of_sum(x, bias):
        return torch.nn.functional.gelu(x.float() + bias, approximate="tanh").to(x.dtype)

    both = _with_gradients(_compile(gelu_of_sum), 2)
    return {"torch compiled": lambda x, bias, dy: both((x, bias), dy)}


def _head(contest):
    import torch
    from torch.nn.functional import cross_entropy, linear

    def nats(h, w, targets):
        return cross_entropy(linear(h, w).float(), targets, reduction="none")

    compiled = _compile(nats)

    def nats_and_gradients(h, w, targets):
        h, w = (x.detach().requires_grad_() for x in (h, w))
        out = compiled(h, w, targets)
        return out, *torch.autograd.grad(out, (h, w), torch.ones_like(out))

    return {"torch compiled": lambda h, w, y: nats_and_gradients(h, w, y.long())}


def _square(contest):
    import torch

    def quintic(x):
        gram = x @ x.mT
        return torch.baddbmm(gram, gram, gram, beta=-1.5, alpha=2.0)

    return {"torch compiled": _compile(quintic)}


CONTESTANTS = {
    "attention": _attention,
    "norm": _norm,
    "qk_rope": _qk_rope,
    "gelu": _gelu,
    "head": _head,
    "square": _square,
}


def takes_part(contest: Contest) -> bool:
    """Returns whether PyTorch has a contestant: its flash attention has no documents or window."""
    return not (contest.documents or contest.window)


def torch_contestants(contest: Contest) -> dict[str, Callable]:
    """Returns {name: function of the contest's arrays, passed as tensors in the same order}."""
    return CONTESTANTS[contest.op](contest) if takes_part(contest) else {}


def as_tensors(arrays: Sequence[jax.Array]) -> list[Any]:
    """Returns tensors that share the arrays' memory, on the device where they are."""
    import torch

    return [torch.from_dlpack(x) for x in jax.block_until_ready(arrays)]


def _time_sample(function, calls) -> float:
    """Returns seconds per call, by CUDA events on a GPU."""
    import torch

    if not torch.cuda.is_available():
        start = time.perf_counter()
        for _ in range(calls):
            function()
        return (time.perf_counter() - start) / calls
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(calls):
        function()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3 / calls


def _capture(function) -> Callable[[], Any]:
    """Returns a function that replays the function's calls as one CUDA graph."""
    import torch

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # compiles, and allocates what later calls keep
        for _ in range(3):
            function()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function()
    return graph.replay


def measure_torch(
    contest: Contest, inputs: Sequence[Sequence[jax.Array]], device: str
) -> Iterator[tuple[str, Timing | str]]:
    """Times PyTorch's contestants. Yields (name, Timing or why it failed); nothing without one.

    Args:
        inputs: sets of arrays that a timed call uses one after another.
        device: "cuda", or "cpu" for a trial.
    """
    if not takes_part(contest):
        return
    if reason := why_unavailable(device):
        yield "torch", reason
        return
    import torch

    sets = [as_tensors(arrays) for arrays in inputs]
    for name, function in torch_contestants(contest).items():

        def call(function=function):
            return [function(*tensors) for tensors in sets]

        try:
            replay = _capture(call) if device == "cuda" else call
            timing = time_calls(replay, time_sample=_time_sample).divided(len(sets))
        except Exception as error:  # one failure must not stop a comparison
            timing = first_line(error)
        yield name, timing
    if device == "cuda":
        torch.cuda.empty_cache()  # returns memory that torch's allocator caches, so JAX can use it
