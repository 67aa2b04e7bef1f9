"""A finished checkpoint goes to the Hub."""

from __future__ import annotations

import re
from contextlib import nullcontext
from pathlib import Path

from mlxtx.checkpoint.hub import explained, quiet_bars
from mlxtx.errors import MlxtxError


def upload(
    folder: str | Path, repo: str, *, private: bool = False, show_progress: bool = False
) -> str:
    """Make the repository ``repo`` (owner/name) if need be and put ``folder`` into it; returns its
    address. show_progress: let huggingface-hub draw its bars on stderr. Needs `hf auth login` or HF_TOKEN. Raises MlxtxError that says what to do."""
    folder = Path(folder)
    if not (folder / "config.json").is_file():
        raise MlxtxError(f"{folder} is no model's folder, so it is not uploaded")
    check_upload(repo)
    from huggingface_hub import HfApi

    api = HfApi()
    with explained(repo, None), nullcontext() if show_progress else quiet_bars():
        api.create_repo(repo, private=private, exist_ok=True)
        if private and not api.model_info(repo).private:  # one that was there stays as it was
            raise MlxtxError(
                f"{repo} is public already: make it private on its page, or name another"
            )
        api.upload_folder(repo_id=repo, folder_path=str(folder), commit_message="Add the model")
    return f"{api.endpoint}/{repo}"


def check_upload(repo: str) -> None:
    """Raises MlxtxError where an upload to ``repo`` can't even begin. Asks nobody."""
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repo):
        raise MlxtxError(f"{repo!r:.80} is no repository's name; it is owner/name")
    from huggingface_hub import get_token

    if not get_token():
        raise MlxtxError("uploading needs an account: run `hf auth login`, or set HF_TOKEN")
