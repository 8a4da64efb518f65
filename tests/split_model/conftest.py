"""What several tests of the split model begin with."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from support.checkpoints import checkpoint


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A checkpoint of one's own, to be changed."""
    return Path(shutil.copytree(checkpoint(), tmp_path / "copy"))
