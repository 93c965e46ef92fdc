"""Checks alerts against a web server of this process: formats, retries, limits, and no secrets."""

import contextlib
import json
import time
from pathlib import Path

import pytest
from web_server import SECRET, Server

from jaxtrain.config.train_config import TrainConfig, freeze, to_dict
from jaxtrain.reporting import webhook as webhook_module
from jaxtrain.reporting.run_logger import RunLogger
from jaxtrain.reporting.webhook import BURST, Webhook, build_request, parse_address, read_url
from jaxtrain.training.loop import Diverged
from launch.host.restart_policy import JobController, Policy
from launch.slo import alert_breach

pytestmark = pytest.mark.fast
ROOT = Path(__file__).parent.parent


@pytest.fixture
def server():
    with contextlib.closing(Server()) as server:
        yield server


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch):
    monkeypatch.setattr(webhook_module, "RETRY_S", (0.01, 0.01))


def test_both_copies_of_the_module_are_equal():
    copies = [ROOT / "jaxtrain/reporting/webhook.py", ROOT / "launch/host/webhook.py"]
    assert copies[0].read_text() == copies[1].read_text()


def test_an_alert_arrives_with_its_event_text_and_details(server):
    hook = Webhook(server.url, "run a", print, host="h0")
    hook.send("diverged", "at step 7", step=7)
    hook.close()
    [alert] = server.bodies()
    assert alert.pop("time").endswith("Z")
    expected = {"event": "diverged", "text": "run a: at step 7", "source": "run a", "step": 7}
    assert alert == expected | {"host": "h0"}


@pytest.mark.parametrize(
    ("url", "body"),
    [
        ("https://hooks.slack.com/services/x", {"text": "r: it"}),
        ("slack+https://chat.example/hooks/x", {"text": "r: it"}),
        ("https://discord.com/api/webhooks/x", {"content": "r: it"}),
        ("json+https://hooks.slack.com/x", {"event": "done", "text": "r: it", "step": 1}),
    ],
)
def test_the_format_follows_from_the_address(url, body):
    request = build_request(parse_address(url, "it"), "done", "r: it", {"step": 1})
    assert json.loads(request.data) == body
    assert request.full_url == url.partition("+")[2] or "+" not in url


def test_ntfy_receives_plain_text_with_a_title():
    request = build_request(parse_address("ntfy+http://h/topic", "it"), "stuck", "run: é", {})
    assert (request.data, request.get_header("Title")) == ("run: é".encode(), "jaxtrain: stuck")


def test_a_server_error_is_tried_again_and_a_refusal_is_not(server):
    warnings = []
    hook = Webhook(server.url, "r", warnings.append)
    server.answers = [503, 429, 200, 404]
    hook.send("stuck", "first")
    hook.send("stuck", "second")
    hook.close()
    assert [alert["text"] for alert in server.bodies()] == ["r: first"] * 3 + ["r: second"]
    assert warnings == [
        "alerts do not reach 127.0.0.1: it answered with HTTP status 404; training goes on"
    ]


def test_a_redirect_is_refused(server):
    warnings, server.headers = [], {"Location": "/elsewhere"}
    server.answers = [302]
    hook = Webhook(server.url, "r", warnings.append)
    hook.send("done", "x")
    hook.close()
    assert len(server.posts) == 1 and "status 302" in warnings[0]


def test_more_alerts_than_the_limit_are_counted_and_not_sent(server, monkeypatch):
    hook = Webhook(server.url, "r", print)
    for i in range(BURST + 5):
        hook.send("straggler", f"{i}")
    monkeypatch.setattr(webhook_module, "REFILL_S", 1e-6)
    hook.send("straggler", "after a while")
    hook.close()
    texts = [alert["text"] for alert in server.bodies()]
    assert len(texts) == BURST + 1
    assert texts[-1] == "r: after a while (5 alerts before this one were not sent: too many)"


def test_an_unreachable_server_delays_nothing_and_its_address_is_not_shown():
    warnings = []
    hook = Webhook(f"http://127.0.0.1:1/{SECRET}", "r", warnings.append)
    started_s = time.monotonic()
    for _ in range(3):
        hook.send("done", "x")
    assert time.monotonic() - started_s < 0.5
    hook.close(wait_s=5.0)
    assert warnings == ["alerts do not reach 127.0.0.1: Connection refused; training goes on"]


def test_close_waits_for_a_bounded_time(monkeypatch, server):
    monkeypatch.setattr(webhook_module, "RETRY_S", (30.0,))
    warnings, server.answers = [], [500, 500, 500]
    hook = Webhook(server.url, "r", warnings.append)
    hook.send("done", "x")
    started_s = time.monotonic()
    hook.close(wait_s=0.2)
    assert time.monotonic() - started_s < 2
    assert warnings == ["1 alerts were not sent within 0.2 s"]


def test_the_address_is_read_from_a_variable_or_a_file(monkeypatch, tmp_path):
    monkeypatch.delenv(webhook_module.VARIABLE, raising=False)
    assert read_url("", "f") == read_url(webhook_module.DEFAULT, "f") == ""
    monkeypatch.setenv("HOOK", "https://h/x\n")
    (tmp_path / "url").write_text("ntfy+https://h/topic\n")
    assert read_url("env:HOOK", "f") == "https://h/x"
    assert read_url(f"file:{tmp_path}/url", "f") == "ntfy+https://h/topic"


@pytest.mark.parametrize(
    ("setting", "value", "message"),
    [
        (f"https://h/{SECRET}", "", "an address, which is a secret"),
        ("env:", "", "got 'env:'"),
        ("slack", "", "got 'slack'"),
        ("env:UNSET", "", "got UNSET"),
        ("file:/no/such", "", "/no/such: No such file"),
        ("env:HOOK", f"h/{SECRET}", "must be https://HOST"),
        ("env:HOOK", f"ftp://h/{SECRET}", "must be https://HOST"),
        ("env:HOOK", f"https://h/{SECRET} x", "must be https://HOST"),
        ("env:HOOK", f"https:///{SECRET}", "must be https://HOST"),
        ("env:HOOK", f"https://h:99999/{SECRET}", "must be https://HOST"),
    ],
)
def test_an_invalid_setting_is_refused_without_showing_the_address(
    setting, value, message, monkeypatch
):
    monkeypatch.setenv("HOOK", value)
    with pytest.raises(ValueError, match=message) as error:
        read_url(setting, "--notify.url")
    assert SECRET not in str(error.value) and "--notify.url" in str(error.value)


def _end_of_run(server, tmp_path, error=None, stopped_by=None):
    """Ends a run that a webhook is told of; returns the alerts."""
    hook = Webhook(server.url, "run", print)
    with contextlib.suppress(type(error) if error else ()):
        with RunLogger(tmp_path / "run", 10, quiet=True, webhook=hook) as logger:
            logger.write(4, {"train/loss_nats": 2.0})
            if error:
                raise error
            logger.finish({"step": 4 if stopped_by else 10, "stopped_by": stopped_by})
    return [(alert["event"], alert["text"]) for alert in server.bodies()]


@pytest.mark.parametrize(
    ("end", "expected"),
    [
        ({}, ("done", "run: done step 10/10 loss 2.000 nats/token")),
        (
            {"stopped_by": "SIGTERM"},
            ("stopped", "run: stopped step 4/10 loss 2.000 nats/token by SIGTERM"),
        ),
        (
            {"error": Diverged("10 steps")},
            ("diverged", "run: diverged at step 4 of 10: Diverged: 10 steps"),
        ),
        ({"error": OSError("full")}, ("failed", "run: failed at step 4 of 10: OSError: full")),
    ],
)
def test_the_end_of_a_run_is_an_alert(server, tmp_path, end, expected):
    assert _end_of_run(server, tmp_path, **end) == [expected]


def test_ctrl_c_is_no_alert_and_a_launcher_reports_failures_itself(server, tmp_path, monkeypatch):
    assert _end_of_run(server, tmp_path, error=KeyboardInterrupt()) == []
    monkeypatch.setenv("JAXTRAIN_BEAT", str(tmp_path / "beat"))
    assert _end_of_run(server, tmp_path, error=OSError("full")) == []


def test_stragglers_are_alerts(server, tmp_path):
    hook = Webhook(server.url, "run", print)
    with RunLogger(tmp_path / "run", 10, quiet=True, webhook=hook) as logger:
        logger.write_ranks(["rank 3 (h1) is slow"], {})
    assert [alert["event"] for alert in server.bodies()] == ["straggler"]


def test_where_alerts_go_does_not_change_what_a_run_trains():
    from jaxtrain.config.train_config import config_hash

    other = freeze(to_dict(TrainConfig()) | {"notify": {"url": "env:OTHER"}})
    assert config_hash(other) == config_hash(TrainConfig())


def test_a_supervisor_reports_stuck_ranks_restarts_and_the_end_of_its_job():
    alerts = []
    controller = JobController(
        Policy(restarts=1),
        ["h0"],
        lambda: "a:1",
        lambda text: None,
        alert=lambda *a: alerts.append(a),
    )

    def report(now, **rank):
        base = {"rank": 0, "pid": 1, "stopped_s": 0.0, "code": None, "beats": 9, "step": 5}
        base |= {"phase": "train", "step_s": 0.1, "age_s": 0.1, "lines": []} | rank
        running = controller.state in ("run", "dump", "settle")
        host = {"host": 0, "attempt": controller.attempt, "ranks": [base] if running else []}
        controller.take_report(host | {"clean": not running, "lease_age_s": 0, "stop": None}, now)
        return controller.next_target(now)

    for second in range(120):
        report(second, age_s=99.0 if second % 60 > 30 else 0.1)
    assert [event for event, _ in alerts] == ["stuck", "restarted", "stuck", "failed"]
    assert "h0 rank 0" in alerts[0][1] and alerts[1][1].startswith("restart 1 of 1 in 2 s")


def test_a_breach_names_the_figure_its_value_and_its_bound(server):
    class Run:
        name = "today"

    row = {"figure": "tokens_per_s", "bound": 900.0, "run": 800.0}
    alert_breach(server.url, Run(), [row], "base.json")
    [alert] = server.bodies()
    assert alert["event"] == "breach" and "800" in alert["text"] and "900" in alert["text"]
