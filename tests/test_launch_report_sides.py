"""Files of published figures and of ceilings that cannot be used."""

import pytest
from run_directories import series, write_run

from launch import compare
from launch.report.sides import read_side, with_ceilings


def test_a_side_that_is_no_table_is_refused(tmp_path, capsys):
    (tmp_path / "figures.toml").write_text("side = [1, 2]")
    assert compare.main(["--external", str(tmp_path / "figures.toml")]) == 1
    assert "side 1 must be a table; got 1" in capsys.readouterr().err


@pytest.mark.parametrize("value", ["null", "0", '"x"', "NaN", "-1", "[" * 100_000])
def test_a_ceiling_that_is_no_positive_number_is_refused(tmp_path, value):
    text = f'{{"device": "NVIDIA A40", "copy_bytes_per_s": 1, "matmul_flops_per_s": {value}}}'
    (tmp_path / "ceilings.json").write_text(text)
    with pytest.raises(ValueError, match="--ceilings"):
        with_ceilings(read_side(write_run(tmp_path / "a", series(60))), tmp_path / "ceilings.json")
