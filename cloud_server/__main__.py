"""The command `cloud-server`."""

from __future__ import annotations

import argparse
import asyncio
import logging
import math
import os
import sys
from pathlib import Path

from cloud_server import access, keys
from cloud_server.config import ServerConfig
from protocol.process import LogFormat, Signals, add_flags, announce, check_flags, set_up_logging, settle
from protocol.transport.base import Address
from protocol.transport.quic_door import Bounds
from split_model.config import ModelError
from split_model.settings import PRECISIONS, Precision
from split_model.source import find_model

log = logging.getLogger("cloud_server")


def main(arguments: list[str] | None = None) -> int:
    given = _parser().parse_args(arguments)
    try:
        return int(given.run(given) or 0)
    except (ModelError, keys.BadKeys, OSError, ValueError) as error:
        print(f"cloud-server: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="cloud-server", description="Serve a full model to phones.")
    commands = parser.add_subparsers(required=True)

    serve = commands.add_parser("serve", help="serve over QUIC, gRPC and HTTPS")
    serve.add_argument("--model", default="assistant-20m", help="built-in name, checkpoint directory or hub id")
    serve.add_argument(
        "--tiny", metavar="NAME|DIR", help="model of the same tokenizer that drafts here; none if not given"
    )
    for flag, whose in (("--precision", "the model is"), ("--tiny-precision", "the one that drafts is")):
        serve.add_argument(flag, choices=[one.value for one in Precision], metavar="P",
                           help=f"how {whose} held: {PRECISIONS}")  # fmt: skip
    access.add_flags(serve)
    serve.add_argument("--host", help="0.0.0.0 if not given, loopback without keys")
    serve.add_argument("--port", type=int, default=4433, help="UDP for QUIC, TCP for gRPC")
    serve.add_argument("--http-port", type=int, default=8000)
    serve.add_argument("--slots", type=int, default=ServerConfig.__dataclass_fields__["slots"].default)
    serve.add_argument("--waiting", type=int, default=ServerConfig.__dataclass_fields__["waiting"].default)
    serve.add_argument("--context", type=int, help="positions a session may have; the model's own if not given")
    serve.add_argument("--step-tokens", type=int, default=ServerConfig.__dataclass_fields__["step_tokens"].default)
    serve.add_argument("--keep", type=float, default=ServerConfig.__dataclass_fields__["keep_s"].default, metavar="S",
                       help="seconds that a device's KV is kept for its next session; 0: not at all")  # fmt: skip
    serve.add_argument("--shared-prefix", type=Path, metavar="FILE",
                       help="text of a system prompt, computed at the start for every device")  # fmt: skip
    serve.add_argument("--threads", type=int, help="of the compute pool (default: the fast physical cores)")
    serve.add_argument("--advertise", type=Address.parse, metavar="HOST:PORT", help="where phones reach this server")
    serve.add_argument("--peer", action="append", default=[], metavar="URL", help="HTTPS address of another replica")
    serve.add_argument("--retry-above", type=float, default=Bounds().retry_above, metavar="N",
                       help="QUIC handshakes a second above which phones first show their address")  # fmt: skip
    serve.add_argument("--handshakes-per-prefix", type=float, default=Bounds().per_prefix, metavar="N",
                       help="QUIC handshakes a second that one /24 or /56 may do")  # fmt: skip
    add_flags(serve, "sessions", drain_s=20.0)
    serve.set_defaults(run=_serve)

    access.add_commands(commands)
    return parser


def _serve(given: argparse.Namespace) -> int:
    for name, least in (("slots", 1), ("step_tokens", 8), ("waiting", 0), ("threads", 1), ("context", 16)):
        value = getattr(given, name)
        if value is not None and value < least:
            raise ValueError(f"--{name.replace('_', '-')} {value}, must be at least {least}")
    for name in ("port", "http_port"):
        if not 0 <= getattr(given, name) < 65536:
            raise ValueError(f"--{name.replace('_', '-')} {getattr(given, name)}, must be 0 to 65535")
    if not 0 <= given.retry_above < math.inf:
        raise ValueError(f"--retry-above {given.retry_above:g}, must be at least 0")
    if not 0 < given.handshakes_per_prefix < math.inf:
        raise ValueError(f"--handshakes-per-prefix {given.handshakes_per_prefix:g}, must be more than 0")
    check_flags(given)
    config = ServerConfig(
        model=find_model(given.model), tiny=find_model(given.tiny) if given.tiny else None,
        precision=given.precision and Precision(given.precision),
        tiny_precision=given.tiny_precision and Precision(given.tiny_precision),
        port=given.port, http_port=given.http_port,
        slots=given.slots, waiting=given.waiting, context=given.context, step_tokens=given.step_tokens,
        keep_s=given.keep, shared_prefix=given.shared_prefix,
        threads=given.threads, advertise=given.advertise, peers=tuple(given.peer), drain_s=given.drain,
        quic=Bounds(retry_above=given.retry_above, per_prefix=given.handshakes_per_prefix), **access.settings(given),
    )  # fmt: skip
    set_up_logging(given.log_format, given.log_level)
    # A compiled shape takes about half a megabyte, 1,024 are kept by default, and 128 miss 2 calls in a thousand; torch
    # keeps as many again by the other name (benchmarks/resident.py).
    for kept in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
        os.environ.setdefault(kept, "128")
    return asyncio.run(_run(config, given.log_format))


async def _run(config: ServerConfig, style: LogFormat) -> int:
    from cloud_server.server import running

    signals = Signals()
    async with running(config) as server:
        service = server.service
        signals.ready(service.drain)
        settle()
        where = f"{server.address} (QUIC and gRPC) and {server.http} (HTTPS)" if config.tls else f"{server.http} (HTTP)"
        exact = str(service.model.exact).lower()
        drafts = f", drafts by {config.tiny.name}" if config.tiny else ""
        announce(log, style, f"serving {service.model.config.name} (exact: {exact}{drafts}) on {where}")
        if not config.guarded:
            log.warning("NO KEYS: whoever reaches %s may use this server, and nothing limits how much", server.http)
        await service.leaving.wait()
        log.info("draining: %d sessions have %g s to finish", service.rooms.taken, config.drain_s)
        left = await server.drain(config.drain_s, signals.hurried)
        if left:
            log.warning("%d sessions cancelled at the deadline", left)
    return 0


if __name__ == "__main__":
    sys.exit(main())
