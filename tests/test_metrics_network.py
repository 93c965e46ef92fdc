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


def test_what_is_sent_is_counted_on_both_sides():
    wire = NetworkCounters("lo")
    before = wire.read()
    send_over_loopback(SIZE)
    sent, received = (b - a for a, b in zip(before, wire.read(), strict=True))
    wire.close()
    assert SIZE <= sent and SIZE <= received
    assert wire.names == ["lo"] and 0 < wire.read_s < 0.1


def test_loopback_is_no_network():
    wire = NetworkCounters()
    assert wire.names and "lo" not in wire.names
    wire.close()


def test_an_interface_that_is_not_there_names_the_variable():
    with pytest.raises(ValueError, match="JAXTRAIN_INTERFACE must name .*got 'eth99'"):
        NetworkCounters("eth99")
