"""Network interfaces of this host and their addresses, as the kernel says through libc."""

import ctypes
import ipaddress
import socket

FAMILIES = {socket.AF_INET: (4, 4), socket.AF_INET6: (8, 16)}  # of sockaddr: offset, size of an IP


class _Entry(ctypes.Structure):
    """The beginning of struct ifaddrs. Source: getifaddrs(3)."""


_Entry._fields_ = [
    ("next", ctypes.POINTER(_Entry)),
    ("name", ctypes.c_char_p),
    ("flags", ctypes.c_uint),
    ("address", ctypes.c_void_p),
]


def addresses() -> dict[str, list[str]]:
    """{interface: its IPs}, also of one that has none. Raises OSError where libc does."""
    libc, first = ctypes.CDLL(None, use_errno=True), ctypes.POINTER(_Entry)()
    if libc.getifaddrs(ctypes.byref(first)):
        raise OSError(ctypes.get_errno(), "getifaddrs")
    found, entry = {}, first
    while entry:
        name = entry.contents.name.decode().partition(":")[0]  # eth0:1 is a second IP of eth0
        held, where = found.setdefault(name, []), entry.contents.address
        family = ctypes.c_ushort.from_address(where).value if where else None
        if family in FAMILIES:
            offset, size = FAMILIES[family]
            held.append(str(ipaddress.ip_address(ctypes.string_at(where + offset, size))))
        entry = entry.contents.next
    libc.freeifaddrs(first)
    return found


def holder(address: str) -> str:
    """The interface that holds an IP; "" where none does."""
    wanted = str(ipaddress.ip_address(address))
    return next((name for name, held in addresses().items() if wanted in held), "")
