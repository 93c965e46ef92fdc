import os
import socket

import pytest

from jaxtrain.metrics.network import NetworkCounters

SIZE = 1 << 20


def send_over_loopback(size):
    """Sends size bytes to this process."""
    server = socket.create_server(("127.0.0.1", 0))
    sender = socket.create_connection(server.getsockname())
    receiver, _ = server.accept()
    with server, sender, receiver:
        for _ in range(size // 4096):
            sender.sendall(bytes(4096))
            left = 4096
            while left:
                left -= len(receiver.recv(left))


def test_bytes_sent_over_loopback_are_counted_as_sent_and_received():
    counters = NetworkCounters("lo")
    before = counters.read()
    send_over_loopback(SIZE)
    sent, received = (b - a for a, b in zip(before, counters.read(), strict=True))
    counters.close()
    assert SIZE <= sent and SIZE <= received
    assert counters.names == ["lo"] and 0 < counters.read_s < 0.1


def test_loopback_is_not_counted_by_default():
    counters = NetworkCounters()
    assert counters.names and "lo" not in counters.names
    counters.close()


def test_an_unknown_interface_is_an_error_that_names_the_variable():
    with pytest.raises(ValueError, match="JAXTRAIN_INTERFACE must name .*got 'eth99'"):
        NetworkCounters("eth99")


def test_interfaces_past_the_kernels_first_page_are_counted(tmp_path, monkeypatch):
    """The kernel returns at most a page of the table per read: about 30 interfaces."""
    table = tmp_path / "dev"
    rows = [f"  eth{i}: 1 {' 0' * 7} 2 {' 0' * 7}\n" for i in range(200)]
    table.write_text("head\nhead\n" + "".join(rows))
    pread = os.pread
    monkeypatch.setattr("jaxtrain.metrics.network.TABLE", table)
    monkeypatch.setattr(os, "pread", lambda fd, size, at: pread(fd, min(size, 4_000), at))
    counters = NetworkCounters()
    assert len(counters.names) >= 200 and counters.read() >= (400, 200)
    counters.close()
