import jax
import pytest

from configs import debug
from jaxtrain.config.train_config import freeze
from jaxtrain.metrics.flops import matrix_weights
from jaxtrain.metrics.hlo_collectives import Collective
from jaxtrain.metrics.mfu import StepWork, build_work, chip_dict, describe_utilisation
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
    """A compiled program that this code does not know."""

    def as_text(self):
        raise ValueError("a form of tomorrow")


def test_utilisation_is_of_all_devices_peaks_and_of_one_devices_bytes():
    used = work_of().utilisation(A40, 0.5)
    assert used["perf/mfu"] == pytest.approx(5e12 / 0.5 / (2 * 149.7e12))
    assert used["perf/mfu_6n"] == pytest.approx(4e12 / 0.5 / (2 * 149.7e12))
    assert used["perf/mbu"] == pytest.approx(1.0)
    float32 = work_of(dtype="float32").utilisation(A40, 0.5)
    assert float32["perf/mfu"] == pytest.approx(5e12 / 0.5 / (2 * 74.8e12))


def test_where_no_peak_is_known_none_is_guessed():
    assert work_of().utilisation(None, 0.5) == {} and chip_dict(None) is None
    assert work_of(dtype="float64").utilisation(A40, 0.5) == {}
    device = jax.devices()[0]
    assert "'cpu' has no peak" in describe_utilisation(work_of(), None, device)[0]
    assert "float64" in describe_utilisation(work_of(dtype="float64"), A40, device)[0]
    assert "149.7 TFLOP/s (bfloat16" in describe_utilisation(work_of(), A40, device)[0]


@pytest.mark.parametrize(
    ("data", "said"),
    [({}, ""), ({"document_mask": True}, "mfu counts keys"), ({"pack": True}, "padding")],
)
def test_what_is_counted_though_it_is_masked_or_padding_is_said(data, said):
    config = debug.get_config()
    config.data.update(data)
    run = build_run(freeze(config), jax.devices()[:1])
    work = build_work(run.cfg, run.parameters, run.mesh, Unreadable())
    lines = "\n".join(describe_utilisation(work, None, jax.devices()[0]))
    assert ("mfu counts keys" in lines or "padding" in lines) == bool(said) and said in lines


def test_collectives_are_summed_by_kind_axis_and_whether_they_leave_a_host():
    work = work_of()
    assert work.as_dict()["collectives"] == [
        {"kind": "all-reduce", "axis": "replica", "inter_host": True, "bytes": 3_000, "count": 3},
        {"kind": "all-gather", "axis": "replica", "inter_host": False, "bytes": 3_000, "count": 3},
    ]
    assert work.collective_metrics() == {
        "comm/all_reduce_bytes": 3_000,
        "comm/all_gather_bytes": 3_000,
    }
    assert work.sent_bytes == 3_000  # a ring of two sends its half twice


def test_copies_of_a_model_reduce_its_gradients_and_scalars_and_no_more():
    """Counted by hand: 4 bytes a parameter; of one layer no copy keeps a part of the moments."""
    config = debug.get_config()
    config.model.L = 1
    config.optim.name = "adamw"
    config.mesh.update(replica=2, fsdp=1)
    run = build_run(freeze(config), jax.devices()[:2])
    work = build_work(run.cfg, run.parameters, run.mesh, compile_step(run).compiled, ["a"])
    assert {c.kind for c in work.collectives} == {"all-reduce"}
    assert 0 <= work.payload_bytes - 4 * run.parameters <= 256
    assert work.sent_bytes == 0.0 and work.parameters == run.parameters  # both devices on one host
    tokens = config.data.batch * config.data.seq_len
    assert work.flops_6n == 6 * matrix_weights(config.model) * tokens
    assert work.flops_6n < work.flops_causal < work.flops_full


def test_a_program_that_cannot_be_read_is_said_and_stops_nothing():
    run = build_run(freeze(debug.get_config()), jax.devices()[:1])
    work = build_work(run.cfg, run.parameters, run.mesh, Unreadable())
    assert "a form of tomorrow" in describe_utilisation(work, None, jax.devices()[0])[-1]
    assert work.utilisation(A40, 0.5).keys() == {"perf/mfu", "perf/mfu_6n"}
