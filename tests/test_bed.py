"""Beds of hosts that run at the same time have different networks."""

import secrets
import shutil

import bed as beds
import pytest

pytestmark = pytest.mark.skipif(not shutil.which("ip"), reason="reads addresses with ip")


@pytest.fixture
def in_order(monkeypatch):
    """Every bed tries the networks in their order."""
    monkeypatch.setattr(secrets.SystemRandom, "sample", lambda *_: range(beds.NETWORKS))


def test_two_beds_at_a_time_have_two_networks_and_an_ended_one_gives_its_own_back(in_order):
    with beds.own_network() as first:
        with beds.own_network() as second:
            assert first != second
        with beds.own_network() as third:
            assert third == second


def test_the_network_of_a_bed_that_was_killed_is_not_taken_while_its_devices_are_there(
    in_order, monkeypatch
):
    left = "7: jb12ab    inet 10.77.0.254/24 scope global jb12ab"
    monkeypatch.setattr(beds, "check_output", lambda *_: left)
    with beds.own_network() as network:
        assert network == "10.77.1"


def test_a_machine_without_a_free_network_says_so(in_order, monkeypatch):
    everything = "".join(f"inet 10.77.{i}.254/24\n" for i in range(beds.NETWORKS))
    monkeypatch.setattr(beds, "check_output", lambda *_: everything)
    with pytest.raises(RuntimeError, match="all 250 networks of beds are in use"):
        with beds.own_network():
            pass
