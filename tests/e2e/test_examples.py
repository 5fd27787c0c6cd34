"""Every example runs on rendered clips and small models, and does what it is for."""

import ast
import dataclasses
import json
import re
import runpy
import shutil
import sys
from pathlib import Path

import pytest
import torch
from datasets import Video, load_dataset
from peft import PeftModel
from torch.nn.functional import normalize
from transformers import AutoVideoProcessor

import umt_hf
from tests.e2e.conftest import ROOT
from umt_hf import (
    UMTTextConfig,
    UMTVideoConfig,
    UMTVideoForPreTraining,
    UMTVideoForVideoClassification,
    UMTVideoProcessor,
    UMTVideoTextConfig,
    UMTVideoTextForRetrieval,
    UMTVideoTextProcessor,
)
from umt_hf.moving_shapes.render import render_clip, sample_clip, write_video
from umt_hf.processing.processing_umt_video_text import SPECIAL_TOKENS, build_tokenizer

EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
PUBLIC = {"datasets", "peft", "torch", "transformers", "umt_hf"}
CLASSES = {"red circle": ("red", "circle"), "blue square": ("blue", "square")}
TINY = {
    "image_size": 64,
    "patch_size": 16,
    "num_frames": 4,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "position_embedding_frames": 4,
    "position_embedding_image_size": 64,
    "initializer_range": 0.1,
    "num_aligned_layers": 2,
    "teacher_hidden_size": 12,
}
NAMED_TOKENS = {"pad": "[PAD]", "bos": "[CLS]", "eos": "[SEP]", "mask": "[MASK]"}


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_examples_are_short_and_use_public_names(path):
    text = path.read_text()
    assert len(text.splitlines()) <= 60
    tree = ast.parse(text)
    assert f"python examples/{path.name} --" in ast.get_docstring(tree)
    assert f"python examples/{path.name} --" in (ROOT / "examples" / "README.md").read_text()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0
            if node.module.startswith("umt_hf"):
                assert node.module == "umt_hf" and {alias.name for alias in node.names} <= set(umt_hf.__all__)
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [node.module] if isinstance(node, ast.ImportFrom) else []
        assert all(name.split(".")[0] in PUBLIC | sys.stdlib_module_names for name in names)
        assert "umt_hf" not in {name.split(".")[0] for name in names if "." in name}


def test_there_are_seven():
    assert len(EXAMPLES) == 7


def run(name: str, monkeypatch, **flags) -> None:
    """Run an example as a program, in this process."""
    words = [name]
    for flag, values in flags.items():
        words += [f"--{flag}", *map(str, values if isinstance(values, list) else [values])]
    monkeypatch.setattr(sys, "argv", words)
    runpy.run_path(str(ROOT / "examples" / name), run_name="__main__")


@pytest.fixture(scope="module")
def videos(tmp_path_factory) -> Path:
    """A folder per class, in two splits."""
    folder = tmp_path_factory.mktemp("videos")
    for split, count in (("train", 6), ("validation", 2)):
        for name, (color, shape) in CLASSES.items():
            (folder / split / name).mkdir(parents=True)
            for i in range(count):
                clip = dataclasses.replace(sample_clip(0, split, i), color=color, shape=shape)
                write_video(folder / split / name / f"{i}.mp4", render_clip(clip)[0])
    return folder


@pytest.fixture(scope="module")
def stage1(tmp_path_factory) -> Path:
    """A stage-1 folder with fresh weights, its alignment heads included."""
    folder = tmp_path_factory.mktemp("stage1")
    torch.manual_seed(0)
    config = UMTVideoConfig(**TINY)
    UMTVideoForPreTraining(config).save_pretrained(folder)
    UMTVideoProcessor.from_model_config(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def video_text(videos, tmp_path_factory) -> Path:
    """A video-text folder whose towers have learned the two classes."""
    folder = tmp_path_factory.mktemp("video_text")
    torch.manual_seed(0)
    words = [*SPECIAL_TOKENS.values(), "a", "video", "of", *" ".join(CLASSES).split()]
    tokenizer = build_tokenizer(words, max_length=12)
    text = UMTTextConfig(
        vocab_size=len(words),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        fusion_layer=1,
        encoder_width=32,
        **{f"{name}_token_id": tokenizer.convert_tokens_to_ids(token) for name, token in NAMED_TOKENS.items()},
    )
    config = UMTVideoTextConfig(vision_config=UMTVideoConfig(**TINY), text_config=text, projection_dim=16)
    model = UMTVideoTextForRetrieval(config)
    processor = UMTVideoTextProcessor(UMTVideoProcessor.from_model_config(config.vision_config), tokenizer)
    files = sorted((videos / "train").glob("*/*.mp4"))
    inputs = processor(videos=files, text=[f"a video of {name}" for name in CLASSES], return_tensors="pt")
    texts = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    labels = torch.tensor([list(CLASSES).index(file.parent.name) for file in files])
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for _ in range(40):  # both towers learn one vector per class
        found = model.get_video_features(inputs["pixel_values"]).pooler_output
        named = normalize(model.get_text_features(**texts).pooler_output, dim=-1)
        loss = 2 - found[:, :2].gather(1, labels[:, None]).mean() - named.diagonal().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def test_embed_video_finds_the_copy(stage1, videos, tmp_path, monkeypatch, capsys):
    files = sorted(videos.glob("validation/*/*.mp4"))
    copy = shutil.copy(files[1], tmp_path / "copy.mp4")
    table = tmp_path / "vectors.parquet"
    run("embed_video.py", monkeypatch, model=stage1, videos=[*files, copy], out=table)
    printed = capsys.readouterr().out
    assert "5 vectors of 32 numbers" in printed
    assert f"{copy}: most like {files[1]} (1.000)" in printed and f"{files[1]}: most like {copy} (1.000)" in printed
    rows = load_dataset("parquet", data_files=str(table), cache_dir=str(tmp_path / "cache"))["train"]
    assert rows["video"][-1] == str(copy) and rows["vector"][1] == rows["vector"][-1] != rows["vector"][0]


def test_finetune_folder_learns_and_classify_video_reads_its_model(stage1, videos, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    output = tmp_path / "classifier"
    flags = {"epochs": 12, "learning_rate": 3e-3, "batch_size": 6}
    run("finetune_folder.py", monkeypatch, model=stage1, data=videos, output_dir=output, **flags)
    assert "accuracy 1.000" in capsys.readouterr().out
    log = json.loads((output / "trainer_state.json").read_text())["log_history"]
    losses = [line["loss"] for line in log if "loss" in line]
    assert len(losses) == 12 and losses[-1] < 0.3 * losses[0]

    files = sorted(videos.glob("validation/*/*.mp4"))
    run("classify_video.py", monkeypatch, model=output, videos=files, top_k=1, num_clips=2)
    lines = capsys.readouterr().out.splitlines()
    assert lines[::2] == list(map(str, files))
    for file, answer in zip(files, lines[1::2], strict=True):
        assert re.fullmatch(rf"  [01]\.\d+  {file.parent.name}", answer)


def test_lora_saves_an_adapter_that_loads_again(stage1, videos, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    output = tmp_path / "adapter"
    torch.manual_seed(0)
    run("lora.py", monkeypatch, model=stage1, data=videos, output_dir=output, epochs=15, learning_rate=1e-2)
    printed = capsys.readouterr().out
    assert "trainable params" in printed and "accuracy 1.000" in printed
    assert not (output / "model.safetensors").exists()

    base = UMTVideoForVideoClassification.from_pretrained(stage1, num_labels=2)
    model = PeftModel.from_pretrained(base, output).merge_and_unload().eval()
    processor = AutoVideoProcessor.from_pretrained(stage1)
    rows = load_dataset("videofolder", data_dir=str(videos))["validation"].cast_column("video", Video(decode=False))
    for row in rows:
        inputs = processor(row["video"]["path"], return_tensors="pt")
        with torch.no_grad():
            assert model(**inputs).logits.argmax() == row["label"]


@pytest.mark.parametrize("rerank", [False, True])
def test_search_videos_finds_the_right_ones(video_text, videos, tmp_path, monkeypatch, capsys, rerank):
    pytest.importorskip("lancedb")
    folder = videos / "validation"
    queries = [f"a video of {name}" for name in CLASSES]
    flags = {"videos": folder, "index": tmp_path / "index", "queries": queries, "top_k": 2}
    run("search_videos.py", monkeypatch, model=video_text, **flags, **({"rerank": []} if rerank else {}))
    lines = capsys.readouterr().out.splitlines()
    assert "4 encoded" in lines[0] and lines[1::3] == queries
    for i, name in enumerate(CLASSES):
        hits = [line.split("  ")[2] for line in lines[3 * i + 2 : 3 * i + 4]]
        assert len(hits) == 2
        if not rerank:  # the matching head has learned nothing
            assert {Path(hit).parent.name for hit in hits} == {name}
    run("search_videos.py", monkeypatch, model=video_text, **flags)
    assert "0 encoded, 4 unchanged" in capsys.readouterr().out


@pytest.mark.parametrize("prompts", [None, ["{}", "a video of {}"]])
def test_zero_shot_names_the_right_class(video_text, videos, monkeypatch, capsys, prompts):
    files = sorted(videos.glob("validation/*/*.mp4"))
    flags = {} if prompts is None else {"prompts": prompts}
    run("zero_shot.py", monkeypatch, model=video_text, videos=files, classes=list(CLASSES), **flags)
    lines = capsys.readouterr().out.splitlines()
    for i, file in enumerate(files):
        assert lines[3 * i] == str(file)
        (best, first), (worst, second) = (line.strip().split("  ") for line in lines[3 * i + 1 : 3 * i + 3])
        assert first == file.parent.name and {first, second} == set(CLASSES)
        assert float(best) > 0.6 and abs(float(best) + float(worst) - 1) < 2e-3
