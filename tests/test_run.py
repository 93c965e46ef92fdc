import pytest

from jaxtrain.run import of_runtime


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("UNKNOWN: Gloo AllGather failed: Connection closed by peer [10.77.222.1]:20881", True),
        ("UNAVAILABLE: failed to connect to all addresses", True),
        ("data.batch must divide over 2 devices; got 3. Set --config.data.batch.", False),
    ],
)
def test_the_death_of_a_peer_is_not_taken_for_bad_input(text, expected):
    assert of_runtime(ValueError(text)) == expected
