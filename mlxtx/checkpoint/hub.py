"""A folder on disk for a path or a Hub id: downloads with progress and resume, works offline.

huggingface-hub does the transfer and keeps the cache; this module decides what is fetched (never
code, never pickles) and turns its errors into one line that says what to do.
"""

from __future__ import annotations

import contextlib
import os
import re
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from mlxtx.checkpoint import bundled
from mlxtx.errors import MlxtxError
from mlxtx.events import Event, Progress
from mlxtx.files import disk_full

OnEvent = Callable[[Event], None]

# What a model runs with: weights, configuration, tokenizer files, chat templates.
NEEDED_FILES = ("*.safetensors", "*.json", "*.jinja", "*.model", "*.tiktoken", "*.txt")
# What is fetched with it, and not missed where another program fetched a model without it.
EXTRA_FILES = ("README.md", "LICENSE*", "NOTICE*")
# The same weights once more in another layout, and everything in sub-folders.
UNWANTED_FILES = ("*/*", "consolidated*.safetensors", "adapter_model.safetensors")

_REPO_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


def resolve(
    path_or_repo: str | Path, revision: str | None = None, *, on_event: OnEvent | None = None
) -> Path:
    """The folder of a checkpoint: ``path_or_repo`` itself, or the Hub repository, downloaded;
    "bundled" is the model in the package.

    revision: a branch, tag or commit of the repository. on_event: gets ``Progress`` events (stage
    "download", bytes). A connection that breaks is taken up where it was; when a download is begun
    again, files that are complete are not fetched again. Without a network, what is in the cache is
    used. Raises MlxtxError with what to do: no such folder, a gated or unknown repository, no
    network, a full disk.
    """
    if str(path_or_repo) == bundled.NAME:
        _unversioned(bundled.NAME, revision)
        return bundled.bundled_folder()
    if not str(path_or_repo):
        raise MlxtxError("the model's name is empty; give a folder or a Hub id such as owner/name")
    try:
        path = Path(path_or_repo).expanduser()
    except RuntimeError:  # ~somebody who is not known here
        path = Path(path_or_repo)
    if os.path.isdir(path):  # which takes any text, however odd
        _unversioned(f"the folder {path}", revision)
        return _readable(path)
    repo = str(path_or_repo)
    if os.path.exists(path):
        raise MlxtxError(f"{path} is a file; give the folder that holds config.json")
    if repo.startswith((".", "/", "~")) or not _REPO_ID.fullmatch(repo):
        raise MlxtxError(f"there is no folder {path}; give a folder or a Hub id such as owner/name")
    from huggingface_hub.errors import LocalEntryNotFoundError

    listed = threading.Event()
    with explained(repo, revision):
        folder = Path(_download(repo, revision, on_event, listed))
        complete = any(folder.glob("*.safetensors"))
        if not complete and not listed.is_set():  # for example of `plan`, which reads headers only
            raise LocalEntryNotFoundError(f"only a part of {repo} is in the cache")
    if not complete and (folder / "adapter_config.json").is_file():
        raise MlxtxError(
            f"{repo} holds an adapter, not a model: download it, name its model, and give the "
            "adapter's folder with --adapter"
        )
    if not complete:
        raise MlxtxError(
            f"{repo} has no safetensors weights at its top (pickled ones are never read, as they "
            "can run code); look for a safetensors version of the model"
        )
    return folder


def _unversioned(what: str, revision: str | None) -> None:
    if revision is not None:
        raise MlxtxError(f"{what} has no revisions, only a Hub id has; leave out {revision!r:.80}")


def _readable(folder: Path) -> Path:
    try:
        os.listdir(folder)
        with contextlib.suppress(FileNotFoundError):
            os.stat(folder / "config.json")
    except OSError as error:
        raise MlxtxError(f"cannot read the folder {folder}: {error.strerror or error}") from None
    return folder


def _download(
    repo: str, revision: str | None, on_event: OnEvent | None, listed: threading.Event
) -> str:
    """snapshot_download in a thread of its own: it waits for all its threads when it is
    interrupted, so that Ctrl-C would end it when everything has arrived. ``listed`` is set where
    the repository's files are known; else the folder is what the cache has of it."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    stop = threading.Event()
    answer: Future[str] = Future()

    def fetch() -> str:
        try:
            return snapshot_download(
                repo,
                revision=revision,
                allow_patterns=[*NEEDED_FILES, *EXTRA_FILES],
                ignore_patterns=list(UNWANTED_FILES),
                tqdm_class=_reporting_bar(on_event, stop, listed),
            )
        except LocalEntryNotFoundError:
            folder = cached_folder(repo, revision)
            if folder is None:
                raise
            return folder

    def work() -> None:
        try:
            answer.set_result(fetch())
        except BaseException as error:
            answer.set_exception(error)

    with quiet_bars():
        threading.Thread(target=work, daemon=True).start()
        try:
            return answer.result()
        finally:
            stop.set()


def cached_folder(repo: str, revision: str | None) -> str | None:
    """What the cache has of a repository, unless it is known that a model can't run with it. Asks
    nobody."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        return snapshot_download(
            repo,
            revision=revision,
            local_files_only=True,
            allow_patterns=list(NEEDED_FILES),
            ignore_patterns=list(UNWANTED_FILES),
        )
    except LocalEntryNotFoundError:
        return None


@contextlib.contextmanager
def quiet_bars() -> Iterator[None]:
    """Without huggingface-hub's own progress bars and warnings: the caller renders events, or
    nothing, and what goes wrong for good is an error."""
    from huggingface_hub import utils

    was_quiet, level = utils.are_progress_bars_disabled(), utils.logging.get_verbosity()
    if not was_quiet:
        utils.disable_progress_bars()
    utils.logging.set_verbosity_error()
    try:
        with warnings.catch_warnings(action="ignore"):
            yield
    finally:
        utils.logging.set_verbosity(level)
        if not was_quiet:
            utils.enable_progress_bars()


def _reporting_bar(
    on_event: OnEvent | None, stop: threading.Event, listed: threading.Event
) -> type[Any]:
    """A progress bar class in huggingface-hub's terms that draws nothing and reports bytes; once
    ``stop`` is set it ends every transfer at its next piece. ``listed`` is set with the first bar."""
    from tqdm.auto import tqdm

    started = time.monotonic()
    lock = threading.Lock()

    class Bar(tqdm):  # type: ignore[type-arg]
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            listed.set()
            name = str(kwargs.pop("name", ""))
            # Of the two byte counts, what has arrived on disk is the one to show.
            self.reported = kwargs.get("unit") == "B" and not name.endswith(".transfer")
            kwargs["disable"] = True
            super().__init__(*args, **kwargs)

        def update(self, n: float | None = 1) -> None:
            if stop.is_set():
                raise InterruptedError("the download was stopped")
            with lock:
                self.n += n or 0
                if not on_event or not self.reported or not self.total:
                    return
                progress = Progress(
                    stage="download",
                    done=min(self.n, self.total),
                    total=self.total,
                    unit="bytes",
                    seconds=time.monotonic() - started,
                )
                try:
                    on_event(progress)
                except BaseException:
                    stop.set()  # who is told may stop the download: the other files end too
                    raise

    return Bar


@contextlib.contextmanager
def explained(repo: str, revision: str | None) -> Iterator[None]:
    """Turn huggingface-hub's errors into lines for people."""
    from huggingface_hub import errors

    at = f" at revision {revision}" if revision else ""
    try:
        yield
    except errors.GatedRepoError as error:
        raise MlxtxError(
            f"{repo} is gated: accept its terms on its Hub page, then run `hf auth login` "
            "with the same account (or set HF_TOKEN) and try again"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise MlxtxError(
            f"the Hub has no {repo} that you can read, and there is no such folder; check the "
            "name, or run `hf auth login` if it is private"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise MlxtxError(f"{repo} has no revision {revision}; see its page for branches") from error
    except errors.HFValidationError as error:
        raise MlxtxError(f"{repo} is neither a folder nor a Hub id such as owner/name") from error
    except errors.LocalEntryNotFoundError as error:
        gated = error.__cause__
        if isinstance(gated, errors.HfHubHTTPError) and gated.response.status_code in (401, 403):
            raise MlxtxError(
                f"the Hub refuses {repo}: run `hf auth login` with an account that may read it"
            ) from error
        raise MlxtxError(
            f"the Hub cannot be reached and {repo}{at} is not completely in the local cache; "
            "check the network (and HF_HUB_OFFLINE), or give a folder"
        ) from error
    except errors.EntryNotFoundError as error:
        raise MlxtxError(f"{repo}{at} lacks a file: {_first_line(error)}") from error
    except errors.HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else "no"
        if status in (401, 403):
            raise MlxtxError(
                f"the Hub refuses {repo}{at} ({status}): see that your account has the right to it,"
                " then run `hf auth login` again, or set another HF_TOKEN"
            ) from error
        raise MlxtxError(f"the Hub answered {status} for {repo}{at}; try again later") from error
    except OSError as error:
        if disk_full(error):
            raise MlxtxError(
                f"the disk is full, so {repo}{at} is not complete: free some space (or set HF_HOME "
                "to a larger disk) and run the same command again"
            ) from error
        raise MlxtxError(f"downloading {repo}{at} failed: {_first_line(error)}") from error
    except Exception as error:
        if type(error).__module__.split(".")[0] in ("httpx", "httpx2", "httpcore", "requests"):
            raise MlxtxError(
                f"the download of {repo}{at} broke off ({type(error).__name__}); run the same "
                "command again; what is complete is not fetched again"
            ) from error
        raise


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
