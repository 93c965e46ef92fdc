"""The file in which a process shows the launcher how far it is."""

import json

from jaxtrain.distributed.heartbeat import BEAT_BYTES, Heartbeat


def test_a_long_text_about_sites_is_cut_and_leaves_no_rest_behind_the_next_beat(
    tmp_path, monkeypatch
):
    monkeypatch.setenv("JAXTRAIN_BEAT", str(tmp_path / "beat"))
    monkeypatch.setattr("faulthandler.register", lambda *args, **options: None)
    beat = Heartbeat()
    beat.describe_rank(dict.fromkeys(("compute", "data", "host"), 100.1234), ["compute"])
    text = f"waits for round 123456 of {'a' * 64}, {'b' * 64}"
    for sites in (text, ""):
        beat.describe_sites(sites)
        beat("sites", 123_456)
        content = (tmp_path / "beat").read_text()
        assert len(content) == BEAT_BYTES
        assert text.startswith(shown := json.loads(content)["sites"]) and len(shown) <= len(sites)
    beat.describe_sites("without asuncion since round 12")
    beat("train", 123_457)
    found = json.loads((tmp_path / "beat").read_text())
    assert found["sites"] == "without asuncion since round 12" and found["slow"] == ["compute"]
