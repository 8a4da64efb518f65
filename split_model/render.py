"""Renders chat templates in a process of its own: they are programs from strangers, and some never end.

A line of JSON in, a line out, until the input ends. The kernel kills the process when one template computes for more
than CPU_S, whatever it does just then, and memory beyond MEMORY is not given.
"""

from __future__ import annotations

import json
import resource
import signal
import sys
from datetime import datetime
from functools import lru_cache
from typing import Any, NoReturn

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
from jinja2.exceptions import SecurityError
from jinja2.sandbox import ImmutableSandboxedEnvironment

CPU_S = 1.0
MEMORY = 512 << 20  # of address space, of which 60 MB are taken before anything is rendered
LONGEST = 4 << 20  # characters of a rendered text
# What a template can raise, by its own doing or by what its expressions do to the messages.
REFUSALS = (jinja2.TemplateError, TypeError, ValueError, ArithmeticError, LookupError, AttributeError, RecursionError)


class Generation(jinja2.ext.Extension):
    """`{% generation %}` marks for training what the model says; here it is as if it were not there."""

    tags = {"generation"}  # noqa: RUF012 - as jinja declares it

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _refuse(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _to_json(value: object, ensure_ascii: bool = False, indent: int | None = None,
             separators: tuple[str, str] | None = None, sort_keys: bool = False) -> str:  # fmt: skip
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _now(form: str) -> str:
    return datetime.now().strftime(form)


@lru_cache(4)
def _compile(template: str) -> jinja2.Template:
    """In the environment that transformers documents for chat templates."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = _to_json
    environment.globals.update(raise_exception=_refuse, strftime_now=_now)
    return environment.from_string(template)


def render(template: str, values: dict[str, Any]) -> dict[str, str]:
    """`text`, or why there is none: `refused` by the template itself, or `broken`, whatever it is given."""
    try:
        compiled = _compile(template)
    except (jinja2.TemplateError, RecursionError, MemoryError, SyntaxError) as error:
        return {"broken": _named(error)}
    try:
        text = compiled.render(values)
    except (SecurityError, MemoryError) as error:
        return {"broken": _named(error)}
    except REFUSALS as error:
        return {"refused": _named(error)}
    if len(text) > LONGEST:
        return {"broken": f"writes {len(text):,} characters, limit {LONGEST:,}"}
    return {"text": text}


def _named(error: BaseException) -> str:
    if isinstance(error, MemoryError):
        return f"needs more than {MEMORY >> 20} MiB of memory"
    return str(error)[:500] or type(error).__name__


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the program that asks, and closes the input
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    most = resource.getrlimit(resource.RLIMIT_AS)[1]
    limit = MEMORY if most == resource.RLIM_INFINITY else min(MEMORY, most)
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    for line in sys.stdin.buffer:
        asked = json.loads(line)
        signal.setitimer(signal.ITIMER_PROF, CPU_S)  # its signal kills
        answer = render(asked["template"], asked["values"])
        signal.setitimer(signal.ITIMER_PROF, 0)
        sys.stdout.buffer.write(json.dumps(answer).encode() + b"\n")
        sys.stdout.buffer.flush()


if __name__ == "__main__":
    main()
