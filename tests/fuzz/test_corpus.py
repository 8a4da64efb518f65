"""Every saved example, and examples spoiled at random, leave every parser of strangers' bytes whole."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fuzz.targets import TARGETS

CORPUS = Path(__file__).parent / "corpus"
SAVED = {name: sorted((CORPUS / name).iterdir()) for name in TARGETS}
SLOW = {"datagram": 40, "first_packet": 40, "client_hello": 40, "established": 15}  # examples


@pytest.mark.parametrize("name", TARGETS)
def test_saved_examples(name: str) -> None:
    for path in SAVED[name]:
        TARGETS[name](path.read_bytes())


@pytest.mark.parametrize("name", TARGETS)
def test_spoiled_and_random_examples(name: str) -> None:
    examples = [path.read_bytes() for path in SAVED[name]]

    @settings(max_examples=SLOW.get(name, 300), deadline=None, derandomize=True, database=None)
    @given(spoiled(examples) | st.binary(max_size=300))
    def check(data: bytes) -> None:
        TARGETS[name](data)

    check()


@st.composite
def spoiled(draw: st.DrawFn, examples: list[bytes]) -> bytes:
    """An example with bytes changed, cut out or put in, or two of them joined."""
    data = bytearray(draw(st.sampled_from(examples)))
    for _ in range(draw(st.integers(1, 4))):
        at, size = draw(st.integers(0, len(data))), draw(st.integers(0, 8))
        data[at : at + size] = draw(st.binary(max_size=8))
    return bytes(data) + draw(st.sampled_from([b"", *examples]))
