"""Whether the Hub can be reached and has a repository: one request of ours, answered within seconds.

Transformers and huggingface_hub try again for up to a minute, and their message speaks of tokens in either case.
"""

import logging
import re
import time
from pathlib import Path
from typing import Any

from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url, is_offline_mode, try_to_load_from_cache
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from .folder import CONFIG_FILE, TOKENIZER_FILE

logger = logging.getLogger(__name__)

SECONDS_TO_ANSWER = 5.0
NUM_ATTEMPTS = 2
# So long an answer holds: a model, its configuration and its processor are asked for one after the other.
SECONDS_TO_REMEMBER = 60.0
MISSING = (401, 403, 404)  # also of mirrors, which leave out the code of the error
# Of a tokenizer alone there may be no configuration in the cache.
TOKENIZER_FILES = (TOKENIZER_FILE, "tokenizer.json", "vocab.txt")
# The client's own base of network errors: that of httpx or of its successor.
NETWORK_ERRORS = (HfHubHTTPError.__bases__[0], OSError)
COMMIT = re.compile("[0-9a-f]{40}")
_answers: dict[tuple[Any, ...], tuple[float, str]] = {}


def find_on_hub(
    repo_id: str,
    file: str = CONFIG_FILE,
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | None = None,
    subfolder: str | None = None,
    local_files_only: bool = False,
) -> str:
    """Make sure that a repository can be had, and say what to load it by; asks nothing with `HF_HUB_OFFLINE`.

    Args:
        repo_id: Of a model.
        file: Of it, which is asked for; it may be missing.
        revision: Branch, tag or commit.
        token: Of the Hub; default: that of the login.
        cache_dir: Of huggingface_hub.
        subfolder: In the repository.
        local_files_only: Whether nothing is asked, and what is on this machine counts.

    Returns:
        The id; or, if the Hub cannot be reached, the folder in the cache of huggingface_hub.

    Raises:
        FileNotFoundError: If the Hub has no such repository or revision, or hides it from the token; or if nothing may
            be asked and it is not in the cache.
        ConnectionError: If the Hub cannot be reached and the repository is not in the cache.
    """
    key = (constants.ENDPOINT, repo_id, file, revision, token, cache_dir, subfolder)
    if key in _answers and time.monotonic() - _answers[key][0] < SECONDS_TO_REMEMBER:
        return _answers[key][1]
    beginning = f"{repo_id} is not a folder here, and cannot be read from the Hub"
    is_offline = local_files_only or is_offline_mode()
    try:
        cached = _find_cached(repo_id, file, subfolder, {"cache_dir": cache_dir, "revision": revision})
        if is_offline and cached is None:
            raise FileNotFoundError(
                f"{beginning}: only the cache of this machine may be read (HF_HUB_OFFLINE), and it is not there. "
                "Unset HF_HUB_OFFLINE, or give a local folder."
            )
        # What a commit holds does not change.
        if is_offline or (cached is not None and COMMIT.fullmatch(revision or "")):
            return repo_id
        problem = _ask(hf_hub_url(repo_id, file, subfolder=subfolder, revision=revision), token)
    except HFValidationError as error:
        raise FileNotFoundError(f"{repo_id} is neither a folder here nor a name of the Hub: {error}") from error
    except (RevisionNotFoundError, RepositoryNotFoundError) as error:
        raise FileNotFoundError(f"{beginning}: {_explain(error, repo_id, revision)}") from error
    answer = repo_id
    if problem is not None:
        if cached is None:
            raise ConnectionError(
                f"{beginning}: {constants.ENDPOINT} cannot be reached ({problem}). Check the network and HF_ENDPOINT, "
                "or give a local folder."
            )
        logger.warning("%s cannot be reached (%s): %s comes from the cache.", constants.ENDPOINT, problem, repo_id)
        answer = str(cached)
    _answers[key] = (time.monotonic(), answer)
    return answer


def _explain(error: HfHubHTTPError, repo_id: str, revision: str | None) -> str:
    """What the Hub's refusal means, and what to do."""
    if isinstance(error, RevisionNotFoundError):
        return f"the repository has no revision {revision!r}."
    if isinstance(error, GatedRepoError):
        return f"its owner must admit you. Ask on {constants.ENDPOINT}/{repo_id}, then run `hf auth login`."
    return f"{constants.ENDPOINT} has no such repository, or it is private. Check the name, or run `hf auth login`."


def _find_cached(repo_id: str, file: str, subfolder: str | None, options: dict[str, Any]) -> Path | None:
    """Folder of a repository in the cache of huggingface_hub, if a file of it is there."""
    for name in (file, *TOKENIZER_FILES) if file == CONFIG_FILE else (file,):
        place = Path(subfolder or "", name)
        found = try_to_load_from_cache(repo_id, place.as_posix(), **options)
        if isinstance(found, str):
            return Path(found).parents[len(place.parts) - 1]
    return None


def _ask(url: str, token: str | bool | None) -> str | None:
    """Ask for a file's head; what is wrong with the network, if something is.

    Raises:
        RepositoryNotFoundError: And other answers that no second try changes.
    """
    problem = None
    for _ in range(NUM_ATTEMPTS):
        try:
            get_hf_file_metadata(url, token=token, timeout=SECONDS_TO_ANSWER)
            return None
        except (RepositoryNotFoundError, RevisionNotFoundError):
            raise
        except EntryNotFoundError:
            return None  # the repository is there
        except HfHubHTTPError as error:
            status = error.response.status_code
            if status in MISSING:
                raise RepositoryNotFoundError(str(error), response=error.response) from error
            problem = f"it answers with status {status}"
        except NETWORK_ERRORS as error:
            problem = _describe(error)
    return problem


def _describe(error: Exception) -> str:
    """The kind of a network error, and its words where it has some."""
    words = " ".join(str(error).split()).rstrip(".")
    name = type(error).__name__
    return "no answer in time" if "Timeout" in name else f"{name}: {words}" if words else name
