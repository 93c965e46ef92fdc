import pytest

from launch.inventory import parse_inventory

HOSTS = [{"name": "a", "address": "10.0.0.1"}, {"name": "b", "address": "10.0.0.2"}]


def test_a_hosts_own_values_override_the_defaults():
    hosts = [HOSTS[0], HOSTS[1] | {"port": 23}]
    inventory = parse_inventory({"defaults": {"user": "u", "port": 22}, "hosts": hosts}, "f")
    assert [(h.name, h.user, h.port, h.target) for h in inventory.hosts] == [
        ("a", "u", 22, "a"),
        ("b", "u", 23, "b"),
    ]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"adress": "10.0.0.3"}, "Did you mean 'address'"),
        ({"address": "here"}, "must be an IP; got 'here'"),
        ({"address": "127.0.0.1"}, "reachable from the other hosts"),
        ({"address": "10.0.0.2"}, "10.0.0.2"),
        ({"name": "b"}, "'b'"),
        ({"name": "a b"}, "name must consist of letters"),
        ({"ssh": "-oProxyCommand=x"}, "must not begin with '-'"),
        ({"gpus": "8"}, "gpus must be of type int; got '8'"),
        ({"gpus": 8}, "as many gpus as the others"),
        ({"site": "mars"}, "at one site"),
    ],
)
def test_an_invalid_host_is_refused_by_name(change, message):
    with pytest.raises(ValueError, match=message):
        parse_inventory({"hosts": [HOSTS[0] | change, HOSTS[1]]}, "f")


def test_there_is_one_rank_per_host_or_per_gpu():
    hosts = [host | {"gpus": 4} for host in HOSTS]
    assert parse_inventory({"hosts": hosts}, "f").ranks_per_host == 1
    assert parse_inventory({"hosts": hosts, "ranks": "gpu"}, "f").ranks_per_host == 4
    with pytest.raises(ValueError, match='"host" or "gpu"'):
        parse_inventory({"hosts": hosts, "ranks": "node"}, "f")
