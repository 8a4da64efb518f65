"""The key folder: `ca.pem ca.key server.pem server.key`, `signing/<kid>.pem`, and `revoked`."""

from __future__ import annotations

import contextlib
import fcntl
import itertools
import os
import re
import tempfile
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from cloud_server import certificates
from cloud_server.tokens import GENERATE, LIFE_S, LONGEST_LIFE_S, SCOPES, Signer, Trusted, check_device
from protocol import private_files

SETTLE_S = 30.0  # before a new key signs: every server has read it by then
MAX_REVOKED = 4 << 20  # bytes of the file
KID = re.compile(r"(\d{10})-[0-9a-f]{16}")


class BadKeys(Exception):
    """Keys that cannot be used; one line that names the file and the reason."""


@dataclass(frozen=True, slots=True)
class _Signing:
    """A key of the folder; `created` is a Unix time, in front of its kid."""

    created: int
    signer: Signer


def make(folder: Path, names: list[str]) -> str:
    """Makes a CA, a server certificate for `names` (host names or addresses) and a signing key, all or nothing.

    Returns the CA's fingerprint. Raises BadKeys when the folder holds anything already, ValueError for a bad name.
    """
    if folder.exists() and any(folder.iterdir()):
        raise BadKeys(f"{folder} is not empty; name another folder")
    made = certificates.make(names)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as name:
        new = Path(name) / "keys"
        new.mkdir(mode=0o700)
        private_files.replace(new / "ca.pem", made.ca, 0o644)
        private_files.replace(new / "ca.key", made.ca_key)
        private_files.replace(new / "server.pem", made.server, 0o644)
        private_files.replace(new / "server.key", made.server_key)
        _add_signing(new, int(time.time()))
        new.rename(folder)
    return certificates.fingerprint(made.ca)


def rotate(folder: Path) -> str:
    """Adds a signing key, which signs once every server has read it, and removes those no token can be of any more.

    Returns its kid.
    """
    with _locked(folder):
        known = _signing(folder)
        kid = _add_signing(folder, max([int(time.time()), *(key.created + 1 for key in known)]))
        kept = {key.signer.kid for key in _current(known)}
        for key in known:
            if key.signer.kid not in kept:
                (folder / "signing" / f"{key.signer.kid}.pem").unlink()
    return kid


def issue(folder: Path, device: str, life_s: float = LIFE_S, scopes: Iterable[str] = (GENERATE,)) -> str:
    """A token for `device`, valid from now. Raises ValueError for what a token may not say, BadKeys."""
    check_device(device)
    if unknown := set(scopes) - SCOPES:
        raise ValueError(f"scope {sorted(unknown)[0]!r}, must be one of {', '.join(sorted(SCOPES))}")
    if not 1 <= life_s <= LONGEST_LIFE_S:
        raise ValueError(f"a token for {life_s:g} s, must be 1 to {LONGEST_LIFE_S:.0f}")
    signer = read(folder).signer
    assert signer is not None
    return signer.token(device, scopes, life_s)


def revoke(folder: Path, device: str) -> None:
    """Every token of `device` that goes back to now or earlier is out; one issued later is not."""
    check_device(device)
    with _locked(folder):
        now = int(time.time())
        revoked = {name: at for name, at in read_revoked(folder).items() if at > now - LONGEST_LIFE_S} | {device: now}
        lines = (f"{name}  {at:.0f}\n" for name, at in revoked.items())
        private_files.replace(folder / "revoked", "".join(lines).encode())


def read(folder: Path) -> Trusted:
    """What the folder says now. Raises BadKeys."""
    keys = _current(_signing(folder))
    if not keys:
        raise BadKeys(f"{folder / 'signing'} holds no key; `cloud-server keys rotate` makes one")
    settled = [key for key in keys if key.created + SETTLE_S <= time.time()]
    public = {key.signer.kid: key.signer.key.public_key() for key in keys}
    return Trusted(public, read_revoked(folder), (settled[-1] if settled else keys[0]).signer)


def read_revoked(folder: Path) -> dict[str, float]:
    """When each revoked device was put out. Raises BadKeys."""
    path = folder / "revoked"
    try:
        with path.open(encoding="utf-8") as file:
            text = file.read(MAX_REVOKED + 1)
        if len(text) > MAX_REVOKED:
            raise ValueError(f"over {MAX_REVOKED} characters")
        pairs = (line.rsplit(maxsplit=1) for line in text.splitlines() if line.strip())
        return {device: float(at) for device, at in pairs}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise BadKeys(f"{path}: {error}") from None


def _current(keys: list[_Signing]) -> list[_Signing]:
    """Without those whose last token has expired: the next key took over, and the longest token life is past."""
    horizon = time.time() - SETTLE_S - LONGEST_LIFE_S
    return [key for key, after in itertools.pairwise(keys) if after.created > horizon] + keys[-1:]


def _signing(folder: Path) -> list[_Signing]:
    """Every signing key, the oldest first."""
    try:
        return sorted(map(_load, (folder / "signing").glob("*.pem")), key=lambda key: key.signer.kid)
    except OSError as error:
        raise BadKeys(f"{folder / 'signing'}: {error}") from None


def _load(path: Path) -> _Signing:
    kid = KID.fullmatch(path.stem)
    try:
        if not kid:
            raise ValueError("the name must be <Unix time>-<16 hex digits>.pem")
        key = serialization.load_pem_private_key(path.read_bytes(), None)
        if not isinstance(key, Ed25519PrivateKey):
            raise ValueError("not an Ed25519 key")
    except (OSError, ValueError, TypeError) as error:
        raise BadKeys(f"{path}: {error}") from None
    return _Signing(int(kid[1]), Signer(path.stem, key))


def _add_signing(folder: Path, created: int) -> str:
    """The kid: when the key was made, and 16 hex digits of the SHA-256 of its public half."""
    key = Ed25519PrivateKey.generate()
    digest = hashes.Hash(hashes.SHA256())
    digest.update(key.public_key().public_bytes_raw())
    kid = f"{created:010}-{digest.finalize().hex()[:16]}"
    (folder / "signing").mkdir(mode=0o700, exist_ok=True)
    private_files.replace(folder / "signing" / f"{kid}.pem", certificates.private_pem(key))
    return kid


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """One command at a time changes a folder. Raises BadKeys for one that is not there."""
    try:
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as error:
        raise BadKeys(f"{folder}: {error}") from None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)
