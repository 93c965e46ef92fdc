"""Sends alerts of a run to a webhook: Slack, Discord, ntfy, or any server that takes JSON.

jaxtrain/reporting/webhook.py and launch/host/webhook.py are copies of one file, because neither
package imports the other. A test compares them.

The address of a webhook is a secret: whoever knows it can post. So settings name the environment
variable or the file that contains it, and no message of this module shows more of it than the host.
Alerts are sent by a thread, so a slow or unreachable server delays nothing.
"""

import collections
import functools
import json
import os
import re
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

VARIABLE = "JAXTRAIN_NOTIFY_URL"
DEFAULT = f"env:{VARIABLE}"
SCHEME = re.compile(r"(?:(slack|discord|ntfy|json)\+)?(https?://.*)", re.S)
HOSTS = {"hooks.slack.com": "slack", "discord.com": "discord", "ntfy.sh": "ntfy"}
TIMEOUT_S = 10.0
RETRY_S = (2.0, 10.0, 60.0, 300.0)  # pauses between the attempts to send an alert
MOST_RETRY_S = 600.0  # longest Retry-After of a server that is obeyed
BURST, REFILL_S = 10, 120.0  # so many alerts at once, then one in this time
MOST_WAITING = 50  # alerts that wait to be sent
MOST_TEXT = 1500  # characters; Discord takes 2000


def read_url(setting: str, flag: str) -> str:
    """Returns the address that a setting stands for; "" if alerts are off.

    Args:
        setting: "env:NAME", "file:PATH" or "" (off). The default variable may be unset.
        flag: name of the setting in errors.

    Raises:
        ValueError: the setting or what it names is not valid. The error does not show the address.
    """
    kind, _, name = setting.partition(":")
    if not setting:
        return ""
    if kind == "env" and name:
        url = os.environ.get(name, "").strip()
        if not url and setting != DEFAULT:
            raise ValueError(f"{flag} must name a variable that is set; got {name}. Export it.")
    elif kind == "file" and name:
        try:
            url = Path(name).expanduser().read_text().strip()
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or "it is not text"
            raise ValueError(
                f"{flag} must name a file with the webhook's address; got {name}: {reason}."
            ) from None
    else:
        is_address = SCHEME.fullmatch(setting)
        shown = "an address, which is a secret: it would be stored and listed" if is_address else ""
        raise ValueError(
            f"{flag} must be env:NAME or file:PATH, which contain the webhook's address; got "
            f"{shown or repr(setting)}. Export it as {VARIABLE}, for example."
        )
    if url:
        parse_address(url, f"the address in {setting} ({flag})")
    return url


class Address(NamedTuple):
    """A webhook's address in its parts."""

    kind: str  # of its format: slack, discord, ntfy or json
    url: str  # without the kind
    host: str


def parse_address(url: str, what: str) -> Address:
    """Returns the parts of an address.

    Raises:
        ValueError: it is not that of a webhook. The error names `what` and not the address.
    """
    match = SCHEME.fullmatch(url)
    try:
        parts = urllib.parse.urlsplit(match[2]) if match else None
        host = parts.hostname if parts and parts.port != 0 else None  # `port` raises if too large
    except ValueError:
        host = None
    if not match or not host or not url.isascii() or re.search(r"[\s\x00-\x1f\x7f]", url):
        raise ValueError(
            f"{what} must be https://HOST/..., in one line without spaces, optionally with "
            "slack+, discord+, ntfy+ or json+ before it, which choose the format."
        )
    return Address(match[1] or HOSTS.get(host, "json"), match[2], host)


def build_request(
    address: Address, event: str, text: str, details: dict[str, Any]
) -> urllib.request.Request:
    """Returns the HTTP request that sends an alert in the format of the webhook's kind."""
    headers = {"Content-Type": "application/json", "User-Agent": "jaxtrain"}
    if address.kind == "ntfy":
        headers |= {"Content-Type": "text/plain; charset=utf-8", "Title": f"jaxtrain: {event}"}
        headers |= {"Priority": "default" if event == "done" else "high"}
        return urllib.request.Request(address.url, text.encode(), headers)
    body = {
        "slack": {"text": text},
        "discord": {"content": text},
        "json": {"event": event, "text": text, **details},
    }[address.kind]
    return urllib.request.Request(address.url, json.dumps(body).encode(), headers)


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """Refuses redirects, which would send an alert without its body, or elsewhere."""

    def redirect_request(self, *args: Any) -> None:
        return None


class Webhook:
    """Sends alerts in a thread. It never raises, and never waits except in `close`.

    At most BURST alerts are sent at once and one in REFILL_S after that; what is left out is
    counted in the next alert. An alert that the server does not take is sent again after RETRY_S.

    Args:
        url: from read_url; "" sends nothing.
        source: what each alert begins with, such as the run's name.
        warn: prints a line, when sending begins to fail.
        details: fields of every JSON alert.
    """

    def __init__(
        self, url: str, source: str, warn: Callable[[str], object], **details: Any
    ) -> None:
        self._address = parse_address(url, "the address of a webhook") if url else None
        self.source, self._warn, self.details = source, warn, details
        self._waiting: collections.deque[tuple[str, str, dict]] = collections.deque()
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        self._is_sending = self._is_closing = False
        self._allowance, self._filled_at = float(BURST), time.monotonic()
        self._left_out = 0
        self._opener: urllib.request.OpenerDirector | None = None

    def send(self, event: str, text: str, **details: Any) -> None:
        """Queues an alert and returns at once.

        Args:
            event: what happened, in a word, such as diverged, stuck, restarted, failed or done.
        """
        if not self._address:
            return
        with self._changed:
            now = time.monotonic()
            grown = self._allowance + (now - self._filled_at) / REFILL_S
            self._allowance, self._filled_at = min(float(BURST), grown), now
            if self._allowance < 1 or len(self._waiting) >= MOST_WAITING or self._is_closing:
                self._left_out += 1
                return
            self._allowance -= 1
            line = f"{self.source}: {text}"
            if len(line) > MOST_TEXT:
                line = line[: MOST_TEXT - 3] + "..."
            if self._left_out:
                line += f" ({self._left_out} alerts before this one were not sent: too many)"
            self._left_out = 0
            stamp = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
            fields = {"source": self.source, "time": stamp, **self.details, **details}
            self._waiting.append((event, line, fields))
            if self._thread is None:
                run = functools.partial(self._run, self._address)
                self._thread = threading.Thread(target=run, name="webhook", daemon=True)
                self._thread.start()
            self._changed.notify_all()

    def close(self, wait_s: float = 15.0) -> None:
        """Waits until all alerts are sent, but at most this long; then sends no more."""
        deadline = time.monotonic() + wait_s
        with self._changed:
            self._is_closing = True
            self._changed.notify_all()
            while self._waiting or self._is_sending:
                if (left_s := deadline - time.monotonic()) <= 0:
                    count = len(self._waiting) + self._is_sending
                    self._warn(f"{count} alerts were not sent within {wait_s:g} s")
                    break
                self._changed.wait(left_s)
            self._waiting.clear()

    def _run(self, address: Address) -> None:
        failing = False
        while True:
            with self._changed:
                self._is_sending = False
                self._changed.notify_all()
                while not self._waiting:
                    if self._is_closing:
                        return
                    self._changed.wait()
                self._is_sending = True
                alert = self._waiting.popleft()
            reason = self._send_with_retries(address, *alert)
            if reason and not failing:
                self._warn(f"alerts do not reach {address.host}: {reason}; training goes on")
            failing = bool(reason)

    def _send_with_retries(
        self, address: Address, event: str, text: str, details: dict[str, Any]
    ) -> str:
        """Sends an alert; returns why it was given up, or "" if the server took it."""
        for pause_s in RETRY_S:
            reason, least_s = self._send_once(build_request(address, event, text, details))
            if not reason or least_s is None:
                return reason
            with self._changed:
                wait_s = max(least_s, pause_s)
                is_closing = self._changed.wait_for(lambda: self._is_closing, wait_s)
            if is_closing:  # `close` waits for a bounded time, so the pauses are short now
                time.sleep(RETRY_S[0])
        return self._send_once(build_request(address, event, text, details))[0]

    def _send_once(self, request: urllib.request.Request) -> tuple[str, float | None]:
        """Returns (why it failed, seconds to wait at least; None if another try is useless)."""
        try:
            # Built here: certificates are read from disk, which takes 20 ms.
            self._opener = self._opener or urllib.request.build_opener(_NoRedirect)
            with self._opener.open(request, timeout=TIMEOUT_S) as response:
                response.read(1024)
            return "", None
        except urllib.error.HTTPError as error:
            error.close()
            reason = f"it answered with HTTP status {error.code}"
            if error.code != 429 and error.code < 500:
                return reason, None
            after = (error.headers or {}).get("Retry-After", "")
            return reason, min(float(after), MOST_RETRY_S) if after.isdecimal() else 0.0
        except Exception as error:
            # Its text may contain the address, so only known parts of it are shown.
            cause = error.reason if isinstance(error, urllib.error.URLError) else error
            words = getattr(cause, "strerror", None) if isinstance(cause, OSError) else None
            return words or type(cause).__name__, 0.0
