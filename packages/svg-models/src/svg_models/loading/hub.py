"""Find a model: the one in this package, a folder, or a model of the hub."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from svg_models.errors import ModelUnavailableError, SettingError, first_line, shortened
from svg_models.files import user_path
from svg_models.loading.progress import Progress, quiet

__all__ = [
    "HUB_ID",
    "fetch_configuration",
    "fetch_weights",
    "hub_errors",
    "local_folder",
    "locate",
    "unreachable",
]

# What the hub allows: no dot or dash at an end, none doubled, at most 96 characters.
HUB_ID = re.compile(
    r"(?=[\w./-]{3,96}\Z)(?!.*(--|\.\.))\w(?:[\w.-]*\w)?/\w(?:[\w.-]*\w)?", re.ASCII
)
_REACH_SECONDS = 6.0


def locate(
    model: str | os.PathLike[str] | None, *, progress: Progress = quiet
) -> tuple[str, Path, bool]:
    """Find a model.

    Returns:
        Its name, a folder with at least its configuration, and whether the weights have yet to
        come from the hub.

    Raises:
        ModelUnavailableError: in one sentence, what is missing.
        SettingError: if it is no name.
    """
    if not isinstance(model, str | os.PathLike | None):
        raise no_model(model)
    if model is None or str(model) == "embedded":
        from svg_models.embedded import embedded_path

        return "embedded", Path(embedded_path()), False
    folder = local_folder(model)
    if folder is not None:
        return str(model), folder, False
    progress("looking for the model", 0, 0)
    return str(model), fetch_configuration(str(model)), True


def no_model(value: Any) -> SettingError:
    """Return the error for what was given as a model and is none."""
    hint = "; sparsify(pipe) makes it sparse" if hasattr(value, "transformer") else ""
    return SettingError(
        "model must be a folder, a hub id or what load_pipeline returned, got a "
        f"{type(value).__name__}{hint}"
    )


def local_folder(model: str | os.PathLike[str]) -> Path | None:
    """Return the folder that `model` names, or None if it is an id of the hub.

    Raises:
        ModelUnavailableError: if it is neither.
    """
    text = os.fspath(model)
    try:
        folder = user_path(text)
        if folder.is_dir():
            return folder
        elsewhere = folder.is_absolute() or text.startswith((".", "~"))
    except (OSError, ValueError):  # a name too long, or no name at all
        elsewhere = True
    if elsewhere or not HUB_ID.fullmatch(text):
        raise ModelUnavailableError(
            f"unknown model '{shortened(text, 120)}': expected 'embedded', an existing folder in "
            "diffusers' format, or a hub id like Wan-AI/Wan2.1-T2V-14B-Diffusers"
        )
    return None


def fetch_configuration(model: str) -> Path:
    """Download what describes a model of the hub, without its weights.

    Raises:
        ModelUnavailableError: in one sentence, what is missing.
        SettingError: if it is no name.
    """
    if not isinstance(model, str | os.PathLike | None):
        raise no_model(model)
    from huggingface_hub import snapshot_download

    with hub_errors(model) as offline:
        configs = ["model_index.json", "*/config.json"]
        folder = Path(snapshot_download(model, allow_patterns=configs, local_files_only=offline))
    return _checked(folder, model)


def fetch_weights(model: str) -> Path:
    """Download a model of the hub.

    Raises:
        ModelUnavailableError: in one sentence, what is missing.
        SettingError: if it is no name.
    """
    if not isinstance(model, str | os.PathLike | None):
        raise no_model(model)
    from diffusers import DiffusionPipeline

    with hub_errors(model) as offline:
        return Path(
            DiffusionPipeline.download(model, local_files_only=offline, use_safetensors=True)
        )


@contextmanager
def hub_errors(model: str) -> Iterator[bool]:
    """Turn what goes wrong on the way to the hub into one sentence.

    Args:
        model: what is fetched.

    Yields:
        Whether only the local cache can help, because the hub does not answer.

    Raises:
        ModelUnavailableError: in one sentence, what is missing.
        SettingError: if it is no name.
    """
    if not isinstance(model, str | os.PathLike | None):
        raise no_model(model)
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        RepositoryNotFoundError,
    )

    trouble = unreachable()
    try:
        yield trouble is not None
    except GatedRepoError as error:
        raise ModelUnavailableError(
            f"{model} asks for your consent: accept its terms on the hub, then run hf auth login"
        ) from error
    except RepositoryNotFoundError as error:
        raise ModelUnavailableError(
            f"the hub has no model '{model}' (or it is private); check the name"
        ) from error
    except HFValidationError as error:
        raise ModelUnavailableError(
            f"'{model}' is no id of the hub ({first_line(error)}); check the name"
        ) from error
    except (HfHubHTTPError, OSError) as error:  # a file missing from the local cache included
        raise ModelUnavailableError(
            f"could not reach {_endpoint()} to fetch {model}, and it is not in the local cache "
            f"({trouble or first_line(error)}); connect, or give the path of a local copy"
        ) from error


def _checked(folder: Path, name: str) -> Path:
    if (folder / "model_index.json").is_file():
        return folder
    raise ModelUnavailableError(f"{name} is not a diffusers pipeline: it has no model_index.json")


def _endpoint() -> str:
    from huggingface_hub import constants

    return str(constants.ENDPOINT)


def unreachable() -> str | None:
    """Return why the hub cannot be reached, or None if it answers.

    One request with a short time limit: the hub's own client would retry for half a minute.
    """
    import ssl
    import urllib.error
    import urllib.request

    from huggingface_hub import constants

    if constants.is_offline_mode():
        return "HF_HUB_OFFLINE is set"
    request = urllib.request.Request(_endpoint(), method="HEAD")
    try:
        urllib.request.urlopen(request, timeout=_REACH_SECONDS).close()
    except urllib.error.HTTPError:
        return None  # it answered
    except (urllib.error.URLError, TimeoutError, OSError) as error:
        reason = getattr(error, "reason", error)
        if isinstance(reason, ssl.SSLError):
            return None  # reached; the hub's client has certificates of its own
        return str(getattr(reason, "strerror", None) or reason)
    return None
