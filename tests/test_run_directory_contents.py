import json

import pytest

from jaxtrain.run_directory.contents import load_train_config, read_config_json


def test_a_bad_value_in_config_json_names_the_file_and_no_flag(tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"config": {"steps": "a"}, "data": {}}))
    with pytest.raises(ValueError) as error:
        load_train_config(tmp_path)
    assert str(error.value) == (
        f"{path} must be edited, because no flag changes it: steps must be of type int; got 'a'."
    )


def test_an_empty_run_flag_is_refused_and_not_taken_for_the_current_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"config": {}, "data": {}}))
    with pytest.raises(ValueError, match="--run must name a folder; got ''."):
        read_config_json("")
