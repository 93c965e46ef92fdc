import pytest

from jaxtrain.crosscheck.names import align_names, check_like, check_names, explain_names
from jaxtrain.crosscheck.trace import Trace, TraceError

NAMES = ("ours", "theirs")
LLAMA = {"model.embed_tokens.weight", "model.norm.weight", "model.layers.0.mlp.up_proj.weight"}


def record(names, **more):
    table = {name: [0.0] for name in names}
    return {"step": 1, "parameter": table, "gradient": table} | more


@pytest.mark.parametrize("prefix", ["model.", "net.model."])
def test_a_wrappers_prefix_is_removed_where_only_one_side_has_it(prefix):
    ours = LLAMA | {"lm_head.weight"}
    theirs = {prefix + name for name in ours}
    a, b = align_names([record(ours)], [record(theirs)])
    assert a[0]["gradient"].keys() == b[0]["gradient"].keys() == ours
    b, a = align_names([record(theirs)], [record(ours, tolerance={})])  # tolerances keep names
    assert a[0]["gradient"].keys() == b[0]["gradient"].keys() == ours


def test_the_model_without_its_head_lacks_a_prefix():
    bare = {name.removeprefix("model.") for name in LLAMA}
    a, b = align_names([record(LLAMA)], [record(bare)])
    assert a[0]["parameter"].keys() == b[0]["parameter"].keys()


@pytest.mark.parametrize(
    "only_ours, only_theirs, cause",
    [
        ((), ("lm_head.weight",), "theirs has lm_head.weight of its own and ours does not"),
        (("lm_head.weight",), (), "the head of ours is not tied to its embedding"),
        (
            tuple(f"h.0.attn.c_attn.weight/{i}" for i in range(3)),
            ("h.0.attn.c_attn.weight",),
            'Pass Recorder(split={"c_attn": 3})',
        ),
        ((), ("model.layers.0.mlp.up_proj.bias",), "theirs has biases that ours lacks"),
        ((), ("model.layers.1.mlp.up_proj.weight",), "theirs has layers that ours lacks"),
        ((), ("model.layers.0.self_attn.q_norm.weight",), "--model.qk_norm"),
    ],
)
def test_the_cause_of_differing_names_is_given(only_ours, only_theirs, cause):
    a, b = (record(LLAMA | set(only)) for only in (only_ours, only_theirs))
    with pytest.raises(TraceError) as error:
        check_names(a, b, NAMES)
    assert cause in str(error.value)


def test_a_frozen_parameter_is_not_taken_for_another_name():
    theirs = record(LLAMA)
    theirs["gradient"] = {name: x for name, x in theirs["gradient"].items() if "norm" not in name}
    with pytest.raises(TraceError, match="gradient of model.norm.weight: are they frozen"):
        check_names(record(LLAMA), theirs, NAMES)


def test_names_without_any_in_common_ask_for_a_style():
    assert "--names=hf" in explain_names({"embed"}, LLAMA, NAMES)[0]


def test_a_trace_of_another_model_is_refused_before_training():
    trace = Trace({"side": "theirs"}, [{"step": 0} | record(LLAMA), {"step": 1}])
    check_like(record(LLAMA), trace)
    fewer = {name for name in LLAMA if ".mlp." not in name}
    with pytest.raises(TraceError, match="theirs has layers that jaxtrain lacks"):
        check_like(record(fewer), trace)
