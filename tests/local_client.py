"""An SshClient whose hosts are this machine: `sh` replaces `ssh`, everything else is real."""

from launch.ssh import SshClient


class LocalClient(SshClient):
    """Runs a host's command on this machine. A subclass can replace it by another `command`."""

    command = 'eval "$2"'  # sh's $0, $1 and $2 are "--", the host's name and the command

    def ssh_command(self, host, shared=True):
        return ["sh", "-c", self.command]
