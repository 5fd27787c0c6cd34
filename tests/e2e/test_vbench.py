"""`examples/vbench_human_action.py` beside VBench's transform, network and rule, written out here once more."""

import json
import runpy
import sys
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from torch.nn import functional as F
from torchvision.transforms.v2 import functional as images
from transformers import AutoVideoProcessor

from tests.e2e.conftest import ROOT
from tests.hub.released import build_released_tensors, list_released_shapes
from umt_hf.hub_cards import released_checkpoints as conversion
from umt_hf.hub_cards.convert_umt_checkpoint import build_published_config
from umt_hf.moving_shapes.render import render_clip, sample_clip, write_video
from umt_hf.zoo import find_entry

NAME = "umt-vit-l16-k400-f16"
EXAMPLE = ROOT / "examples" / "vbench_human_action.py"
# As wide as a test can wait for; depth, frames, patches and classes are the model's.
WIDTHS = {1024: 24, 3072: 72, 4096: 96}
HEADS = 2
FIELDS = {"hidden_size": 24, "num_attention_heads": HEADS, "intermediate_size": 96}


def read_all(path: Path) -> torch.Tensor:
    with av.open(str(path)) as file:
        frames = [frame.to_ndarray(format="rgb24") for frame in file.decode(video=0)]
    return torch.from_numpy(np.stack(frames)).permute(0, 3, 1, 2)


def prepare_as_published(path: Path) -> torch.Tensor:
    """`(1, 16, 3, 224, 224)`: middle frames of 16 parts, short side 256, centre, ImageNet's mean and deviation."""
    frames = read_all(path)
    borders = np.linspace(0, len(frames), min(16, len(frames)) + 1).astype(int)
    chosen = [(first + stop - 1) // 2 for first, stop in zip(borders, borders[1:], strict=False)]
    chosen += [chosen[-1]] * (16 - len(chosen))
    height, width = frames.shape[-2:]
    size = (256, int(256 * width / height)) if height <= width else (int(256 * height / width), 256)
    clip = images.resize(frames[chosen], size, images.InterpolationMode.BILINEAR, antialias=False)
    top, left = round((size[0] - 224) / 2), round((size[1] - 224) / 2)
    clip = images.crop(clip, top, left, 224, 224).float() / 255
    return images.normalize(clip, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225])[None]


def run_as_published(tensors: dict[str, torch.Tensor], pixel_values: torch.Tensor) -> torch.Tensor:
    """Logits of the published network, from the tensors of its file."""

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        return F.layer_norm(x, x.shape[-1:], tensors[f"{name}.weight"], tensors[f"{name}.bias"], 1e-6)

    def linear(x: torch.Tensor, name: str) -> torch.Tensor:
        return F.linear(x, tensors[f"{name}.weight"], tensors[f"{name}.bias"])

    patches = pixel_values.transpose(1, 2)
    weight, bias = tensors["patch_embed.proj.weight"], tensors["patch_embed.proj.bias"]
    x = F.conv3d(patches, weight, bias, stride=weight.shape[2:]).flatten(2).transpose(1, 2) + tensors["pos_embed"]
    for layer in range(24):
        name = f"blocks.{layer}"
        q_bias, v_bias = tensors[f"{name}.attn.q_bias"], tensors[f"{name}.attn.v_bias"]
        own = torch.cat([q_bias, torch.zeros_like(q_bias), v_bias])
        qkv = F.linear(norm(x, f"{name}.norm1"), tensors[f"{name}.attn.qkv.weight"], own)
        q, k, v = qkv.reshape(*x.shape[:2], 3, HEADS, -1).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = x + linear(attended, f"{name}.attn.proj")
        x = x + linear(F.gelu(linear(norm(x, f"{name}.norm2"), f"{name}.mlp.fc1")), f"{name}.mlp.fc2")
    return linear(norm(x.mean(1), "fc_norm"), "head")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """The tensors of a file with the published names, and the folder that `convert` makes of it."""
    folder, entry = tmp_path_factory.mktemp("vbench"), find_entry(NAME)
    shapes = {key: [WIDTHS.get(size, size) for size in shape] for key, shape in list_released_shapes(entry).items()}
    tensors = build_released_tensors(entry, shapes)
    tensors |= {key: 40 * value for key, value in tensors.items() if key.startswith("head.")}  # answers that are sure
    torch.save({"module": tensors}, folder / Path(entry.file).name)
    config, task = build_published_config(NAME)
    for name, value in FIELDS.items():
        setattr(config, name, value)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(conversion, "build_published_config", lambda _: (config, task))
        conversion.convert_released_checkpoint(folder / Path(entry.file).name, output_dir=folder / NAME)
    return tensors, folder / NAME


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("videos")
    found = []
    for number, (frames, size) in enumerate([(16, (96, 128)), (40, (128, 96)), (9, (90, 90))]):
        clip = np.tile(render_clip(sample_clip(3, "test", number))[0], (4, 1, 1, 1))[:frames]
        clip = images.resize(torch.from_numpy(clip).permute(0, 3, 1, 2), list(size)).permute(0, 2, 3, 1).numpy()
        write_video(folder / f"{number}.mp4", clip)
        found.append(folder / f"{number}.mp4")
    return found


def test_pixels_classes_and_rule_are_those_of_the_published_code(model, videos, monkeypatch, capsys):
    tensors, folder = model
    settings = runpy.run_path(str(EXAMPLE))
    processor = AutoVideoProcessor.from_pretrained(folder, **settings["PREPARATION"], **settings["VIEWS"])
    names = Path(ROOT / "umt_hf/hub_cards/labels/kinetics_400.txt").read_text().splitlines()
    expected, renamed = [], []
    for number, video in enumerate(videos):
        pixel_values = prepare_as_published(video)
        found = processor(str(video), return_tensors="pt").pixel_values
        torch.testing.assert_close(found, pixel_values, rtol=0, atol=1e-5)
        with torch.no_grad():
            best = run_as_published(tensors, pixel_values)[0].sigmoid().topk(5)
        said = [names[i] for i, p in zip(best.indices.tolist(), best.values.tolist(), strict=True) if p >= 0.85]
        assert said  # else the rule has nothing to decide
        action = said[-1] if number != 1 else "juggling ghosts"
        expected.append((best, action, number != 1))
        renamed.append(video.with_name(f"A person is {action.capitalize()}-{number}.mp4"))
        video.rename(renamed[-1])
    damaged = renamed[0].with_name("A person is marching-9.mp4")
    damaged.write_bytes(b"no video")
    monkeypatch.setattr(sys, "argv", ["", "--model", str(folder), "--videos", *map(str, [*renamed, damaged])])
    settings["main"]()
    *lines, unread, last = capsys.readouterr().out.splitlines()
    assert last == "2 of 4: 0.5000" and not json.loads(unread)["is_right"] and "9.mp4" in json.loads(unread)["error"]
    for line, (best, action, is_right) in zip(map(json.loads, lines), expected, strict=True):
        assert (line["action"], line["is_right"]) == (action.lower(), is_right)
        assert line["is_class"] == (action in names)
        assert [label for label, _ in line["best"]] == [names[i] for i in best.indices.tolist()]
        assert [p for _, p in line["best"]] == pytest.approx(best.values.tolist(), abs=1e-4)


@pytest.mark.parametrize(
    ("name", "action"),
    [
        ("a person is riding a bike-0.mp4", "riding a bike"),
        ("A person is Marching-14.mp4", "marching"),
        ("sample/A person is marching_seed3.mp4", "marching"),
        ("dodgeball.mp4", "dodgeball"),
    ],
)
def test_the_name_of_a_file_says_what_it_should_show(name, action):
    assert runpy.run_path(str(EXAMPLE))["read_action"](name) == action
