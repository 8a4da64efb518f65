"""`make fuzz`: random bytes for each target, guided by coverage; what breaks one is kept in its corpus."""

from __future__ import annotations

import argparse
import logging
import subprocess
import sys
from pathlib import Path

CORPUS = Path(__file__).parent / "corpus"
SECONDS = 30
LONGEST = 60  # seconds one input may take, on a busy machine
MEMORY = 2048  # MB


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("target", nargs="*", help="all of them if none is named")
    parser.add_argument("--seconds", type=int, default=SECONDS, help="for each target")
    given = parser.parse_args()
    names = given.target or sorted(folder.name for folder in CORPUS.iterdir())
    broken = [name for name in names if _apart(name, given.seconds)]
    for name in broken:
        print(f"fuzz: {name} broke; the input is in {CORPUS / name}", file=sys.stderr)
    return 1 if broken else 0


def _apart(name: str, seconds: int) -> int:
    """In a process of its own, since the fuzzer never returns."""
    print(f"fuzz: {name}", flush=True)
    return subprocess.run([sys.executable, __file__, "--", name, str(seconds)], check=False).returncode


def _fuzz(name: str, seconds: int) -> None:
    import atheris

    with atheris.instrument_imports(include=["protocol", "aioquic", "cloud_server", "jwt"]):
        from fuzz.targets import TARGETS

    logging.disable(logging.CRITICAL)
    found = Path("build/fuzz") / name
    found.mkdir(parents=True, exist_ok=True)
    options = {
        "max_total_time": seconds, "timeout": LONGEST, "report_slow_units": LONGEST, "rss_limit_mb": MEMORY,
        "max_len": 4096, "artifact_prefix": f"{CORPUS / name}/", "verbosity": 0, "print_final_stats": 1,
    }  # fmt: skip
    flags = [f"-{option}={value}" for option, value in options.items()]
    atheris.Setup([sys.argv[0], *flags, str(found), str(CORPUS / name)], TARGETS[name])
    atheris.Fuzz()


if __name__ == "__main__":
    if sys.argv[1:2] == ["--"]:
        _fuzz(sys.argv[2], int(sys.argv[3]))
    sys.exit(main())
