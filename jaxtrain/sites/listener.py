"""Opens the socket on which a process waits for the processes of other sites."""

import errno
import socket
from collections.abc import Callable

from jaxtrain.sites.layout import Address

BACKLOG = 64  # connections that the kernel accepts before the program does


def open_listener(address: Address, note: Callable[[str], None]) -> socket.socket:
    """Returns a listening socket on an address, or on all interfaces if the host lacks it.

    Raises:
        ValueError: the port is in use.
        OSError: the address cannot be resolved.
    """
    family, _, _, _, where = socket.getaddrinfo(
        address.address, address.port, type=socket.SOCK_STREAM
    )[0]
    for place in (where, ("" if family == socket.AF_INET else "::", address.port)):
        listener = socket.socket(family, socket.SOCK_STREAM)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(place)
            listener.listen(BACKLOG)
            listener.setblocking(False)
            return listener
        except OSError as error:
            listener.close()
            if error.errno == errno.EADDRINUSE:
                raise ValueError(
                    f"--sites_file gives this process {address}, but the port is in use. Choose "
                    "another port, or stop the process that listens there."
                ) from None
            if error.errno != errno.EADDRNOTAVAIL or place is not where:
                raise
            note(f"this host does not own {address.address}: listening on all its addresses.")
    raise AssertionError
