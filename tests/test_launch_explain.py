"""Why a host does not answer, from what ssh and the host print."""

import re

import pytest

from launch.explain import explain
from launch.inventory import Host

CHANGED_KEY = """Add correct host key in /home/u/known_hosts to get rid of this message.\r
Offending ED25519 key in /home/u/known_hosts:3\r
  remove with:\r
  ssh-keygen -f "/home/u/known_hosts" -R "[10.0.0.1]:23"\r
Host key for [10.0.0.1]:23 has changed and you have requested strict checking.\r
Host key verification failed.\r
"""
BAD_CONFIG = "/home/u/.ssh/config {}\n/home/u/.ssh/config: terminating, 1 bad configuration options"


@pytest.mark.parametrize(
    ("errors", "message"),
    [
        (CHANGED_KEY, r"`ssh-keygen -f /home/u/known_hosts -R '\[10.0.0.1\]:23'` and compare"),
        ("Host key for h1 has changed and you", "`ssh-keygen -f ~/.ssh/known_hosts -R h1` and"),
        ("Bad owner or permissions on /home/u/.ssh/config\r\n", "chmod go-w /home/u/.ssh/config`"),
        (BAD_CONFIG.format("line 1: Bad configuration option: foo"), "Correct the line"),
        (BAD_CONFIG.format("line 1: Bad port 'abc'"), "Correct the line that ssh names"),
        ("No ED25519 host key is known for h0\nHost key verification failed.", "not known here"),
        ("ssh: Could not resolve hostname h0: Name or service not known", "name has no address"),
        ("ssh: connect to host h0 port 23: Connection refused", "nothing listens .*correct port"),
        ("ssh: connect to host h0 port 22: Connection timed out", "cannot be reached"),
        ("u@h0: Permission denied (publickey).", "accepts no key .*ssh-copy-id u@h0"),
        (
            "sign_and_send_pubkey: signing failed for ED25519: agent refused operation\n"
            "u@h0: Permission denied (publickey).",
            "agent did not sign .*ssh-add -l",
        ),
        ("kex_exchange_identification: Connection closed by remote host", "sshd closed"),
        (
            "Received disconnect from h0 port 22:2: Too many authentication failures\n"
            "Disconnected from h0 port 22",
            "too many keys.*IdentitiesOnly yes.*IdentityFile",
        ),
    ],
)
def test_each_kind_of_failure_has_its_own_remedy(errors, message):
    host = Host("a", "10.0.0.1", ssh="u@h0")
    text = explain(host, 255, b"", errors.encode())
    assert re.search(message, text) and text.startswith("a: ") and "ended with 255" in text


BANNER = b"Idle sessions are timed out.\n" + 20 * b"Authorised users only.\n"


@pytest.mark.parametrize(
    ("code", "output", "errors", "message"),
    [
        (127, b"curl: (7) Connection refused\n", b"exec: python3: not found", "no program python3"),
        (127, b"", b"curl: (7) Connection refused\nUnknown command", "no program python3"),
        (127, b"", b"bash: line 1: exec: tmux: not found\n", "no program tmux"),
        (127, b"", b"curl: not found\nsh: 1: exec: tmux: not found\n", "no program tmux"),
        (127, b"", b"-bash: /opt/x: No such file or directory\n", "no program /opt/x"),
        (127, b"", b"zsh:1: command not found: tmux\n", "no program tmux"),
        (127, b"", b"zsh:1: no such file or directory: /opt/x\n", "no program /opt/x"),
        (127, b"", b"fish: Unknown command: tmux\nfish:\ntmux\n^~~^", "no program tmux"),
        (127, b"", b"tmux: not found\nzsh:1: command not found: python3", "no program python3"),
        (127, b"", b"\x1b[2J: not found", "no program \\x1b[2J."),
        (1, b"", b"curl: command not found\npython3: Command not found.\n", "no program python3"),
        (1, b"", b"curl: command not found\nKilled\n", "gave no answer"),
        (255, b"curl: (7) Connection refused\n", b"Broken pipe", "connection broke"),
        (255, b"", BANNER + b"u@a: Permission denied (publickey).", "accepts no key"),
    ],
)
def test_the_cause_is_what_ssh_or_the_shell_reports_not_what_a_script_or_a_banner_says(
    code, output, errors, message
):
    assert message in explain(Host("a", "10.0.0.1"), code, output, errors)


def test_the_last_line_of_a_host_with_a_long_banner_is_quoted():
    text = explain(Host("a", "10.0.0.1"), 255, b"", BANNER + b"an unknown reason\n")
    assert 'Authorised users only. an unknown reason". Check' in text and len(text) < 600


def test_a_remedy_names_the_user_and_port_of_the_inventory():
    host = Host("a", "10.0.0.1", ssh="h0", user="u", port=23)
    unknown = explain(host, 255, b"", b"Host key verification failed.")
    assert "`ssh -p 23 u@h0` ended" in unknown and "Run `ssh -p 23 u@h0` once" in unknown
    refused = explain(host, 255, b"", b"u@h0: Permission denied (publickey).")
    assert "`ssh-copy-id -p 23 u@h0`" in refused
