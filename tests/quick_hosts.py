"""Makes a job's hosts, and those who follow it, look at one another several times as often.

    python -m tests.quick_hosts ARGUMENTS...       (those of launch.run)

Most of a short job is waiting for the next look. test_launch_host_supervise.py and the acceptance
programs use the intervals that users have.
"""

import contextlib
import functools
import re
import sys
from collections.abc import Iterator
from unittest import mock

from launch import follower, run, ssh, start

# Seconds, by module of the host and name of the constant.
INTERVALS = {
    "supervise": {"TURN_S": 0.02, "REPORT_S": 0.1, "STATUS_S": 0.1},
    "stream": {"STATUS_S": 0.2},
    "restart_policy": {"SETTLE_S": 0.4, "DUMP_S": 0.4},
    "keeper": {"SLICE_S": 0.1, "STACKS_S": 0.2},
    "watch": {"SLICE_S": 0.1},
}


def replace_constants(sources: dict[str, str], **constants: dict[str, float]) -> dict[str, str]:
    """Returns the sources of a host's modules with other values of their constants."""
    sources = dict(sources)
    for module, values in constants.items():
        for name, value in values.items():
            text = sources[f"launch.host.{module}"]
            text, count = re.subn(rf"(?m)^{name} = [\d.]+", f"{name} = {value}", text)
            assert count == 1, f"launch.host.{module} must define {name} once"
            sources[f"launch.host.{module}"] = text
    return sources


@contextlib.contextmanager
def quick_hosts(**constants: dict[str, float]) -> Iterator[None]:
    """Gives INTERVALS, and more constants of modules, to the hosts that this process calls."""
    sources = replace_constants(replace_constants(ssh.host_modules(), **INTERVALS), **constants)
    with contextlib.ExitStack() as stack:
        patch = lambda *replaced: stack.enter_context(mock.patch.object(*replaced))
        patch(ssh, "host_modules", lambda: sources)
        patch(follower, "RENEW_S", 0.5)
        patch(start, "preflight", functools.partial(start.preflight, burst_s=0.03))
        yield


if __name__ == "__main__":
    with quick_hosts():
        sys.exit(run.main())
