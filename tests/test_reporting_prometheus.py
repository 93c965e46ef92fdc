import json
import math
import re
import urllib.request
from pathlib import Path

import pytest

from jaxtrain.metrics.names import describe_metric, measured_names, prometheus_name
from jaxtrain.reporting.prometheus import PrometheusExporter

DASHBOARD = Path(__file__).parent.parent / "docs" / "grafana.json"
TRAINED = ("step", "train/loss_nats", "train/grad_norm", "train/skipped_steps", "eval/loss_nats")


@pytest.fixture(scope="module")
def exporter():
    exporter = PrometheusExporter("127.0.0.1", 0)
    yield exporter
    exporter.close()


def read(exporter, path="/metrics"):
    with urllib.request.urlopen(f"http://127.0.0.1:{exporter.port}{path}", timeout=10) as answer:
        return answer.read().decode()


def values(page):
    lines = [line.split() for line in page.splitlines() if not line.startswith("#")]
    return {name: float(value) for name, value in lines}


def test_the_page_shows_the_newest_value_of_every_metric(exporter):
    exporter.write(1, 0.0, {"perf/step_time_s": 0.1, "train/loss_nats": 5.5})
    exporter.write(2, 0.0, {"perf/step_time_s": 0.3, "eval/loss_nats": math.nan, "a": -math.inf})
    page = read(exporter)
    shown = values(page)
    assert math.isnan(shown.pop("jaxtrain_eval_loss_nats"))
    assert shown == {
        "jaxtrain_perf_step_time_s": 0.3,
        "jaxtrain_train_loss_nats": 5.5,
        "jaxtrain_a": -math.inf,
        "jaxtrain_step": 2,
    }
    text = measured_names()["perf/step_time_s"]
    assert f"# HELP jaxtrain_perf_step_time_s {text}\n" in page
    assert "# TYPE jaxtrain_perf_step_time_s gauge\n" in page


def test_the_metrics_of_sources_and_tasks_are_described(exporter):
    names = ["data/web_tokens", "data/my_code_epochs", "eval/web_loss_nats", "eval/a_accuracy_norm"]
    names += ["eval/a_accuracy_norm_stderr", "eval/arc_examples", "eval/web_bits_per_byte"]
    exporter.write(1, 0.0, dict.fromkeys(names, 1.0))
    page = read(exporter)
    for name in names:
        exported = prometheus_name(name)
        assert f"# HELP {exported} " in page and f"# HELP {exported} {name}" not in page
    assert describe_metric("eval/loss_nats") == "eval/loss_nats"  # of no source


def test_no_file_can_be_read_through_the_exporter(exporter):
    assert "root:" not in read(exporter, "/etc/passwd")


def test_a_port_in_use_is_an_error_that_names_the_flag(exporter):
    with pytest.raises(ValueError, match="--export.port"):
        PrometheusExporter("127.0.0.1", exporter.port)


def test_no_two_metrics_have_the_same_name_in_prometheus():
    names = [*measured_names(), *TRAINED]
    exported = {prometheus_name(name) for name in names}
    assert len(exported) == len(names)
    assert all(re.fullmatch(r"[a-zA-Z_][a-zA-Z0-9_]*", name) for name in exported)


def test_the_dashboard_uses_only_exported_names():
    known = {prometheus_name(name): name for name in (*measured_names(), *TRAINED)}
    dashboard = json.loads(DASHBOARD.read_text())
    targets = [target for panel in dashboard["panels"] for target in panel["targets"]]
    used = [re.match(r"\w+", target["expr"])[0] for target in targets]
    assert len(used) > 20 and not set(used) - known.keys()
    assert [known[name] for name in used] == [target["legendFormat"] for target in targets]


def test_each_ranks_own_time_has_the_rank_as_a_label(exporter):
    exporter.write_ranks({"compute": [1.0, 1.42], "data": [1.0, 1.0]})
    shown = values(read(exporter))
    assert shown['jaxtrain_rank_compute_ratio{rank="1"}'] == 1.42
    assert sum(name.startswith("jaxtrain_rank_") for name in shown) == 4
