"""Plans of steps compiled for chips that are not there; searches over settings by known memory."""

import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest

from jaxtrain.errors import REFUSED

pytest.importorskip("cramjam", reason='cramjam is missing: pip install "jaxtrain[offline]"')
pytest.importorskip("jax_cuda12_plugin", reason="the compiler for GPUs is missing: offline")
from configs import debug  # noqa: E402
from jaxtrain.config.train_config import freeze  # noqa: E402
from jaxtrain.metrics.hlo_collectives import Collective  # noqa: E402
from jaxtrain.planning import search  # noqa: E402
from jaxtrain.planning.chip_comparison import parse_prices  # noqa: E402
from jaxtrain.planning.compiled import Memory  # noqa: E402
from jaxtrain.planning.links import LINKS, parse_link, seconds_of  # noqa: E402
from jaxtrain.planning.memory_formula import ABSOLUTE_BYTES, RELATIVE  # noqa: E402
from jaxtrain.planning.render import verdict  # noqa: E402
from pallas_kernels.chip import find_chip  # noqa: E402

A40 = find_chip("a40")
GIB = 2**30


def run(*argv):
    env = {k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS", "JAX_PLATFORMS")}
    argv = [sys.executable, "-m", "jaxtrain.plan", *argv]
    return subprocess.run(argv, capture_output=True, text=True, env=env, timeout=300, check=False)


def test_a_plan_over_hosts_shows_memory_bound_collectives_and_routes(tmp_path):
    done = run("--config=configs/debug.py", "--gpus=2", "--hosts=2", "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    memory = found["memory_bytes"]
    assert found["devices"] == 4 and found["hosts"] == 2 and found["fits"]
    # Muon keeps one number a weight of matrices, AdamW two of the rest; both lie on 4 devices.
    assert found["parameters"] / memory["parameters"] == pytest.approx(1, rel=0.3)
    assert memory["parameters"] <= memory["optimizer state"] <= 2.2 * memory["parameters"]
    assert 0 < memory["parameters"] + memory["optimizer state"] < memory["peak"]
    kinds = {row["kind"] for row in found["collectives"]}
    assert {"all-gather", "all-to-all"} <= kinds  # parameters for use, matrices to their owners
    assert all(row["crosses_hosts"] and row["seconds"] > 0 for row in found["collectives"])
    assert found["step_s"] > found["roofline_s"] > 0
    assert found["routes"]["attention"]


def test_bad_input_is_one_line_that_names_the_flag():
    assert "a config must be named, such as" in run().stderr
    done = run("--config=configs/debug.py", "--chip=b300")
    assert done.returncode == REFUSED and "got 'b300'" in done.stderr


COMPILED = """
import os
os.environ["JAX_PLATFORMS"] = "cpu"
from configs import llama_135m
from jaxtrain.config.train_config import freeze
from jaxtrain.planning.memory_formula import estimate
from jaxtrain.planning.compiled import compile_plan
from pallas_kernels.chip import find_chip
cfg = freeze(llama_135m.get_config())
m = compile_plan(cfg, find_chip("a40"), 2).memory
e = estimate(cfg, 2)
print(m.peak, e.peak, m.parameters + m.optimizer_state, e.state)
"""


def test_the_formula_is_as_near_to_the_compiled_step_as_it_says():
    env = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    argv = [sys.executable, "-c", COMPILED]
    done = subprocess.run(argv, capture_output=True, text=True, env=env, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    peak, by_formula, state, state_by_formula = map(float, done.stdout.split())
    assert state == pytest.approx(state_by_formula, rel=0.01)  # vectors lie whole on each
    assert abs(peak - by_formula) < max(RELATIVE * peak, ABSOLUTE_BYTES)


ZEROS = """
import os
os.environ["JAX_PLATFORMS"] = "cpu"
from types import SimpleNamespace
import jax
import jax.numpy as jnp
from jaxtrain.training.step import build_gradient
from pallas_kernels.chip import find_chip
from pallas_kernels.hlo import Program, bytes_of
from pallas_kernels.offline import compile_for

def loss(h_BTD, w_VD, targets_BT, weights_BT):
    nats = (jnp.tanh(h_BTD * w_VD[targets_BT]).sum(-1) * weights_BT).sum()
    return nats, nats

def step(params, tokens_BT1):
    nats, _, grads = gradient(params, {"tokens": tokens_BT1})
    keep = lambda w, g: w - jnp.where(jnp.isfinite(nats), g, 0)  # as the optimizer skips a step
    return nats, jax.tree.map(keep, params, grads)

model = SimpleNamespace(apply=lambda params, tokens_BT, docs_BT: params["embed"][tokens_BT])
gradient = build_gradient(model, loss, accumulation=4)
embed, tokens = jax.ShapeDtypeStruct((4_096, 64), "float32"), jax.ShapeDtypeStruct((4, 9), "int32")
compiled, _ = compile_for(find_chip("a40"), step, {"embed": embed}, tokens)
program = Program(compiled.as_text())
made = (i for i in program.computations[program.entry] if not i.operands)
print(max(bytes_of(i.result) for i in made if i.op in ("fusion", "broadcast", "constant")))
"""


def test_no_tree_of_zeros_lies_through_the_accumulation():
    env = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    argv = [sys.executable, "-c", ZEROS]
    done = subprocess.run(argv, capture_output=True, text=True, env=env, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 1_024  # the gradient is 1 MiB


def test_the_formula_needs_no_compiler_and_says_how_far_it_may_be_off():
    done = run("--config=configs/llama_1400m.py", "--formula", "--config.accumulation=64")
    assert done.returncode == 0 and "to 10% of the peak or 0.5 GiB" in done.stdout, done.stderr
    done = run("--config=configs/llama_1400m.py", "--formula", "--json", "--config.accumulation=1")
    assert done.returncode == 1 and not json.loads(done.stdout)["fits"]


def memory(peak, activations=0.0):
    sizes = (4, 8, 4, 4 + activations, peak, 40)
    return Memory(*(int(size * GIB) for size in sizes))


def test_what_does_not_fit_names_the_largest_term_and_what_would():
    plan = SimpleNamespace(memory=memory(50, 34), chip=A40)
    says = verdict(plan, "--config.accumulation=64")
    assert "does not fit: 50.0 GiB of 40.0" in says
    assert "activations and workspace, 34.0 GiB" in says and "accumulation=64 would fit" in says
    assert "use more GPUs" in verdict(plan, "")
    assert verdict(SimpleNamespace(memory=memory(22), chip=A40), "").startswith("fits: 50% of")


ROWS_BYTES = {"none": 9.0, "dots": 4.0, "attention": 1.5, "full": 1.0}  # GiB a row
SLOWER = {"none": 1.0, "dots": 1.1, "attention": 1.25, "full": 1.3}


def figures(rows, state):
    """evaluate of a device whose memory and speed are known; small parts are slower."""

    def evaluate(parts, remat, fsdp=None):
        activations = ROWS_BYTES[remat] * rows / parts
        peak = state + activations
        return {
            "remat": remat,
            "accumulation": parts,
            "fsdp": fsdp or 8,
            "replica": 1,
            "unroll": 0,
            "seq_len": 512,
            "batch": rows,
            "fits": peak <= 40 and fsdp != 1,  # a copy of all parameters on each device does not
            "mfu_causal": 0.5,
            "tokens_per_s": (5e3 if peak > 36 else 1e4)  # where memory is tight, XLA recomputes
            / SLOWER[remat]
            / (1 + 0.01 * parts)
            * {None: 1, 4: 1.1, 1: 1.2}[fsdp],
            "memory_bytes": {
                "activations and workspace": activations * GIB,
                "peak": peak * GIB,
                "usable": 40 * GIB,
            },
        }

    return evaluate


@pytest.mark.parametrize("optimism", [0.8, 1.0, 1.2])
@pytest.mark.parametrize("state", [2.0, 30.0, 34.5, 38.2, 39.5])
def test_the_search_finds_what_trying_everything_finds(state, optimism):
    rows, seen = 64, []
    cfg = SimpleNamespace(data=SimpleNamespace(batch=rows, seq_len=512))
    evaluate = figures(rows, state)
    rough = figures(rows, state * optimism)
    guess = lambda *setting: rough(*setting)["fits"]
    found = search.search_settings(cfg, 1, evaluate, seen.append, guess=guess)
    every = [evaluate(p, r) for p in search.accumulations(cfg, 1) for r in search.REMATS]
    fitting = [f for f in every if f["fits"]]
    if fitting:
        assert found[0] == max(fitting, key=lambda f: f["tokens_per_s"])
    else:
        assert not found[0]["fits"]
    assert len(seen) == len(found) < len(every)


def test_the_fastest_setting_is_tried_on_every_mesh():
    cfg = SimpleNamespace(data=SimpleNamespace(batch=64, seq_len=512))
    evaluate, seen, variants = figures(64, 2.0), [], [{"fsdp": size} for size in (8, 4, 1)]
    found = search.search_settings(cfg, 1, evaluate, seen.append, variants=variants)
    assert found[0]["fsdp"] == 4 and found[1]["fsdp"] == 8  # 1 is faster, and does not fit
    assert [f["fsdp"] for f in found if not f["fits"]].count(1) == 1


def test_another_length_keeps_the_tokens_of_a_step():
    cfg = freeze(debug.get_config())
    other = search.with_setting(cfg, 2, "dots", seq_len=64, unroll=2, fsdp=1)
    assert other.data.batch * other.data.seq_len == cfg.data.batch * cfg.data.seq_len
    assert (other.data.seq_len, other.accumulation, other.model.remat) == (64, 2, "dots")
    assert (other.model.unroll, other.mesh.fsdp, other.mesh.replica) == (2, 1, -1)
    with pytest.raises(ValueError, match="got 100. Set --seq_lens"):
        search.with_setting(cfg, 1, "none", seq_len=100)


def test_a_chosen_setting_is_written_as_a_config(tmp_path):
    chosen = figures(64, 2.0)(4, "dots") | {"devices": 1, "chip": "a40"}
    search.write_config(tmp_path / "mine.py", "gpt_124m", chosen)
    space = {}
    exec((tmp_path / "mine.py").read_text(), space)
    config = space["get_config"]()
    assert config.accumulation == 4 and config.model.remat == "dots" and config.model.D == 768


def test_links_cost_their_bytes_and_their_latency():
    gather = Collective("all-gather", 8 * 10**9, ("fsdp",), 8, False, 2)
    inside, between = parse_link("pcie4", A40), parse_link("wan:150ms,1gbps", A40)
    assert seconds_of(gather, inside, between) == pytest.approx(2 * 7 / 8 * 0.25, rel=1e-2)
    far = seconds_of(gather._replace(crosses_hosts=True), inside, between)
    assert far == pytest.approx(2 * (7 / 8 * 64 + 7 * 0.075))
    assert parse_link("nvlink", A40).bytes_per_s == A40.nvlink_bytes_per_s / 2
    for text in ("isdn", "wan:1s,2gbps", "wan:150ms,0gbps"):
        with pytest.raises(ValueError, match=f"got '{text}'"):
            parse_link(text, A40)
    with pytest.raises(ValueError, match="got 'nvlink' for l40s"):
        parse_link("nvlink", find_chip("l40s"))
    usual = {name: parse_link("", find_chip(name)).name for name in ("a40", "h100", "h100_pcie")}
    assert usual == {"a40": "pcie4", "h100": "nvlink", "h100_pcie": "pcie5"}
    assert set(LINKS)


def test_prices_are_checked():
    assert parse_prices(["a40=0.40", "h100=2.5"]) == {"a40": 0.4, "h100": 2.5}
    with pytest.raises(ValueError, match="--price must be as"):
        parse_prices(["a40"])
    with pytest.raises(ValueError, match="got 'b300'"):
        parse_prices(["b300=1"])
