"""What belongs to what: captions, paragraphs, questions and options of videos and images, from any annotation.

`load_videos` reads the files; this file says what their columns mean. Texts stay as they are annotated: cleaning them
is the processor's job.
"""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import pyarrow as pa
from datasets import Dataset, Features, Value

from ..runs.mistakes import read_rank
from ..runs.noise import show_bar
from .arrow_cache import map_once
from .lists.text_files import read_json_file
from .sources import load_videos

HASH_BYTES = 16
CaptionMode = Literal["single", "each", "paragraph"]


@dataclass
class RetrievalSet:
    """Held-out videos and texts, and which of them belong together.

    Args:
        videos: Path, or `{"path", "bytes"}`, of each video (or image), each once.
        texts: Captions.
        videos_of_text: For each text, the indices of its videos.
        texts_of_video: For each video, the indices of its texts.
    """

    videos: list[str | dict[str, Any]]
    texts: list[str]
    videos_of_text: list[list[int]]
    texts_of_video: list[list[int]]


def load_pairs(source: str, captions: CaptionMode = "single", **options: Any) -> Dataset:
    """Read videos or images with captions, to train on.

    Args:
        source: Anything that `load_videos` reads, with a `caption` (a text, or a list of texts) in every row.
        captions: What a row with a list of captions is: "single" (a list is an error), "each" (one row a caption) or
            "paragraph" (its sentences, joined by a space, are one text).
        **options: As for `load_videos`; `video_column="image"` for images.

    Returns:
        Rows with `video` and one `caption`, `None` where a row has none: it is skipped and counted like a video that
        cannot be read.

    Raises:
        ValueError: If there are no captions, or one is a list where a single one is expected.
    """
    table = load_videos(source, needs_labels=False, **options)
    _require_captions(table, source)
    if getattr(table.features["caption"], "dtype", None) == "string" and not table.data.column("caption").null_count:
        return table  # a text in each row
    options = {"batched": True, "fn_kwargs": {"captions": captions, "source": source}, "desc": "reading captions"}
    options["features"] = Features({**table.features, "caption": Value("string")})
    with show_bar(len(table), read_rank()), map_once(table):
        return table.map(_expand_captions, **options)


def load_retrieval_set(
    source: str, captions: CaptionMode = "each", multiple_videos_per_text: bool = False, **options: Any
) -> RetrievalSet:
    """Read videos and texts to search each other with.

    Args:
        source: Anything that `load_videos` reads, with a `caption` in every row.
        captions: What a list of captions is: a text for each ("each") or the sentences of one text ("paragraph").
        multiple_videos_per_text: Whether equal captions are one text with several videos (SSv2). Rows may then list
            several videos themselves, as the published files do. Otherwise every caption is a separate text, and
            rows that repeat a video add texts to it.
        **options: As for `load_videos`.

    Returns:
        Every video once, in order of first appearance.

    Raises:
        ValueError: If there are no captions.

    Source: the published evaluation's ground truth.
    """
    rows = load_videos(source, needs_labels=False, **options)
    _require_captions(rows, source)
    video_index: dict[str, int] = {}
    text_index: dict[str, int] = {}
    found = RetrievalSet([], [], [], [])
    for number, row in enumerate(rows):
        key = identify_video(row["video"], number)
        if key not in video_index:
            video_index[key] = len(found.videos)
            found.videos.append(row["video"])
            found.texts_of_video.append([])
        video = video_index[key]
        for caption in _list_captions(row["caption"], captions, source):
            if caption is None:
                name = name_video(row["video"], number)
                raise ValueError(f"{source}: row {number} ({name}) has no caption. Fill it in or leave it out.")
            text = text_index.get(caption) if multiple_videos_per_text else None
            if text is None:
                text = text_index[caption] = len(found.texts)
                found.texts.append(caption)
                found.videos_of_text.append([])
            if video not in found.videos_of_text[text]:
                found.videos_of_text[text].append(video)
                found.texts_of_video[video].append(text)
    return found


def load_questions(source: str, **options: Any) -> Dataset:
    """Read questions about videos.

    Args:
        source: Anything that `load_videos` reads, with `question` and, where known, `answer` (a text, or a list of
            texts by several annotators) in every row.
        **options: As for `load_videos`.

    Returns:
        Rows with `video`, `question`, `answers` (list of texts), `answer_weights` (share of the annotators who gave
        each) and `question_id` (the row's own, or its position).

    Raises:
        ValueError: If there are no questions.
    """
    table = load_videos(source, needs_labels=False, **options)
    _require_columns(table, source, ["question"])

    def describe(row: dict[str, Any], number: int) -> dict[str, Any]:
        answers, weights = merge_answers(row.get("answer"))
        return {
            "question": row["question"],
            "answers": answers,
            "answer_weights": weights,
            "question_id": row.get("question_id", number),
        }

    others = [name for name in table.column_names if name not in ("video", "question", "question_id")]
    with show_bar(len(table), read_rank()):
        return table.map(describe, with_indices=True, remove_columns=others, desc="reading questions")


def load_choices(source: str, **options: Any) -> Dataset:
    """Read videos with several captions of which one is right.

    Args:
        source: Anything that `load_videos` reads, with `caption` (the options) and `answer` (index of the right one).
        **options: As for `load_videos`.

    Returns:
        Rows with `video`, `caption` (list) and `answer` (int).

    Raises:
        ValueError: If a row's answer is none of its options.
    """
    table = load_videos(source, needs_labels=False, **options)
    _require_columns(table, source, ["caption", "answer"])
    for number, (captions, answer) in enumerate(zip(table["caption"], table["answer"], strict=True)):
        is_index = str(answer).isdecimal() and isinstance(captions, list) and int(answer) < len(captions)
        if not is_index:
            raise ValueError(f"{source}, object {number}: answer {answer!r} is not an index of its captions.")
    if table.features["answer"].dtype == "string":  # as a program may have written them
        numbers = [int(answer) for answer in table["answer"]]
        return table.remove_columns("answer").add_column("answer", numbers)
    return table


@dataclass(frozen=True)
class MomentQuery:
    """A text and when it is right of a video.

    Attributes:
        video: Number of the video.
        text: What is looked for.
        spans: Start and end in seconds of each moment that it is right of.
    """

    video: int
    text: str
    spans: tuple[tuple[float, float], ...]


def load_moments(source: str, **options: Any) -> tuple[list[Any], list[MomentQuery]]:
    """Read videos with texts and the times that each is right of.

    Args:
        source: Anything that `load_videos` reads, with `caption`, `start_seconds` and `end_seconds` in every row. Rows
            with the same video and caption are several moments of one query.
        **options: As for `load_videos`.

    Returns:
        Each video once (path, or `{"path", "bytes"}`) and the queries, both in order of first appearance.

    Raises:
        ValueError: If columns are missing, or a moment does not end after it begins.
    """
    rows = load_videos(source, needs_labels=False, **options)
    _require_captions(rows, source)
    _require_columns(rows, source, ["start_seconds", "end_seconds"])
    places: dict[str, int] = {}
    videos: list[Any] = []
    spans: dict[tuple[int, str], list[tuple[float, float]]] = {}
    for number, row in enumerate(rows):
        place = places.setdefault(identify_video(row["video"], number), len(videos))
        if place == len(videos):
            videos.append(row["video"])
        start, end = row["start_seconds"], row["end_seconds"]
        if not (isinstance(start, int | float) and isinstance(end, int | float) and 0 <= start < end):
            raise ValueError(
                f"{source}, row {number}: start_seconds {start!r} and end_seconds {end!r} are not a span."
            )
        for text in _list_captions(row["caption"], "each", source):
            if text is None:
                raise ValueError(f"{source}: row {number} has no caption. Fill it in or leave it out.")
            spans.setdefault((place, text), []).append((float(start), float(end)))
    return videos, [MomentQuery(video, text, tuple(own)) for (video, text), own in spans.items()]


def merge_answers(answers: str | list[str] | None) -> tuple[list[str], list[float]]:
    """Distinct answers in order of first appearance, and the share of annotators who gave each."""
    answers = [] if answers is None else [answers] if isinstance(answers, str) else answers
    distinct = list(dict.fromkeys(answers))
    return distinct, [answers.count(answer) / len(answers) for answer in distinct]


def compute_pair_id(corpus: int, key: str) -> int:
    """Id of what a caption belongs to: equal for captions of one video, different across corpora.

    Args:
        corpus: Number of the corpus.
        key: The video's path, or the caption where equal captions are true pairs.

    Returns:
        63 bits, so that two of a billion videos share an id with a chance of 5 %.
    """
    # Not `hash`: its seed differs between processes, which must agree on the ids.
    digest = hashlib.blake2b(f"{corpus}:{key}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1  # a signed 64-bit tensor must hold it


def identify_video(video: str | bytes | dict[str, Any] | None, number: int) -> str:
    """What identifies a video: a hash of its bytes, else its path; its place in the table where it has neither.

    The path of a row with bytes is often a mere file name, which videos of several folders share.
    """
    content = video.get("bytes") if isinstance(video, dict) else video
    if content and not isinstance(content, str):
        return f"bytes {hashlib.blake2b(content, digest_size=HASH_BYTES).hexdigest()}"
    path = video.get("path") if isinstance(video, dict) else video
    return str(path or f"row {number}")


def name_video(video: str | bytes | dict[str, Any] | None, number: int) -> str:
    """What a report calls a video: its path, or else what identifies it."""
    path = video.get("path") if isinstance(video, dict) else None
    return path or identify_video(video, number)


def _expand_captions(batch: dict[str, list], captions: CaptionMode, source: str) -> dict[str, list]:
    columns: dict[str, list] = {name: [] for name in batch}
    for i, caption in enumerate(batch["caption"]):
        for text in _list_captions(caption, captions, source):
            for name, values in batch.items():
                columns[name].append(text if name == "caption" else values[i])
    return columns


def _list_captions(caption: str | list[str] | None, captions: CaptionMode, source: str) -> Sequence[str | None]:
    """Texts of a row; `None` in place of those that are not complete."""
    if isinstance(caption, str):
        return [caption]
    if not caption or not all(isinstance(text, str) for text in caption):
        return [None]
    if captions == "paragraph":
        return [" ".join(caption)]
    if captions == "single" and len(caption) > 1:
        raise ValueError(
            f"{source}: a row has {len(caption)} captions. Say what they are: captions=each makes each a separate "
            "text, captions=paragraph joins them."
        )
    return list(caption)


def _require_columns(table: Dataset, source: str, names: Iterable[str]) -> None:
    known = table.column_names
    if missing := [name for name in names if name not in known]:
        raise ValueError(f"{source}: rows have no {' and no '.join(missing)}; they have {', '.join(known)}.")


def _require_captions(table: Dataset, source: str) -> None:
    """Refuse rows whose captions are not texts or lists of texts, or of which none has one."""
    _require_columns(table, source, ["caption"])
    kind = table.data.schema.field("caption").type
    is_list = pa.types.is_list(kind) or pa.types.is_large_list(kind)
    inner = kind.value_type if is_list else kind
    if table.data.column("caption").null_count == len(table):
        raise ValueError(f"{source}: no row has a caption. Fill them in.")
    if not (pa.types.is_string(inner) or pa.types.is_large_string(inner)):
        raise ValueError(f"{source}: expected a caption or a list of captions in a row, got values of type {kind}.")


def load_answers(path: str) -> list[str]:
    """Read a closed list of answers.

    Raises:
        ValueError: If the file holds no JSON list of texts.
    """
    answers = read_json_file(path)
    if not isinstance(answers, list) or not answers or not all(isinstance(answer, str) for answer in answers):
        raise ValueError(f"{path}: expected a JSON list of answers.")
    return answers
