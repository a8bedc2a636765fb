"""Adapter folders on the Hugging Face hub, through huggingface_hub.

A folder holds adapter.tinylora and README.md, and, where asked for, the same adapter as PEFT or LoRA, which other tools
then load from the same repository.
"""

from pathlib import Path
from typing import Any

from tinylora.errors import UserError
from tinylora.system.folders import folder_beside

PATTERNS = ["*.tinylora", "adapter*.safetensors", "adapter_config.json", "README.md"]
"""What `pull` fetches: nothing that could run."""


def push(folder: Path, repo: str, *, private: bool = False, message: str = "Adapter by tinylora") -> str:
    """Upload a folder, making the repository if need be; returns its address. Raises: UserError if the hub refuses."""
    from huggingface_hub import HfApi

    _check_repo(repo)
    try:
        api: Any = HfApi()
        address = api.create_repo(repo, private=private, exist_ok=True)
        api.upload_folder(folder_path=str(folder), repo_id=repo, commit_message=message)
    except Exception as error:
        raise _explained(error, f"cannot upload to {repo}") from error
    return str(address)


def pull(repo: str, folder: Path, *, revision: str = "") -> Path:
    """Fetch an adapter's folder, whole or not at all.

    Raises: UserError if there is none, the folder is in use, or the hub cannot be reached.
    """
    from huggingface_hub import snapshot_download

    _check_repo(repo)
    with folder_beside(folder) as made:
        try:
            snapshot_download(repo, revision=revision or None, allow_patterns=PATTERNS, local_dir=made)
        except Exception as error:
            raise _explained(error, f"cannot fetch {repo}") from error
        if not any(made.glob("*.tinylora")) and not any(made.glob("adapter*.safetensors")):
            raise UserError(f"{repo} holds no adapter (no *.tinylora and no adapter*.safetensors)")
    return folder


def _check_repo(repo: str) -> None:
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils._validators import validate_repo_id

    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise UserError(f"{repo!r} is no repository name ({error}); give OWNER/NAME") from error
    if "/" not in repo:
        raise UserError(f"{repo!r} names no owner; give OWNER/NAME")


def _explained(error: Exception, what: str) -> UserError:
    from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError, OfflineModeIsEnabled

    text = " ".join(str(error).split())[:240]
    if isinstance(error, UserError):
        return error
    if isinstance(error, OfflineModeIsEnabled):
        return UserError(f"{what}: HF_HUB_OFFLINE is set; unset it")
    if isinstance(error, LocalTokenNotFoundError) or (isinstance(error, HfHubHTTPError) and "401" in text):
        return UserError(f"{what}: the hub wants you to log in; run hf auth login ({text})")
    return UserError(f"{what}: {type(error).__name__}: {text}")
