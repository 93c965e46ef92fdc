"""Whether a job outlives the end of the connection that started it, where systemd-logind rules.

With KillUserProcesses=yes a session's end takes all of its processes, however detached. A scope of
the user's own manager is no part of the session; but that manager itself ends with the last
session, unless the user lingers. Source: logind.conf(5), systemd-run(1).
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


def decide(text: str, says: str, user: str, lingers: bool, can_scope: bool) -> str:
    """How the supervisor must be started.

    Args:
        text: logind's settings, later ones first in force; says: what logind itself answers for
            KillUserProcesses ("b true"), "" where it cannot be asked.
        can_scope: systemd-run is there, and the user's manager runs.

    Returns:
        STAYS (as any process), SCOPE (in one of its own), LINGER (after loginctl enable-linger) or
        ENDS (it would be killed, and nothing that a user may do helps).
    """
    pairs = [line.partition("=")[::2] for line in text.splitlines() if "=" in line]
    settings = {name.strip().lower(): value.strip() for name, value in pairs}
    kills = settings.get("killuserprocesses", "no").lower() in ("yes", "true", "on", "1")
    kills = says == "b true" if says else kills
    only = settings.get("killonlyusers", "").split()
    spared = settings.get("killexcludeusers", "root").split()
    if not kills or user in spared or (only and user not in only):
        return STAYS
    if not lingers:
        return LINGER
    return SCOPE if can_scope else ENDS


def look() -> str:
    """`decide` for this host and user."""
    if not Path("/run/systemd/system").exists():  # another init: no logind
        return STAYS
    paths = [Path(name) for name in CONFIGS]
    files = [file for p in paths for file in (sorted(p.glob("*.conf")) if p.is_dir() else [p])]
    text = "\n".join(file.read_text() for file in files if file.is_file())
    user = getpass.getuser()
    manager = Path(os.environ.get("XDG_RUNTIME_DIR") or f"/run/user/{os.getuid()}", "systemd")
    can_scope = shutil.which("systemd-run") is not None and manager.exists()
    lingers = Path("/var/lib/systemd/linger", user).is_file()
    return decide(text, _ask_logind(), user, lingers, can_scope)


def _ask_logind() -> str:
    argv = ["busctl", "get-property", *PROPERTY, "KillUserProcesses"]
    try:
        asked = subprocess.run(argv, capture_output=True, text=True, timeout=5)
    except (OSError, subprocess.SubprocessError):
        return ""
    return asked.stdout.strip() if asked.returncode == 0 else ""
