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
