"""Image files of every kind: raster formats alone, scaled, upright, over white; or a named refusal."""

import io
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from umt_hf import UMTVideoProcessor
from umt_hf.processing.decoding import VideoDecodingError
from umt_hf.processing.images import IMAGE_FORMATS, read_image
from umt_hf.processing.media_files import LIMITS

MEDIA = Path(__file__).parents[2] / "fixtures" / "media"


@pytest.mark.parametrize("form", ["path", "bytes"])
@pytest.mark.parametrize("content", ["fixture", "failing"])
def test_postscript_called_jpg_starts_no_program(form, content, tmp_path, monkeypatch):
    started = []
    monkeypatch.setattr(subprocess, "Popen", lambda *arguments, **options: started.append(arguments))
    monkeypatch.setattr(subprocess, "check_call", lambda *arguments, **options: started.append(arguments))
    program = (MEDIA / "eps.jpg").read_bytes()
    if content == "failing":
        program = program.replace(b"showpage", b"undefinedoperator")
    path = tmp_path / "eps.jpg"
    path.write_bytes(program)
    with pytest.raises(VideoDecodingError, match=r"(eps\.jpg|<image of \d+ bytes>): cannot be read as an image"):
        read_image(str(path) if form == "path" else program)
    assert not started


def test_no_format_that_starts_programs_is_opened():
    assert not {"EPS", "WMF", "PDF", "HDF5", "GRIB", "BUFR", "FITS", "MPEG", "PSD"} & set(IMAGE_FORMATS)
    with pytest.raises(VideoDecodingError, match="cannot be read as an image"):
        read_image(b"\xd7\xcd\xc6\x9a" + bytes(100))  # a Windows metafile


def test_grey_of_16_bits_is_scaled(tmp_path):
    truth = np.asarray(Image.open(MEDIA / "grey16.png")).astype(float) / 257
    pixels = read_image(str(MEDIA / "grey16.png"))
    assert pixels.shape == (1, 3, *truth.shape)
    np.testing.assert_allclose(pixels[0].numpy(), np.broadcast_to(truth, (3, *truth.shape)), atol=0.51)
    levels = np.array([[0, 257, 32768, 65535]], np.uint16)
    for name in ("grey.png", "grey.tiff"):
        Image.fromarray(levels).save(tmp_path / name)
        assert read_image(str(tmp_path / name))[0, 0].tolist() == [[0, 1, 128, 255]]


def test_pixels_without_an_agreed_white_are_refused(tmp_path):
    with pytest.raises(VideoDecodingError, match=r"float\.tiff: cannot be read as an image .*mode F"):
        read_image(str(MEDIA / "float.tiff"))
    Image.fromarray(np.array([[0, 70000]], np.int32)).save(tmp_path / "long.tiff")
    with pytest.raises(VideoDecodingError, match=r"long\.tiff: cannot be read as an image .*mode I"):
        read_image(str(tmp_path / "long.tiff"))


def test_transparency_is_on_white_as_in_the_processor(tmp_path):
    processor = UMTVideoProcessor(do_resize=False, do_center_crop=False, do_rescale=False, do_normalize=False)
    pictures = {"rgba.png": Image.open(MEDIA / "rgba.png")}
    pictures["grey_alpha.png"] = pictures["rgba.png"].convert("LA")
    palette = Image.new("P", (4, 4), 1)
    palette.putpalette([10, 20, 30, 200, 100, 50])
    palette.info["transparency"] = 1
    pictures["palette.png"] = palette
    for name, picture in pictures.items():
        picture.save(tmp_path / name, **({"transparency": 1} if name == "palette.png" else {}))
        with Image.open(tmp_path / name) as opened:
            expected = processor([opened], do_sample_frames=False, return_tensors="pt")["pixel_values"][0]
        assert torch.equal(read_image(str(tmp_path / name)).float(), expected.float()), name
    assert (read_image(str(tmp_path / "palette.png")) == 255).all()


def test_frames_of_16_bits_are_scaled_in_the_processor_too():
    processor = UMTVideoProcessor(do_resize=False, do_center_crop=False, do_rescale=False, do_normalize=False)
    grey = Image.fromarray(np.full((4, 4), 25700, np.uint16))
    assert (processor([[grey]], do_sample_frames=False, return_tensors="pt")["pixel_values"] == 100).all()
    with pytest.raises(ValueError, match=r"videos\[0\] has a frame that cannot be used: its pixels are of mode F"):
        processor([[Image.new("F", (4, 4))]], do_sample_frames=False)


@pytest.mark.parametrize("suffix", [".gif", ".webp", ".png"])
def test_of_an_animated_image_the_first_frame_is_read(suffix, tmp_path):
    frames = [Image.new("RGB", (8, 6), colour) for colour in ((250, 0, 0), (0, 250, 0), (0, 0, 250))]
    path = tmp_path / f"animated{suffix}"
    frames[0].save(path, save_all=True, append_images=frames[1:], **({} if suffix == ".gif" else {"lossless": True}))
    pixels = read_image(str(path))
    assert pixels.shape == (1, 3, 6, 8) and pixels[0, :, 0, 0].tolist() == [250, 0, 0]
    with Image.open(MEDIA / "a_webp_anim.webp") as opened:
        first = np.asarray(opened.convert("RGB"))
    np.testing.assert_array_equal(read_image(str(MEDIA / "a_webp_anim.webp"))[0].permute(1, 2, 0), first)


def test_orientation_is_applied(tmp_path):
    picture = Image.fromarray(np.arange(2 * 3 * 3, dtype=np.uint8).reshape(2, 3, 3) * 9)
    exif = Image.Exif()
    for orientation, turned in ((1, picture), (6, picture.transpose(Image.Transpose.ROTATE_270))):
        exif[0x0112] = orientation
        picture.save(tmp_path / "turned.png", exif=exif)
        pixels = read_image(str(tmp_path / "turned.png"))[0].permute(1, 2, 0).numpy()
        np.testing.assert_array_equal(pixels, np.asarray(turned))


def test_damaged_and_oversized_images_are_named(tmp_path, monkeypatch):
    content = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 40, 3), np.uint8)).save(content, "PNG")
    content = content.getvalue()
    generator = np.random.default_rng(1)
    for trial in range(60):
        damaged = bytearray(content[: int(generator.integers(1, len(content)))] if trial % 2 else content)
        for place in generator.integers(0, len(damaged), 5):
            damaged[place] ^= 1 << int(generator.integers(8))
        try:
            assert read_image(bytes(damaged)).dtype == torch.uint8
        except VideoDecodingError as error:
            assert "<image of" in str(error)
    for bad in (b"", b"text", b"GIF89a"):
        with pytest.raises(VideoDecodingError, match="<image of"):
            read_image(bad)
    monkeypatch.setattr(LIMITS, "max_frame_pixels", 40 * 40 - 1)
    with pytest.raises(VideoDecodingError, match="has frames of 40 x 40 pixels, more than the limit"):
        read_image(content)
