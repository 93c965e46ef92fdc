"""Compares transports between two sites on a simulated link of 150 ms.

    python tests/transport_candidates.py [RATE_MBIT ...]

Each candidate encrypts, authenticates both ends and sends messages in chunks over several
connections: TLS sockets of the standard library under asyncio, ZeroMQ with CURVE, gRPC with TLS.
Prints payload Mbit/s for a first message and for one after an idle second, the share of wire bytes
beyond the payload, and the processor seconds of both ends. Needs root, pyzmq and grpcio.
"""

import asyncio
import datetime
import itertools
import json
import resource
import ssl
import subprocess
import sys
import tempfile
import time
from pathlib import Path

CHUNK = 1 << 18
PORT = 7400
MESSAGES = 3  # the first warms the connections up
KINDS = ("tls", "zmq", "grpc")


def make_certificate(folder):
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "sites")])
    certificate = (
        x509.CertificateBuilder(name, name, key.public_key(), 1)
        .not_valid_before(datetime.datetime(2000, 1, 1))
        .not_valid_after(datetime.datetime(2100, 1, 1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName("sites")]), False)
        .add_extension(x509.BasicConstraints(True, None), True)
        .sign(key, hashes.SHA256())
    )
    encoding = serialization.Encoding.PEM
    (folder / "cert.pem").write_bytes(certificate.public_bytes(encoding))
    (folder / "key.pem").write_bytes(
        key.private_bytes(encoding, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )


def context(folder, purpose):
    tls = ssl.create_default_context(purpose, cafile=str(folder / "cert.pem"))
    tls.load_cert_chain(folder / "cert.pem", folder / "key.pem")
    tls.minimum_version = ssl.TLSVersion.TLSv1_3
    tls.verify_mode, tls.check_hostname = ssl.CERT_REQUIRED, False
    return tls


# --- TLS under asyncio


async def tls_serve(folder, size):
    got = itertools.count()
    chunks = size // CHUNK
    writers = []

    async def serve(reader, writer):
        writers.append(writer)
        while True:
            await reader.readexactly(CHUNK)
            if (next(got) + 1) % chunks == 0:
                writer.write(b"d")

    server = await asyncio.start_server(
        serve, port=PORT, ssl=context(folder, ssl.Purpose.CLIENT_AUTH), limit=1 << 20
    )
    async with server:
        await asyncio.sleep(600)


async def tls_send(folder, address, size, streams):
    tls = context(folder, ssl.Purpose.SERVER_AUTH)
    pairs = [
        await asyncio.open_connection(address, PORT, ssl=tls, server_hostname="sites")
        for _ in range(streams)
    ]
    data = bytes(CHUNK)
    for _ in range(MESSAGES):
        start, left = time.monotonic(), itertools.count()

        async def push(writer, left=left):
            while next(left) < size // CHUNK:
                writer.write(data)
                await writer.drain()

        waits = [asyncio.ensure_future(reader.readexactly(1)) for reader, _ in pairs]
        await asyncio.gather(*(push(writer) for _, writer in pairs))
        await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        yield time.monotonic() - start
        for wait in waits:
            wait.cancel()
        await asyncio.sleep(1)


# --- ZeroMQ


def zmq_keys():
    import zmq
    from zmq.utils import z85

    secret = z85.encode(bytes(range(32)))
    return zmq.curve_public(secret), secret


def zmq_serve(size):
    import zmq
    from zmq.auth.thread import ThreadAuthenticator

    public, secret = zmq_keys()
    zmq_context = zmq.Context()
    folder = Path(tempfile.mkdtemp())
    (folder / "a.key").write_text(f'metadata\ncurve\n    public-key = "{public.decode()}"\n')
    authenticator = ThreadAuthenticator(zmq_context)
    authenticator.start()
    authenticator.configure_curve(domain="*", location=str(folder))
    server = zmq_context.socket(zmq.ROUTER)
    server.curve_server, server.curve_secretkey, server.curve_publickey = True, secret, public
    server.rcvhwm = 8
    server.maxmsgsize = CHUNK + 1024
    server.bind(f"tcp://*:{PORT}")
    got = 0
    while True:
        name, _ = server.recv_multipart(copy=False)
        got += 1
        if got % (size // CHUNK) == 0:
            server.send_multipart([name, b"d"])


def zmq_send(address, size, streams):
    import zmq

    public, secret = zmq_keys()
    zmq_context = zmq.Context()
    poller, sockets = zmq.Poller(), []
    for _ in range(streams):
        socket = zmq_context.socket(zmq.DEALER)
        socket.curve_serverkey, socket.curve_publickey, socket.curve_secretkey = (
            public,
            public,
            secret,
        )
        socket.sndhwm = 4
        socket.connect(f"tcp://{address}:{PORT}")
        sockets.append(socket)
        poller.register(socket, zmq.POLLIN | zmq.POLLOUT)
    data, time_s = bytes(CHUNK), []
    for _ in range(MESSAGES):
        start, sent, done = time.monotonic(), 0, False
        while not done:
            for socket, event in poller.poll():
                if event & zmq.POLLIN:
                    done = socket.recv() == b"d"
                if event & zmq.POLLOUT and sent < size // CHUNK:
                    socket.send(data, copy=False)
                    sent += 1
            if sent == size // CHUNK:
                for socket in sockets:
                    poller.modify(socket, zmq.POLLIN)
        for socket in sockets:
            poller.modify(socket, zmq.POLLIN | zmq.POLLOUT)
        time_s.append(time.monotonic() - start)
        time.sleep(1)
    return time_s


# --- gRPC

GRPC_OPTIONS = [
    ("grpc.max_receive_message_length", CHUNK + 1024),
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.http2.bdp_probe", 1),
    ("grpc.ssl_target_name_override", "sites"),
]


def grpc_serve(folder, size):
    from concurrent.futures import ThreadPoolExecutor

    import grpc

    got, chunks = itertools.count(), size // CHUNK

    def take(requests, _):
        for _ in requests:
            if (next(got) + 1) % chunks == 0:
                yield b"d"

    server = grpc.server(ThreadPoolExecutor(64), options=GRPC_OPTIONS)
    handler = grpc.stream_stream_rpc_method_handler(take)
    server.add_generic_rpc_handlers(
        (grpc.method_handlers_generic_handler("sites", {"take": handler}),)
    )
    key, certificate = (folder / "key.pem").read_bytes(), (folder / "cert.pem").read_bytes()
    credentials = grpc.ssl_server_credentials([(key, certificate)], certificate, True)
    server.add_secure_port(f"0.0.0.0:{PORT}", credentials)
    server.start()
    server.wait_for_termination()


def grpc_send(folder, address, size, streams):
    import queue
    import threading

    import grpc

    key, certificate = (folder / "key.pem").read_bytes(), (folder / "cert.pem").read_bytes()
    credentials = grpc.ssl_channel_credentials(certificate, key, certificate)
    wanted, done, data = queue.Queue(), queue.Queue(), bytes(CHUNK)

    def requests():
        while wanted.get():
            yield data

    def listen(call):
        for answer in call:
            done.put(answer)

    for _ in range(streams):
        channel = grpc.secure_channel(f"{address}:{PORT}", credentials, options=GRPC_OPTIONS)
        call = channel.stream_stream("/sites/take")(requests())
        threading.Thread(target=listen, args=(call,), daemon=True).start()
    time_s = []
    for _ in range(MESSAGES):
        start = time.monotonic()
        for _ in range(size // CHUNK):
            wanted.put(True)
        done.get()
        time_s.append(time.monotonic() - start)
        time.sleep(1)
    return time_s


def serve(kind, folder, size):
    if kind == "tls":
        asyncio.run(tls_serve(folder, size))
    elif kind == "zmq":
        zmq_serve(size)
    else:
        grpc_serve(folder, size)


async def collect(times):
    return [time_s async for time_s in times]


def send(kind, folder, address, size, streams):
    if kind == "tls":
        time_s = asyncio.run(collect(tls_send(folder, address, size, streams)))
    elif kind == "zmq":
        time_s = zmq_send(address, size, streams)
    else:
        time_s = grpc_send(folder, address, size, streams)
    usage = resource.getrusage(resource.RUSAGE_SELF)
    print(json.dumps([time_s, usage.ru_utime + usage.ru_stime]), flush=True)
    import os

    os._exit(0)


def main():
    import relay
    from bed import Bed

    rates = [int(arg) for arg in sys.argv[1:]] or [20, 100, 1000]
    folder = Path(tempfile.mkdtemp())
    make_certificate(folder)
    print(
        "| rate Mbit/s | transport | streams | Mbit/s, first | second | third | wire/payload | cpu s |"
    )
    with Bed(2, relayed=True) as bed:
        for rate in rates:
            bed.link("h0", "h1", delay_ms=75, rate_mbit=rate)
            bed.link("h1", "h0", delay_ms=75, rate_mbit=rate)
            size = (rate * 5 // 2 if rate < 200 else rate * 2) * 125_000 // CHUNK * CHUNK
            for kind in KINDS:
                for streams in (1, 8, 16) if rate > 200 else (1, 8):
                    common = [sys.executable, __file__]
                    server = subprocess.Popen(
                        bed.inside("h1", *common, "serve", kind, folder, size, 0, 0)
                    )
                    time.sleep(2)
                    before = relay.ask(bed.folder / "relay", {"do": "stats"})["h0 > h1"]["bytes"]
                    argv = [kind, folder, size, streams, bed.address["h1"]]
                    out = json.loads(bed.run("h0", "timeout", "60", *common, "send", *argv))
                    after = relay.ask(bed.folder / "relay", {"do": "stats"})["h0 > h1"]["bytes"]
                    pid = next(
                        p for p, c in bed.processes("h1").items() if "transport_candidates" in c
                    )
                    bed.run("h1", "kill", "-9", pid)
                    server.wait()
                    mbit = [f"{size * 8e-6 / s:.0f}" for s in out[0]]
                    wire = (after - before) / (size * MESSAGES)
                    print(
                        f"| {rate} | {kind} | {streams} | {' | '.join(mbit)} | {wire:.3f} "
                        f"| {out[1]:.1f} |",
                        flush=True,
                    )


if __name__ == "__main__":
    if len(sys.argv) > 2 and sys.argv[1] in ("serve", "send"):
        _, action, kind, folder, size, streams, address = sys.argv
        if action == "serve":
            serve(kind, Path(folder), int(size))
        else:
            send(kind, Path(folder), address, int(size), int(streams))
    else:
        main()
