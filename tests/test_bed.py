"""Beds of hosts that run at the same time have different networks."""

import secrets
import shutil

import bed as beds
import pytest

pytestmark = pytest.mark.skipif(not shutil.which("ip"), reason="reads addresses with ip")


@pytest.fixture
def network(monkeypatch):
    """Networks of this test, which beds try in their order; real beds use others meanwhile."""
    monkeypatch.setattr(secrets.SystemRandom, "sample", lambda *_: range(beds.NETWORKS))
    monkeypatch.setattr(beds, "NETWORK", f"test-{secrets.token_hex(4)}")
    return beds.NETWORK


def test_two_beds_at_a_time_have_two_networks_and_an_ended_one_gives_its_own_back(network):
    with beds.own_network() as first:
        with beds.own_network() as second:
            assert (first, second) == (f"{network}.0", f"{network}.1")
        with beds.own_network() as third:
            assert third == second


def test_the_network_of_a_bed_that_was_killed_is_not_taken_while_its_devices_are_there(
    network, monkeypatch
):
    left = f"7: jb12ab    inet {network}.0.254/24 scope global jb12ab"
    monkeypatch.setattr(beds, "check_output", lambda *_: left)
    with beds.own_network() as found:
        assert found == f"{network}.1"


def test_a_machine_without_a_free_network_says_so(network, monkeypatch):
    everything = "".join(f"inet {network}.{i}.254/24\n" for i in range(beds.NETWORKS))
    monkeypatch.setattr(beds, "check_output", lambda *_: everything)
    with pytest.raises(RuntimeError, match="all 250 networks of beds are in use"):
        with beds.own_network():
            pass
