"""Fewer tokens by flags of commands and arguments of objects: set, recorded, and never mixed with others."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection
from typer.testing import CliRunner

from tests.unit.inference.test_label_files import save_classifier
from umt_hf import UMTTeacher, UMTVideoForVideoClassification, UMTVideoModel, UMTVideoProcessor, VideoClassifier
from umt_hf.cli import app
from umt_hf.evaluation import classification
from umt_hf.inference.features import load_encoder, save_features
from umt_hf.inference.labels.files import LabelFile
from umt_hf.inference.loading import keep_tokens
from umt_hf.moving_shapes.render import write_video
from umt_hf.runs.arguments import KeptTokenArguments
from umt_hf.teachers.saliency import attach_teacher, load_choosing_teacher

runner = CliRunner()
HALF = KeptTokenArguments(keep_ratio=0.5)


@pytest.fixture(scope="module")
def videos(tmp_path_factory) -> Path:
    folder, noise = tmp_path_factory.mktemp("videos"), np.random.default_rng(0)
    for name in ("a", "b", "c"):
        write_video(folder / f"{name}.mp4", noise.integers(0, 255, (12, 48, 48, 3), dtype=np.uint8))
    return folder


@pytest.fixture(scope="module")
def classifier(tmp_path_factory) -> Path:
    return save_classifier(tmp_path_factory.mktemp("classifier"))


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> Path:
    """A CLIP with other patches than the classifier's encoder."""
    torch.manual_seed(0)
    config = CLIPVisionConfig(
        image_size=28,
        patch_size=7,
        hidden_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        projection_dim=12,
    )
    folder = tmp_path_factory.mktemp("teacher")
    CLIPVisionModelWithProjection(config).save_pretrained(folder)
    return folder


def read_clips(folder: Path, videos: Path) -> torch.Tensor:
    processor = UMTVideoProcessor.from_pretrained(folder)
    return processor(sorted(map(str, videos.iterdir())), return_tensors="pt")["pixel_values"]


def test_choices_are_set_on_a_loaded_model(classifier):
    model = UMTVideoForVideoClassification.from_pretrained(classifier)
    assert keep_tokens(model) is None and keep_tokens(model, KeptTokenArguments()) is None
    record = keep_tokens(model, KeptTokenArguments(keep_ratio=0.25, token_selector="random"))
    assert record == {"keep_ratio": 0.25, "token_selector": "random", "token_selector_seed": 0}
    assert keep_tokens(model) == record  # of a model that was saved so
    assert keep_tokens(model, KeptTokenArguments(keep_ratio=1.0)) is None


def test_a_teacher_is_the_same_one_from_any_folder(classifier, teacher, monkeypatch):
    """As an index records it, which another command reads where it starts."""
    choice = KeptTokenArguments(keep_ratio=0.5, token_selector="teacher_saliency", teacher_name_or_path=teacher.name)
    monkeypatch.chdir(teacher.parent)
    record = keep_tokens(UMTVideoForVideoClassification.from_pretrained(classifier), choice)
    assert record is not None and record["teacher_name_or_path"] == str(teacher)


def test_choices_that_do_not_fit_are_refused(classifier, teacher, tmp_path):
    model = UMTVideoForVideoClassification.from_pretrained(classifier)
    with pytest.raises(ValueError, match="needs the teacher that chooses the tokens: set teacher_name_or_path"):
        keep_tokens(model, KeptTokenArguments(keep_ratio=0.5, token_selector="teacher_saliency"))
    for wrong in ({"keep_ratio": 0.5, "token_selector": "random"}, {"keep_ratio": 1.0}):
        with pytest.raises(ValueError, match="teacher_name_or_path is for token_selector=teacher_saliency"):
            keep_tokens(model, KeptTokenArguments(**wrong, teacher_name_or_path=str(teacher)))
    choice = {"keep_ratio": 0.5, "token_selector": "teacher_saliency"}
    with pytest.raises(ValueError, match="a CLIP, .*, which the teacher must be"):
        keep_tokens(model, KeptTokenArguments(**choice, teacher_name_or_path=str(classifier)))
    with pytest.raises(OSError):
        keep_tokens(model, KeptTokenArguments(**choice, teacher_name_or_path=str(tmp_path / "nothing")))
    with pytest.raises(ValueError, match="keep_ratio must be above 0 and at most 1, got 2"):
        KeptTokenArguments(keep_ratio=2)


@torch.no_grad()
def test_a_teacher_chooses_the_tokens_and_can_be_taken_away(classifier, teacher, videos):
    model, clips = UMTVideoForVideoClassification.from_pretrained(classifier).eval(), read_clips(classifier, videos)
    model.config.keep_ratio, model.config.token_selector = 0.5, "teacher_saliency"
    grid = model.config.image_size // model.config.patch_size
    own = load_choosing_teacher(str(teacher), grid)
    assert own.grid_size == grid
    saliency = own(clips).saliency
    torch.testing.assert_close(own.compute_saliency(clips), saliency)
    expected = model(clips, saliency=saliency).logits
    handle = attach_teacher(model, own)
    assert torch.equal(model(clips).logits, expected)
    assert torch.equal(model(pixel_values=clips, saliency=saliency).logits, expected)
    assert not any("teacher" in name or "vision_tower" in name for name in model.state_dict())
    handle.remove()
    with pytest.raises(ValueError, match="needs saliency"):
        model(clips)
    assert isinstance(own, UMTTeacher)


@pytest.mark.parametrize("selector", ["random", "frame_difference", "teacher_saliency"])
def test_a_classifier_answers_from_the_tokens_it_is_given(classifier, teacher, videos, selector):
    name = str(teacher) if selector == "teacher_saliency" else None
    tokens = KeptTokenArguments(keep_ratio=0.5, token_selector=selector, teacher_name_or_path=name)
    kept, every = VideoClassifier(classifier, tokens=tokens), VideoClassifier(classifier)
    report = kept.classify_files([str(videos)], top_k=3, show_progress=False)
    assert len(report.videos) == 3
    for found in report.videos:
        alone = kept.classify(found.path, top_k=3)
        assert [one.label for one in alone] == [one.label for one in found.labels]
        assert [one.probability for one in alone] == pytest.approx([one.probability for one in found.labels], abs=1e-5)
        assert every.classify(found.path, top_k=3) != alone


def test_results_of_other_tokens_are_not_mixed(classifier, videos, tmp_path):
    out = tmp_path / "results.jsonl"
    words = ["classify", str(videos), "--model", str(classifier), "--num-workers", "0", "--out", str(out)]
    half = [*words, "--keep-ratio", "0.5", "--token-selector", "random"]
    assert runner.invoke(app, half).exit_code == 0
    settings = json.loads(LabelFile(out).manifest.read_text())["settings"]
    assert settings["kept_tokens"] == {"keep_ratio": 0.5, "token_selector": "random", "token_selector_seed": 0}
    again = runner.invoke(app, half)
    assert again.exit_code == 0 and "0 classified" in again.output
    for other in (words, [*words, "--keep-ratio", "0.5"], [*words, "--keep-ratio", "0.25"]):
        result = runner.invoke(app, other)
        assert result.exit_code == 2 and "kept_tokens" in result.output.replace("\n", " ")
    result = runner.invoke(app, [*words, "--keep-ratio", "1.5"])
    assert result.exit_code == 2 and "keep_ratio must be above 0" in result.output


def test_results_from_before_there_was_a_choice_go_on(classifier, videos, tmp_path):
    out = tmp_path / "results.jsonl"
    words = ["classify", str(videos), "--model", str(classifier), "--num-workers", "0", "--out", str(out)]
    assert runner.invoke(app, words).exit_code == 0
    manifest = LabelFile(out).manifest
    content = json.loads(manifest.read_text())
    del content["settings"]["kept_tokens"]
    manifest.write_text(json.dumps(content))
    assert runner.invoke(app, [*words, "--keep-ratio", "1"]).exit_code == 0
    assert runner.invoke(app, [*words, "--keep-ratio", "0.5"]).exit_code == 2


def test_features_are_those_of_the_kept_tokens(classifier, videos, tmp_path):
    found = {}
    for level in ("clip", "frame", "tubelet"):
        folder = tmp_path / level
        save_features([str(videos / "a.mp4")], classifier, folder, level, stride=2, tokens=HALF)
        (file,) = folder.glob("*.safetensors")
        found[level] = load_file(file)["features"]
        settings = json.loads((folder / "settings.json").read_text())["settings"]
        assert settings["kept_tokens"]["keep_ratio"] == 0.5
        with pytest.raises(ValueError, match="features made with kept_tokens"):
            save_features([str(videos)], classifier, folder, level, stride=2)
    encoder, processor = load_encoder(classifier)
    frames = processor(str(videos / "a.mp4"), do_sample_frames=False, return_tensors="pt")["pixel_values"]
    window = encoder.config.num_frames
    encoder.config.keep_ratio = 0.5
    with torch.no_grad():
        first = encoder(frames[:, :window])
    np.testing.assert_allclose(found["clip"][0], first.pooler_output[0], atol=1e-5)
    # Frames of which one window sees each: the first ones.
    own = first.last_hidden_state[0].unflatten(0, (window // encoder.config.tubelet_size, -1))
    np.testing.assert_allclose(found["frame"][0], own[0].mean(0), atol=1e-5)
    tubelet = torch.from_numpy(found["tubelet"][0]).flatten(0, 1)
    kept = first.kept_indices[0, : own.shape[1]]
    torch.testing.assert_close(tubelet[kept], own[0], atol=1e-5, rtol=1e-5)
    assert tubelet.any(dim=1).sum() == len(kept) == len(tubelet) / 2


def test_an_evaluation_takes_the_flags_and_reports_them(classifier, teacher, videos, tmp_path):
    (tmp_path / "test.csv").write_text("".join(f"{videos / name}.mp4,{i}\n" for i, name in enumerate("abc")))
    words = ["--model_name_or_path", str(classifier), "--data", str(tmp_path / "test.csv")]
    words += ["--num_clips", "1", "--num_crops", "1", "--dataloader_num_workers", "0", "--disable_tqdm", "true"]
    choice = ["--keep_ratio", "0.5", "--token_selector", "teacher_saliency", "--teacher_name_or_path", str(teacher)]
    classification.main([*words, *choice, "--output_dir", str(tmp_path / "half")])
    report = json.loads((tmp_path / "half" / "report.json").read_text())
    assert report["kept_tokens"] == {
        "keep_ratio": 0.5,
        "token_selector": "teacher_saliency",
        "token_selector_seed": 0,
        "teacher_name_or_path": str(teacher),
    }
    classification.main([*words, "--output_dir", str(tmp_path / "all")])
    assert json.loads((tmp_path / "all" / "report.json").read_text())["kept_tokens"] is None


def test_an_index_says_which_tokens_its_searches_keep(videos, tmp_path):
    pytest.importorskip("lancedb")
    from tests.unit.inference.test_search import QUERY, save_model
    from umt_hf.inference.search import VideoSearcher, embed_videos

    model = save_model(tmp_path / "model")
    embed_videos([str(videos)], model, tmp_path / "half", tokens=HALF)
    embed_videos([str(videos)], model, tmp_path / "all")
    half, every = VideoSearcher(tmp_path / "half"), VideoSearcher(tmp_path / "all")
    assert half.encoder.model.config.keep_ratio == 0.5 and every.encoder.model.config.keep_ratio == 1
    scores = [{hit.path: hit.matching_score for hit in one.search(QUERY, rerank=True)} for one in (half, every)]
    assert scores[0].keys() == scores[1].keys() and all(scores[0][path] != scores[1][path] for path in scores[0])
    for folder, tokens in (("half", None), ("half", KeptTokenArguments(keep_ratio=0.25)), ("all", HALF)):
        with pytest.raises(ValueError, match="was built with --keep-ratio .* these vectors would be of --keep-ratio "):
            embed_videos([str(videos)], model, tmp_path / folder, tokens=tokens)
    shutil.rmtree(tmp_path / "half")


def test_an_encoder_of_any_folder_keeps_tokens(classifier):
    model = UMTVideoModel.from_pretrained(classifier, keep_ratio=0.5, use_final_norm=False)
    assert keep_tokens(model)["keep_ratio"] == 0.5
