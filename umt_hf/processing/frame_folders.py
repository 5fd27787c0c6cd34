# Copyright 2026 The umt_hf authors.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""Videos that are folders of numbered pictures, a frame each."""

import os
import re
from typing import Any

FRAME_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp"})
NUMBER = re.compile(r"\d+")
MIN_FRAMES = 2


def list_frames(folder: str | os.PathLike) -> list[str]:
    """Paths of the pictures in a folder, hidden ones left out, in natural order: `frame_9.jpg`, `frame_10.jpg`."""
    with os.scandir(folder) as entries:
        names = [entry.name for entry in entries if _is_picture(entry.name)]
    return [os.path.join(folder, name) for name in sorted(names, key=_sort_key)]


def holds_frames(folder: str | os.PathLike) -> bool:
    """Whether the pictures in a folder are the frames of a video: several, whose names differ in one number alone."""
    try:
        with os.scandir(folder) as entries:
            names = [entry.name for entry in entries if _is_picture(entry.name)]
    except OSError:
        return False
    if len(names) < MIN_FRAMES:
        return False
    # The last number counts: `cam2_0001.jpg`.
    kinds = {tuple(re.split(r"\d+(?=\D*$)", os.path.splitext(name)[0])) for name in names}
    suffixes = {os.path.splitext(name)[1].lower() for name in names}
    return len(kinds) == len(suffixes) == 1 and len(next(iter(kinds))) == 2


def _is_picture(name: str) -> bool:
    return not name.startswith(".") and os.path.splitext(name)[1].lower() in FRAME_SUFFIXES


def _sort_key(name: str) -> tuple[Any, ...]:
    """Numbers compare as numbers; equal ones (`1.jpg`, `01.jpg`) by the text."""
    texts = NUMBER.split(name)
    numbers = [int(number) for number in NUMBER.findall(name)]
    return tuple(part for pair in zip(texts, [*numbers, 0], strict=True) for part in pair), name
