"""Where a checkpoint is: a local directory or .gguf file, or a hub id, downloaded once into the Hugging Face cache."""

import os
import re
from collections.abc import Sequence
from pathlib import Path

from jaxgen.errors import JaxgenError
from jaxgen.paths import as_path

from .checkpoint import INDEX, OLD_GPTQ, WEIGHTS, absent_shards
from .leftovers import settle

# What belongs to a model beside its config and weights: defaults for generating, and all that makes a tokenizer.
COMPANIONS = (
    "generation_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template*",
    "additional_chat_templates/*.jinja",
    "vocab.*",
    "merges.*",
    "tekken.json",
)
# Only what jaxgen reads: many repositories hold the same weights once more in other formats. Shards are usually
# called so; others, which only an index names, are fetched when it is there.
WANTED = ("config.json", OLD_GPTQ, WEIGHTS, INDEX, "model-*.safetensors", *COMPANIONS)
_COMMIT = re.compile(r"[0-9a-f]{40}")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


def locate(
    name_or_path: str | os.PathLike[str],
    *,
    files: Sequence[str] = WANTED,
    revision: str | None = None,
    local_files_only: bool = False,
    cache_dir: str | os.PathLike[str] | None = None,
    token: str | bool | None = None,
) -> Path:
    """The local directory of a checkpoint, or a .gguf file; downloaded from the Hugging Face hub if it is neither.

    `files`: patterns of what to download. Other arguments as `huggingface_hub.snapshot_download`. Raises
    `JaxgenError` for a path that is not there, and for whatever keeps the hub from answering: no network, no such
    repository or revision, no access.
    """
    path = as_path(name_or_path, "name_or_path", "a directory or a hub id")
    settle(path)
    try:
        is_directory, exists = path.is_dir(), path.exists()
    except OSError as error:  # a name too long, no permission
        raise JaxgenError(f"{name_or_path!r:.200} cannot be looked up: {error}") from error
    if is_directory or (exists and path.suffix == ".gguf"):
        return path
    if exists:
        raise JaxgenError(f"{path} is a file; give the directory that holds config.json and the weights")
    if os.path.lexists(path):
        raise JaxgenError(f"{path} is a link that leads nowhere")
    if not isinstance(name_or_path, str) or not _HUB_ID.fullmatch(name_or_path):
        raise JaxgenError(f"{name_or_path!r}: there is no such directory, and it is not a hub id ('owner/name')")
    return _download(name_or_path, files, revision, local_files_only, cache_dir, token)


def _download(
    repo_id: str,
    files: Sequence[str],
    revision: str | None,
    local_files_only: bool,
    cache_dir: str | os.PathLike[str] | None,
    token: str | bool | None,
) -> Path:
    import huggingface_hub
    from huggingface_hub import errors

    if not isinstance(revision, str | None):
        raise JaxgenError(f"revision={revision!r:.80} must be the name of a branch or tag, or a commit")
    where = f"{repo_id!r} is no local directory, and from the Hugging Face hub"
    placed = {
        "local_files_only": local_files_only,
        "cache_dir": None if cache_dir is None else os.fspath(as_path(cache_dir, "cache_dir")),
        "token": token,
    }
    try:
        place = Path(
            huggingface_hub.snapshot_download(repo_id, revision=revision, allow_patterns=list(files), **placed)
        )
        if INDEX in files and (rest := absent_shards(place)):
            commit = place.name if _COMMIT.fullmatch(place.name) else revision  # a branch may have moved meanwhile
            huggingface_hub.snapshot_download(repo_id, revision=commit, allow_patterns=rest, **placed)
        return place
    except errors.GatedRepoError as error:
        raise JaxgenError(
            f"{where} it is gated: accept its terms at https://huggingface.co/{repo_id}, then log in "
            "(`hf auth login`) or give token="
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise JaxgenError(f"{where} it cannot be had: no such repository, or a private one (give token=)") from error
    except errors.RevisionNotFoundError as error:
        raise JaxgenError(
            f"{where} revision={revision!r} cannot be had: there is no such branch, tag or commit"
        ) from error
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled) as error:
        raise JaxgenError(
            f"{where} it cannot be had: it is not in the cache, and the hub is not reachable or not allowed "
            "(local_files_only, HF_HUB_OFFLINE)"
        ) from error
    except (errors.HFValidationError, OSError) as error:  # every HTTP and disk error is an OSError
        raise JaxgenError(f"{where} it cannot be had: {error}") from error
