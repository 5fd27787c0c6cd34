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
"""Video processor of UMT: videos in any form to normalised clips, one view or many.

Legend: B videos, T frames of a clip, C channels, H height, W width.
"""

import os
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from transformers.feature_extraction_utils import BatchFeature
from transformers.image_utils import (
    IMAGENET_DEFAULT_MEAN,
    IMAGENET_DEFAULT_STD,
    ChannelDimension,
    PILImageResampling,
    SizeDict,
    infer_channel_dimension_format,
    is_pil_image,
)
from transformers.processing_utils import Unpack, VideosKwargs
from transformers.utils import TensorType, logging
from transformers.video_processing_utils import BaseVideoProcessor
from transformers.video_utils import VideoInput, VideoMetadata

from .decoding import DecoderName, VideoSource, open_video
from .images import convert_image
from .media_files import LIMITS, VideoDecodingError
from .resizing import is_extreme, resize_part
from .sampling import SamplingStrategy, place_crops, sample_frame_indices, trim_num_frames

logger = logging.get_logger(__name__)


class UMTVideoProcessorKwargs(VideosKwargs, total=False):
    """Arguments of `UMTVideoProcessor` beyond those of every video processor.

    Attributes:
        sampling_strategy (`str`):
            How frames are chosen: "uniform", "segments", "middle", "dense" or "fps"; see `sample_frame_indices`.
        frame_stride (`int`):
            Distance between the frames of a "dense" clip.
        frame_span (`int`):
            Frames around a key frame that a "segments" clip of action detection is spread over.
        num_clips (`int`):
            Clips taken from each video.
        first_seconds (`float`):
            Sample from the first seconds of longer videos alone; default: from the complete video.
        num_crops (`int`):
            Crops taken from each clip, along the longer side of the frame.
        decoder (`str`):
            Library that reads files: "pyav" (frame-exact), "decord" or "torchcodec".
    """

    sampling_strategy: str | None
    frame_stride: int | None
    frame_span: int | None
    num_clips: int | None
    first_seconds: float | None
    num_crops: int | None
    decoder: str | None


class UMTVideoProcessor(BaseVideoProcessor):
    r"""Turn videos into the `pixel_values` of the UMT models.

    A video is a path (of a file, or of a folder of numbered pictures), an http(s) or file URL, the bytes of a file, a
    binary file object, what a `Video` column of `datasets` gives (a torchcodec `VideoDecoder`, or `{"path", "bytes"}`
    with one of them), an array or tensor `(T, H, W, C)` or `(T, C, H, W)`, or a list of frames (PIL images, or arrays
    `(H, W)`, `(H, W, C)` or `(C, H, W)`).
    Videos come singly or in a list, and may differ in kind and size. Grey frames become RGB; what is transparent
    becomes white.

    Each video gives `num_clips * num_crops` views, which are adjacent in the batch, clips outermost:
    `pixel_values` is `(B * num_clips * num_crops, T, C, H, W)`. The defaults give the published single view;
    `num_clips=4, num_crops=3` gives the published test views.

    - Frames are chosen by `sampling_strategy`, from arrays and lists of frames too; `do_sample_frames=False` keeps
      all. A video of exactly `num_frames` frames is kept as it is (single clip). A shorter one repeats frames as its
      strategy says, unless it is in memory and the call itself asks for more frames than it has: that is an error, as
      in every video processor.
    - `fps` chooses frames by time instead; arrays then need `video_metadata`. Given in the call, either of
      `num_frames` and `fps` overrules what the processor was configured with.
    - `first_seconds` samples from the first seconds of longer videos alone, as in the published DiDeMo tests (30).
    - The shorter side is resized to `size`, bilinear *without* antialiasing, as the published evaluation does with
      OpenCV; then crops of `crop_size` are taken, in the middle or along the longer side.
    - Floating-point frames must be finite, and in [0, 255] or sent with `do_rescale=False`.
    - An argument of `None` in the call means the processor's own setting.

    Raises:
        VideoDecodingError: If a file cannot be read; the message names it.
        ValueError: If a video in memory is malformed; the message gives its place in the batch.

    Examples:
        >>> from umt_hf import UMTVideoProcessor
        >>> processor = UMTVideoProcessor.from_pretrained("umt-vit-b16-k400")
        >>> processor("video.mp4", return_tensors="pt")["pixel_values"].shape
        torch.Size([1, 8, 3, 224, 224])
        >>> views = processor("video.mp4", num_clips=4, num_crops=3)
        >>> len(views["pixel_values"])  # the published test views
        12
    """

    resample = PILImageResampling.BILINEAR
    image_mean = IMAGENET_DEFAULT_MEAN
    image_std = IMAGENET_DEFAULT_STD
    size = {"shortest_edge": 224}
    default_to_square = False
    crop_size = {"height": 224, "width": 224}
    do_resize = True
    do_center_crop = True
    do_rescale = True
    rescale_factor = 1 / 255
    do_normalize = True
    do_convert_rgb = True
    do_sample_frames = True
    num_frames = 8
    sampling_strategy: SamplingStrategy = "uniform"
    frame_stride = 4
    frame_span = None
    num_clips = 1
    first_seconds = None
    num_crops = 1
    decoder: DecoderName = "pyav"
    fps: float | None  # set by the base class, as every argument of `valid_kwargs` is
    valid_kwargs = UMTVideoProcessorKwargs
    model_input_names = ["pixel_values"]

    @classmethod
    def from_model_config(cls, config: Any, task: str | None = None, **kwargs: Any) -> "UMTVideoProcessor":
        """Processor that gives a model the frames and size it expects, prepared as its published evaluation does.

        Video encoders get a square cut from the middle; video-text models the complete frame, squeezed to a square
        by bicubic interpolation, and the middle frame of each of `num_frames` equal parts. For detection the complete
        frame keeps its shape, somewhat larger than in training (256 pixels for a model of 224); clips are chosen
        around a key frame (see `compute_key_frame_offsets`).

        Args:
            config: A `UMTVideoConfig` or `UMTVideoTextConfig` (or another with `num_frames` and `image_size`).
            task: "detection" for action detection; other tasks follow from the configuration.
            **kwargs: Other settings of the processor; `None` leaves one as it is.
        """
        kwargs = {name: value for name, value in kwargs.items() if value is not None}
        if hasattr(config, "vision_config"):
            config = config.vision_config
            kwargs = {
                "size": {"height": config.image_size, "width": config.image_size},
                "do_center_crop": False,
                "resample": PILImageResampling.BICUBIC,
                "sampling_strategy": "middle",
                **kwargs,
            }
        side = config.image_size
        if task == "detection":
            kwargs = {
                "size": {"shortest_edge": side * 8 // 7},
                "do_center_crop": False,
                # The published detector is normalised by these numbers, unlike the other models.
                "image_mean": [value / 255 for value in (122.7717, 115.9465, 102.9801)],
                "image_std": [57.375 / 255] * 3,
                "sampling_strategy": "dense",
                "frame_stride": 8,
                "frame_span": 300,
                **kwargs,
            }
        settings = {
            "num_frames": config.num_frames,
            "size": {"shortest_edge": side},
            "crop_size": {"height": side, "width": side},
        }
        return cls(**{**settings, **kwargs})

    # pyrefly: ignore[bad-override]  more keyword arguments than the base class has, as in every processor
    def preprocess(self, videos: VideoInput, **kwargs: Unpack[UMTVideoProcessorKwargs]) -> BatchFeature:
        """Read, sample, resize, crop and normalise one video or a batch; see the class."""
        kwargs = {name: value for name, value in kwargs.items() if value is not None}
        sources = split_videos(videos)
        clips, metadata = [], []
        for index, (source, given) in enumerate(zip(sources, self._spread_metadata(sources, kwargs), strict=True)):
            try:
                frames, described = self._load_clips(source, given, kwargs)
                clips.append(_to_rgb(frames) if self._setting("do_convert_rgb", kwargs) else frames)
            except _MalformedVideo as error:
                raise ValueError(f"videos[{index}] {error}") from error
            metadata.append(described)
        self._warn_if_rescaled(clips, kwargs)
        loaded = {"do_sample_frames": False, "input_data_format": ChannelDimension.FIRST, "video_metadata": None}
        batch = super().preprocess(clips, **{**kwargs, **loaded})
        if self._setting("return_metadata", kwargs):
            batch["video_metadata"] = metadata
        return batch

    def sample_frames(
        self,
        metadata: VideoMetadata,
        num_frames: int | None = None,
        fps: int | float | None = None,
        sampling_strategy: str | None = None,
        frame_stride: int | None = None,
        num_clips: int | None = None,
        first_seconds: float | None = None,
        **kwargs: Any,
    ) -> np.ndarray:
        """Choose the frames of all clips of a video; arguments left out are the processor's own.

        Returns:
            Frame numbers `(num_clips * T,)`, clip after clip.

        Raises:
            ValueError: If both `num_frames` and `fps` are given, or `metadata` lacks the rate that `fps` or
                `first_seconds` needs.
        """
        if fps is not None and num_frames is not None:
            raise ValueError("`num_frames` and `fps` are mutually exclusive arguments, please use only one!")
        strategy: Any = sampling_strategy or self.sampling_strategy  # a name, checked where frames are chosen
        num_clips = self.num_clips if num_clips is None else num_clips
        if fps is None and num_frames is None:
            fps = self.fps
        if fps is not None:
            strategy = "fps"
            if not metadata.fps:
                raise ValueError("Sampling by `fps` needs the video's own rate: pass `video_metadata` with its `fps`.")
        elif strategy == "fps":
            if num_frames is None:
                raise ValueError("sampling_strategy='fps' needs `fps`, the number of frames per second to take.")
            strategy = "uniform"
        num_frames = self.num_frames if num_frames is None else num_frames
        for name, value in (("num_frames", num_frames), ("num_clips", num_clips)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}.")
        total = metadata.total_num_frames
        first_seconds = self.first_seconds if first_seconds is None else first_seconds
        if first_seconds is not None:
            total = trim_num_frames(total, metadata.fps, first_seconds)
        if total == num_frames and num_clips == 1 and strategy != "fps":
            return np.arange(total)
        clips = [
            sample_frame_indices(
                total,
                num_frames,
                strategy,
                num_clips,
                clip,
                frame_stride=frame_stride or self.frame_stride,
                fps=fps,
                video_fps=metadata.fps,
            )
            for clip in range(num_clips)
        ]
        return np.concatenate(clips)

    # pyrefly: ignore[bad-override]  all that open_video takes, where the base class only takes URLs
    def fetch_videos(
        self, video_url_or_urls: VideoSource | list[VideoSource], sample_indices_fn: Callable | None = None
    ) -> tuple[np.ndarray, VideoMetadata] | list[tuple]:
        """Decode one video, or each of a list, with the processor's `decoder` (Transformers' own needs torchcodec).

        Args:
            video_url_or_urls: What `open_video` takes, or a list of that.
            sample_indices_fn: Called with `metadata=`, gives the frame numbers to decode; by default all.

        Returns:
            Frames, uint8 `(T, H, W, 3)`, and metadata; for a list, a list of all frames and one of all metadata.
        """
        if isinstance(video_url_or_urls, list):
            fetched = [self.fetch_videos(video, sample_indices_fn) for video in video_url_or_urls]
            return list(zip(*fetched, strict=True))
        return _read_file(video_url_or_urls, self.decoder, sample_indices_fn)

    def _setting(self, name: str, kwargs: dict[str, Any]) -> Any:
        return kwargs[name] if name in kwargs else getattr(self, name, None)

    def _spread_metadata(self, sources: list, kwargs: dict[str, Any]) -> list[VideoMetadata | dict | None]:
        """Give each video its own entry of the `video_metadata` argument."""
        given = kwargs.get("video_metadata")
        if given is None:
            return [None] * len(sources)
        given = given if isinstance(given, list) else [given]
        entries = [entry for item in given for entry in (item if isinstance(item, list) else [item])]
        if len(entries) != len(sources):
            raise ValueError(
                f"Got {len(sources)} videos but {len(entries)} video_metadata entries; pass one per video."
            )
        return entries

    def _load_clips(
        self, source: Any, given: VideoMetadata | dict | None, kwargs: dict[str, Any]
    ) -> tuple[torch.Tensor, VideoMetadata]:
        """Give the frames of all clips of a video, `(num_clips * T, C, H, W)`, and what is known about it."""
        choose_frames = None
        if self._setting("do_sample_frames", kwargs):
            names = ("num_frames", "fps", "sampling_strategy", "frame_stride", "num_clips", "first_seconds")
            options = {name: kwargs[name] for name in names if name in kwargs}

            def choose_frames(metadata: VideoMetadata) -> np.ndarray:
                return self.sample_frames(metadata, **options)

        elif self._setting("num_clips", kwargs) > 1:
            raise ValueError("num_clips above 1 needs do_sample_frames=True.")
        if _is_file(source):
            strategy = self._setting("sampling_strategy", kwargs) if choose_frames is not None else None
            frames, metadata = _read_file(source, self._setting("decoder", kwargs), choose_frames, strategy)
            return torch.from_numpy(frames).permute(0, 3, 1, 2), metadata
        if _is_decoder(source):
            return _read_decoder(source, choose_frames)

        if not len(source):
            raise _MalformedVideo("is empty: it has no frames.")
        if isinstance(source, np.ndarray | torch.Tensor) and source.ndim == 4 and 0 not in source.shape:
            # Before frames are chosen, so that the error names the shape that was given.
            _find_layout(source, self._setting("input_data_format", kwargs))
        if choose_frames is not None and kwargs.get("num_frames", 0) > len(source):
            raise _MalformedVideo(
                f"has {len(source)} frames and the call asks for num_frames={kwargs['num_frames']}. Ask for fewer, or "
                "set num_frames on the processor, which then repeats frames."
            )
        described: dict[str, Any] = {"total_num_frames": len(source), **dict(given or {})}
        metadata = VideoMetadata(**described)
        indices: Any = np.arange(len(source))
        if choose_frames is not None:
            if metadata.total_num_frames != len(source):
                raise _MalformedVideo(
                    f"has {len(source)} frames and its metadata says {metadata.total_num_frames}. Pass the "
                    "complete video, or do_sample_frames=False."
                )
            indices = choose_frames(metadata)
        if metadata.frames_indices is None or choose_frames is not None:
            metadata.frames_indices = indices
        source = _widen(source)
        frames = source[indices] if not isinstance(source, list) else [source[i] for i in indices]
        frames = _stack_frames(frames, self._setting("input_data_format", kwargs))
        metadata.height, metadata.width = frames.shape[-2:]
        return frames, metadata

    def _warn_if_rescaled(self, clips: list[torch.Tensor], kwargs: dict[str, Any]) -> None:
        if self._setting("do_rescale", kwargs) and any(c.is_floating_point() and c.max() <= 1 for c in clips):
            logger.warning_once(
                "Floating-point frames within [0, 1] are about to be divided by 255 once more; pass do_rescale=False."
            )

    # pyrefly: ignore[bad-override]  the BatchFeature of images, which the base class names, is the same in use
    def _preprocess(
        self,
        videos: list[torch.Tensor],
        do_resize: bool,
        size: SizeDict,
        resample: PILImageResampling | int | None,
        do_center_crop: bool,
        crop_size: SizeDict,
        do_rescale: bool,
        rescale_factor: float,
        do_normalize: bool,
        image_mean: float | list[float] | None,
        image_std: float | list[float] | None,
        return_tensors: str | TensorType | None = None,
        num_clips: int = 1,
        num_crops: int = 1,
        **kwargs: Any,
    ) -> BatchFeature:
        """Turn frames `(num_clips * T, C, H, W)` of each video into views: the part that is the same for all kinds."""
        if num_crops < 1:
            raise ValueError(f"num_crops must be at least 1, got {num_crops}.")
        views = []
        for video in videos:
            crops = None
            if do_resize and (do_center_crop or num_crops > 1):
                crops = _crop_strip(video, size, resample, crop_size, num_crops)
            if crops is None:
                crops = self._resize_and_crop(video, do_resize, size, resample, do_center_crop, crop_size, num_crops)
            clips = zip(*(crop.chunk(num_clips) for crop in crops), strict=True)
            views += [view for clip in clips for view in clip]
        shapes = {tuple(view.shape) for view in views}
        if return_tensors is not None and len(shapes) > 1:
            raise ValueError(
                f"The videos of a batch come out in different shapes (T, C, H, W): {sorted(shapes)}. Let them be "
                "cropped (do_center_crop) and sampled to one num_frames, or pass them one by one."
            )
        normalize: tuple[Any, ...] = (do_rescale, rescale_factor, do_normalize, image_mean, image_std)
        if len(shapes) == 1:
            pixel_values = self.rescale_and_normalize(torch.stack(views), *normalize)
        else:
            pixel_values = [self.rescale_and_normalize(view, *normalize) for view in views]
        data = {"pixel_values": pixel_values if return_tensors is not None else list(pixel_values)}
        return BatchFeature(data=data, tensor_type=return_tensors)

    def _resize_and_crop(
        self,
        video: torch.Tensor,
        do_resize: bool,
        size: SizeDict,
        resample: PILImageResampling | int | None,
        do_center_crop: bool,
        crop_size: SizeDict,
        num_crops: int,
    ) -> list[torch.Tensor]:
        """The crops of frames `(T, C, H, W)`, or the one view that they are."""
        if do_resize:
            height, width = video.shape[-2:]
            name = f"<video of {width} x {height} pixels, resized>"
            LIMITS.check_frame_size(name, *_compute_size(height, width, size))
            video = self._resize_as_published(video, size, resample)
        if num_crops == 1:
            return [self.center_crop(video, crop_size) if do_center_crop else video]
        if crop_size.height is None or crop_size.width is None:
            raise ValueError(f"num_crops={num_crops} needs crop_size with height and width, got {crop_size}.")
        height, width = video.shape[-2:]
        boxes = place_crops(height, width, crop_size.height, crop_size.width, num_crops)
        return [video[..., top:bottom, left:right] for top, left, bottom, right in boxes]

    def _resize_as_published(
        self, video: torch.Tensor, size: SizeDict, resample: PILImageResampling | int | None
    ) -> torch.Tensor:
        """Resize without antialiasing; bicubic results for uint8 are rounded."""
        # In float and rounded here: torchvision's own bicubic kernel for uint8 is a grey level off here and there.
        if resample != PILImageResampling.BICUBIC or video.is_floating_point():
            return self.resize(video, size=size, resample=resample, antialias=False)
        resized = self.resize(video.float(), size=size, resample=resample, antialias=False)
        return resized.clamp(0, 255).round().to(video.dtype)


def _compute_size(height: int, width: int, size: SizeDict) -> tuple[int, int]:
    """Height and width after resizing, as the base class computes them."""
    if not size.shortest_edge or size.longest_edge:  # with both, the frame gets no larger than the longer one
        return size.height or height, size.width or width
    short, long = min(height, width), max(height, width)
    resized_long = int(size.shortest_edge * long / short)
    return (size.shortest_edge, resized_long) if height <= width else (resized_long, size.shortest_edge)


def _crop_strip(
    video: torch.Tensor,
    size: SizeDict,
    resample: PILImageResampling | int | None,
    crop_size: SizeDict,
    num_crops: int,
) -> list[torch.Tensor] | None:
    """The crops of frames that are long strips, without resizing what is cut off.

    Returns:
        `None` for ordinary frames, which are resized first: their values stay what they always were, to the last bit.
    """
    height, width = video.shape[-2:]
    if not size.shortest_edge or size.longest_edge or resample != PILImageResampling.BILINEAR:
        return None
    if not is_extreme(height, width) or crop_size.height is None or crop_size.width is None:
        return None
    resized = _compute_size(height, width, size)
    if resized[0] < crop_size.height or resized[1] < crop_size.width:
        return None
    boxes = place_crops(*resized, crop_size.height, crop_size.width, num_crops)
    return [resize_part(video, resized, box) for box in boxes]


class _MalformedVideo(ValueError):
    """What is wrong with a video in memory, as the end of a sentence that begins with its place in the batch."""


def split_videos(videos: Any) -> list:
    """Sort out one video or a batch, nested or not.

    Returns:
        One entry per video: what `open_video` takes, an array or tensor `(T, ...)` of four dimensions, or a list of
        frames.

    Raises:
        ValueError: If there is no video, or one of no known kind.
    """
    if _is_file(videos):
        return [videos]
    if _is_decoder(videos):
        return [_find_encoded(videos) or videos]
    if is_pil_image(videos):
        return [[videos]]
    if isinstance(videos, np.ndarray | torch.Tensor):
        return _split_array(videos)
    if not isinstance(videos, list | tuple):
        raise ValueError(
            "A video is a path, URL, bytes, file object, row of a `Video` column, array, tensor or frames, got "
            f"{type(videos).__name__}."
        )
    if not videos:
        raise ValueError("Got an empty list where a video, its frames or a batch was expected.")
    if all(is_pil_image(item) or getattr(item, "ndim", 0) in (2, 3) for item in videos):
        return [list(videos)]
    nested = videos[0][0] if isinstance(videos[0], list | tuple) and videos[0] else None
    if isinstance(nested, list | tuple) and any(isinstance(item, str) for item in nested):
        raise ValueError("Lists of paths are nested too deep: frames are PIL images or arrays, not paths.")
    return [video for item in videos for video in split_videos(item)]


def _split_array(videos: np.ndarray | torch.Tensor) -> list:
    if videos.ndim == 5:
        if not len(videos):
            raise ValueError(f"Got an empty batch where videos were expected: its shape is {tuple(videos.shape)}.")
        return list(videos)
    if videos.ndim == 4:
        return [videos]
    is_grey_video = videos.ndim == 3 and not {videos.shape[0], videos.shape[-1]} & {1, 3, 4}
    if is_grey_video:
        return [list(videos)]
    if videos.ndim in (2, 3):
        return [[videos]]  # one frame
    raise ValueError(f"A video array has 2 to 5 dimensions, got shape {tuple(videos.shape)}.")


def _is_file(video: Any) -> bool:
    return (
        isinstance(video, str | bytes | bytearray | memoryview)
        or (isinstance(video, dict) and not video.keys().isdisjoint(("path", "bytes")))
        or hasattr(video, "__fspath__")
        or hasattr(video, "read")
    )


def _is_decoder(video: Any) -> bool:
    """Whether an object is torchcodec's `VideoDecoder`, or has its interface."""
    return hasattr(video, "get_frames_at") and hasattr(video, "metadata") and hasattr(video, "__len__")


def _find_encoded(video: Any) -> dict[str, Any] | None:
    """The file that `datasets` made a decoder from: read by us, it gives the frames that its path gives."""
    encoded = getattr(video, "_hf_encoded", None)
    if not isinstance(encoded, dict):
        return None
    path = encoded.get("path")
    return encoded if encoded.get("bytes") or (isinstance(path, str) and os.path.isfile(path)) else None


def _read_decoder(decoder: Any, choose_frames: Callable | None) -> tuple[torch.Tensor, VideoMetadata]:
    """Frames of a decoder object that `choose_frames(metadata=...)` names, by default all, `(T, C, H, W)`."""
    name, total = "<video decoder>", len(decoder)
    metadata = VideoMetadata(
        total_num_frames=total,
        fps=getattr(decoder.metadata, "average_fps", None),
        duration=getattr(decoder.metadata, "duration_seconds", None),
        video_backend="torchcodec",
    )
    indices: Any = np.arange(total) if choose_frames is None else choose_frames(metadata=metadata)
    LIMITS.check_num_frames(name, len(indices))
    try:
        frames = decoder.get_frames_at(indices=[int(index) for index in indices]).data
    except (RuntimeError, IndexError, ValueError) as error:
        reason = str(error).strip().split("\n")[0]
        raise VideoDecodingError(f"{name}: cannot be decoded ({reason}). Replace it or leave it out.") from error
    frames = _stack_frames(frames.cpu(), None)
    metadata.frames_indices = indices
    metadata.height, metadata.width = frames.shape[-2:]
    return frames, metadata


def _read_file(
    source: VideoSource, decoder: DecoderName, choose_frames: Callable | None, strategy: str | None = None
) -> tuple[np.ndarray, VideoMetadata]:
    """Decode the frames that `choose_frames(metadata=...)` names, by default all, `(T, H, W, 3)`."""
    with open_video(source, decoder) as reader:
        if strategy == "dense":  # "fps" asks for a rate, which kept frames do not have
            reader.check_strategy(strategy)
        metadata = VideoMetadata(
            total_num_frames=reader.num_frames,
            fps=reader.fps,
            duration=reader.duration_seconds,
            video_backend=decoder,
        )
        try:
            indices: Any = np.arange(reader.num_frames) if choose_frames is None else choose_frames(metadata=metadata)
        except VideoDecodingError as error:  # its rate and `fps` ask for too many frames
            raise VideoDecodingError(f"{reader.name}: {error}") from error
        frames = reader.get_frames(indices)
    metadata.frames_indices = indices
    metadata.height, metadata.width = frames.shape[1:3]
    return frames, metadata


def _stack_frames(video: Any, input_data_format: str | ChannelDimension | None) -> torch.Tensor:
    """Turn an array, a tensor or a list of frames into a checked tensor `(T, C, H, W)`, uint8 or float32."""
    if isinstance(video, list):
        if any(is_pil_image(frame) for frame in video):
            input_data_format = ChannelDimension.LAST
        frames = [_frame_to_tensor(frame) for frame in video]
        shapes = {tuple(frame.shape) for frame in frames}
        if len(shapes) > 1:
            raise _MalformedVideo(f"has frames of different shapes: {sorted(shapes)}. Resize them to one size.")
        video = torch.stack(frames)
    elif isinstance(video, np.ndarray):
        video = _array_to_tensor(video)
    if video.ndim == 3:  # grey frames without a channel axis
        video, input_data_format = video.unsqueeze(1), ChannelDimension.FIRST
    if 0 in video.shape:
        raise _MalformedVideo(f"is empty: its shape is {tuple(video.shape)}.")
    if _find_layout(video, input_data_format) == ChannelDimension.LAST:
        video = video.permute(0, 3, 1, 2)
    return _check_values(video)


def _find_layout(video: Any, input_data_format: str | ChannelDimension | None) -> ChannelDimension:
    """Whether an array of four dimensions is `(T, C, H, W)` or `(T, H, W, C)`."""
    shape = tuple(video.shape)
    try:
        layout = ChannelDimension(input_data_format or infer_channel_dimension_format(video, num_channels=(1, 3, 4)))
    except ValueError as error:
        cure = " (C, T, H, W) needs its first two axes swapped." if shape[0] in (1, 3, 4) else ""
        raise _MalformedVideo(
            f"has shape {shape}, which is neither (T, H, W, C) nor (T, C, H, W) with 1, 3 or 4 channels.{cure}"
        ) from error
    num_channels = shape[1] if layout == ChannelDimension.FIRST else shape[-1]
    if num_channels not in (1, 3, 4):
        raise _MalformedVideo(f"has {num_channels} channels ({layout.value}); frames have 1, 3 or 4.")
    return layout


def _frame_to_tensor(frame: Any) -> torch.Tensor:
    if is_pil_image(frame):
        try:
            return torch.from_numpy(convert_image(frame))
        except ValueError as error:
            raise _MalformedVideo(f"has a frame that cannot be used: {error}.") from error
    return _widen(_array_to_tensor(frame) if isinstance(frame, np.ndarray) else frame)


def _widen(video: Any) -> Any:
    """Make signed integers of unsigned ones of more than 8 bits, for which PyTorch has hardly any operation."""
    is_wide = isinstance(video, torch.Tensor) and video.dtype in (torch.uint16, torch.uint32, torch.uint64)
    return video.long() if is_wide else video


def _array_to_tensor(array: np.ndarray) -> torch.Tensor:
    if array.dtype.kind not in "uif":
        raise _MalformedVideo(f"has pixels of type {array.dtype}; they are uint8 or floating-point.")
    return torch.from_numpy(np.array(array, order="C"))


def _check_values(video: torch.Tensor) -> torch.Tensor:
    if video.dtype == torch.uint8:
        return video
    if video.is_floating_point():
        video = video.float()  # first, since a large number of 64 bits becomes infinite in it
        if not video.isfinite().all():
            raise _MalformedVideo("holds NaN or infinite pixels. Clean or leave out this video.")
        return video
    if video.is_complex() or video.dtype == torch.bool:
        raise _MalformedVideo(f"has pixels of type {video.dtype}; they are uint8 or floating-point.")
    video = video.long()  # 255 does not fit some types, and cannot be compared with them
    if video.min() < 0 or video.max() > 255:
        raise _MalformedVideo(f"has pixels from {video.min()} to {video.max()}; integers are in 0..255.")
    return video.to(torch.uint8)


def _to_rgb(video: torch.Tensor) -> torch.Tensor:
    """Repeat grey, and blend what is transparent with white, in a video `(T, C, H, W)`."""
    if video.shape[1] == 1:
        return video.expand(-1, 3, -1, -1)
    if video.shape[1] == 3:
        return video
    if video.is_floating_point():
        raise _MalformedVideo("has 4 floating-point channels; convert it to RGB or uint8.")
    colour, opacity = video[:, :3].float(), video[:, 3:].float() / 255
    return (colour * opacity + 255 * (1 - opacity)).round().to(torch.uint8)


__all__ = ["UMTVideoProcessor"]
