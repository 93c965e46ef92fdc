import pytest

from jaxtrain.metrics.hlo_collectives import Collective
from jaxtrain.planning.hardware import build_hardware, collective_seconds, parse_link
from pallas_kernels.chip import find_chip

A40 = find_chip("a40")


def test_a_collective_takes_the_time_of_its_bytes_and_of_its_messages_latency():
    gather = Collective("all-gather", 8 * 10**9, ("fsdp",), 8, False, 2)
    hardware = build_hardware(A40, 8, 2, "pcie4", "wan:150ms,1gbps")
    assert collective_seconds(gather, hardware) == pytest.approx(2 * 7 / 8 * 0.25, rel=1e-2)
    between_hosts = collective_seconds(gather._replace(crosses_hosts=True), hardware)
    assert between_hosts == pytest.approx(2 * (7 / 8 * 64 + 7 * 0.075))


def test_a_link_is_a_known_name_or_a_delay_and_a_rate():
    assert parse_link("nvlink", A40).bytes_per_s == A40.nvlink_bytes_per_s / 2  # one direction
    for text in ("isdn", "wan:1s,2gbps", "wan:150ms,0gbps"):
        with pytest.raises(ValueError, match=f"got '{text}'"):
            parse_link(text, A40)
    with pytest.raises(ValueError, match="got 'nvlink' for l40s"):
        parse_link("nvlink", find_chip("l40s"))


def test_the_default_link_is_the_one_that_hosts_with_the_chip_have():
    chips = ("a40", "h100", "h100_pcie", "h100_nvl")
    names = ["pcie4", "nvlink", "pcie5", "pcie5"]  # bridges join only pairs of the last two
    assert [parse_link("", find_chip(name)).name for name in chips] == names
