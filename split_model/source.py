"""Where a model comes from: a directory, the built-in pair, or the Hugging Face hub."""

from __future__ import annotations

import errno
import re
from importlib import resources
from pathlib import Path

from split_model.config import ModelError

HUB_ID = re.compile(r"(?P<repo>[A-Za-z0-9][\w.-]*/[\w.-]+)(@(?P<revision>[\w./-]+))?", re.ASCII)
WANTED = ["*.safetensors", "*.json", "*.jinja"]
UNWANTED = ["*/*", "consolidated*"]  # other formats in folders of their own, and Mistral's second copy of its weights


def find_model(name: str | Path) -> Path:
    """A directory as it is, the place of a built-in model, or that of a hub's `org/name[@revision]` once it is here.

    Whatever is downloaded goes to the hub's own cache (HF_HOME, HF_HUB_CACHE), with its progress bar; HF_HUB_OFFLINE=1
    takes only what is there. Raises ModelError.
    """
    folder = Path(name)
    if folder.is_dir():
        return folder
    try:
        built_in = Path(str(resources.files("models"))) / name
    except ModuleNotFoundError:
        built_in = folder
    if built_in.is_dir():
        return built_in
    found = HUB_ID.fullmatch(str(name))
    if found is None:
        raise ModelError(f"{name}: neither a directory nor a built-in model, nor a hub's id (org/name[@revision])")
    return _from_hub(str(name), found["repo"], found["revision"])


def _from_hub(name: str, repo: str, revision: str | None) -> Path:
    # imported late: who has a directory need not wait for it
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub import errors as hub

    try:
        return Path(snapshot_download(repo, revision=revision, allow_patterns=WANTED, ignore_patterns=UNWANTED))
    except hub.GatedRepoError:
        reason = f"gated: accept its terms on {constants.ENDPOINT}/{repo}, then log in (`hf auth login`, or HF_TOKEN)"
    except hub.RepositoryNotFoundError:
        reason = "neither a directory nor a built-in model, nor on the hub; a private one needs `hf auth login`"
    except hub.RevisionNotFoundError:
        reason = f"the hub has {repo}, but no revision {revision!r} of it"
    except hub.LocalEntryNotFoundError:
        why = "HF_HUB_OFFLINE forbids asking the hub" if constants.HF_HUB_OFFLINE else "the hub did not answer"
        reason = f"no directory, not whole in the cache {constants.HF_HUB_CACHE}, and {why}; download it with a network"
    except hub.HFValidationError:
        reason = "neither a directory nor a built-in model, nor an id that the hub allows"
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        reason = f"no space left for it in {constants.HF_HUB_CACHE}" if full else _one_line(error)
    except Exception as error:  # what its HTTP client and its downloader raise is passed on as it is, and has no root
        reason = _one_line(error)
    raise ModelError(f"{name}: {reason}")


def _one_line(error: Exception) -> str:
    return f"not downloaded: {' '.join(str(error).split())[:300] or type(error).__name__}"
