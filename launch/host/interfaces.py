"""This host's network interfaces, from libc's getifaddrs, and sockets on their addresses."""

import ctypes
import functools
import ipaddress
import socket

# In a sockaddr of this family: (offset of the IP, its size in bytes).
IP_IN_SOCKADDR = {int(socket.AF_INET): (4, 4), int(socket.AF_INET6): (8, 16)}


class _Ifaddrs(ctypes.Structure):
    """The first fields of struct ifaddrs. Source: getifaddrs(3)."""


_Ifaddrs._fields_ = [
    ("next", ctypes.POINTER(_Ifaddrs)),
    ("name", ctypes.c_char_p),
    ("flags", ctypes.c_uint),
    ("address", ctypes.c_void_p),
]


@functools.cache
def _libc() -> ctypes.CDLL:
    # Loading it again makes new classes, whose memory Python frees only after some minutes.
    return ctypes.CDLL(None, use_errno=True)


def addresses() -> dict[str, list[str]]:
    """Returns {interface: its IPs}; an interface without an IP has an empty list.

    Raises:
        OSError: libc could not list them.
    """
    libc, first = _libc(), ctypes.POINTER(_Ifaddrs)()
    if libc.getifaddrs(ctypes.byref(first)):
        raise OSError(ctypes.get_errno(), "getifaddrs")
    ips_of: dict[str, list[str]] = {}
    entry = first
    while entry:
        name = entry.contents.name.decode().partition(":")[0]  # eth0:1 is a second IP of eth0
        ips, sockaddr = ips_of.setdefault(name, []), entry.contents.address
        family = ctypes.c_ushort.from_address(sockaddr).value if sockaddr else -1
        if family in IP_IN_SOCKADDR:
            offset, size = IP_IN_SOCKADDR[family]
            ips.append(str(ipaddress.ip_address(ctypes.string_at(sockaddr + offset, size))))
        entry = entry.contents.next
    libc.freeifaddrs(first)
    return ips_of


def interface_of(address: str) -> str:
    """Returns the interface that has this IP; "" if none has."""
    wanted = str(ipaddress.ip_address(address))
    return next((name for name, ips in addresses().items() if wanted in ips), "")


def interface_variables(interface: str) -> dict[str, str]:
    """Returns the variables that bind NCCL and the byte counters to an interface; {} for ""."""
    # "=" makes NCCL match the whole name, not a prefix of it.
    variables = {"JAXTRAIN_INTERFACE": interface, "NCCL_SOCKET_IFNAME": f"={interface}"}
    return variables if interface else {}


def bind_tcp(address: str, port: int = 0) -> socket.socket:
    """Returns a TCP socket bound to an address; port 0 takes any free one.

    SO_REUSEADDR lets a restarted server bind while old connections are still in TIME_WAIT.
    """
    sock = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind((address, port))
    except OSError:
        sock.close()
        raise
    return sock


def endpoint(address: str, port: int) -> str:
    """Returns `address:port`, with an IPv6 address in brackets. Source: RFC 3986, 3.2.2."""
    return f"[{address}]:{port}" if ":" in address else f"{address}:{port}"


def free_port(address: str) -> int:
    """Returns a port of this address on which nothing listens now."""
    with bind_tcp(address) as probe:
        return probe.getsockname()[1]
