from types import SimpleNamespace

from jaxtrain.planning.compiled import StepMemory
from jaxtrain.planning.render import GIB, fit_verdict
from pallas_kernels.chip import find_chip


def plan_of(peak, activations=0.0):
    sizes = (4, 8, 4, 4 + activations, peak, 40)
    memory = StepMemory(*(int(size * GIB) for size in sizes))
    return SimpleNamespace(memory=memory, hardware=SimpleNamespace(chip=find_chip("a40")))


def test_the_verdict_names_the_largest_use_of_memory_and_flags_that_fit():
    verdict = fit_verdict(plan_of(50, activations=34), "--config.accumulation=64")
    assert "Does not fit: needs 50.0 GiB of 40.0" in verdict
    assert "activations and workspace, 34.0 GiB" in verdict
    assert "These flags fit: --config.accumulation=64" in verdict
    assert "use more GPUs" in fit_verdict(plan_of(50, activations=34), "")
    assert fit_verdict(plan_of(22), "").startswith("Fits: 50% of")
