"""Sparse coders of the Hugging Face hub: which file is wanted, and whether it may be downloaded."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import constants, hf_hub_download, try_to_load_from_cache
from huggingface_hub import errors as hub

from mi_helpers.errors import Refused, first_line
from mi_helpers.files import need_space
from mi_helpers.layouts import ModelError

CONFIG, WEIGHTS = "cfg.json", "sae_weights.safetensors"
SPARSIFY, SCOPE, SCOPE2 = "sae.safetensors", "params.npz", "params.safetensors"
KNOWN = (WEIGHTS, SPARSIFY, SCOPE, SCOPE2)
MOST_CONFIG = 2**22  # bytes of a cfg.json


def from_hub(repo: str, folder: str) -> Path:
    """The weights' file of a coder on the hub, downloaded once, with its cfg.json beside it.

    Raises:
        ModelError: it is not there, the hub cannot be reached, or a file is too large.
        RunError: the disk has no room for it.
    """
    single = folder.endswith((".safetensors", ".npz"))
    wanted = [folder] if single else [f"{folder}/{name}".lstrip("/") for name in KNOWN]
    try:
        held = [file for file in wanted if isinstance(try_to_load_from_cache(repo, file), str)]
        for file in held or wanted:
            try:
                path = download(repo, file)
            except hub.EntryNotFoundError as error:
                if isinstance(error, hub.LocalEntryNotFoundError):
                    raise
                continue
            if path.name in (WEIGHTS, SPARSIFY):
                download(repo, Path(file).with_name(CONFIG).as_posix(), MOST_CONFIG)
            return path
    except Refused:
        raise
    except (hub.EntryNotFoundError, hub.HfHubHTTPError, OSError, ValueError) as error:
        raise ModelError(_why(repo, folder, error)) from None
    what = folder if single else f"{folder or 'its top folder'} ({' or '.join(KNOWN)})"
    raise ModelError(
        f"{repo} has no coder in {what}: look at https://huggingface.co/{repo}/tree/main."
    )


def download(repo: str, file: str, most: int | None = None) -> Path:
    """A file of a repository, downloaded once, after its size was compared with `most` bytes and
    with the disk's room.

    Raises:
        ModelError: it is larger.
        RunError: the disk has less room.
    """
    if not isinstance(try_to_load_from_cache(repo, file), str):
        size = hf_hub_download(repo, file, dry_run=True).file_size or 0
        if most is not None and size > most:
            raise ModelError(
                f"{repo} has a {Path(file).name} of {size:,} bytes, and at most {most:,} are read."
            )
        need_space(Path(constants.HF_HUB_CACHE), size, f"The download of {repo}/{file}")
    return Path(hf_hub_download(repo, file))


def _why(repo: str, folder: str, error: BaseException) -> str:
    """One sentence for what the hub raised."""
    if isinstance(error, hub.GatedRepoError):
        return (
            f"{repo} is gated: accept its licence at https://huggingface.co/{repo}, then run "
            "`hf auth login`."
        )
    if isinstance(error, hub.RepositoryNotFoundError | hub.HFValidationError):
        return f"There is no repository {repo!r} on huggingface.co, and no folder of that name."
    if isinstance(error, hub.LocalEntryNotFoundError | hub.OfflineModeIsEnabled | ConnectionError):
        return (
            f"{repo}/{folder} is not on this machine and huggingface.co cannot be reached: connect "
            "to the network, or give a local folder."
        )
    return f"{repo}/{folder} could not be loaded: {first_line(error)}."
