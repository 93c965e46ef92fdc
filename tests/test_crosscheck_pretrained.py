import numpy as np
import pytest

reason = "transformers is missing: install the crosscheck extra to compare with it"
pytest.importorskip("torch", reason=reason)
pytest.importorskip("transformers", reason=reason)

from jaxtrain.crosscheck.pretrained import check_pretrained, english, mean_loss  # noqa: E402
from jaxtrain.interop import InteropError  # noqa: E402


def test_the_mean_loss_is_of_the_next_token_and_does_not_overflow():
    tokens = np.array([[3, 1, 2]])
    even = np.zeros((1, 3, 5), np.float32)
    assert mean_loss(even, tokens) == pytest.approx(np.log(5))
    sure = even + 1_000.0
    sure[0, 0, 1] += 100.0
    sure[0, 1, 2] += 100.0
    assert mean_loss(sure, tokens) == pytest.approx(0.0, abs=1e-12)


def test_the_english_text_is_long_enough_to_evaluate_on():
    assert len(english()) > 300_000


def test_a_folder_with_files_is_refused_before_anything_is_downloaded(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(InteropError, match="needs a new folder.*--workdir"):
        check_pretrained(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
