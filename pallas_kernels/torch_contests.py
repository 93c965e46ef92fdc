"""PyTorch in the contests: SDPA's flash backend and torch.compile on the very same values.

Arrays are lent by DLPack, so both frameworks read the same memory; times are CUDA events'. Where
there is no GPU (a trial), torch.compile traces without its code generator, whose C++ takes minutes.
"""

import importlib.util
import time

import jax

from pallas_kernels.timing import time_calls


def why_not(device_wanted: str) -> str:
    """Why torch cannot take part on "cuda" or "cpu"; or nothing."""
    if importlib.util.find_spec("torch") is None:
        return "torch is not installed"
    import torch

    if device_wanted == "cuda" and not torch.cuda.is_available():
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
    """(outputs, gradients of the first `count` arguments, along those that come after `inputs`)."""
    import torch

    def run(inputs, cotangents):
        wanted = [x.detach().requires_grad_(i < count) for i, x in enumerate(inputs)]
        out = forward(*wanted)
        return out, torch.autograd.grad(out, wanted[:count], cotangents)

    return run


def _attention(contest):
    if "forward" in contest.name:
        return {"torch sdpa": lambda q, k, v, do: _sdpa(q, k, v)}
    both = _with_gradients(_sdpa, 3)
    return {"torch sdpa": lambda q, k, v, do: both((q, k, v), do)}


def _norm(contest):
    from torch.nn.functional import rms_norm

    def join(h, y, gain):
        s = h + y
        return s, rms_norm(s.float(), gain.shape, gain, 1e-6).to(s.dtype)

    both = _with_gradients(_compile(join), 3)
    return {"torch compiled": lambda h, y, ds, dn, gain: both((h, y, gain), (ds, dn))}


def _qk_rope(contest):
    import torch

    def turn(x, gain, cos, sin):
        n = torch.nn.functional.rms_norm(x.float(), gain.shape, gain, 1e-6)
        first, second = n.chunk(2, -1)
        turned = torch.cat((-second, first), -1)
        return (n * cos[:, None] + turned * sin[:, None]).to(x.dtype)

    both = _with_gradients(_compile(turn), 2)
    return {"torch compiled": lambda x, dy, gain, cos, sin: both((x, gain, cos, sin), dy)}


def _head(contest):
    import torch
    from torch.nn.functional import cross_entropy, linear

    def nats(h, w, targets):
        return cross_entropy(linear(h, w).float(), targets, reduction="none")

    compiled = _compile(nats)

    def run(h, w, targets):
        h, w = (x.detach().requires_grad_() for x in (h, w))
        out = compiled(h, w, targets)
        return out, *torch.autograd.grad(out, (h, w), torch.ones_like(out))

    return {"torch compiled": lambda h, w, targets: run(h, w, targets.long())}


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
    "head": _head,
    "square": _square,
}


def torch_contestants(contest) -> dict:
    """{name: function of the contest's arrays as tensors, in their order}."""
    return CONTESTANTS[contest.op](contest)


def as_tensors(arrays) -> list:
    """The arrays' own memory as tensors, on the device where they lie."""
    import torch

    return [torch.from_dlpack(x) for x in jax.block_until_ready(arrays)]


def _sample(run, calls) -> float:
    """Seconds a call, by CUDA events on a GPU."""
    import torch

    if not torch.cuda.is_available():
        start = time.perf_counter()
        for _ in range(calls):
            run()
        return (time.perf_counter() - start) / calls
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(calls):
        run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3 / calls


def measure_torch(contest, arrays, device) -> dict:
    """{contestant: Timing or the error that it ended in}; on "cuda", or "cpu" for a trial."""
    reason = why_not(device)
    if reason:
        return {"torch": reason}
    import torch

    tensors, found = as_tensors(arrays), {}
    for name, run in torch_contestants(contest).items():
        try:
            found[name] = time_calls(lambda run=run: run(*tensors), sample=_sample)
        except Exception as error:  # one that cannot run must not end the others
            found[name] = f"{type(error).__name__}: {str(error).splitlines()[0][:100]}"
    if device == "cuda":
        torch.cuda.empty_cache()  # what torch keeps, JAX cannot have
    return found
