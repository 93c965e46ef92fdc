"""Efficiencies fitted to measured steps, and the classes of work that they belong to."""

import json

import jax
import pytest

from jaxtrain.benchmarks import plan_check
from jaxtrain.benchmarks.first_day_results import find_left, read_rows, summarize
from jaxtrain.metrics.mfu import roofline
from jaxtrain.metrics.work_kinds import CLASSES, find_causes
from jaxtrain.planning.calibration import (
    calibrate_by_traces,
    classes_of_causes,
    fit_calibration,
    read_calibration,
)
from pallas_kernels.chip import find_chip
from pallas_kernels.hlo import Program

EFFICIENCY = {"products": 0.7, "attention": 0.45, "memory": 0.85}
STEPS = [
    {"products": 0.10, "attention": 0.02, "memory": 0.08},
    {"products": 0.30, "attention": 0.03, "memory": 0.10},
    {"products": 0.60, "attention": 0.09, "memory": 0.15},
    {"products": 0.90, "attention": 0.05, "memory": 0.25},
]


def measured(step):
    return sum(seconds / EFFICIENCY[name] for name, seconds in step.items())


def test_the_fit_recovers_the_efficiencies_of_each_class():
    fitted = fit_calibration("h100", STEPS, [measured(step) for step in STEPS], {})
    assert fitted.efficiency == pytest.approx(EFFICIENCY, rel=1e-6)
    assert fitted.largest_error < 1e-6 and not fitted.notes
    new = {"products": 0.2, "attention": 0.2, "memory": 0.2}
    assert fitted.seconds(new) == pytest.approx(measured(new))


def test_a_class_that_the_steps_do_not_determine_is_named():
    impossible = [step | {"memory": 0.0} for step in STEPS]
    times = [step["products"] / 0.5 + step["attention"] * 0.1 for step in impossible]
    fitted = fit_calibration("h100", impossible, times, {})
    assert fitted.efficiency["attention"] == pytest.approx(1.0)
    assert "memory" not in fitted.efficiency
    assert "not determined: attention" in fitted.describe()


def test_fewer_steps_than_classes_share_one_efficiency():
    fitted = fit_calibration("h100", STEPS[:2], [2 * sum(s.values()) for s in STEPS[:2]], {})
    assert fitted.efficiency == pytest.approx(dict.fromkeys(CLASSES, 0.5))
    assert "fewer steps than classes (2)" in fitted.describe()
    for classes_s, times_s in (([], []), ([STEPS[0]], [0.0]), ([{"products": 0.0}], [1.0])):
        with pytest.raises(ValueError, match="needs steps with positive times"):
            fit_calibration("h100", classes_s, times_s, {})


def test_traces_by_cause_determine_each_class_even_with_one_step():
    step_s = measured(STEPS[1])
    # Two steps' trace, in which a tenth of the time has no cause or is idle.
    part = lambda name, share: 2 * 0.9 * share * STEPS[1][name] / EFFICIENCY[name]
    by_cause_s = {
        "products, forward": part("products", 0.4),
        "products, backward": part("products", 0.6),
        "attention": part("attention", 1.0),
        "copies": part("memory", 0.1),
        "element-wise and reductions, optimizer": part("memory", 0.9),
        "not in the step's program": 0.01,
    }
    traced_s = classes_of_causes(by_cause_s, step_s)
    assert sum(traced_s.values()) == pytest.approx(step_s)
    fitted = calibrate_by_traces("h100", STEPS[1:2], [traced_s], {})
    assert fitted.efficiency == pytest.approx(EFFICIENCY) and fitted.largest_error < 1e-9
    assert "from traces by cause" in fitted.describe()
    assert classes_of_causes({"not in the step's program": 1.0}, step_s) == {}


def test_only_a_measured_calibration_of_the_same_chip_is_read(tmp_path):
    path, chip = tmp_path / "calibration.json", find_chip("h100")
    fitted = fit_calibration("h100", STEPS, list(map(measured, STEPS)), {"card": "H100"})
    path.write_text(json.dumps(fitted._asdict()))
    assert read_calibration(path, chip) == fitted
    with pytest.raises(ValueError, match="measured on a40; got .*, of h100"):
        read_calibration(path, find_chip("a40"))
    path.write_text(json.dumps(fitted._asdict() | {"tiny": True}))
    with pytest.raises(ValueError, match="a trial's, which measured nothing"):
        read_calibration(path, chip)


DAMAGED = {
    "no JSON": "{",
    "no object": "[]",
    "no fields": "{}",
    "an unknown class": {"efficiency": {"product": 0.5}},
    "no class": {"efficiency": {}},
    "an efficiency above 1": {"efficiency": {"products": 1.2}},
    "an efficiency that is no number": {"efficiency": {"products": "0.5"}},
    "an error that is no number": {"largest_error": "small"},
    "steps that are no number": {"steps": "2"},
    "a source that is a text": {"about": "H100"},
    "notes that are a number": {"notes": 3},
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_the_error_names_a_damaged_calibration(damage, tmp_path):
    fitted = fit_calibration("h100", STEPS, list(map(measured, STEPS)), {"card": "H100"})
    change, path = DAMAGED[damage], tmp_path / "calibration.json"
    values = json.dumps(fitted._asdict() | change) if isinstance(change, dict) else change
    path.write_text(values)
    with pytest.raises(ValueError, match="--calibrated must .* got .*calibration.json"):
        read_calibration(path, find_chip("h100")).describe()


def test_what_a_calibration_does_not_cover_is_said():
    steps = [{"products": step["products"], "memory": step["memory"]} for step in STEPS]
    fitted = fit_calibration("h100", steps, [2 * sum(s.values()) for s in steps], {"jax": "0.1.2"})
    text = fitted.describe()
    assert "not in these steps, so taken at the peak: attention" in text
    assert "with jax 0.1.2" in text and f"this is jax {jax.__version__}" in text
    same = fitted._replace(about={"jax": jax.__version__}).describe()
    assert "this is jax" not in same
    one = fit_calibration("h100", steps[:1], [1.0], {}).describe()
    assert "fitted to 1 step measured" in one


HLO = """
HloModule step

%inside (a: f32[64,64]) -> f32[64,64] {
  %a = f32[64,64]{1,0} parameter(0)
  ROOT %sum = f32[64,64]{1,0} add(%a, %a)
}

ENTRY %main (q: bf16[8,1024,16,128], a: bf16[8192,8192], b: f32[64,64]) -> f32[64,64] {
  %q = bf16[8,1024,16,128]{3,2,1,0} parameter(0)
  %a = bf16[8192,8192]{1,0} parameter(1)
  %b = f32[64,64]{1,0} parameter(2)
  %attend = bf16[8,1024,16,128]{3,2,1,0} custom-call(%q, %q, %q), \
custom_call_target="__gpu$xla.gpu.triton", \
metadata={op_name="jit(step)/jvp()/flash_attention_forward/pallas_call"}
  %dot.1 = bf16[8192,8192]{1,0} dot(%a, %a), lhs_contracting_dims={1}, rhs_contracting_dims={0}, \
metadata={op_name="jit(step)/transpose(jvp())/dot_general"}
  %gemm = bf16[8192,8192]{1,0} custom-call(%a, %a), custom_call_target="__cublas$lt$matmul", \
backend_config={"lhs_contracting_dimensions":["1"]}, \
metadata={op_name="jit(step)/dot_general"}
  %moved = bf16[8192,8192]{0,1} copy(%a)
  ROOT %fusion = f32[64,64]{1,0} fusion(%b), kind=kLoop, calls=%inside, \
metadata={op_name="jit(step)/add"}
}
"""


def test_classes_add_up_to_the_roofline_and_each_instruction_has_a_cause():
    program, chip = Program(HLO), find_chip("h100")
    bound = roofline(program, chip)
    assert sum(bound.class_s.values()) == bound.seconds
    assert min(bound.class_s.values()) > 0
    assert bound.class_s["products"] == pytest.approx(4 * 8_192**3 / chip.peak_flops["bfloat16"])
    assert bound.compute_s <= bound.class_s["products"] + bound.class_s["attention"]
    assert find_causes(program) == {
        "attend": "attention, forward",
        "dot.1": "products, backward",
        "gemm": "products, optimizer",
        "moved": "copies",
        "fusion": "element-wise and reductions, optimizer",
    }


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder with measured steps, whose plans are known without compiling."""
    card = {"suite": "gpu", "case": "ceilings", "device": find_chip("h100").kind}
    step = {"variant": "jaxtrain", "what": "step", "rows": 8, "tokens_per_step": 65_536}
    sizes = ("gpt_124m", "gpt_350m", "gpt_774m", "llama_1400m")
    plans = dict(zip(sizes, STEPS, strict=True))
    rows = [card, {"case": "gpt_124m muon", "variant": "pytorch", "what": "step", "step_s": 9.0}]
    for size, classes in plans.items():
        rows.append(step | {"case": f"{size} muon", "step_s": measured(classes), "peak_bytes": 9})
    rows.append({"case": "gpt_124m muon", "variant": "jaxtrain", "what": "step", "error": "x"})
    (tmp_path / "training.jsonl").write_text("\n".join(map(json.dumps, rows)))
    sizes_of = {(12, 768): "gpt_124m", (24, 1_024): "gpt_350m", (36, 1_280): "gpt_774m"}

    def compiled_figures(cfg, hardware, cache):
        assert (cfg.data.batch // cfg.accumulation, hardware.chip.name) == (8, "h100")
        seconds = plans[sizes_of.get((cfg.model.L, cfg.model.D), "llama_1400m")]
        figures = {"roofline_s": sum(seconds.values()), "class_s": seconds, "routes": {}}
        return figures | {"memory_bytes": {"peak": 8}, "notes": []}

    monkeypatch.setattr(plan_check, "compiled_figures", compiled_figures)
    return tmp_path


def test_measured_steps_are_compared_with_their_plans_and_calibrate_them(folder):
    plan_check.main([str(folder)])
    [plan] = read_rows(folder / "plan.json")
    assert len(plan["rows"]) == 4 and not find_left([plan])
    for row in plan["rows"]:
        assert row["calibrated_s"] == pytest.approx(row["measured_s"])
        assert row["bound_s"] < row["measured_s"]
        assert (row["measured_bytes"], row["planned_bytes"]) == (9, 8)
    found = read_calibration(folder / "calibration.json", find_chip("h100"))
    assert found.efficiency == pytest.approx(EFFICIENCY, rel=1e-6)
    assert found.about["commit"] and found.about["date"] and found.about["command"]
    assert "products 70%, attention 45%, memory 85%" in summarize("plan", [plan])[-1]


def test_steps_that_the_time_does_not_reach_are_listed_as_left(folder, monkeypatch):
    clock = iter([0.0, 0.0, 0.0, 100.0])
    monkeypatch.setattr(plan_check.time, "monotonic", lambda: next(clock))
    plan_check.check_folder(folder, 60.0, tiny=False)
    [plan] = read_rows(folder / "plan.json")
    assert len(plan["rows"]) == 3
    assert find_left([plan]) == ["llama_1400m muon"]
    assert not (folder / "calibration.json").exists()


def test_steps_of_an_unknown_card_are_an_error_that_names_it(folder):
    (folder / "training.jsonl").write_text(json.dumps({"device": "NVIDIA B300"}))
    with pytest.raises(SystemExit, match="device of the chip table; got \\['NVIDIA B300'\\]"):
        plan_check.main([str(folder)])
