"""The process that forks for the tests survives whatever its forks do."""

import os
import signal

from fork_server import ForkServer


def test_forks_that_end_at_the_same_time_all_have_a_status_and_the_server_goes_on():
    with ForkServer(env=dict(os.environ)) as server:
        for _ in range(4):
            forks = [server.start("import signal; signal.pause()") for _ in range(40)]
            for fork in forks:
                os.kill(fork.pid, signal.SIGKILL)
            for fork in forks:
                fork.communicate(timeout=20)
                assert fork.returncode == -signal.SIGKILL
