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
"""Image files to pixels: raster formats alone, upright, transparency over white."""

from typing import Any, BinaryIO

import numpy as np
import torch
from PIL import Image, ImageOps

from .media_files import LIMITS, VideoDecodingError, VideoSource, open_source

# Formats whose files are pixels. Pillow also opens drawings, for which it starts another program (EPS: Ghostscript),
# and stubs of scientific formats.
IMAGE_FORMATS = (
    "AVIF", "BMP", "DIB", "GIF", "ICO", "JPEG", "JPEG2000", "MPO", "PCX", "PNG", "PPM", "QOI", "SGI", "TGA", "TIFF",
    "WEBP",
)  # fmt: skip
LEVELS_16_BIT = 257  # 65535 / 255


def read_image(source: VideoSource) -> torch.Tensor:
    """Read an image file, upright and in RGB, as a clip of one frame.

    Of an animated image the first frame is read. Grey of 16 bits is scaled to 8; what is transparent becomes white, as
    in the video processor. Floating-point and 32-bit images have no agreed white, and are refused.

    Args:
        source: Path, URL, the file's bytes, or a row `{"path", "bytes"}`.

    Returns:
        `(1, 3, H, W)`, uint8.

    Raises:
        VideoDecodingError: If it cannot be read or exceeds `LIMITS`; the message names it.

    Examples:
        >>> from PIL import Image
        >>> from umt_hf.processing.images import read_image
        >>> Image.new("RGB", (320, 240), "red").save("picture.png")
        >>> read_image("picture.png").shape
        torch.Size([1, 3, 240, 320])
    """
    media = open_source(source, kind="image")
    try:
        pixels = _decode(media.name, media.file)
    finally:
        media.close()
    if pixels.shape[-1] == 4:
        pixels = lay_over_white(pixels)
    return torch.from_numpy(pixels)[None].permute(0, 3, 1, 2)


def _decode(name: str, file: BinaryIO) -> np.ndarray:
    Image.init()
    try:
        with Image.open(file, formats=[kind for kind in IMAGE_FORMATS if kind in Image.OPEN]) as image:
            LIMITS.check_frame_size(name, image.height, image.width)
            upright = ImageOps.exif_transpose(image)
            upright.format = image.format  # older versions of Pillow lose it, and open 16 bits of PNG as 32
            return convert_image(upright)
    except VideoDecodingError:
        raise
    except Exception as error:  # a damaged file makes Pillow's readers raise nearly anything
        raise VideoDecodingError(
            f"{name}: cannot be read as an image ({str(error) or type(error).__name__}). It is damaged, or of a kind "
            "that is not opened; replace it or leave it out."
        ) from error


def convert_image(image: Any) -> np.ndarray:
    """Convert a PIL image to uint8 RGB, or RGBA where a part may be transparent, `(H, W, 3 or 4)`.

    Raises:
        ValueError: If its pixels have no agreed white: floating-point, or integers of 32 bits.
    """
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):
        grey = (np.asarray(image).astype(np.float32) / LEVELS_16_BIT).round().astype(np.uint8)
        return np.repeat(grey[..., None], 3, axis=-1)
    if image.mode in ("I", "F"):
        raise ValueError(f"its pixels are of mode {image.mode}, where no value stands for white; store 8 or 16 bits")
    has_alpha = image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info
    return np.array(image.convert("RGBA" if has_alpha else "RGB"))


def lay_over_white(pixels: np.ndarray) -> np.ndarray:
    """Lay RGBA pixels `(..., 4)`, uint8, over white."""
    colour, opacity = pixels[..., :3].astype(np.float32), pixels[..., 3:].astype(np.float32) / 255
    return (colour * opacity + 255 * (1 - opacity)).round().astype(np.uint8)
