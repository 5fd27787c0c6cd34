"""Upload of a finished model folder to the Hub: one commit, with the code that `trust_remote_code=True` runs.

Everything goes up in one commit, so that nobody ever downloads half of an update. An upload that failed goes on where
it stopped: files that the Hub has are not sent again.
"""

import json
import logging
import time
from collections.abc import Callable, Iterator, Mapping
from fnmatch import fnmatch
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import yaml
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, get_token
from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled
from huggingface_hub.utils import validate_repo_id
from safetensors import safe_open
from transformers import AutoConfig, PreTrainedConfig
from transformers.dynamic_module_utils import custom_object_save
from transformers.models.auto import modeling_auto

from ..processing.processing_umt_video_text import UMTVideoTextProcessor
from ..processing.video_processing_umt_video import UMTVideoProcessor
from ..runs.folder import (
    ADAPTER_CONFIG_FILE,
    BOX_RESULTS_FILE,
    CARD_FILE,
    CONFIG_FILE,
    CONVERSION_FILE,
    LOSS_PICTURE,
    PREDICTIONS_FILE,
    PROCESSOR_FILE,
    RECIPE_FILE,
    REPORT_FILE,
    STATE_FOLDER,
    TOKENIZER_FILE,
    TRAINER_ARGUMENTS_FILE,
    VIDEO_PROCESSOR_FILE,
)
from ..runs.mistakes import UserError
from ..runs.privacy import hide_folders
from ..runs.scripts import TRACKED_PROJECT
from ..runs.summary import list_bases, publish_settings
from .card import write_model_card
from .endpoint import build_handler
from .eval_results import build_eval_results
from .model_info import require_stored_weights

logger = logging.getLogger(__name__)

# Not part of a model: the state of a run, its logs, what was half written, and whatever is a pickle.
EXCLUDED = (
    STATE_FOLDER,
    "checkpoint-*",
    "last-checkpoint",
    "*.unfinished",
    "*.deleted",
    "*.replaced",
    "optimizer*",
    "scheduler*",
    "scaler*",
    "rng_state*",
    "random_states*",
    "*.bin",
    "*.pt",
    "*.pth",
    "*.pkl",
    "events.out.tfevents*",
    TRACKED_PROJECT,  # the trackers' folders
    "runs",
    "wandb",
    "__pycache__",
    ".*",
)
SECRETS = (TRAINER_ARGUMENTS_FILE,)  # may hold the token
# Written by us, with paths of this machine in them.
FILES_WITH_PLACES = (
    CONFIG_FILE,
    ADAPTER_CONFIG_FILE,
    RECIPE_FILE,
    REPORT_FILE,
    PREDICTIONS_FILE,
    CONVERSION_FILE,
    PROCESSOR_FILE,
    VIDEO_PROCESSOR_FILE,
    TOKENIZER_FILE,
)
PREDICTION_FILES = (PREDICTIONS_FILE, BOX_RESULTS_FILE)
TEXT_SUFFIXES = (".json", ".jsonl", ".md", ".py", ".txt", ".yaml")
MAX_ATTEMPTS = 5
RETRY_SECONDS = 2.0


class PublishingError(UserError):
    """The Hub refused a folder or could not be reached; the message says what to do."""


def push_folder(
    folder: str | Path,
    repo_id: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    token: str | None = None,
    with_code: bool = True,
    with_handler: bool = False,
    with_predictions: bool = False,
    commit_message: str | None = None,
    checkpoints: Mapping[str, Path] | None = None,
    max_attempts: int = MAX_ATTEMPTS,
    announce: Callable[[list[str]], None] | None = None,
) -> str:
    """Publish a model folder with its processor, recipe, metrics and card; the folder itself stays as it is.

    A folder without `README.md` gets a model card on the Hub, as `umt-hf card` writes it. Settings, reports and
    configurations go up with every path cut down to its last part.

    Args:
        folder: A finished folder of any architecture of this package. Checkpoints, optimizer state and logs in it
            stay here.
        repo_id: `name` in your own account, or `account/name`. Made if it does not exist.
        private: Whether a new repository is private; default: the account's setting.
        revision: Branch, made if it does not exist; default: main.
        token: With write permission; default: the one you are logged in with.
        with_code: Add the model's and processor's source files and name them in `auto_map`, so that the repository
            loads with `trust_remote_code=True` where this package is not installed.
        with_handler: Add `handler.py` and `requirements.txt`, by which Inference Endpoints serve the model, unless the
            folder has its own.
        with_predictions: Add the predictions of evaluations, which name every held-out video.
        commit_message: First line of the commit.
        checkpoints: Folders that go up with all their files, state included: name in the repository -> folder.
        max_attempts: How often to try where the Hub fails or cannot be reached.
        announce: Gets the names of the files before the first is sent.

    Returns:
        URL of the commit.

    Raises:
        ValueError: If the folder holds no finished model, there is no handler for it, or the name is not one of a
            repository.
        PublishingError: If nobody is logged in, the Hub refuses, or all attempts failed.
    """
    folder = Path(folder)
    check_model_folder(folder)
    refuse_nonfinite_files(folder)
    check_destination(repo_id, token)
    # Bytes stand for files that are made for the Hub and not written to the folder.
    files: dict[str, Path | bytes] = dict(list_model_files(folder))
    if not with_predictions:
        files = {name: path for name, path in files.items() if not name.endswith(PREDICTION_FILES)}
    if CARD_FILE not in files:
        files |= build_card_files(folder, repo_id)
    files |= build_eval_results(folder)
    if with_handler:
        files = build_handler(folder) | files
    if with_code:
        files |= build_remote_code(folder)
    for name, checkpoint in (checkpoints or {}).items():
        files |= {
            f"{name}/{path.relative_to(checkpoint).as_posix()}": path
            for path in sorted(checkpoint.rglob("*"))
            if path.is_file() and path.name not in SECRETS
        }
    files = {name: hide_folders_of_file(name, content, folder) for name, content in files.items()}
    if announce is not None:
        announce(list(files))
    commit_message = commit_message or f"Upload {folder.resolve().name}"
    additions = [CommitOperationAdd(path, content) for path, content in files.items()]
    api = HfApi(token=token)
    replaced = tuple(checkpoints or ())

    def commit() -> str:
        return _commit(api, additions, repo_id, private, revision, commit_message, replaced)

    return _try_repeatedly(commit, repo_id, max_attempts)


def _try_repeatedly(commit: Callable[[], str], repo_id: str, max_attempts: int) -> str:
    """Commit, and again where a failure may pass.

    Raises:
        PublishingError: Says what went wrong, and what to do.
        ValueError: If `max_attempts` is below 1.
    """
    for attempt in range(1, max_attempts + 1):
        try:
            return commit()
        except PublishingError:
            raise
        except Exception as error:  # whatever the client raises, the user reads what to do about it
            if attempt == max_attempts or not _is_passing(error):
                raise PublishingError(_explain(error, repo_id)) from error
            logger.info("Attempt %d of %d to reach the Hub failed (%s).", attempt, max_attempts, _summarize(error))
            # Doubled each time, so that a Hub under load gets room.
            time.sleep(RETRY_SECONDS * 2 ** (attempt - 1))
    raise ValueError(f"max_attempts must be at least 1, got {max_attempts}.")


def check_model_folder(folder: Path) -> None:
    """Refuse what is not a complete model of this package.

    Raises:
        ValueError: Says what the folder is, or what is missing.
    """
    if not folder.exists():
        raise ValueError(f"{folder}: no such folder.")
    try:
        require_stored_weights(folder)
    except OSError as error:
        raise ValueError(str(error)) from error


def refuse_nonfinite_files(folder: Path) -> None:
    """Refuse weights that are NaN or infinite, with which no model answers.

    Raises:
        ValueError: Names the file and the first of them.
    """
    for file in sorted(folder.glob("model*.safetensors")):
        with safe_open(file, "pt") as content:
            for name in content.keys():  # noqa: SIM118
                tensor = content.get_tensor(name)
                if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
                    raise ValueError(f"{file} is not fit to be published: {name} is NaN or infinite.")


def check_destination(repo_id: str, token: str | None) -> None:
    """Refuse a bad name, and a missing token, without asking the Hub.

    Raises:
        ValueError: If the name is not one of a repository.
        PublishingError: If there is no token.
    """
    validate_repo_id(repo_id)
    if token is None and get_token() is None:
        raise PublishingError(
            "Nobody is logged in to the Hub. Run `hf auth login`, or set HF_TOKEN to a token with write permission."
        )


def list_model_files(folder: Path) -> Iterator[tuple[str, Path]]:
    """Path in the repository and path here of every file that is published."""
    for path in sorted(folder.rglob("*")):
        relative = path.relative_to(folder)
        if path.is_file() and not any(is_excluded(part) for part in relative.parts):
            yield relative.as_posix(), path


def hide_folders_of_file(name: str, content: Path | bytes, folder: Path) -> Path | bytes:
    """A file as it goes up: what names places on this machine loses its folders; everything else stays as it is.

    Args:
        name: Path in the repository.
        content: The file, or its bytes.
        folder: Model folder.
    """
    last = name.rsplit("/", 1)[-1]
    if last not in FILES_WITH_PLACES:
        return content
    text = (content if isinstance(content, bytes) else content.read_bytes()).decode("utf-8-sig")
    if last == RECIPE_FILE:
        return yaml.safe_dump(
            publish_settings(yaml.safe_load(text) or {}, folder), sort_keys=False, allow_unicode=True
        ).encode()
    found = json.loads(text)
    hidden = hide_folders(found, list_bases(folder))
    return content if hidden == found else (json.dumps(hidden, indent=2) + "\n").encode()


def is_excluded(name: str) -> bool:
    """Whether files and folders of that name stay here."""
    return any(fnmatch(name, pattern) for pattern in EXCLUDED)


def build_card_files(folder: Path, repo_id: str) -> dict[str, bytes]:
    """The model card of a folder that has none, and its picture; nothing is written to the folder.

    Args:
        folder: Model folder.
        repo_id: Where it goes.

    Returns:
        Path in the repository -> content.
    """
    with TemporaryDirectory() as directory:
        # The card is written beside links to the folder's files, since the folder stays as it is.
        mirror = Path(directory) / repo_id.rsplit("/", 1)[-1]
        mirror.mkdir()
        for path in folder.resolve().iterdir():
            if path.name != LOSS_PICTURE:
                (mirror / path.name).symlink_to(path, path.is_dir())
        write_model_card(mirror, repo_id=repo_id if "/" in repo_id else None)
        written = [mirror / name for name in (CARD_FILE, LOSS_PICTURE)]
        return {path.name: path.read_bytes() for path in written if path.is_file()}


def build_remote_code(folder: Path) -> dict[str, bytes]:
    """Source files of a folder's classes, flat, and its configurations with the `auto_map` that names them.

    Transformers copies the files, as it does after `register_for_auto_class`; but no class is registered here, so that
    no `save_pretrained`, in this thread or another, ships code.

    Args:
        folder: Model folder.

    Returns:
        Path in the repository -> content.
    """
    config = AutoConfig.from_pretrained(folder)
    with TemporaryDirectory() as directory:
        fields = _read_settings(folder / CONFIG_FILE)
        _add_code(type(config), "AutoConfig", directory, fields)
        for auto_class, model_class in find_auto_classes(config).items():
            _add_code(model_class, auto_class, directory, fields)
        changed = {CONFIG_FILE: fields}
        for name in (PROCESSOR_FILE, VIDEO_PROCESSOR_FILE):
            if (folder / name).is_file():
                settings = changed[name] = _read_settings(folder / name)
                if "processor_class" in settings and name == PROCESSOR_FILE:
                    _add_code(UMTVideoTextProcessor, "AutoProcessor", directory, settings)
                _add_code(
                    UMTVideoProcessor,
                    "AutoVideoProcessor",
                    directory,
                    settings.get("video_processor", settings),
                )
        code = {path.name: path.read_bytes() for path in sorted(Path(directory).glob("*.py"))}
    return {name: (json.dumps(value, indent=2) + "\n").encode() for name, value in changed.items()} | code


def find_auto_classes(config: PreTrainedConfig) -> dict[str, type]:
    """Auto class -> class of this package that it loads for a configuration.

    Those that take a part of the configuration, or refuse it, are left out: Transformers cannot register them for it
    where this package is not installed.
    """
    found = {}
    for name, auto_class in vars(modeling_auto).items():
        mapping = getattr(auto_class, "_model_mapping", None) if name.startswith("AutoModel") else None
        # The mapping's truth value would import all of Transformers.
        if mapping is not None and type(config) in mapping and mapping[type(config)].config_class is type(config):
            found[name] = mapping[type(config)]
    return found


def _read_settings(path: Path) -> dict[str, Any]:
    """A configuration without the `auto_map` of a repository that it came from."""
    settings = json.loads(path.read_text(encoding="utf-8-sig"))
    settings.pop("auto_map", None)
    return settings


def _add_code(source: Any, auto_class: str, directory: str, settings: dict[str, Any]) -> None:
    """Copy the files of `source` and name it in the settings' `auto_map`."""
    subject = source.__new__(source)  # Transformers wants an instance, and looks at its class alone
    subject.__dict__["_auto_class"] = auto_class
    custom_object_save(subject, directory, config=settings)


def _commit(
    api: HfApi,
    additions: list[CommitOperationAdd],
    repo_id: str,
    private: bool | None,
    revision: str | None,
    commit_message: str,
    replaced_folders: tuple[str, ...],
) -> str:
    """Upload what the Hub lacks, then commit. Called again after a failure, it goes on from there."""
    # The Hub answers with the account's name in front.
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    if private and not api.repo_info(repo_id).private:
        raise PublishingError(
            f"{repo_id} exists and is public. Make it private in its settings on the Hub, or choose another name."
        )
    if revision is not None:
        api.create_branch(repo_id, branch=revision, exist_ok=True)
    texts = [addition for addition in additions if addition.path_in_repo.endswith(TEXT_SUFFIXES)]
    others = [[addition] for addition in additions if not addition.path_in_repo.endswith(TEXT_SUFFIXES)]
    for group in (texts, *others):  # one by one: each that arrives is done with, whatever becomes of the next
        api.preupload_lfs_files(repo_id, group, revision=revision, free_memory=False)
    kept = {addition.path_in_repo for addition in additions}
    replaced = ("model*.safetensors*", *(f"{folder}/*" for folder in replaced_folders))
    # Shards of an earlier, larger upload would stay beside the new ones.
    deletions = [
        CommitOperationDelete(path)
        for path in api.list_repo_files(repo_id, revision=revision)
        if path not in kept and any(fnmatch(path, pattern) for pattern in replaced)
    ]
    operations = [*deletions, *additions]
    return api.create_commit(repo_id, operations, commit_message=commit_message, revision=revision).commit_url


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _find_status(error: BaseException) -> int | None:
    """HTTP status behind an error, if the Hub answered."""
    return next((e.response.status_code for e in _chain(error) if isinstance(e, HfHubHTTPError)), None)


def _is_passing(error: BaseException) -> bool:
    """Whether it may help to try again."""
    if any(isinstance(e, OfflineModeIsEnabled) for e in _chain(error)):
        return False
    if (status := _find_status(error)) is not None:
        return status >= 500 or status in (408, 429)
    # httpx's errors; the Xet client raises RuntimeError, and so does huggingface_hub around a failed upload.
    http_error = HfHubHTTPError.__bases__[0]
    return any(isinstance(e, http_error | RuntimeError | ConnectionError | TimeoutError) for e in _chain(error))


def _summarize(error: BaseException) -> str:
    """The root of an error in one line."""
    root = list(_chain(error))[-1]
    return f"{type(root).__name__}: {(str(root).strip() or 'no message').splitlines()[0]}"


def _explain(error: BaseException, repo_id: str) -> str:
    """What went wrong, and what to do."""
    if any(isinstance(e, OfflineModeIsEnabled) for e in _chain(error)):
        return f"{repo_id} was not pushed: HF_HUB_OFFLINE is set. Unset it."
    match _find_status(error):
        case 401:
            return f"{repo_id} was not pushed: the Hub does not know your token. Run `hf auth login`, or set HF_TOKEN."
        case 403:
            return (
                f"{repo_id} was not pushed: your token may not write there. Use a token with write permission, of an "
                "account to which the repository belongs (https://huggingface.co/settings/tokens)."
            )
        case 404:
            return f"{repo_id} was not pushed: the Hub has no such repository or branch, or hides it from your token."
    if _is_passing(error):
        return (
            f"{repo_id} was not pushed: the Hub failed or could not be reached ({_summarize(error)}). A later push "
            "sends only what is missing."
        )
    return f"{repo_id} was not pushed: {error}"
