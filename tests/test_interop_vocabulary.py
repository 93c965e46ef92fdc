"""Padding of a vocabulary in an export."""

import dataclasses
import re

import numpy as np
import pytest
from small_models import TOKENS, model_of

from jaxtrain.data.tokenizer import build_tokenizer
from jaxtrain.interop.hf import read_config, write_folder
from jaxtrain.interop.hf_tokenizer import SpecialTokens
from jaxtrain.interop.vocabulary import choose_rows, cut_vocabulary
from jaxtrain.model.trees import named_leaves

NONE = SpecialTokens()
BYTES = build_tokenizer("bytes")


@pytest.mark.parametrize(
    "tokenizer, special, V, imported, rows, words",
    [
        (BYTES, NONE, 320, False, 256, "256 rows; 64 rows of padding are removed"),
        (BYTES, SpecialTokens(0, (0, 270)), 320, False, 271, "271 rows; 49 rows of padding"),
        (BYTES, SpecialTokens(0, (0, 999)), 320, False, 320, "320 rows, one for each token"),
        (BYTES, NONE, 256, False, 256, "256 rows, one for each token"),
        (BYTES, NONE, 320, True, 320, "64 are without a token .as in the imported weights"),
        (BYTES, NONE, 50_304, False, 50_304, "50,048 are without a token .too many"),
        (
            None,
            SpecialTokens(7, (7,)),
            320,
            False,
            320,
            "320 rows; without a tokenizer",
        ),
    ],
)
def test_rows_after_the_last_token_are_removed_if_they_are_padding(
    tokenizer, special, V, imported, rows, words
):
    found, text = choose_rows(tokenizer, special, V, imported)
    assert found == rows
    assert re.search(words, text), text


@pytest.mark.parametrize("name", ["llama", "gpt2"])  # with an untied head and a tied one
def test_transformers_computes_the_logits_of_the_rows_that_stay(name, tmp_path):
    reason = "transformers is missing: install the crosscheck extra to compare with it"
    transformers = pytest.importorskip("transformers", reason=reason)
    torch = pytest.importorskip("torch", reason=reason)
    cfg, model, params = model_of(name)
    axes, tokens = named_leaves(model.axes), np.minimum(TOKENS, 89)
    rows = cut_vocabulary(axes, named_leaves(params), 90)
    write_folder(tmp_path / "out", dataclasses.replace(cfg, V=90), axes, rows)
    assert read_config(tmp_path / "out").V == 90
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    with torch.no_grad():
        found = theirs(torch.from_numpy(tokens)).logits.numpy()
    expected = np.asarray(model.logits(params, model.apply(params, tokens)))[..., :90]
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)
