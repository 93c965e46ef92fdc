from fractions import Fraction

import pytest

from jaxtrain.config.mixture_fields import parse_epochs, parse_sources, parse_stages, write_sources
from jaxtrain.config.train_config import DataConfig, TrainConfig, config_hash

NAMES = "web", "code", "math"


def test_sources_are_names_and_paths_which_may_be_quoted():
    sources = {"web": "a/b", "code_2": "with space", "math": "x=*.bin"}
    assert parse_sources("web=a/b\n code_2='with space'  math=x=*.bin") == sources
    assert parse_sources(write_sources(sources)) == sources


def test_stages_have_weights_and_ends_in_shares_or_tokens():
    text = "web 0.9, code .1 until 2e9 tokens; code 1/3,\nweb 2/3 until 80 % ; math 1"
    first, second, last = parse_stages(text, NAMES)
    assert first.quotas == {"code": 1, "web": 9} and second.quotas == {"code": 1, "web": 2}
    assert (first.tokens, first.share) == (2_000_000_000, None)
    assert (second.tokens, second.share) == (None, Fraction(4, 5))
    assert last == ({"math": 1}, None, None)
    assert parse_stages("code 0.1, web 0.9", NAMES) == parse_stages("web 0.9, code 1/10", NAMES)


def test_a_limit_of_epochs_is_that_of_all_sources_or_of_some():
    assert parse_epochs("1.5", NAMES) == dict.fromkeys(NAMES, Fraction(3, 2))
    assert parse_epochs("web 1, math 4", NAMES) == {"web": 1, "math": 4}
    assert parse_epochs(" ", NAMES) == {}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"mixture": "web"}, r"data\.mixture must be a list of NAME=PATH"),
        ({"mixture": "we-b=x"}, r"data\.mixture must be a list of NAME=PATH"),
        ({"mixture": "web=x web=y"}, "web comes twice"),
        ({"mixture": "web='x"}, "pairs of quotation marks"),
        ({"shards": "x"}, r"data\.shards must be empty with data\.mixture"),
        ({"text": "x"}, r"data\.text must be empty with data\.mixture"),
        ({"stages": ""}, "'web 1/2, code 1/2'"),
        ({"stages": "web 0.9, code 0.2"}, r"sum is 1 in each stage; stage 1 has 1\.1; .*--data\."),
        ({"stages": "web 0.9, cod 0.1"}, "sources of data.mixture, web, code; stage 1 has 'cod'"),
        ({"stages": "web 2, code -1"}, "code in stage 1 is -1"),
        ({"stages": "web 1, code 0"}, "code in stage 1 is 0"),
        ({"stages": "web nan"}, "web in stage 1 is nan"),
        ({"stages": "web 0.5 code 0.5"}, "stage 1 has 'web 0.5 code 0.5'"),
        ({"stages": "web 0.5, web 0.5"}, "stage 1 has web twice"),
        ({"stages": "web 1 until 80%"}, "must not end stage 1, the last one"),
        ({"stages": "web 1; code 1"}, "must say where stage 1 ends"),
        ({"stages": "web 1 until 100%; code 1"}, "before 100%"),
        ({"stages": "web 1 until 9%; code 1 until 8%; web 1"}, "order of their ends"),
        ({"stages": "web 0.1234567, code 0.8765433"}, "denominator of at most 100,000"),
        ({"max_epochs": "web 0"}, r"data\.max_epochs must have positive numbers"),
        ({"max_epochs": "law 1"}, "'law'"),
    ],
)
def test_a_faulty_mixture_is_refused_with_its_flag(values, message):
    good = {"mixture": "web=a code=b", "stages": "web 0.5, code 0.5"}
    DataConfig(**good)
    with pytest.raises(ValueError, match=message):
        DataConfig(**good | values)


def test_stages_and_limits_need_a_mixture():
    for name in ("stages", "max_epochs"):
        with pytest.raises(ValueError, match=rf"data\.{name} must be empty without data\.mixture"):
            DataConfig(**{name: "1"})


def test_the_hash_of_a_config_covers_the_mixture():
    hash_of = lambda stages: config_hash(
        TrainConfig(data=DataConfig(mixture="web=a code=b", stages=stages))
    )
    assert hash_of("web 1") != hash_of("code 1") != config_hash(TrainConfig())
