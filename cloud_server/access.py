"""The part of the command line that is about who gets in: keys, tokens, revocation, quotas."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from cloud_server import certificates, keys
from cloud_server.quota import Quota
from cloud_server.tokens import AUDIENCE, GENERATE, ISSUER, LIFE_S, SCOPES
from protocol import private_files

Commands = argparse._SubParsersAction  # argparse has no public name for it
QUOTA = Quota(requests=240, prompt_tokens=200_000, output_tokens=60_000, sessions=16)


def add_flags(serve: argparse.ArgumentParser) -> None:
    """Those of `serve`."""
    serve.add_argument("--keys", type=Path, metavar="DIR", help="made by `cloud-server keys`")
    serve.add_argument("--jwks", metavar="FILE|URL", help="take tokens signed with these keys, not those of --keys")
    serve.add_argument("--issuer", default=ISSUER, help="of the tokens that are taken")
    serve.add_argument("--audience", default=AUDIENCE)
    serve.add_argument("--certificate", type=Path, metavar="FILE", help="PEM, with its chain, not that of --keys")
    serve.add_argument("--certificate-key", type=Path, metavar="FILE")
    serve.add_argument("--token-life", type=float, default=LIFE_S, metavar="S", help="of a renewed token")
    serve.add_argument("--insecure", action="store_true", help="without keys, listen beyond loopback all the same")
    for name, about in (
        ("requests", "requests a minute"), ("prompt_tokens", "prompt tokens a minute"),
        ("output_tokens", "answer tokens a minute"), ("sessions", "sessions open at once"),
    ):  # fmt: skip
        serve.add_argument(_flag(name), type=int, default=getattr(QUOTA, name), metavar="N", dest=f"quota_{name}",
                           help=f"{about} of one device (%(default)s), 0 for no limit")  # fmt: skip


def settings(given: argparse.Namespace) -> dict[str, Any]:
    """Fields of ServerConfig from those flags. Raises ValueError."""
    quota = Quota(**{name: getattr(given, f"quota_{name}") for name in Quota.__slots__})
    for name in Quota.__slots__:
        if getattr(quota, name) < 0:
            raise ValueError(f"{_flag(name)} {getattr(quota, name)}, must be at least 0")
    host = given.host or ("0.0.0.0" if given.keys or given.jwks or given.insecure else "127.0.0.1")
    return {
        "host": host, "keys": given.keys, "jwks": given.jwks, "issuer": given.issuer, "audience": given.audience,
        "certificate": given.certificate, "certificate_key": given.certificate_key, "token_life_s": given.token_life,
        "insecure": given.insecure, "quota": quota,
    }  # fmt: skip


def _flag(name: str) -> str:
    return "--sessions-per-device" if name == "sessions" else f"--{name.replace('_', '-')}-per-minute"


def add_commands(commands: Commands[argparse.ArgumentParser]) -> None:
    """`keys`, `token` and `revoke`."""
    folder = argparse.ArgumentParser(add_help=False)
    folder.add_argument("--keys", type=Path, default=Path("keys"), metavar="DIR")

    make = commands.add_parser("keys", parents=[folder], help="make a CA, a certificate and a signing key")
    make.add_argument("what", nargs="?", choices=("make", "rotate", "fingerprint"), default="make",
                      help="make the folder, add a signing key to it, or tell its CA's fingerprint")  # fmt: skip
    make.add_argument("--name", action="append", metavar="HOST", help="name or address in the certificate")
    make.set_defaults(run=_keys)

    token = commands.add_parser("token", parents=[folder], help="issue a device token")
    token.add_argument("--device", required=True, metavar="NAME")
    token.add_argument("--scope", action="append", choices=sorted(SCOPES), help=f"({GENERATE})")
    token.add_argument("--ttl", type=float, default=LIFE_S, metavar="S", help="(%(default)g)")
    token.add_argument("--out", type=Path, metavar="FILE", help="write it there, readable by its owner only")
    token.set_defaults(run=_token)

    revoke = commands.add_parser("revoke", parents=[folder], help="put a device out")
    revoke.add_argument("--device", required=True, metavar="NAME")
    revoke.set_defaults(run=_revoke)


def _keys(given: argparse.Namespace) -> None:
    if given.what == "make":
        if not given.name:
            raise ValueError("keys: --name is missing: the name or address that phones reach the server by")
        print(f"CA fingerprint (SHA-256): {keys.make(given.keys, given.name)}")
    elif given.what == "rotate":
        print(f"added {keys.rotate(given.keys)}; it signs in {keys.SETTLE_S:.0f} s, the others go when they expire")
    else:
        print(certificates.fingerprint((given.keys / "ca.pem").read_bytes()))


def _token(given: argparse.Namespace) -> None:
    token = keys.issue(given.keys, given.device, given.ttl, given.scope or (GENERATE,))
    if given.out:
        private_files.replace(given.out, f"{token}\n".encode())
    else:
        print(token)


def _revoke(given: argparse.Namespace) -> None:
    keys.revoke(given.keys, given.device)
    print(f"{given.device} is out within 30 s, with what it has running; tokens issued from the next second on count")
