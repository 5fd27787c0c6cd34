"""The processor's call: every form of a video, every switch, against pixels resized and cut by plain arithmetic.

Legend: B videos, T frames, C channels, H height, W width.
"""

import io
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from tests.properties.test_decoding import File, decode_all, write
from umt_hf import UMTVideoProcessor
from umt_hf.processing.sampling import sample_frame_indices

MEAN, STD = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])


def draw_pixels(frames: int, height: int, width: int, channels: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (frames, height, width, channels), dtype=np.uint8)


FORMS = {
    "array last": lambda rgb: rgb,
    "array first": lambda rgb: np.moveaxis(rgb, -1, 1),
    "tensor last": torch.from_numpy,
    "tensor first": lambda rgb: torch.from_numpy(rgb).permute(0, 3, 1, 2),
    "list of arrays": list,
    "list of tensors, first": lambda rgb: list(torch.from_numpy(rgb).permute(0, 3, 1, 2)),
    "list of pictures": lambda rgb: [Image.fromarray(frame) for frame in rgb],
    "tuple of pictures": lambda rgb: tuple(Image.fromarray(frame) for frame in rgb),
    "integers of 64 bits": lambda rgb: rgb.astype(np.int64),
    "integers of 16 bits": lambda rgb: torch.from_numpy(rgb.astype(np.int16)),
    "double": lambda rgb: rgb.astype(np.float64),
    "half": lambda rgb: torch.from_numpy(rgb).half(),
    "turned around twice": lambda rgb: rgb[:, ::-1, ::-1].copy()[:, ::-1, ::-1],
    "other order in memory": np.asfortranarray,
}
GREY_FORMS = {
    "grey list": lambda grey: list(grey[..., 0]),
    "grey array": lambda grey: grey,
    "grey pictures": lambda grey: [Image.fromarray(frame) for frame in grey[..., 0]],
    "grey first": lambda grey: torch.from_numpy(np.moveaxis(grey, -1, 1)),
}
ALPHA_FORMS = {
    "transparent pictures": lambda rgba: [Image.fromarray(frame) for frame in rgba],
    "transparent array": lambda rgba: rgba,
}


@dataclass
class Video:
    """A video in a form, and its pixels `(T, H, W, 3)` in RGB."""

    form: str
    given: Any
    pixels: np.ndarray


@st.composite
def videos(draw, forms: tuple[str, ...] = (*FORMS, *GREY_FORMS, *ALPHA_FORMS)) -> Video:
    form = draw(st.sampled_from(forms))
    frames, height, width = draw(st.integers(1, 6)), draw(st.integers(5, 20)), draw(st.integers(5, 20))
    seed = draw(st.integers(0, 100))
    if form in FORMS:
        rgb = draw_pixels(frames, height, width, 3, seed)
        return Video(form, FORMS[form](rgb), rgb)
    if form in GREY_FORMS:
        grey = draw_pixels(frames, height, width, 1, seed)
        return Video(form, GREY_FORMS[form](grey), grey.repeat(3, -1))
    rgba = draw_pixels(frames, height, width, 4, seed)
    opacity = rgba[..., 3:] / 255
    return Video(form, ALPHA_FORMS[form](rgba), np.round(rgba[..., :3] * opacity + 255 * (1 - opacity)))


def resize(pixels: np.ndarray, height: int, width: int) -> np.ndarray:
    """Bilinear between pixel centres, nothing averaged."""
    for axis, length in ((1, height), (2, width)):
        old = pixels.shape[axis]
        places = np.clip((np.arange(length) + 0.5) * old / length - 0.5, 0, old - 1)
        low = np.floor(places).astype(int)
        high = np.minimum(low + 1, old - 1)
        share = (places - low).reshape([-1 if i == axis else 1 for i in range(4)])
        pixels = pixels.take(low, axis) * (1 - share) + pixels.take(high, axis) * share
    return pixels


def cut(pixels: np.ndarray, top: int, left: int, side: tuple[int, int]) -> np.ndarray:
    """A part that may reach beyond the frame, where it is black."""
    canvas = np.zeros((pixels.shape[0], *side, 3))
    for y in range(side[0]):
        for x in range(side[1]):
            if 0 <= top + y < pixels.shape[1] and 0 <= left + x < pixels.shape[2]:
                canvas[:, y, x] = pixels[:, top + y, left + x]
    return canvas


class Refused(Exception):
    """What a call is expected to be refused for: a word of the message."""


def place(long: int, side: int, crop: int, num_crops: int) -> int:
    return (long - side) // 2 if num_crops == 1 else (long - side) * crop // (num_crops - 1)


def compute_views(pixels: np.ndarray, options: dict[str, Any], in_call: set[str]) -> list[np.ndarray]:
    """The views of a video, `(T, H, W, 3)` each, before scaling."""
    total, num_clips, num_crops = len(pixels), options["num_clips"], options["num_crops"]
    if not options["do_sample_frames"]:
        if num_clips > 1:
            raise Refused("num_clips")
        clips = [list(range(total))]
    elif "num_frames" in in_call and options["num_frames"] > total:
        raise Refused("num_frames")
    elif total == options["num_frames"] and num_clips == 1:
        clips = [list(range(total))]
    else:
        clips = [
            sample_frame_indices(
                total, options["num_frames"], options["sampling_strategy"], num_clips, clip, frame_stride=2
            )
            for clip in range(num_clips)
        ]
    views = []
    for indices in clips:
        frames = pixels[indices].astype(float)
        height, width = frames.shape[1:3]
        if options["do_resize"]:
            size = options["size"]
            if "shortest_edge" in size:
                short, long = min(height, width), max(height, width)
                sides = size["shortest_edge"], int(size["shortest_edge"] * long / short)
                height, width = sides if height <= width else sides[::-1]
            else:
                height, width = size["height"], size["width"]
            frames = resize(frames, height, width)
        side = options["crop_size"]["height"], options["crop_size"]["width"]
        if num_crops == 1 and not options["do_center_crop"]:
            views.append(frames)
        elif num_crops == 1:
            # Half a pixel goes down; where there is less than the crop, the bottom and right get the larger border.
            top = (height - side[0]) // 2 if height >= side[0] else -((side[0] - height) // 2)
            left = (width - side[1]) // 2 if width >= side[1] else -((side[1] - width) // 2)
            views.append(cut(frames, top, left, side))
        else:
            if height < side[0] or width < side[1]:
                raise Refused("does not fit")
            for crop in range(num_crops):
                top, left = (height - side[0]) // 2, (width - side[1]) // 2
                if height > width:
                    top = place(height, side[0], crop, num_crops)
                else:
                    left = place(width, side[1], crop, num_crops)
                views.append(frames[:, top : top + side[0], left : left + side[1]])
    return views


@st.composite
def settings_of_a_call(draw) -> tuple[dict[str, Any], set[str]]:
    """Every setting, and which of them the call gives (the others are the processor's)."""
    numbers = st.integers(4, 14)
    options = {
        "num_frames": draw(st.integers(1, 6)),
        "sampling_strategy": draw(st.sampled_from(["uniform", "segments", "middle", "dense"])),
        "frame_stride": 2,
        "num_clips": draw(st.sampled_from([1, 1, 2, 3])),
        "num_crops": draw(st.sampled_from([1, 1, 2, 3])),
        "do_sample_frames": draw(st.sampled_from([True, True, True, False])),
        "do_resize": draw(st.sampled_from([True, True, False])),
        "do_center_crop": draw(st.booleans()),
        "do_rescale": draw(st.booleans()),
        "do_normalize": draw(st.booleans()),
        "size": draw(
            st.builds(lambda n: {"shortest_edge": n}, numbers)
            | st.builds(lambda h, w: {"height": h, "width": w}, numbers, numbers)
        ),
        "crop_size": draw(st.builds(lambda h, w: {"height": h, "width": w}, numbers, numbers)),
    }
    return options, draw(st.sets(st.sampled_from(sorted(options))))


def scale(view: np.ndarray, options: dict[str, Any]) -> np.ndarray:
    view = view / 255 if options["do_rescale"] else view
    return (view - MEAN) / STD if options["do_normalize"] else view


@given(st.lists(videos(), min_size=1, max_size=2), settings_of_a_call(), st.sampled_from([None, "pt", "np"]))
def test_views_are_resized_cut_and_scaled(batch, call, return_tensors):
    options, in_call = call
    processor = UMTVideoProcessor(**{name: value for name, value in options.items() if name not in in_call})
    # `None` in a call means the processor's own setting.
    arguments = {name: value if name in in_call else None for name, value in options.items()}
    sources = batch[0].given if len(batch) == 1 else [video.given for video in batch]
    try:
        expected = [view for video in batch for view in compute_views(video.pixels, options, in_call)]
        if return_tensors is not None and len({view.shape for view in expected}) > 1:
            raise Refused("different shapes")
    except Refused as reason:
        with pytest.raises(ValueError) as caught:
            processor(sources, return_tensors=return_tensors, **arguments)
        assert any(word in str(caught.value) for word in (str(reason), "does not fit", "num_frames", "num_clips"))
        return
    found = processor(sources, return_tensors=return_tensors, **arguments)["pixel_values"]
    kind = {None: list, "pt": torch.Tensor, "np": np.ndarray}[return_tensors]
    assert isinstance(found, kind) and len(found) == len(expected)
    # Whole levels of uint8 pixels are rounded after resizing; the division amplifies what is left.
    level = (1.0 if options["do_resize"] else 0.51) * (1 / 255 if options["do_rescale"] else 1.0)
    tolerance = 1.01 * level / (STD.min() if options["do_normalize"] else 1.0) + 1e-3 * max(level, 0.01)
    for view, truth in zip(found, expected, strict=True):
        view = torch.as_tensor(view)
        is_scaled = options["do_rescale"] or options["do_normalize"]
        assert view.dtype == torch.float32 or (not is_scaled and view.dtype == torch.uint8)
        wanted = np.moveaxis(scale(truth, options), -1, 1)
        assert view.shape == wanted.shape
        assert np.abs(view.double().numpy() - wanted).max() <= tolerance


@given(videos(), st.sampled_from([1, 2]), st.integers(1, 3))
def test_batches_nestings_and_places_do_not_matter(video, num_clips, copies):
    """One video alone, in a list, in a list of lists, and beside others, gives the same views."""
    processor = UMTVideoProcessor(num_frames=3, size={"shortest_edge": 8}, crop_size={"height": 8, "width": 8})
    alone = processor(video.given, num_clips=num_clips, return_tensors="pt")["pixel_values"]
    for nested in ([video.given], [video.given] * copies, [[video.given]], (video.given, video.given)):
        found = processor(nested, num_clips=num_clips, return_tensors="pt")["pixel_values"]
        repeats = len(nested)
        torch.testing.assert_close(found, alone.repeat(repeats, 1, 1, 1, 1), rtol=0, atol=0)
    assert alone.shape == (num_clips, 3, 3, 8, 8)


@given(st.data(), videos(("array last", "tensor first", "list of pictures")), st.none() | st.floats(1, 60))
def test_metadata_and_fps(data, video, rate):
    """`fps` needs the rate of the video, which arrays get from `video_metadata`; the indices used come back."""
    fps = data.draw(st.none() | st.floats(0.5, 60))
    total = len(video.pixels)
    stated = data.draw(st.sampled_from([total, total, total + 1]))
    given_metadata = None if rate is None else {"fps": rate, "total_num_frames": stated}
    processor = UMTVideoProcessor(num_frames=3, size={"shortest_edge": 8}, crop_size={"height": 8, "width": 8})
    options = {"video_metadata": given_metadata, "return_metadata": True, "return_tensors": "pt"}
    if fps is not None:
        options["fps"] = fps
    if (fps is not None and rate is None) or (rate is not None and stated != total):
        with pytest.raises(ValueError, match="fps|metadata says"):
            processor(video.given, **options)
        return
    batch = processor(video.given, **options)
    if fps is None:
        indices = list(range(3)) if total == 3 else sample_frame_indices(total, 3)
    else:
        indices = sample_frame_indices(total, 1, "fps", fps=fps, video_fps=rate)
    (metadata,) = batch["video_metadata"]
    assert list(metadata.frames_indices) == indices and metadata.total_num_frames == total
    assert (metadata.height, metadata.width) == video.pixels.shape[1:3]
    assert batch["pixel_values"].shape == (1, len(indices), 3, 8, 8)
    picked = processor(video.pixels[indices], do_sample_frames=False, return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(batch["pixel_values"], picked, rtol=0, atol=0)


@given(videos(tuple(FORMS)))
def test_files_of_decoded_frames_are_arrays(video):
    """A `.npy` path or URL gives the same views as the array itself."""
    processor = UMTVideoProcessor(num_frames=2, size={"shortest_edge": 8}, crop_size={"height": 8, "width": 8})
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "clip.npy"
        np.save(path, video.pixels)
        for source in (path, str(path), path.as_uri()):
            found = processor(source, return_tensors="pt")["pixel_values"]
            torch.testing.assert_close(found, processor(video.pixels, return_tensors="pt")["pixel_values"])


arrays_of_any_shape = st.lists(st.sampled_from([0, 1, 2, 3, 4, 5, 7]), max_size=6)
DTYPES = ("uint8", "int32", "float32", "float64", "bool", "complex64", "uint16", "object", "U1", "int8")


@given(
    arrays_of_any_shape,
    st.sampled_from(DTYPES),
    st.sampled_from(["none", "nan", "inf", "large", "huge", "negative"]),
    st.booleans(),
)
def test_arrays_of_any_shape_and_type_are_read_or_refused(shape, dtype, odd, is_listed):
    """What comes out is finite and of the right shape; what is refused says so in words of ours."""
    array = np.ones(shape, dtype)
    value = {"nan": np.nan, "inf": np.inf, "large": 1000, "huge": 1e300, "negative": -5}.get(odd)
    if value is not None and array.size and array.dtype.kind in "iuf":
        with np.errstate(all="ignore"):
            array.flat[0] = np.array(value).astype(array.dtype)
    processor = UMTVideoProcessor(num_frames=2, size={"shortest_edge": 4}, crop_size={"height": 4, "width": 4})
    try:
        found = processor([array] if is_listed else array, return_tensors="pt")["pixel_values"]
    except ValueError as error:
        assert str(error).startswith(("videos[", "A video", "Got an empty", "Lists of paths")), error
        return
    assert found.shape[1:] == (2, 3, 4, 4) and found.isfinite().all() and 0 not in shape


@given(
    st.recursive(
        st.none() | st.integers() | st.text(max_size=3) | st.just({}) | st.just(b"") | st.just(object()),
        lambda inner: st.lists(inner, max_size=3),
        max_leaves=5,
    )
)
def test_anything_else_is_refused_by_name(source):
    with pytest.raises((ValueError, TypeError)) as caught:
        UMTVideoProcessor()(source, return_tensors="pt")
    assert len(str(caught.value)) > 20


def test_bytes_of_a_video_are_read_like_its_frames():
    file = File("libx264", "mp4", 9, 48, 64, 4, 2, False)
    processor = UMTVideoProcessor(num_frames=3, size={"shortest_edge": 8}, crop_size={"height": 8, "width": 8})
    expected = processor(np.stack(decode_all(write(file))), return_tensors="pt")["pixel_values"]
    for source in (write(file), io.BytesIO(write(file))):
        torch.testing.assert_close(processor(source, return_tensors="pt")["pixel_values"], expected)
