"""Derives the TLS settings of a job's connections from the key in its sites file.

Python's ssl module offers pre-shared keys only from 3.13 on. So the key seeds an Ed25519 key pair,
and with it every process computes the same self-signed certificate, byte for byte. Both ends of a
connection present it and accept no other, so the handshake succeeds exactly if both hold the key.
"""

import datetime
import hashlib
import hmac
import os
import ssl

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

NAME = "jaxtrain sites"


def build_tls(key: bytes) -> tuple[ssl.SSLContext, ssl.SSLContext]:
    """Returns the TLS settings of the end that listens and of the end that connects."""
    private = Ed25519PrivateKey.from_private_bytes(hmac.digest(key, NAME.encode(), hashlib.sha256))
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, NAME)])
    public = private.public_key()
    identifier = x509.SubjectKeyIdentifier.from_public_key(public)
    usage = dict.fromkeys(
        ("content_commitment", "key_encipherment", "data_encipherment", "key_agreement"), False
    ) | dict.fromkeys(("crl_sign", "encipher_only", "decipher_only"), False)
    certificate = (
        x509.CertificateBuilder(name, name, public, serial_number=1)
        .not_valid_before(
            datetime.datetime(2000, 1, 1)
        )  # the same at all sites, whatever the clock
        .not_valid_after(datetime.datetime(9999, 12, 31))
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .add_extension(x509.KeyUsage(digital_signature=True, key_cert_sign=True, **usage), True)
        .add_extension(identifier, critical=False)
        .sign(private, None)  # Ed25519 signatures are deterministic (RFC 8032)
    ).public_bytes(Encoding.PEM)
    secret = private.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    listening = _context(ssl.PROTOCOL_TLS_SERVER, certificate, secret)
    listening.num_tickets = 0  # sessions are not resumed
    return listening, _context(ssl.PROTOCOL_TLS_CLIENT, certificate, secret)


def _context(protocol: int, certificate: bytes, secret: bytes) -> ssl.SSLContext:
    context = ssl.SSLContext(protocol)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.check_hostname = False  # the certificate names the job's key, not a host
    context.verify_mode = ssl.CERT_REQUIRED
    context.load_verify_locations(cadata=certificate.decode())
    # The ssl module reads keys from files only; this one is in memory and has no name.
    with os.fdopen(os.memfd_create("certificate"), "wb") as file:
        file.write(secret + certificate)
        file.flush()
        context.load_cert_chain(f"/proc/self/fd/{file.fileno()}")
    return context
