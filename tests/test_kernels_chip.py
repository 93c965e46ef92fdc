from types import SimpleNamespace

import pytest

from pallas_kernels.chip import CHIPS, detect_chip, explain_unknown, find_chip


@pytest.mark.parametrize("name", CHIPS)
def test_the_chip_of_a_device_is_detected_from_its_kind(name):
    chip = find_chip(name)
    assert detect_chip(SimpleNamespace(device_kind=chip.kind)) is chip
    assert chip.source


@pytest.mark.parametrize(
    "kind", ["NVIDIA A4000", "NVIDIA H200 NVL", "NVIDIA A100 80GB PCIe", "cpu"]
)
def test_a_device_that_only_resembles_a_known_chip_is_an_error(kind):
    with pytest.raises(ValueError, match=f"got '{kind}'"):
        detect_chip(SimpleNamespace(device_kind=kind))


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("NVIDIA H100 NVL", "h100_nvl"),
        ("NVIDIA GH200 480GB", "gh200"),
        ("NVIDIA GH200 144G HBM3e", "gh200_144gb"),
        ("NVIDIA L40", "l40"),
        ("NVIDIA A10", "a10"),
    ],
)
def test_variants_of_a_chip_have_their_own_entries(kind, name):
    assert detect_chip(SimpleNamespace(device_kind=kind)).name == name


@pytest.mark.parametrize("kind", ["NVIDIA H100 80GB HBM3 MIG 1g.10gb", "NVIDIA A30 MIG 2g.12gb"])
def test_a_mig_slice_is_refused_because_it_has_a_part_of_the_peaks(kind):
    with pytest.raises(
        ValueError, match=f"must be a whole GPU of .*'{kind}' is a MIG slice.*mig 0"
    ):
        detect_chip(SimpleNamespace(device_kind=kind))
    assert "a MIG slice" in explain_unknown(kind) and "a MIG slice" not in explain_unknown("cpu")


def test_an_unknown_chip_name_lists_the_known_ones():
    with pytest.raises(ValueError, match="one of a40, .*h200, .*; got 'b300'"):
        find_chip("b300")


@pytest.mark.parametrize("chip", CHIPS.values(), ids=CHIPS)
def test_the_peaks_and_sizes_of_a_chip_are_consistent(chip):
    peaks = chip.peak_flops
    assert peaks["bfloat16"] == peaks["float16"] > peaks["tf32"]
    assert peaks["tf32"] >= peaks["float32"]
    assert chip.shared_bytes_per_block + 1_024 <= chip.shared_bytes_per_sm
    assert 1e11 < chip.hbm_bytes_per_s < 1e13 < peaks["float32"]
    # float32: two FLOPs per lane and clock; a multiprocessor has 64 lanes (A100) or 128
    lanes = 64 if chip.compute_capability == (8, 0) else 128
    assert peaks["float32"] == pytest.approx(2 * lanes * chip.sms * chip.clock_ghz * 1e9, rel=0.02)


def test_the_roofline_is_the_longer_of_transfer_and_compute_time():
    chip = find_chip("a40")
    assert chip.seconds(696e9, 0) == 1
    assert chip.seconds(0, 149.7e12) == pytest.approx(1)
    assert chip.seconds(696e9, 2 * 149.7e12) == pytest.approx(2)
    assert chip.seconds(0, 37.4e12, "float32") == pytest.approx(1)
