"""nanochat's own checkpoints, written by a separate copy of its model of October 2025."""

import json
import sys

import numpy as np
import pytest
from small_models import TOKENS, tree_of

from jaxtrain.interop import InteropError
from jaxtrain.interop.hf import read_config, read_weights, write_folder
from jaxtrain.interop.import_export import import_weights
from jaxtrain.interop.nanochat import find_checkpoint
from jaxtrain.model.transformer import build_model
from jaxtrain.model.trees import named_leaves
from jaxtrain.ops.routes import choose_routes

torch = pytest.importorskip("torch", reason="torch is missing: install the crosscheck extra")
from torch.nn import functional as F  # noqa: E402

SIZES = {"sequence_len": 64, "vocab_size": 96, "n_layer": 2, "n_head": 4, "n_kv_head": 2} | {
    "n_embd": 32
}


def normalise(x):
    return F.rms_norm(x, (x.shape[-1],))


def rotate(x, cos, sin):
    first, second = x.chunk(2, -1)
    return torch.cat([first * cos + second * sin, first * -sin + second * cos], -1)


def nanochat_weights():
    """Returns the state dict of a small model with random weights, the embedding in bfloat16."""
    D, H, G, V = (SIZES[name] for name in ("n_embd", "n_head", "n_kv_head", "vocab_size"))
    shapes = {"transformer.wte": (V, D), "lm_head": (V, D)}
    for i in range(SIZES["n_layer"]):
        layer = f"transformer.h.{i}."
        shapes |= {
            f"{layer}attn.c_{x}": (D * n // H, D) for x, n in zip("qkv", (H, G, G), strict=True)
        }
        shapes |= {f"{layer}attn.c_proj": (D, D)}
        shapes |= {f"{layer}mlp.c_fc": (4 * D, D), f"{layer}mlp.c_proj": (D, 4 * D)}
    generator = torch.Generator().manual_seed(0)
    draw = lambda shape: 0.3 * torch.randn(shape, generator=generator)
    weights = {f"{name}.weight": draw(shape) for name, shape in shapes.items()}
    weights["transformer.wte.weight"] = weights["transformer.wte.weight"].bfloat16()
    return weights


def nanochat_logits(weights, tokens_BT):
    """Computes nanochat's forward pass, with RoPE's tables in float32."""
    w = {name.removesuffix(".weight"): x.float() for name, x in weights.items()}
    K, T = SIZES["n_embd"] // SIZES["n_head"], tokens_BT.shape[1]
    frequency = 1 / 10_000 ** (torch.arange(0, K, 2) / K)
    angle = torch.outer(torch.arange(T), frequency)
    x = normalise(w["transformer.wte"][tokens_BT])
    for i in range(SIZES["n_layer"]):
        layer, n = f"transformer.h.{i}.", normalise(x)
        heads = lambda name, n=n, layer=layer: (
            F.linear(n, w[f"{layer}attn.{name}"]).unflatten(-1, (-1, K)).transpose(1, 2)
        )
        turn = lambda q: normalise(rotate(q, angle.cos(), angle.sin()))
        q, k, v = turn(heads("c_q")), turn(heads("c_k")), heads("c_v")
        o = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        x = x + F.linear(o.transpose(1, 2).flatten(2), w[f"{layer}attn.c_proj"])
        up = F.relu(F.linear(normalise(x), w[f"{layer}mlp.c_fc"])).square()
        x = x + F.linear(up, w[f"{layer}mlp.c_proj"])
    return 15 * torch.tanh(F.linear(normalise(x), w["lm_head"]) / 15)


def save(folder, weights, step=20, **sizes):
    folder.mkdir(exist_ok=True)
    torch.save(weights, folder / f"model_{step:06}.pt")
    meta = {"step": step, "val_bpb": 1.0, "model_config": SIZES | sizes}
    (folder / f"meta_{step:06}.json").write_text(json.dumps(meta))
    return folder


def load(source):
    cfg = read_config(source)
    model = build_model(cfg, choose_routes(cfg, False, "cpu", False))
    readers = read_weights(source, cfg, named_leaves(model.axes), named_leaves(model.shapes))
    return cfg, model, {name: read() for name, read in readers.items()}


def test_a_checkpoint_and_its_export_compute_nanochats_logits(tmp_path):
    weights = nanochat_weights()
    compiled = {f"_orig_mod.{name}": x for name, x in weights.items()}
    cfg, model, named = load(save(tmp_path / "nanochat", compiled))
    want = nanochat_logits(weights, torch.from_numpy(TOKENS)).numpy()
    params = tree_of(model, named)
    ours = np.asarray(model.logits(params, model.apply(params, TOKENS)))
    np.testing.assert_allclose(ours, want, rtol=0, atol=1e-5)

    transformers = pytest.importorskip("transformers", reason="install the crosscheck extra")
    write_folder(tmp_path / "hf", cfg, named_leaves(model.axes), named)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    assert type(theirs).__name__ == "NanoChatForCausalLM"
    with torch.no_grad():
        logits = theirs(torch.from_numpy(TOKENS)).logits.numpy()
    np.testing.assert_allclose(logits, want, rtol=0, atol=1e-5)


def test_the_newest_checkpoint_of_a_folder_is_imported_as_a_run(tmp_path):
    folder, text = tmp_path / "nanochat", tmp_path / "text.txt"
    text.write_text("a few words of text\n" * 400)
    save(folder, {"old": torch.zeros(1)}, step=9)
    pad = lambda x: F.pad(x, (0, 0, 0, 256 - len(x)))  # to the vocabulary of bytes
    wide = {name: pad(x) if len(x) == 96 else x for name, x in nanochat_weights().items()}
    save(folder, wide, step=10, vocab_size=256)
    assert find_checkpoint(folder) == folder / "model_000010.pt"
    import_weights(folder, tmp_path / "run", text=str(text), tokenizer="bytes")
    assert (tmp_path / "run/config.json").exists()


def test_a_later_architecture_is_refused_with_all_that_it_has_besides(tmp_path):
    weights = nanochat_weights() | {
        "value_embeds.1.weight": torch.zeros(96, 16),
        "resid_lambdas": torch.ones(2),
        "transformer.h.1.attn.ve_gate.weight": torch.zeros(2, 32),
    }
    with pytest.raises(InteropError) as error:
        read_config(save(tmp_path / "later", weights, window_pattern="SSSL"))
    for part in ("window_pattern='SSSL'", "October 2025", *(weights.keys() - nanochat_weights())):
        assert part in str(error.value), part


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda folder: (folder / "meta_000020.json").unlink(), "sizes in .*meta_000020.json"),
        (lambda folder: (folder / "model_000020.pt").write_bytes(b"PK"), "complete file of torch"),
        (lambda folder: save(folder, [1]), "must contain named tensors; got list"),
        (lambda folder: save(folder, nanochat_weights(), n_head=5), "n_embd=32 .must be a multip"),
        (lambda folder: save(folder, nanochat_weights(), n_layer="2"), "n_layer='2' .must be a wh"),
        (lambda folder: save(folder, nanochat_weights(), n_layer=3), "h.2.attn.c_q.weight is miss"),
    ],
)
def test_a_damaged_checkpoint_is_refused_with_the_reason(tmp_path, damage, message):
    folder = save(tmp_path / "nanochat", nanochat_weights())
    damage(folder)
    with pytest.raises(InteropError, match=message):
        load(folder)


def test_without_torch_the_error_names_the_extra(tmp_path, monkeypatch):
    folder = save(tmp_path / "nanochat", nanochat_weights())
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(InteropError, match="torch, which is missing. Run pip install .jaxtrain.cr"):
        read_config(folder)
