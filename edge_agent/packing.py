"""`edge-agent pack`: writes the part of a model that a phone needs, and shows how far it is."""

from __future__ import annotations

import argparse
import signal

from rich.console import Console
from rich.progress import Progress

from split_model.config import ModelError
from split_model.pack import pack
from split_model.settings import Precision
from split_model.source import find_model


def run(given: argparse.Namespace) -> int:
    """Raises ValueError or OSError that says why there is nothing in `--out`."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: what is half made is taken away
    console = Console(stderr=True)
    progress = Progress(console=console, transient=True, disable=not console.is_terminal)
    try:
        folder = find_model(given.model)  # which may download it, with a bar of its own
        with progress:
            task = progress.add_task("packing", total=None)
            done = pack(folder, given.out, given.split, Precision(given.precision),
                        lambda done, total: progress.update(task, completed=done, total=total))  # fmt: skip
    except ModelError as error:
        raise ValueError(error) from None
    finally:
        signal.signal(signal.SIGTERM, before)
    what = "the whole model" if done.head else f"{done.layers} layers" if done.layers else "no weights"
    print(f"{given.out}: {what}, {given.precision}; {done.before / 1e6:,.1f} MB before, {done.after / 1e6:,.1f} MB now")
    return 0
