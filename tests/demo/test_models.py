"""What stands behind the page, without a page."""

import shutil
import sys
from dataclasses import replace
from importlib.metadata import requires
from pathlib import Path

import numpy as np
import pytest
from packaging.requirements import Requirement
from PIL import Image
from transformers import pipeline
from typer.testing import CliRunner

from tests.e2e.conftest import PIPELINE_TAKES_VIDEOS
from umt_hf import UMTVideoForVideoClassification, UMTVideoProcessor, cli
from umt_hf.demo import space as publishing
from umt_hf.demo.models import (
    FolderSearcher,
    FoundClip,
    TeacherViewer,
    choose_examples,
    describe_problem,
    load_demo_models,
)
from umt_hf.demo.settings import DemoSettings, name_option
from umt_hf.inference.search import VideoTextEncoder, embed_videos
from umt_hf.inference.video_index import VideoIndex
from umt_hf.processing.decoding import VideoDecodingError, open_video
from umt_hf.runs.arguments import KeptTokenArguments

FOLDER = Path(publishing.__file__).parent


@pytest.mark.skipif(not PIPELINE_TAKES_VIDEOS, reason="this pipeline of Transformers reads other frames by itself")
def test_labels_are_those_of_the_pipeline(models, settings, clips):
    video = str(clips / "00000.mp4")
    expected = pipeline("video-classification", model=settings.classifier)(video, top_k=2)
    found = models.classifier.classify(video, top_k=2)
    assert [scored.label for scored in found] == [row["label"] for row in expected]
    assert [scored.probability for scored in found] == pytest.approx([row["score"] for row in expected], abs=1e-5)


def test_labels_that_do_not_exclude_each_other_have_a_sigmoid_each(settings, clips, tmp_path):
    """As the pipeline has it, by `problem_type`; the page shows what the object answers."""
    model = UMTVideoForVideoClassification.from_pretrained(
        settings.classifier, problem_type="multi_label_classification"
    )
    model.save_pretrained(tmp_path)
    UMTVideoProcessor.from_pretrained(settings.classifier).save_pretrained(tmp_path)
    found = load_demo_models(DemoSettings(classifier=str(tmp_path))).classifier.classify(str(clips / "00000.mp4"))
    inputs = UMTVideoProcessor.from_pretrained(tmp_path)(str(clips / "00000.mp4"), return_tensors="pt")
    expected = model(**inputs).logits[0].sigmoid().sort(descending=True).values.tolist()
    assert [scored.probability for scored in found] == pytest.approx(expected, abs=1e-5)
    assert abs(sum(expected) - 1) > 0.05


def test_results_of_equal_names_are_told_apart_and_show_the_score_that_sorts_them():
    from umt_hf.demo.app import write_captions

    picture = Image.new("RGB", (2, 2))
    found = [FoundClip("/a/one.mp4", 0.5, picture), FoundClip("/b/one.mp4", 0.25, picture, 61.5, 1.0)]
    assert write_captions([*found, FoundClip("/b/two\n.mp4", 0.125, picture, 0.0)]) == [
        "a/one.mp4 · 0.50",
        "b/one.mp4 1:01 · matching 1.00",
        "two\\n.mp4 0:00 · 0.12",
    ]


def test_what_is_visible_grows_as_the_mask_shrinks(models, clips, monkeypatch):
    viewer, video = models.viewer, str(clips / "00001.mp4")
    looks = {ratio: viewer.look(video, "attention", ratio) for ratio in (0.75, 0.5, 0.0)}
    assert [looks[ratio].num_visible for ratio in looks] == [16, 32, 64]
    assert looks[0.5].num_patches == 64 and all(-1 <= look.agreement <= 1 for look in looks.values())
    frames = looks[0.0].frames
    assert frames.clip.shape == (4, 64, 64, 3)
    np.testing.assert_array_equal(frames.visible, frames.clip)
    hidden = {ratio: (looks[ratio].frames.visible != frames.clip).any(-1) for ratio in looks}
    assert 0 < hidden[0.5].mean() <= 0.5 < hidden[0.75].mean() <= 0.75
    assert not (hidden[0.5] & ~hidden[0.75]).any()
    # The teacher has looked once; another seed draws another mask from what it saw.
    monkeypatch.setattr(viewer.teacher, "encode", None)
    assert (viewer.look(video, "attention", 0.5, seed=1).frames.visible != looks[0.5].frames.visible).any()


def test_masks_of_a_tube_and_at_random(models, clips):
    video = str(clips / "00001.mp4")

    def find_hidden(mask_type: str) -> np.ndarray:
        look = models.viewer.look(video, mask_type, 0.5)
        return (look.frames.visible != look.frames.clip).any(-1)[:, 8::16, 8::16].reshape(4, -1)

    tube, scattered = find_hidden("tube"), find_hidden("random")
    assert (tube == tube[0]).all() and 0 < tube.mean() < 1
    assert (scattered != scattered[0]).any()


def test_a_teacher_alone_reads_frames_of_its_own_size(settings, clips):
    viewer = TeacherViewer(settings.teacher)
    look = viewer.look(str(clips / "00001.mp4"), "attention", 0.8)
    assert look.frames.clip.shape == (8, 64, 64, 3) and look.agreement is None


def test_search_is_that_of_the_searcher(models, clips):
    searcher = models.searcher
    assert searcher.num_videos == 5 and [Path(video.path).name for video in searcher.skipped] == ["broken.mp4"]
    hits = searcher.search("a red circle moving left", top_k=3)
    expected = searcher.searcher.search("a red circle moving left", top_k=3)
    assert [(hit.path, hit.similarity) for hit in hits] == [(hit.path, hit.similarity) for hit in expected]
    assert hits[0].picture.size == (64, 64) and searcher.has_matching_head
    with pytest.raises(ValueError, match="empty"):
        searcher.search(" ")


def test_an_index_is_kept_and_videos_that_are_gone_are_left_out(settings, tmp_path):
    videos = tmp_path / "videos"
    videos.mkdir()
    for name in ("00000.mp4", "00001.mp4"):
        (videos / name).write_bytes((Path(settings.videos) / name).read_bytes())
    searcher = FolderSearcher(str(videos), settings.video_text, str(tmp_path / "index"))
    assert (tmp_path / "index" / "videos.lance").is_dir() and len(searcher.search("a red circle")) == 2
    (videos / "00000.mp4").unlink()
    assert [Path(hit.path).name for hit in searcher.search("a red circle")] == ["00001.mp4"]


def test_an_index_of_moments_says_when(settings, clips, tmp_path):
    embed_videos([settings.videos], settings.video_text, tmp_path / "index", window=1, stride=0.5)
    searcher = FolderSearcher(settings.videos, settings.video_text, str(tmp_path / "index"))
    hits = searcher.search("a red circle moving left", top_k=3)
    expected = searcher.searcher.search("a red circle moving left", top_k=3)
    assert [(hit.path, hit.start_seconds) for hit in hits] == [(hit.path, hit.start_seconds) for hit in expected]
    assert all(hit.start_seconds is not None for hit in hits) and any(hit.start_seconds for hit in hits)
    for hit in hits:
        with open_video(hit.path) as reader:
            middle = reader.get_frames([round((hit.start_seconds + 0.5) * 8)])[0]
        assert abs(np.asarray(hit.picture).astype(int) - middle).mean() < 1


def test_an_index_is_brought_up_to_date_as_it_was_begun(settings, tmp_path):
    asked = {
        "num_frames": 2,
        "dtype": "bfloat16",
        "tokens": KeptTokenArguments(keep_ratio=0.5, token_selector="random"),
    }
    embed_videos([settings.videos], settings.video_text, tmp_path / "index", **asked)
    before = VideoIndex(tmp_path / "index").read_encoder()
    searcher = FolderSearcher(settings.videos, settings.video_text, str(tmp_path / "index"))
    assert searcher.search("a red circle") and VideoIndex(tmp_path / "index").read_encoder() == before


def test_an_index_that_stores_tokens_is_brought_up_to_date_and_re_ranked_from_them(settings, tmp_path, monkeypatch):
    embed_videos([settings.videos], settings.video_text, tmp_path / "index", store="tokens", store_dtype="float32")
    embed_videos([settings.videos], settings.video_text, tmp_path / "plain")
    stored, plain = (
        FolderSearcher(settings.videos, settings.video_text, str(tmp_path / n)) for n in ("index", "plain")
    )
    query = "a red circle moving left"
    expected = [hit.path for hit in plain.search(query, rerank=True)]
    monkeypatch.setattr(VideoTextEncoder, "encode_videos", None)  # nothing is encoded again
    assert [hit.path for hit in stored.search(query, rerank=True)] == expected


def test_questions_need_words(models, clips):
    video = str(clips / "00000.mp4")
    assert models.answerer.answer(video, "a red circle?") == models.answerer.answer(video, "a red circle?")
    with pytest.raises(ValueError, match="question is empty"):
        models.answerer.answer(video, "  ")


def test_problems_are_told_without_folders_of_the_server(models, clips, sound):
    for path in (clips / "broken.mp4", sound):
        for act in (
            models.classifier.classify,
            lambda video: models.viewer.look(video, "attention", 0.5),
            lambda video: models.answerer.answer(video, "a red circle?"),
        ):
            with pytest.raises(VideoDecodingError) as raised:
                act(str(path))
            message = describe_problem(raised.value, [str(path)])
            assert message.startswith(f"{path.name}: ") and "/" not in message, message


def test_examples_are_spread_and_readable(models):
    assert [Path(path).name for path, _ in choose_examples(models.videos, 3)] == ["00000.mp4", "00002.mp4"]


def test_models_of_another_kind_are_refused(settings):
    with pytest.raises(ValueError, match="is a stage-1 pre-training folder .* needs a video classification folder"):
        load_demo_models(DemoSettings(classifier=settings.student))
    with pytest.raises(
        ValueError, match=r"\(UMTVideoTextFor\w+\), and this step needs a video question answering folder"
    ):
        load_demo_models(DemoSettings(question_answering=settings.video_text))
    with pytest.raises(ValueError, match="is a video classification folder .* needs a stage-1 pre-training folder"):
        load_demo_models(DemoSettings(teacher=settings.teacher, student=settings.classifier))
    with pytest.raises(FileNotFoundError, match="missing: no such"):
        load_demo_models(DemoSettings(videos="missing"))


def test_settings_that_make_no_sense_together():
    with pytest.raises(ValueError, match="teacher"):
        DemoSettings(student="student")
    with pytest.raises(ValueError, match="video_text"):
        DemoSettings(index="index")


def test_variables_overrule_the_file(tmp_path):
    settings = DemoSettings(teacher="openai/clip-vit-base-patch16", videos="videos")
    settings.save(tmp_path / "demo.json")
    assert DemoSettings.load(tmp_path / "demo.json", {}) == settings
    changed = DemoSettings.load(tmp_path / "demo.json", {"UMT_DEMO_VIDEOS": "clips", "UMT_DEMO_TEACHER": ""})
    assert changed == replace(settings, videos="clips")
    assert DemoSettings.load(tmp_path / "missing.json", {}) == DemoSettings()


def test_without_gradio_the_command_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    monkeypatch.delitem(sys.modules, "umt_hf.demo.app", raising=False)
    result = CliRunner().invoke(cli.app, ["demo"])
    assert result.exit_code == 2 and "umt_hf[demo]" in result.output, result.output


def test_the_space_asks_for_what_the_package_needs():
    """A Space has the package as files, so that its dependencies are listed; Gradio comes with the Space."""
    own = [Requirement(line) for line in requires("umt_hf")]
    base = {str(r) for r in own if r.marker is None} | {str(r).split(";")[0] for r in own if r.name == "lancedb"}
    listed = {str(Requirement(line)) for line in (FOLDER / "requirements.txt").read_text().splitlines()}
    # Not needed by the page: the command line, model cards, a tracker and a second video reader.
    unneeded = ("typer", "rich", "packaging", "jinja2", "tensorboard", "decord2")
    assert listed == {line for line in base if not line.startswith(unneeded)}
    gradio = next(r for r in own if r.name == "gradio")
    header = (FOLDER / "README.md").read_text().split("---")[1]
    version = next(line.split()[1] for line in header.splitlines() if line.startswith("sdk_version"))
    assert version in gradio.specifier


OPTIONS = {"classifier": [], "teacher": [], "student": ["teacher"], "video_text": ["videos"], "question_answering": []}


def spoil(folder: Path, kind: str) -> None:
    """Damage a copy of a model folder."""
    weights, config = folder / "model.safetensors", folder / "config.json"
    if kind == "truncated weights":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif kind == "no weights":
        weights.unlink()
    elif kind == "text for weights":
        weights.write_text("version https://git-lfs.github.com/spec/v1")
    elif kind == "a folder for weights":
        weights.unlink()
        weights.mkdir()
    elif kind == "damaged config":
        config.write_text(config.read_text()[:-20])
    elif kind == "no config":
        config.unlink()
    elif kind == "another architecture":
        config.write_text('{"model_type": "bert"}')
    else:
        assert kind == "empty"
        shutil.rmtree(folder)
        folder.mkdir()


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize(
    "kind",
    [
        "truncated weights",
        "no weights",
        "text for weights",
        "a folder for weights",
        "damaged config",
        "no config",
        "another architecture",
        "empty",
    ],
)
def test_a_broken_folder_is_refused_in_a_line(option, kind, settings, tmp_path, monkeypatch):
    folder = tmp_path / "model"
    shutil.copytree(getattr(settings, option), folder)
    spoil(folder, kind)
    monkeypatch.setattr("umt_hf.demo.app.launch_demo", lambda settings, *_: load_demo_models(settings))
    arguments = [word for name in OPTIONS[option] for word in (name_option(name), getattr(settings, name))]
    result = CliRunner().invoke(cli.app, ["demo", name_option(option), str(folder), *arguments])
    assert result.exit_code == 2 and isinstance(result.exception, SystemExit), (result.output, result.exception)
    assert "Traceback" not in result.output and "model" in result.output


def test_mistakes_are_usage_errors(settings, clips, tmp_path):
    for arguments in (
        ["--student", "x"],
        ["--teacher", str(tmp_path / "missing")],
        ["--videos", str(tmp_path)],
        ["--push", "me/demo", "--classifier", settings.classifier],
    ):
        result = CliRunner().invoke(cli.app, ["demo", *arguments])
        assert result.exit_code == 2, result.output
