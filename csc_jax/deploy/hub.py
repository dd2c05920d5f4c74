"""Bundles on the Hugging Face Hub: `hf:OWNER/REPO`, fetched and published."""

import re
from pathlib import Path
from typing import Any

from csc_jax.deploy.weights import CARD, CLASSES, CONFIG, WEIGHTS
from csc_jax.errors import UserError
from csc_jax.text import name as printable_name

PREFIX = "hf:"
_FILES = (WEIGHTS, CONFIG, CLASSES, CARD)
_NAME = re.compile(r"[\w-][\w.-]{0,95}/[\w-][\w.-]{0,95}", re.ASCII)
_TOKEN = re.compile(r"\bhf_\w+|\bapi_org_\w+|(?<=Bearer )\S+")


def repository(source: str) -> str:
    """Returns OWNER/REPO of hf:OWNER/REPO; UserError for anything else."""
    name = source.removeprefix(PREFIX)
    if not source.startswith(PREFIX) or not _NAME.fullmatch(name) or ".." in name:
        raise UserError(f"{printable_name(source)!r} names no repository; it takes hf:OWNER/REPO.")
    return name


def fetch(source: str) -> Path:
    """Returns the folder of a bundle on the Hub, fetched or from the cache of huggingface_hub.

    Raises:
      UserError: no such repository, no network, or huggingface_hub is not installed.
    """
    name = repository(source)
    hub = _library(source)
    try:
        return Path(hub.snapshot_download(name, allow_patterns=list(_FILES)))
    except Exception as error:  # those of the HTTP library are not this project's to know
        raise UserError(
            f"{source} cannot be fetched ({_said(error)}). Without a network, give a folder with "
            "the bundle."
        ) from error


def push(folder: Path, target: str) -> str:
    """Publishes the files of a bundle; a repository that is not there yet is made, private.

    Returns:
      Where it is.

    Raises:
      UserError: it cannot be written to, or huggingface_hub is not installed.
    """
    name = repository(target)
    hub = _library(target)
    try:
        api = hub.HfApi()
        url = str(api.create_repo(name, private=True, exist_ok=True))
        api.upload_folder(
            repo_id=name,
            folder_path=str(folder),
            allow_patterns=list(_FILES),
            commit_message="Model exported by csc_jax",
        )
    except Exception as error:
        raise UserError(
            f"{folder} is written but cannot be published as {target} ({_said(error)}). Log in "
            "with `hf auth login`, or set HF_TOKEN, with the right to write there."
        ) from None  # the chain of causes may hold the request, and the request the token
    return _TOKEN.sub("…", url)


def _library(source: str) -> Any:
    try:
        import huggingface_hub
    except ImportError as error:
        raise UserError(
            f"{source} needs huggingface_hub: pip install huggingface_hub, or csc-jax[hub]."
        ) from error
    return huggingface_hub


def _said(error: Exception) -> str:
    """Returns the first line of an error, without a token."""
    line = f"{type(error).__name__}: {error}".splitlines()[0]
    return printable_name(_TOKEN.sub("…", line))[:200]
