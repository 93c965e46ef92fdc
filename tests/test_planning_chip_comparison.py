import pytest

from jaxtrain.planning.chip_comparison import parse_prices


def test_a_malformed_price_or_an_unknown_chip_is_an_error():
    assert parse_prices(["a40=0.40", "h100=2.5"]) == {"a40": 0.4, "h100": 2.5}
    with pytest.raises(ValueError, match="--price must be of the form"):
        parse_prices(["a40"])
    with pytest.raises(ValueError, match="got 'b300'"):
        parse_prices(["b300=1"])
