"""jaxtrain plan --sites: what it reads, what it refuses, and its table."""

import json
from types import SimpleNamespace

import numpy as np
import pytest

from configs import debug
from jaxtrain.config.train_config import freeze
from jaxtrain.planning.sites import plan_sites, read_site
from jaxtrain.sites.codec import CODECS

FLAGS = {"sites": ["8xa40", "8xh100"], "network": "", "link_mbit": 100.0, "link_rtt_ms": 150.0}
FLAGS |= {"step_s": ["2.0"], "json": True}


def plan(capsys, period=30, fragments=1, delay=0, blend=0.0, **flags):
    config = debug.get_config()
    config.steps, config.save_every = 600, 100
    config.sites.update(period=period, fragments=fragments, delay=delay, blend=blend)
    assert plan_sites(freeze(config), SimpleNamespace(**FLAGS | flags)) == 0
    return capsys.readouterr().out


def test_the_plan_has_each_codecs_exact_bytes_and_both_shares_of_the_time(capsys):
    found = json.loads(plan(capsys))
    rows = {row["codec"]: row for row in found["codecs"]}
    assert list(rows) == list(CODECS)
    sizes = [row["round_bytes"] for row in found["codecs"]]
    assert sizes == sorted(sizes, reverse=True)
    blocks = -(-found["parameters"] // 1_024)
    assert rows["float32"]["round_bytes"] == 4 * 1_024 * blocks
    for row in rows.values():
        exchange_s = row["round_bytes"] / 10e6 + 0.3
        assert row["exchange_s"] == pytest.approx(exchange_s)
        assert row["blocking"] == pytest.approx([60 / (60 + exchange_s)] * 2)
        assert row["hidden"] == [1.0, 1.0]  # 29 steps of 2 s are more than enough
    # One fragment: 8 vectors of float32, and three codes.
    expected = 32 * found["parameters"] + 3 * rows["int4"]["round_bytes"]
    assert rows["int4"]["host_bytes"] == pytest.approx([expected] * 2)
    for row in json.loads(plan(capsys, delay=29, blend=0.5))["codecs"]:  # one vector more
        difference = np.subtract(row["host_bytes"], rows[row["codec"]]["host_bytes"])
        assert difference == pytest.approx([4 * found["parameters"]] * 2)
    # With save_every=100 and keep_last=2, 10 rounds in 300 steps, a pending one and an own code.
    assert rows["int4"]["disk_bytes"] == [12 * rows["int4"]["round_bytes"]] * 2
    every_step = json.loads(plan(capsys, period=1))  # leaves no time to hide anything
    assert {row["hiding_bytes_per_s"] for row in every_step["codecs"]} == {None}
    assert "none" in plan(capsys, period=1, json=False)
    halves = json.loads(plan(capsys, fragments=2, sites=["2x4xa40", "8xh100"]))
    assert halves["delay"] == 15 and halves["sites"][0]["hosts"] == 2
    first, second = halves["codecs"][0]["host_bytes"]
    disk = halves["codecs"][0]["disk_bytes"]
    assert 2 * disk[0] == disk[1] == 12 * halves["codecs"][0]["round_bytes"]
    assert 2 * first == second < rows["float32"]["host_bytes"][0]


def test_the_text_names_the_periods_with_which_unequal_sites_do_not_wait(capsys):
    text = plan(capsys, step_s=["2.0", "0.5"], json=False)
    assert "--steps in the same ratio: site_1 30, site_2 120" in text
    text_of_fragments = plan(capsys, step_s=["2.0", "0.6"], fragments=4, json=False)
    assert "--steps in the same ratio: site_1 32, site_2 100" in text_of_fragments
    assert "100 Mbit/s at 80%, round trip 150 ms" in text
    assert "same ratio" not in plan(capsys, json=False)


def test_a_site_is_an_inventory_or_a_number_of_chips(tmp_path):
    assert read_site("2x8xh100", "a") == ("a", 2, 8, "h100", 0.0)
    path = tmp_path / "asuncion.toml"
    host = '[[hosts]]\nname = "h{0}"\naddress = "10.0.0.{0}"\n'.format
    path.write_text('[defaults]\ngpus = 4\nchip = "a40"\n' + host(1) + host(2))
    assert read_site(str(path), "a") == ("asuncion", 2, 4, "a40", 0.0)
    path.write_text("hosts = 3")
    for text in (str(path), "8a40", "0xa40", ""):
        with pytest.raises(
            ValueError, match="--sites must list inventories or sites such as 8xa40"
        ):
            read_site(text, "a")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"period": 0}, "got sites.period=0. Set --sites.period"),
        ({"sites": ["8xa40"]}, "at least two sites; got 8xa40"),
        ({"step_s": ["1", "2", "3"]}, "for each of the 2; got 1,2,3"),
        ({"step_s": ["nan"]}, "--step_s must be positive seconds.*got nan"),
        ({"link_mbit": -1.0}, "positive link_mbit; got -1.0. Set --link_mbit"),
    ],
)
def test_what_cannot_be_planned_is_refused_by_flag(capsys, values, message):
    with pytest.raises(ValueError, match=message):
        plan(capsys, **values)
