"""Keys and certificates of a federation: its certificate authority, the server's certificate, a key for each node.

All keys are on the curve P-384, which Flower requires for those of nodes. The authority is valid for ten years, the
certificate of the server for two. It can be renewed without changes on nodes, which trust the authority.
"""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from ipaddress import ip_address
from typing import NamedTuple

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
)
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

Key = ec.EllipticCurvePrivateKey

CURVE = ec.SECP384R1()
AUTHORITY_DAYS = 3650
SERVER_DAYS = 730
CLOCK_TOLERANCE = datetime.timedelta(hours=1)  # certificates are valid that long before they were made


def new_key() -> Key:
    """A private key."""
    return ec.generate_private_key(CURVE)


class Authority(NamedTuple):
    """A certificate authority, which all machines of the federation trust."""

    certificate: x509.Certificate
    key: Key


def new_authority() -> Authority:
    """A new authority, which may sign certificates of servers but not of other authorities."""
    key, name = new_key(), _name("fedsim federation authority")
    builder = _builder(key, name, name, AUTHORITY_DAYS)
    builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
    builder = builder.add_extension(_usage("key_cert_sign", "crl_sign"), critical=True)
    return Authority(builder.sign(key, hashes.SHA384()), key)


def read_authority(certificate: bytes, key: bytes) -> Authority:
    """The authority with this PEM certificate and key; raises ValueError where no node would trust what it signs."""
    try:
        read, read_key = x509.load_pem_x509_certificate(certificate), load_pem_private_key(key, None)
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:  # of a damaged, an encrypted, an unknown one
        raise ValueError("one of them is not a PEM file without a password") from error
    if read.public_key() != read_key.public_key():
        raise ValueError("the key is of another certificate")
    if not isinstance(read_key, ec.EllipticCurvePrivateKey) or read_key.curve.name != CURVE.name:
        raise ValueError(f"its key is not on the curve {CURVE.name}")
    if not _may_sign(read):
        raise ValueError("it is not the certificate of an authority")
    begins, ends = read.not_valid_before_utc, read.not_valid_after_utc
    if not begins <= datetime.datetime.now(datetime.UTC) < ends:
        raise ValueError(f"it is valid from {begins:%Y-%m-%d} to {ends:%Y-%m-%d}")
    return Authority(read, read_key)


def _may_sign(certificate: x509.Certificate) -> bool:
    """Whether a certificate is of an authority that may sign certificates of servers."""
    try:
        basic = certificate.extensions.get_extension_for_class(x509.BasicConstraints).value
        usage = certificate.extensions.get_extension_for_class(x509.KeyUsage).value
    except x509.ExtensionNotFound:
        return False
    return basic.ca and usage.key_cert_sign


def server_certificate(key: Key, hosts: Sequence[str], authority: Authority) -> x509.Certificate:
    """A certificate of the server for all `hosts` (DNS names and IP addresses), signed by `authority`."""
    builder = _builder(key, _name(hosts[0][:64]), authority.certificate.subject, SERVER_DAYS)
    builder = builder.add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
    builder = builder.add_extension(_usage("digital_signature"), critical=True)
    builder = builder.add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
    issuer = x509.AuthorityKeyIdentifier.from_issuer_public_key(authority.key.public_key())
    builder = builder.add_extension(issuer, critical=False)
    names = x509.SubjectAlternativeName([_alternative(host) for host in hosts])
    return builder.add_extension(names, critical=False).sign(authority.key, hashes.SHA384())


def certificate_pem(certificate: x509.Certificate) -> bytes:
    """A certificate in PEM."""
    return certificate.public_bytes(Encoding.PEM)


def private_pem(key: Key) -> bytes:
    """The private key of a certificate in PEM (PKCS 8)."""
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


def private_openssh(key: Key) -> bytes:
    """The private key of a node in the OpenSSH format, as Flower reads it."""
    return key.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption())


def public_openssh(key: Key) -> bytes:
    """The public key of a node in the OpenSSH format, as Flower registers it."""
    return key.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH) + b"\n"


def _name(common_name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name)])


def _builder(key: Key, subject: x509.Name, issuer: x509.Name, days: int) -> x509.CertificateBuilder:
    now = datetime.datetime.now(datetime.UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - CLOCK_TOLERANCE)
        .not_valid_after(now + datetime.timedelta(days=days))
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
    )


def _usage(*allowed: str) -> x509.KeyUsage:
    names = (
        "digital_signature content_commitment key_encipherment data_encipherment key_agreement key_cert_sign crl_sign "
        "encipher_only decipher_only"
    )
    return x509.KeyUsage(**{name: name in allowed for name in names.split()})


def _alternative(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ip_address(host))
    except ValueError:
        return x509.DNSName(host)
