"""Key frames with boxes and labels: AVA's files, and a plain JSON list for other videos.

Boxes keep the units of their file, x1, y1, x2, y2 with x2 and y2 just behind the last pixel; `width` and `height` say
what is 1: the frame size that pixels are stated for, 1 for shares of the frame, 0 for the video's own pixels.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
from datasets import Dataset, Features, List, Value

from .ava_labels import AVA_LABELS
from .labels import warn_of_case
from .lists.csv_lists import split_table
from .lists.folders import VIDEO_SUFFIXES
from .lists.paths import is_remote, join_root
from .lists.stores import fetch_list, refuse_own_files, split_address
from .lists.text_files import read_json_file, read_text

# What a first line may call the movie and the second; AVA's own files have none.
AVA_HEADERS = (
    {"movie", "video", "video_id", "movie_id", "video_name"},
    {"second", "seconds", "timestamp", "middle_frame_timestamp", "time", "frame_timestamp", "key_seconds"},
)

FEATURES = Features(
    {
        "video": Value("string"),
        "name": Value("string"),
        "moment": Value("string"),
        "key_seconds": Value("float64"),
        "key_frame": Value("int64"),
        "width": Value("int64"),
        "height": Value("int64"),
        "boxes": List(List(Value("float64"))),
        "labels": List(List(Value("int64"))),
        "scores": List(Value("float64")),
    }
)


@dataclass
class KeyFrame:
    """The boxes of a key frame.

    Args:
        video: Video file, or folder of files of one second.
        name: What the annotations call the video.
        moment: What they call the key frame; with `name` it identifies a key frame.
        key_seconds: When it is shown, or `None`.
        key_frame: Its number, or `None`.
        width: Frame width that boxes are stated for; 0 = the video's own.
        height: The same of the height.
        boxes: x1, y1, x2, y2 each.
        labels: Class indices of each box.
        scores: Score of each box as a detection; 1 for annotated ones.
    """

    video: str
    name: str
    moment: str
    key_seconds: float | None = None
    key_frame: int | None = None
    width: int = 0
    height: int = 0
    boxes: list[list[float]] = field(default_factory=list)
    labels: list[list[int]] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)

    @property
    def key(self) -> tuple[str, str]:
        """What identifies this key frame."""
        return self.name, self.moment

    def add(self, box: list[float], labels: Iterable[int] = (), score: float = 1.0) -> None:
        """Append a box; one with the same edges gets more labels instead."""
        if box in self.boxes and score == 1:
            known = self.labels[self.boxes.index(box)]
            known += [label for label in labels if label not in known]
        else:
            self.boxes.append(box)
            self.labels.append(list(dict.fromkeys(labels)))
            self.scores.append(score)


def load_key_frames(
    source: str | Path,
    data_root: str | None = None,
    class_names: Sequence[str] | None = None,
    label_keys: Sequence[str] = ("labels",),
) -> tuple[list[KeyFrame], list[str]]:
    """Read key frames from any of the supported forms.

    Args:
        source: AVA's CSV (`movie, second, x1, y1, x2, y2, action, person`, boxes as shares of the frame), the JSON of
            AVA that the published code reads (`images` and `annotations`), or a JSON list (see `read_list`). A JSON
            list may be at an address (`s3://bucket/boxes.json`).
        data_root: Folder of the videos; `None` = that of the file. Of AVA it holds `<movie>/<second>.mp4` or
            `<movie>.mp4` (or another suffix).
        class_names: Names of the classes by index; `None` = AVA's 80, or the labels of a JSON list, sorted.
        label_keys: Keys of an object in a JSON list that hold its labels.

    Returns:
        Key frames, also those without boxes, and the names of the classes.

    Raises:
        FileNotFoundError: If the file does not exist.
        ValueError: If it is malformed or holds no key frames; the message names file and place.

    Examples:
        >>> import json
        >>> from umt_hf.data.key_frames import load_key_frames
        >>> person = {"box": [20, 30, 120, 210], "labels": ["walk"]}
        >>> row = {"video": "video.mp4", "key_seconds": 0.5, "objects": [person]}
        >>> with open("boxes.json", "w") as file:
        ...     json.dump([row], file)
        >>> frames, names = load_key_frames("boxes.json")
        >>> frames[0].boxes, frames[0].labels, names
        ([[20.0, 30.0, 120.0, 210.0]], [[0]], ['walk'])
    """
    if is_remote(str(source)):
        return _load_remote(str(source), data_root, class_names, label_keys)
    path = Path(source)
    if not path.is_file():
        raise FileNotFoundError(f"{source}: no such file; expected a .csv or .json file of key frames.")
    root = Path(data_root) if data_root is not None else path.parent
    if path.suffix == ".csv":
        frames, names = read_ava_csv(path, root), list(class_names or AVA_LABELS)
    else:
        content = read_json_file(path)
        if isinstance(content, dict) and "images" in content:
            frames, names = read_ava_json(content, path, root), list(class_names or AVA_LABELS)
        else:
            frames, names = read_list(content, path, root, class_names, label_keys)
    if not frames:
        raise ValueError(f"{source} holds no key frames.")
    highest = max((label for frame in frames for labels in frame.labels for label in labels), default=-1)
    if highest >= len(names):
        raise ValueError(f"{source}: label {highest + 1} is too high for {len(names)} classes {names[:5]}.")
    return frames, names


def _load_remote(
    source: str, data_root: str | None, class_names: Sequence[str] | None, label_keys: Sequence[str]
) -> tuple[list[KeyFrame], list[str]]:
    """Key frames of a JSON list at an address, of which a copy is read."""
    copy = fetch_list(source)
    content = read_json_file(copy)
    if not isinstance(content, list):
        raise ValueError(f"{source}: AVA's files are read from this machine alone. Copy it, and name its path.")
    try:
        frames, names = read_list(content, copy, data_root or split_address(source)[0], class_names, label_keys)
    except ValueError as error:
        raise ValueError(str(error).replace(str(copy), source)) from error
    refuse_own_files(source, pa.chunked_array([[frame.video for frame in frames]], pa.string()), data_root or None)
    if not frames:
        raise ValueError(f"{source} holds no key frames.")
    return frames, names


def build_key_frame_table(frames: Sequence[KeyFrame]) -> Dataset:
    """Rows of a table, a key frame each."""
    return Dataset.from_list([asdict(frame) for frame in frames], features=FEATURES)


def read_ava_csv(path: Path, root: Path) -> list[KeyFrame]:
    """Read AVA's own annotations: a line for each label of a box; a line without box is a second without people.

    Raises:
        ValueError: If a line is malformed, naming file and line.
    """
    frames: dict[tuple[str, str], KeyFrame] = {}
    find_video = _VideoFinder(root)
    for number, columns in split_table(path, AVA_HEADERS):
        try:
            movie, second = columns[0], float(columns[1])
            box = [float(value) for value in columns[2:6]] if any(columns[2:]) else None
            labels = [int(columns[6]) - 1] if box else []  # AVA counts actions from 1
            if len(columns) > 8 or box is not None and (len(box) != 4 or labels[0] < 0):
                raise ValueError(columns)
        except (ValueError, IndexError) as error:
            raise ValueError(
                f"{path}, line {number}: expected `movie,second,x1,y1,x2,y2,action` with an action from 1 on, and "
                f"perhaps a person, got {','.join(columns)!r}."
            ) from error
        # AVA's boxes are shares of the frame: a frame of 1 x 1 keeps them as they are.
        frame = KeyFrame(find_video(movie), movie, _name_second(second), key_seconds=second, width=1, height=1)
        frame = frames.setdefault(frame.key, frame)
        if box is not None:
            frame.add(box, labels)
    return list(frames.values())


def read_ava_json(content: dict[str, Any], path: Path, root: Path) -> list[KeyFrame]:
    """Read AVA as the published code does; each movie has the size that its first image states.

    Raises:
        ValueError: If an entry lacks something.
    """
    frames: dict[Any, KeyFrame] = {}
    sizes: dict[str, tuple[int, int]] = {}
    find_video = _VideoFinder(root)
    try:
        for image in content["images"]:
            movie, second = str(image["movie"]), float(image["timestamp"])
            width, height = sizes.setdefault(movie, (image["width"], image["height"]))
            frames[image["id"]] = KeyFrame(
                find_video(movie), movie, _name_second(second), key_seconds=second, width=width, height=height
            )
        for annotation in content.get("annotations", []):
            frame = frames[annotation["image_id"]]
            box = _clip_box(annotation["bbox"], frame)
            if box is not None:
                frame.add(box, [action - 1 for action in annotation["action_ids"]])
    except (KeyError, TypeError) as error:
        raise ValueError(
            f"{path}: expected `images` with id, movie, timestamp, width and height, and `annotations` with image_id, "
            f"bbox and action_ids; {type(error).__name__}: {error}"
        ) from error
    return list(frames.values())


def read_list(
    content: Any,
    path: Path,
    root: str | Path,
    class_names: Sequence[str] | None = None,
    label_keys: Sequence[str] = ("labels",),
) -> tuple[list[KeyFrame], list[str]]:
    """Read a JSON list with an object for each key frame.

        {"video": "run.mp4", "key_seconds": 2.5, "objects": [
            {"box": [12, 30, 80, 200], "labels": ["run", "wave"]}]}

    `key_frame` may stand for `key_seconds`. Boxes are in pixels of the video, or of `width` and `height` where these
    are given. An object may have a `score`, and `boxes` with one for each frame of the video instead of `box`; without
    a key frame it is then the middle one. A label is a string, or a list of them, under any of `label_keys`.

    Args:
        content: The list.
        path: Its file, for errors.
        root: Folder that relative paths start from.
        class_names: Names of the classes; `None` = all labels, sorted.
        label_keys: Keys of an object that hold labels.

    Returns:
        Key frames and names of the classes.

    Raises:
        ValueError: If an object is malformed or has an unknown label, naming file and place.
    """
    if not isinstance(content, list):
        raise ValueError(f"{path}: expected a JSON list of objects, got {type(content).__name__}.")
    rows = []
    for number, entry in enumerate(content):
        try:
            rows.append(_read_entry(entry, root, label_keys))
        except (KeyError, TypeError, ValueError, IndexError) as error:
            raise ValueError(
                f"{path}, object {number}: expected video, key_seconds or key_frame, and objects with a box of four "
                f"numbers; {type(error).__name__}: {error}"
            ) from error
    # Sorted, so that the classes do not depend on the order of the rows.
    found = sorted({label for _, named in rows for labels in named for label in labels})
    if not class_names:
        warn_of_case(str(path), found)
    names = list(class_names or found)
    places = {name: i for i, name in enumerate(names)}
    for number, (frame, named) in enumerate(rows):
        if unknown := sorted({label for labels in named for label in labels} - set(places)):
            raise ValueError(
                f"{path}, object {number}: the labels {unknown} are not classes; the classes are {names}."
            )
        frame.labels = [[places[label] for label in labels] for labels in named]
    if len({frame.key for frame, _ in rows}) < len(rows):
        raise ValueError(f"{path}: a key frame occurs twice; put all of its boxes in one object.")
    return [frame for frame, _ in rows], names


def _read_entry(
    entry: dict[str, Any], root: str | Path, label_keys: Sequence[str]
) -> tuple[KeyFrame, list[list[str]]]:
    objects = entry["objects"]
    key_seconds, key_frame = entry.get("key_seconds"), entry.get("key_frame")
    # Boxes that move come with every frame of the clip, so any frame could be the key frame: take the middle one.
    if key_seconds is None and key_frame is None:
        key_frame = len(objects[0]["boxes"]) // 2
    moment = f"frame {key_frame}" if key_seconds is None else f"{key_seconds:g}"
    video = entry["video"]
    frame = KeyFrame(
        join_root(root, video), video, moment, key_seconds, key_frame, entry.get("width", 0), entry.get("height", 0)
    )
    named = []
    for item in objects:
        box = item["box"] if "box" in item else item["boxes"][key_frame]
        x1, y1, x2, y2 = (float(value) for value in box)
        if not (x2 > x1 and y2 > y1):
            raise ValueError(f"box {box} is empty; boxes are x1, y1, x2, y2")
        frame.boxes.append([x1, y1, x2, y2])
        frame.scores.append(float(item.get("score", 1.0)))
        labels = [item[key] for key in label_keys if key in item]
        named.append([name for label in labels for name in ([label] if isinstance(label, str) else label)])
    return frame, named


def load_detections(
    source: str | Path, frames: Sequence[KeyFrame], images: str | Path, min_score: float = 0.8
) -> list[KeyFrame]:
    """Put a detector's boxes in the place of the annotated ones; key frames without a detection are left out.

    Args:
        source: JSON list of `{image_id, bbox (x, y, width, height), score}` as published, whose images are those of
            the JSON `images`; or a list as `read_list` takes it, with a `score` for each object.
        frames: Key frames of the data set.
        images: The file that `frames` come from.
        min_score: Detections below it are left out.

    Raises:
        ValueError: If the file is malformed, names key frames that there are not, or nothing is left.
    """
    path = Path(source)
    content = read_json_file(path)
    if isinstance(content, list) and content and "image_id" in content[0]:
        if Path(images).suffix != ".json":
            raise ValueError(f"{source}: these boxes have image ids, so the key frames must be in AVA's JSON form.")
        ids = [image["id"] for image in read_json_file(images)["images"]]
        # Copies: the annotated boxes of `frames` are still needed as the truth.
        found = {i: _without_boxes(frame) for i, frame in zip(ids, frames, strict=True)}
        for detection in content:
            if detection["image_id"] not in found:
                raise ValueError(f"{source}: image {detection['image_id']!r} is not in {images}.")
            frame = found[detection["image_id"]]
            box = _clip_box(detection["bbox"], frame)
            if box is not None and detection["score"] >= min_score:
                frame.boxes.append(box)
                frame.scores.append(float(detection["score"]))
    else:
        found = {frame.key: _without_boxes(frame) for frame in frames}
        # A detector's list names videos and boxes, not what happens in them.
        detected, _ = read_list(content, path, Path(), label_keys=())
        for detection in detected:
            if detection.key not in found:
                raise ValueError(f"{source}: {detection.name} at {detection.moment} is not in {images}.")
            frame = found[detection.key]
            # The detector may have seen frames of another size than the annotators.
            frame.width, frame.height = detection.width, detection.height
            kept = [i for i, score in enumerate(detection.scores) if score >= min_score]
            frame.boxes += [detection.boxes[i] for i in kept]
            frame.scores += [detection.scores[i] for i in kept]
    rows = [frame for frame in found.values() if frame.boxes]
    if not rows:
        raise ValueError(f"{source}: no box of {images} has a score of {min_score} or more.")
    for frame in rows:
        frame.labels = [[] for _ in frame.boxes]
    return rows


def read_exclusions(path: str | Path) -> set[tuple[str, str]]:
    """Read AVA's list of key frames that are not evaluated: `movie,second` a line.

    Raises:
        ValueError: If a line is malformed, naming file and line.
    """
    excluded = set()
    for number, columns in split_table(Path(path), AVA_HEADERS):
        try:
            movie, second = columns
            excluded.add((movie, _name_second(float(second))))
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: expected `movie,second`, got {','.join(columns)!r}.") from error
    return excluded


def read_label_map(path: str | Path) -> list[int]:
    """Read the class indices, from 0, of a label map in protocol-buffer text (`id` or `label_id`, from 1).

    Raises:
        ValueError: If it holds none.
    """
    ids = [int(number) - 1 for number in re.findall(r"\b(?:label_)?id\s*:\s*(\d+)", read_text(path))]
    if not ids:
        raise ValueError(f"{path}: no `id` or `label_id` found; expected a label map such as AVA's .pbtxt.")
    return ids


def _without_boxes(frame: KeyFrame) -> KeyFrame:
    return replace(frame, boxes=[], labels=[], scores=[])


def _clip_box(bbox: Sequence[float], frame: KeyFrame) -> list[float] | None:
    """Edges of a box `x, y, width, height` within the frame; `None` where nothing is left."""
    x, y, width, height = (float(value) for value in bbox)
    box = [max(x, 0.0), max(y, 0.0), min(x + width, frame.width), min(y + height, frame.height)]
    return box if box[2] > box[0] and box[3] > box[1] else None


def _name_second(second: float) -> str:
    return f"{int(second):04d}" if second == int(second) else f"{second:g}"


class _VideoFinder:
    """Where the movies of AVA lie: a folder of one-second files, or a file of any suffix; looked up once a movie."""

    def __init__(self, root: Path):
        self.root = root
        self.found: dict[str, str] = {}

    def __call__(self, movie: str) -> str:
        if movie not in self.found:
            folder = self.root / movie
            files = (folder.with_name(movie + suffix) for suffix in sorted(VIDEO_SUFFIXES))
            path = folder if folder.is_dir() else next((file for file in files if file.is_file()), folder)
            self.found[movie] = str(path)
        return self.found[movie]


def parse_box(text: str) -> list[float]:
    """Read a box as it is written on a command line, "x1,y1,x2,y2".

    Raises:
        ValueError: If it is not four numbers.
    """
    try:
        x1, y1, x2, y2 = map(float, text.split(","))
    except ValueError as error:
        raise ValueError(f'A box is "x1,y1,x2,y2", four numbers with commas between them, got {text!r}.') from error
    return [x1, y1, x2, y2]


def read_boxes(path: Path) -> list[list[float]]:
    """Read a JSON list of boxes, `[[x1, y1, x2, y2], ...]`.

    Raises:
        ValueError: If it is something else; it names the file.
    """
    try:
        boxes = read_json_file(path)
        return [[float(edge) for edge in box] for box in boxes]
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: expected a JSON list of boxes, [[x1, y1, x2, y2], ...].") from error
