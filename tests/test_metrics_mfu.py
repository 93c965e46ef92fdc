import jax
import jax.numpy as jnp
import pytest

from configs import debug
from jaxtrain.config.train_config import freeze
from jaxtrain.metrics.flops import matrix_weights
from jaxtrain.metrics.hlo_collectives import Collective
from jaxtrain.metrics.mfu import StepWork, build_work, chip_dict, describe_utilisation, mfu
from jaxtrain.training.run import build_run, compile_step
from pallas_kernels.chip import find_chip

A40 = find_chip("a40")
REDUCE = Collective("all-reduce", 1_000, ("replica",), 2, True, 3)


def work_of(**values):
    values = (
        dict(
            tokens=100,
            parameters=7,
            flops_6n=4e12,
            flops_causal=5e12,
            flops_full=6e12,
            hbm_bytes=348e9,
            roofline_s=0.1,
            collectives=(REDUCE, REDUCE._replace(kind="all-gather", crosses_hosts=False)),
            devices=2,
            dtype="bfloat16",
        )
        | values
    )
    return StepWork(**values)


class Unreadable:
    """A compiled program whose text cannot be parsed."""

    def as_text(self):
        raise ValueError("an unknown form")


def test_mfu_divides_by_the_peak_of_all_devices_and_mbu_by_that_of_one():
    used = work_of().utilisation(A40, 0.5)
    assert used["perf/mfu"] == pytest.approx(5e12 / 0.5 / (2 * 149.7e12))
    assert used["perf/mfu_6n"] == pytest.approx(4e12 / 0.5 / (2 * 149.7e12))
    assert used["perf/mbu"] == pytest.approx(1.0)
    float32 = work_of(dtype="float32").utilisation(A40, 0.5)
    assert float32["perf/mfu"] == pytest.approx(5e12 / 0.5 / (2 * 74.8e12))


@pytest.mark.parametrize(
    ("dtype", "peak"),
    [("bfloat16", 149.7e12), (jnp.bfloat16, 149.7e12), ("float16", 149.7e12), ("float32", 74.8e12)],
)
def test_mfu_of_an_own_loop_needs_no_config(dtype, peak):
    assert mfu(5e12, 0.5, "a40", dtype, devices=2) == pytest.approx(5e12 / 0.5 / (2 * peak))


@pytest.mark.parametrize(
    ("values", "error"),
    [
        ({"chip": "a4"}, "Did you mean a40"),
        ({"dtype": "float64"}, "dtype must be one of bfloat16, float16, float32; got float64"),
        ({"dtype": "bf16"}, "dtype must be one of .*; got 'bf16'"),
        ({"step_time_s": 0.0}, "step_time_s must be positive; got 0.0"),
        ({"flops": float("nan")}, "flops must be positive; got nan"),
        ({"devices": 0}, "devices must be positive; got 0"),
    ],
)
def test_mfu_is_refused_where_it_would_be_wrong(values, error):
    right = {"flops": 5e12, "step_time_s": 0.5, "chip": "a40", "dtype": "bfloat16"}
    with pytest.raises(ValueError, match=error):
        mfu(**right | values)


def test_without_a_known_peak_there_is_no_utilisation():
    assert work_of().utilisation(None, 0.5) == {} and chip_dict(None) is None
    assert work_of(dtype="float64").utilisation(A40, 0.5) == {}
    device = jax.devices()[0]
    assert "'cpu' has no peak" in describe_utilisation(work_of(), None, device)[0]
    assert "float64" in describe_utilisation(work_of(dtype="float64"), A40, device)[0]
    assert "149.7 TFLOP/s (bfloat16" in describe_utilisation(work_of(), A40, device)[0]


@pytest.mark.parametrize(
    ("data", "caveat"),
    [({}, ""), ({"document_mask": True}, "mfu counts keys"), ({"pack": True}, "padding")],
)
def test_a_caveat_names_masked_keys_or_padding_that_mfu_counts(data, caveat):
    config = debug.get_config()
    config.data.update(data)
    run = build_run(freeze(config), jax.devices()[:1])
    work = build_work(run.cfg, run.parameters, run.mesh, Unreadable())
    lines = "\n".join(describe_utilisation(work, None, jax.devices()[0]))
    assert ("mfu counts keys" in lines or "padding" in lines) == bool(caveat) and caveat in lines


def test_collectives_are_summed_by_kind_axis_and_whether_they_cross_hosts():
    work = work_of()
    assert work.as_dict()["collectives"] == [
        {"kind": "all-reduce", "axis": "replica", "inter_host": True, "bytes": 3_000, "count": 3},
        {"kind": "all-gather", "axis": "replica", "inter_host": False, "bytes": 3_000, "count": 3},
    ]
    assert work.collective_metrics() == {
        "comm/all_reduce_bytes": 3_000,
        "comm/all_gather_bytes": 3_000,
    }
    assert work.sent_bytes == 3_000  # each of two devices sends half of the payload twice


def test_data_parallel_adamw_reduces_gradients_and_gathers_steps():
    """Expects 4 bytes per parameter each way: the moments are split over replicas."""
    config = debug.get_config()
    config.model.L = 1
    config.optim.name = "adamw"
    config.mesh.update(replica=2, fsdp=1)
    run = build_run(freeze(config), jax.devices()[:2])
    work = build_work(run.cfg, run.parameters, run.mesh, compile_step(run).compiled, ["a"])
    payload_bytes = dict.fromkeys([c.kind for c in work.collectives], 0)
    for c in work.collectives:
        payload_bytes[c.kind] += c.times * c.payload_bytes
    assert payload_bytes.keys() == {"all-reduce", "all-gather"}
    assert 0 <= payload_bytes["all-reduce"] - 4 * run.parameters <= 256
    assert 0 < payload_bytes["all-gather"] <= 4 * run.parameters
    assert work.sent_bytes == 0.0 and work.parameters == run.parameters  # both devices on one host
    tokens = config.data.batch * config.data.seq_len
    assert work.flops_6n == 6 * matrix_weights(run.cfg.model) * tokens
    assert work.flops_6n < work.flops_causal < work.flops_full


def test_a_program_that_cannot_be_parsed_is_reported_and_mfu_is_still_measured():
    run = build_run(freeze(debug.get_config()), jax.devices()[:1])
    work = build_work(run.cfg, run.parameters, run.mesh, Unreadable())
    assert "an unknown form" in describe_utilisation(work, None, jax.devices()[0])[-1]
    assert work.utilisation(A40, 0.5).keys() == {"perf/mfu", "perf/mfu_6n"}
