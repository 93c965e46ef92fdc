"""Finds out why a host did not answer a request, and what to do, from what ssh and it printed."""

import re
import shlex

from launch.inventory import Host
from launch.terminal import visible

QUOTED = 300  # characters of a host's output in an error
SSH_ERROR = 255  # ssh's exit status if the connection failed, not the command
SSH_LINES = 5  # at the end of standard error are ssh's own; before them may be the host's banner
NOT_FOUND = 127  # a shell's exit status if it did not find the command

# (pattern, what happened, what to do): causes that ssh reports in its last lines, with SSH_ERROR.
# The first match counts. `{ssh}` is the destination after its port, `{python}` the inventory's
# Python, and others are groups of the pattern.
SSH_CAUSES = (
    (
        # The name under which ssh knows the key may be HostName or HostKeyAlias of ssh's
        # configuration, with a port.
        r"(?:Offending \S+ key in (?P<file>.+):\d+\n(?:.*\n)*)?"
        r"Host key for (?P<name>\S+) has changed",
        "its host key is not the one known here",
        "If it was installed again, remove the old key with `ssh-keygen -f {file} -R {name}` and "
        "compare the new one. Otherwise another machine may be answering in its place.",
    ),
    (
        "Host key verification failed|No .* host key is known",
        "its host key is not known here",
        "Run `ssh {ssh}` once and compare the fingerprint with the host's own.",
    ),
    (
        r"Bad owner or permissions on (?P<file>.+)",
        "ssh does not read its configuration here, which others could change",
        "Run `chmod go-w {file}`; the file must be yours or root's.",
    ),
    (
        "[Bb]ad configuration option|Bad port",
        "ssh's configuration here has an error",
        "Correct the line that ssh names.",
    ),
    (
        "Could not resolve hostname",
        "its name has no address",
        "Correct ssh in the inventory, or add the name to ssh's configuration.",
    ),
    (
        "Connection refused",
        "nothing listens on its ssh port",
        "Start sshd there, or correct port in the inventory.",
    ),
    (
        "timed out|No route to host|Network is unreachable|Host is down",
        "it cannot be reached",
        "Check that it is on, and the network, VPN and firewall between here and there.",
    ),
    (
        "communication with agent failed|agent refused operation|signing failed",
        "the ssh agent did not sign with its key",
        "Look at `ssh-add -l`, and unlock the agent or the hardware key.",
    ),
    (
        "Too many authentication failures",
        "ssh offered it too many keys before the right one",
        "Set `IdentitiesOnly yes` and `IdentityFile` for it in ssh's configuration.",
    ),
    (
        "Permission denied \\(",
        "it accepts no key that ssh offered",
        "Load your key into the agent (`ssh-add`), or add it there (`ssh-copy-id {ssh}`). Check "
        "user in the inventory.",
    ),
    (
        "Connection closed|Connection reset|kex_exchange_identification",
        "its sshd closed the connection",
        "Look into its log (`journalctl -u ssh`); it may limit the number of connections.",
    ),
)
# Causes that the host itself reports, on either stream and with any other exit status.
HOST_CAUSES = (
    (
        "account is (currently )?not available|nologin",
        "its account has no login shell",
        "Give the account a shell there (`chsh -s /bin/bash`), or name another user.",
    ),
    (
        "python must be 3.11",
        "its Python is too old",
        "Set python in the inventory to Python 3.11 or newer.",
    ),
)
ABSENT = (
    "it has no program {python}",
    "Set python in the inventory to Python 3.11 or newer.",
)
# How a shell says that there is no program; zsh and fish write its name last.
MISSING = re.compile(
    r"([^\s:]{1,100}): (?:command )?(?:not found|no such file or directory)(?!:)"
    r"|(?:command not found|unknown command|no such file or directory): (\S{1,100})",
    re.IGNORECASE,
)
OTHER_ABSENT = (
    "it has no program {program}",
    "Install it there, or remove it from the login script (.bashrc) or the forced command that "
    "runs it.",
)
FORCED = (
    "it printed something and did not run our command",
    "A login script (.bashrc) may end the shell: let it return early if the shell is not "
    "interactive. Or a forced command in authorized_keys, or a restricted shell, replaces our "
    "command: use a key without one.",
)
BROKEN = (
    "its connection broke",
    "Check that it is on, and the network between here and there; then try again.",
)
SILENT = (
    "it gave no answer",
    "Try `ssh {ssh} {python} --version` by hand. A login script (.bashrc) may end the shell.",
)


def explain(host: Host, code: int, output: bytes, errors: bytes) -> str:
    """Returns why a host did not answer, what it printed, and what to do.

    Args:
        code: the exit status of ssh; negative if it was killed.
        output: what the host printed on standard output, without an answer.
        errors: what ssh or the host printed on standard error.
    """
    happened, remedy = _find_cause(host, code, output, errors)
    pairs = (("stdout", _quote(output)), ("stderr", _quote(errors)))
    quoted = "".join(f', {where} "{text}"' for where, text in pairs if text)
    end = f"ended with {code}" if code >= 0 else "did not end and was killed"
    return f"{host.name}: {happened}. `ssh {_destination(host)}` {end}{quoted}. {remedy}"


def _destination(host: Host) -> str:
    """Returns what follows `ssh` and `ssh-copy-id` on a command line."""
    port = f"-p {host.port} " if host.port else ""
    return port + (f"{host.user}@{host.target}" if host.user else host.target)


def _find_cause(host: Host, code: int, output: bytes, errors: bytes) -> tuple[str, str]:
    """Returns what happened and what to do."""
    printed, errors_text = output.decode(errors="replace"), errors.decode(errors="replace")
    program = _find_missing_program(host, code, errors_text)
    if code == SSH_ERROR:
        causes, text = SSH_CAUSES, "\n".join(errors_text.splitlines()[-SSH_LINES:])
        other = BROKEN
    else:
        causes, text = HOST_CAUSES, f"{printed}\n{errors_text}"
        other = ABSENT if program == host.python else OTHER_ABSENT
        other = other if program else FORCED if printed.split() else SILENT
    found = ((re.search(pattern, text), *texts) for pattern, *texts in causes)
    match, happened, remedy = next((cause for cause in found if cause[0]), (None, *other))
    words = {"ssh": _destination(host), "python": host.python, "program": visible(program)}
    words |= {"file": "~/.ssh/known_hosts"}
    groups = match.groupdict() if match else {}
    words |= {key: visible(shlex.quote(value)) for key, value in groups.items() if value}
    return happened.format(**words), remedy.format(**words)


def _find_missing_program(host: Host, code: int, errors: str) -> str:
    """Returns the program that the host's shell did not find, or ""."""
    name = re.escape(host.python.rpartition("/")[2])
    # csh ends with 1 instead; a login script may have missed another program before Python
    if re.search(f"(?i){name}.*(not found|no such file)|not found: .*{name}", errors):
        return host.python
    others = [match[1] or match[2] for match in MISSING.finditer(errors)]
    return [host.python, *others][-1] if code == NOT_FOUND else ""


def _quote(data: bytes) -> str:
    """Returns the end of what was printed, where the cause is, as one line."""
    text = visible(" ".join(data.decode(errors="replace").split()))
    return text if len(text) <= QUOTED else f"...{text[-QUOTED:]}"
