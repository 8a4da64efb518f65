"""Certificates and device tokens: made here, and checked here."""

from __future__ import annotations

import datetime
import ipaddress
import os
import tempfile
import time
from pathlib import Path

import jwt
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from protocol.errors import FaultCode, SessionFault
from protocol.transport.base import ServerTls

ISSUER = AUDIENCE = "tandem"
CLAIMS = ["iss", "aud", "sub", "iat", "exp"]
CERTIFICATE_DAYS = 825


class BadKeys(Exception):
    """A key folder that cannot be used; one line that names the file and the reason."""


def tls(folder: Path) -> ServerTls:
    return ServerTls(folder / "server.pem", folder / "server.key")


def make(folder: Path, names: list[str]) -> None:
    """Makes a CA, a server certificate for `names` (host names or addresses) and a token signing key, all or nothing.

    Raises BadKeys when the folder holds anything already.
    """
    if folder.exists() and any(folder.iterdir()):
        raise BadKeys(f"{folder} is not empty; name another folder")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as name:
        made = Path(name) / "keys"
        made.mkdir(mode=0o700)
        _make(made, names)
        made.rename(folder)


def _make(folder: Path, names: list[str]) -> None:
    ca_key, server_key = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "Tandem CA")])
    usage = x509.KeyUsage(False, False, False, False, False, True, True, False, False)
    ca = (
        _certificate(subject, subject, ca_key.public_key())
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(usage, critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(ca_key.public_key()), critical=False)
        .sign(ca_key, hashes.SHA256())
    )
    server = (
        _certificate(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, names[0])]), subject, server_key.public_key())
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(x509.SubjectAlternativeName([_alternative(name) for name in names]), critical=False)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(ca_key.public_key()), critical=False)
        .sign(ca_key, hashes.SHA256())
    )
    _write_key(folder / "ca.key", ca_key)
    _write_key(folder / "server.key", server_key)
    _write_key(folder / "signing.key", Ed25519PrivateKey.generate())
    (folder / "server.pem").write_bytes(server.public_bytes(serialization.Encoding.PEM))
    (folder / "ca.pem").write_bytes(ca.public_bytes(serialization.Encoding.PEM))


def issue(folder: Path, device: str, ttl_s: float) -> str:
    """A token for `device`, valid from now for `ttl_s` seconds."""
    now = int(time.time())
    claims = {"iss": ISSUER, "aud": AUDIENCE, "sub": device, "iat": now, "exp": now + int(ttl_s)}
    key = _signing_key(folder)
    return jwt.encode(claims, key, algorithm="EdDSA", headers={"kid": _kid(key.public_key())})


class Verifier:
    """Checks device tokens against the folder's signing key."""

    def __init__(self, folder: Path):
        self._key = _signing_key(folder).public_key()
        self._kid = _kid(self._key)

    def device(self, token: str) -> str:
        """The device the token names. Raises SessionFault UNAUTHENTICATED that says what is wrong with it."""
        if not token:
            raise SessionFault(FaultCode.UNAUTHENTICATED, "no device token was given")
        try:
            if jwt.get_unverified_header(token).get("kid") != self._kid:
                raise SessionFault(FaultCode.UNAUTHENTICATED, "the device token was signed with an unknown key")
            claims = jwt.decode(
                token, self._key, algorithms=["EdDSA"], audience=AUDIENCE, issuer=ISSUER, options={"require": CLAIMS}
            )
        except jwt.PyJWTError as error:
            raise SessionFault(FaultCode.UNAUTHENTICATED, f"device token refused: {error}") from None
        return str(claims["sub"])


def _certificate(subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey) -> x509.CertificateBuilder:
    now = datetime.datetime.now(datetime.UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(hours=1))
        .not_valid_after(now + datetime.timedelta(days=CERTIFICATE_DAYS))
    )


def _alternative(name: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        return x509.DNSName(name)


def _write_key(path: Path, key: ec.EllipticCurvePrivateKey | Ed25519PrivateKey) -> None:
    data = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        file.write(data)


def _signing_key(folder: Path) -> Ed25519PrivateKey:
    path = folder / "signing.key"
    try:
        key = serialization.load_pem_private_key(path.read_bytes(), None)
    except (OSError, ValueError, TypeError) as error:
        raise BadKeys(f"{path}: {error}") from None
    if not isinstance(key, Ed25519PrivateKey):
        raise BadKeys(f"{path}: not an Ed25519 key")
    return key


def _kid(key: Ed25519PublicKey) -> str:
    """Key id: the first 16 hex digits of the SHA-256 of the raw public key."""
    digest = hashes.Hash(hashes.SHA256())
    digest.update(key.public_bytes(serialization.Encoding.Raw, serialization.PublicFormat.Raw))
    return digest.finalize().hex()[:16]
