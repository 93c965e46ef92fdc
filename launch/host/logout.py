"""Finds how to start a supervisor so that systemd-logind does not kill it at logout.

With KillUserProcesses=yes, logind kills every process of a session when the session ends, even a
detached one. A scope of the user's own service manager is not part of the session; but that
manager itself ends with the user's last session, unless lingering is enabled for the user.
Source: logind.conf(5), systemd-run(1).
"""

import getpass
import os
import shutil
import subprocess
from pathlib import Path

STAYS, SCOPE, LINGER, ENDS = "stays", "scope", "linger", "ends"
CONFIGS = (
    "/usr/lib/systemd/logind.conf.d",
    "/etc/systemd/logind.conf",
    "/etc/systemd/logind.conf.d",
)
PROPERTY = ["org.freedesktop.login1", "/org/freedesktop/login1", "org.freedesktop.login1.Manager"]


def choose_start(settings: str, answer: str, user: str, lingers: bool, can_scope: bool) -> str:
    """Returns how the supervisor must be started.

    Args:
        settings: the text of logind's configuration files; the last value of a key is in force.
        answer: what the running logind answers for KillUserProcesses ("b true"); "" if it cannot
            be asked. It takes precedence over the files, as logind has a compiled-in default.
        lingers: lingering is enabled for the user.
        can_scope: systemd-run is installed and the user's service manager runs.

    Returns:
        STAYS: start it like any process. SCOPE: start it in a scope of its own. LINGER: the user
        must first run loginctl enable-linger. ENDS: it would be killed, and the user cannot
        prevent it.
    """
    pairs = [line.partition("=")[::2] for line in settings.splitlines() if "=" in line]
    values = {name.strip().lower(): value.strip() for name, value in pairs}
    kills = values.get("killuserprocesses", "no").lower() in ("yes", "true", "on", "1")
    if answer:
        kills = answer == "b true"
    only_users = values.get("killonlyusers", "").split()
    spared = values.get("killexcludeusers", "root").split()
    if not kills or user in spared or (only_users and user not in only_users):
        return STAYS
    if not lingers:
        return LINGER
    return SCOPE if can_scope else ENDS


def check_logout() -> str:
    """Returns choose_start's answer for this host and user."""
    if not Path("/run/systemd/system").exists():  # another init, so there is no logind
        return STAYS
    paths = [Path(name) for name in CONFIGS]
    files = [file for p in paths for file in (sorted(p.glob("*.conf")) if p.is_dir() else [p])]
    settings = "\n".join(file.read_text() for file in files if file.is_file())
    user = getpass.getuser()
    manager = Path(os.environ.get("XDG_RUNTIME_DIR") or f"/run/user/{os.getuid()}", "systemd")
    can_scope = shutil.which("systemd-run") is not None and manager.exists()
    lingers = Path("/var/lib/systemd/linger", user).is_file()
    return choose_start(settings, _ask_logind(), user, lingers, can_scope)


def _ask_logind() -> str:
    argv = ["busctl", "get-property", *PROPERTY, "KillUserProcesses"]
    try:
        done = subprocess.run(argv, capture_output=True, text=True, timeout=5)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""
