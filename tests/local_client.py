"""Hosts that are this machine: sh takes ssh's place, all else is what runs on hosts."""

from launch.ssh import SshClient


class Here(SshClient):
    """What would run on a host runs here, or `command` in its place."""

    command = 'eval "$2"'

    def ssh_command(self, host, shared=True):
        return ["sh", "-c", self.command]
