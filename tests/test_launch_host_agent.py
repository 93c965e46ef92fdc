import errno
import socket
import threading

import pytest

from launch.host import agent


def test_a_measurement_fails_if_one_of_its_streams_fails():
    token, threads = b"a" * 32, []
    with socket.create_server(("127.0.0.1", 0)) as server:

        def accept():
            for i in range(1 + 4):  # the ping, then four streams, of which the last is closed
                sock, _ = server.accept()
                if i == 4:
                    sock.close()
                    return
                threads.append(threading.Thread(target=agent.serve_peer, args=(sock, token)))
                threads[-1].start()

        threads.append(threading.Thread(target=accept))
        threads[0].start()
        order = {"peer": server.getsockname(), "streams": 4, "seconds": 0.1, "pings": 1}
        with pytest.raises(OSError):
            agent.ORDERS["measure"](order | {"least_trips": 0, "interface": "lo"}, token)
        for thread in threads:
            thread.join()


def test_counting_the_bytes_of_an_unknown_interface_is_an_error():
    assert min(agent.wire_bytes("lo")) >= 0
    with pytest.raises(OSError, match="got 'eth99'. Correct --hosts"):
        agent.wire_bytes("eth99")


def test_peers_are_served_after_strangers_had_used_up_the_descriptors(monkeypatch):
    monkeypatch.setattr(agent, "STRANGER_S", 0.1)
    token = b"a" * 32
    with socket.create_server(("127.0.0.1", 0)) as listening:
        ours, silent = (socket.create_connection(listening.getsockname()) for _ in range(2))
        theirs, stranger = (listening.accept()[0] for _ in range(2))
    turns = [OSError(errno.EMFILE, "Too many open files"), stranger, theirs, SystemExit()]

    class Server:
        def accept(self):
            turn = turns.pop(0)
            if isinstance(turn, BaseException):
                raise turn
            return turn, None

    with ours, silent:
        ours.sendall(agent.HEADER.pack(token, agent.PING, 0) + b"x")
        with pytest.raises(SystemExit):
            agent._accept_peers(Server(), token)
        for sock, received in ((ours, b"x"), (silent, b"")):
            sock.settimeout(5)
            assert sock.recv(1) == received  # b"": closed
