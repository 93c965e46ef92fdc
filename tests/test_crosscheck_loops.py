"""Loops of users, in float64: three lines record them, and jaxtrain follows them to 1e-10."""

import jax
import pytest

torch = pytest.importorskip(
    "torch", reason='torch is missing: pip install "jaxtrain[crosscheck]" to test the PyTorch side'
)
transformers = pytest.importorskip("transformers", reason="transformers is missing: crosscheck")
from torch import nn  # noqa: E402
from torch.nn import functional as F  # noqa: E402

from jaxtrain.config.train_config import freeze  # noqa: E402
from jaxtrain.crosscheck import jax_train  # noqa: E402
from jaxtrain.crosscheck.comparison import compare_traces  # noqa: E402
from jaxtrain.crosscheck.explanation import explain  # noqa: E402
from jaxtrain.crosscheck.record_config import build_record_config  # noqa: E402
from jaxtrain.crosscheck.recorder import Recorder  # noqa: E402
from jaxtrain.crosscheck.tensor_names import style_of  # noqa: E402
from jaxtrain.crosscheck.trace import batches_of, read_trace  # noqa: E402
from tests.crosscheck_sides import one_thread_and_old_x64_setting  # noqa: E402, F401

STEPS, B, T, V = 2, 4, 12, 64


def llama():
    config = transformers.LlamaConfig(
        vocab_size=V,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=T,
    )
    return transformers.LlamaForCausalLM(config)


def gpt2():
    config = transformers.GPT2Config(
        vocab_size=V, n_embd=16, n_layer=1, n_head=2, n_positions=T, bos_token_id=0, eos_token_id=0
    )
    return transformers.GPT2LMHeadModel(config).eval()


class Block(nn.Module):
    """A layer as nanoGPT writes it."""

    def __init__(self, D, H):
        super().__init__()
        self.H = H
        self.ln_1, self.ln_2 = nn.LayerNorm(D), nn.LayerNorm(D)
        self.attn = nn.ModuleDict({"c_attn": nn.Linear(D, 3 * D), "c_proj": nn.Linear(D, D)})
        self.mlp = nn.ModuleDict({"c_fc": nn.Linear(D, 4 * D), "c_proj": nn.Linear(4 * D, D)})

    def forward(self, x):
        qkv = self.attn["c_attn"](self.ln_1(x)).unflatten(-1, (3, self.H, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.attn["c_proj"](y.transpose(1, 2).flatten(2))
        up = F.gelu(self.mlp["c_fc"](self.ln_2(x)), approximate="tanh")
        return x + self.mlp["c_proj"](up)


class NanoGPT(nn.Module):
    """A GPT with nanoGPT's names; its forward pass returns (logits, loss)."""

    def __init__(self, D=16, H=2, L=1):
        super().__init__()
        parts = {"wte": nn.Embedding(V, D), "wpe": nn.Embedding(T, D), "ln_f": nn.LayerNorm(D)}
        parts["h"] = nn.ModuleList(Block(D, H) for _ in range(L))
        self.transformer = nn.ModuleDict(parts)
        self.lm_head = nn.Linear(D, V, bias=False)
        self.transformer["wte"].weight = self.lm_head.weight

    def forward(self, x, y):
        parts = self.transformer
        h = parts["wte"](x) + parts["wpe"].weight[: x.shape[1]]
        for block in parts["h"]:
            h = block(h)
        logits = self.lm_head(parts["ln_f"](h))
        return logits, F.cross_entropy(logits.flatten(0, 1), y.flatten(), ignore_index=-100)

    @classmethod
    def from_pretrained(cls, folder):
        source = transformers.GPT2LMHeadModel.from_pretrained(folder).state_dict()
        model = cls()
        with torch.no_grad():
            for name, p in model.named_parameters():
                is_linear = ".h." in name and p.ndim == 2  # transformers' Conv1D is transposed
                p.copy_(source[name].T if is_linear else source[name])
        return model


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Returns {family: a folder of transformers}."""
    found = {}
    for build in (llama, gpt2):
        torch.manual_seed(0)
        model, folder = build(), tmp_path_factory.mktemp(build.__name__)
        with torch.no_grad():
            for p in model.parameters():  # gains other than 1 and biases other than 0
                p.add_(0.1 * torch.randn(p.shape))
        model.save_pretrained(folder)
        found[build.__name__] = folder
    return found


@pytest.fixture(scope="module")
def compiled():
    """Returns {key: traced step}, so that each is compiled once."""
    return {}


@pytest.fixture
def follow(folders, compiled, tmp_path, monkeypatch):
    """Returns follow(family, trace path) -> Comparison of jaxtrain's trace with it."""
    build = jax_train.build_traced_step

    def compare(family, path, **optim):
        theirs = read_trace(path)
        jax.config.update("jax_enable_x64", theirs.header["precision"] == "float64")
        config = build_record_config(str(folders[family]), str(path))
        config.steps, config.workdir = STEPS, str(tmp_path)
        config.optim.update(adam_learning_rate=1e-2, adam_b2=0.999, adam_eps=1e-8, **optim)
        start = jax_train.build_start(freeze(config), read_data=False)
        key = family, theirs.header["precision"], str(optim)
        step = compiled.setdefault(key, build(start.run))
        monkeypatch.setattr(jax_train, "build_traced_step", lambda run: step)
        options = (style_of(theirs), batches_of(theirs), False, False, theirs)
        jax_train.record(start, STEPS, tmp_path / "ours.jsonl", *options)
        return compare_traces(read_trace(tmp_path / "ours.jsonl"), theirs)

    return compare


def tokens():
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(0, V, (B, T + 1), generator=generator) for _ in range(STEPS)]


def record_loop(model, loss_of, path, **options):
    """Trains a model on tokens() and records it; returns the path of the trace.

    Args:
        loss_of: (x, y) -> loss.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
    recorder = Recorder(path, model, **options)
    for batch in tokens():
        x, y = batch[:, :-1], batch[:, 1:]
        loss = loss_of(x, y)
        loss.backward()
        recorder.before_step(x, y, loss)
        optimizer.step()
        recorder.after_step()
        optimizer.zero_grad()
    recorder.close()
    return path


def record_llama(folder, path, **options):
    model = transformers.LlamaForCausalLM.from_pretrained(folder, dtype=torch.float64)
    loss_of = lambda x, y: F.cross_entropy(model(x).logits.flatten(0, 1), y.flatten())
    return record_loop(model, loss_of, path, **options)


def largest(comparison):
    return max(d.size for found in comparison.differences.values() for d in found)


def test_modules_that_compute_in_float32_are_named_and_can_be_recorded_in_float64(
    folders, follow, tmp_path
):
    found = follow("llama", record_llama(folders["llama"], tmp_path / "a.jsonl"))
    text = explain(found)
    assert found.precision == "float32" and found.divergence is None, text
    assert "LlamaRMSNorm (model.layers.0.input_layernorm" in text
    assert "LlamaRotaryEmbedding (model.rotary_emb)" in text and "skip_float32=True" in text
    assert 1e-10 < largest(found) < 1e-4
    path = record_llama(folders["llama"], tmp_path / "b.jsonl", skip_float32=True)
    found = follow("llama", path)
    assert found.precision == "float64" and found.divergence is None, explain(found)
    assert found.notes == [] and largest(found) < 1e-10
    assert found.missing == []  # layers and logits were recorded without activations=


def test_nanogpts_loop_is_followed_although_its_matrices_are_transposed(folders, follow, tmp_path):
    model = NanoGPT.from_pretrained(folders["gpt2"]).double()
    path = record_loop(model, lambda x, y: model(x, y)[1], tmp_path / "a.jsonl")
    found = follow("gpt2", path)
    assert found.divergence is None, explain(found)
    assert found.missing == [] and largest(found) < 1e-10


def record_accumulated(folder, path, sizes=(1, 3), divide=True, weigh="micro_batches", **options):
    """Records HF's Llama on micro-batches of transformers' labels with ignored prompts."""
    model = transformers.LlamaForCausalLM.from_pretrained(folder, dtype=torch.float64)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
    recorder = Recorder(path, model, skip_float32=True, **options)
    for batch in tokens():
        inputs = batch[:, :-1]
        labels = inputs.masked_fill(torch.arange(T) < torch.tensor([[5], [0], [2], [7]]), -100)
        count = int((labels[:, 1:] >= 0).sum()) if weigh == "tokens" else None
        for x, y in zip(inputs.split(sizes), labels.split(sizes), strict=True):
            loss = model(x, labels=y, num_items_in_batch=count).loss
            if weigh == "micro_batches" and divide:
                loss = loss / len(sizes)
            loss.backward()
            recorder.micro_batch(x, y, loss)
        recorder.before_step()
        optimizer.step()
        recorder.after_step()
        optimizer.zero_grad()
    recorder.close()
    return path


@pytest.mark.parametrize("weigh", ["micro_batches", "tokens"])
def test_unequal_micro_batches_with_ignored_targets_are_followed(weigh, folders, follow, tmp_path):
    path = tmp_path / "a.jsonl"
    record_accumulated(folders["llama"], path, weigh=weigh, average=weigh)
    found = follow("llama", path)
    assert found.divergence is None, explain(found)
    assert largest(found) < 1e-10


@pytest.mark.parametrize(
    "options, cause",
    [
        ({"divide": False}, "the losses of the 2 micro-batches are added up: divide each by 2"),
        ({"weigh": "tokens"}, 'the mean of all targets together. Pass Recorder(average="tokens")'),
    ],
)
def test_a_wrong_weight_of_micro_batches_is_explained(options, cause, folders, follow, tmp_path):
    record_accumulated(folders["llama"], tmp_path / "a.jsonl", **options)
    found = follow("llama", tmp_path / "a.jsonl")
    assert found.divergence.stage == "loss"
    assert cause in explain(found), explain(found)


@pytest.mark.parametrize("unscale", [True, False])
def test_a_loop_with_a_gradient_scaler_must_unscale_before_it_is_recorded(
    unscale, folders, follow, tmp_path
):
    model = NanoGPT.from_pretrained(folders["gpt2"]).double()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    recorder = Recorder(tmp_path / "a.jsonl", model)
    for batch in tokens():
        for rows in batch.split(B // 2):
            x, y = rows[:, :-1], rows[:, 1:]
            loss = model(x, y)[1] / 2
            scaler.scale(loss).backward()
            recorder.micro_batch(x, y, loss)
        if unscale:
            scaler.unscale_(optimizer)
        recorder.before_step()
        scaler.step(optimizer)
        scaler.update()
        recorder.after_step()
        optimizer.zero_grad()
    recorder.close()
    found = follow("gpt2", tmp_path / "a.jsonl")
    if unscale:
        assert found.divergence is None, explain(found)
        assert largest(found) < 1e-10
    else:
        assert found.divergence.stage == "gradient"
        assert "are 1024 times jaxtrain's; a GradScaler's factor" in explain(found)
