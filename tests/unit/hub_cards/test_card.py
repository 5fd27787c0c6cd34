"""Model cards: every released model's and a run's read well, load, and hold no number without a source."""

import ast
import inspect
import json
import re
import shlex
import shutil

import numpy as np
import pytest
import torch
import yaml
from huggingface_hub import ModelCard, ModelCardData
from transformers import pipeline
from typer.testing import CliRunner

import umt_hf
from tests.hub.released import write_bert_tokenizer
from tests.parity.multi_modality import build_config, load_case
from tests.unit.video_files import write_video
from umt_hf import cli
from umt_hf.hub_cards.card import build_model_card, describe_card, write_model_card
from umt_hf.hub_cards.convert_umt_checkpoint import TASK_CLASSES, build_published_config
from umt_hf.modeling.configuration_umt_video import UMTVideoConfig
from umt_hf.modeling.modeling_umt_video import (
    UMTVideoForActionDetection,
    UMTVideoForPreTraining,
    UMTVideoForVideoClassification,
)
from umt_hf.processing.processing_umt_video_text import UMTVideoTextProcessor, build_tokenizer
from umt_hf.processing.video_processing_umt_video import UMTVideoProcessor
from umt_hf.runs.summary import name_metric
from umt_hf.zoo import load_zoo

ZOO = load_zoo()
TINY = {
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "image_size": 32,
    "patch_size": 16,
    "num_frames": 4,
    "num_aligned_layers": 2,
    "teacher_hidden_size": 8,
}
runner = CliRunner()


def lint(text: str) -> list[str]:
    """What a reader of a README would stumble over."""
    problems = []
    body = text.split("---\n", 2)[2]
    for language, code in re.findall(r"^```(\w*)\n(.*?)^```$", body, flags=re.DOTALL | re.MULTILINE):
        try:
            {"python": ast.parse, "bash": shlex.split, "yaml": yaml.safe_load, "bibtex": str}[language](code)
        except (KeyError, ValueError, SyntaxError, yaml.YAMLError) as error:
            problems.append(f"{language or 'nameless'} block: {error}")
    prose = re.sub(r"^```.*?^```$", "CODE", body, flags=re.DOTALL | re.MULTILINE)
    if "```" in prose or "{{" in prose or "{%" in prose or "None" in prose:
        problems.append("open code block, or what the template left")
    headings = re.findall(r"^(#+) (.+)$", prose, flags=re.MULTILINE)
    if [level for level, _ in headings].count("#") != 1 or headings[0][0] != "#":
        problems.append("not exactly one title")
    if len({title for _, title in headings}) != len(headings):
        problems.append("two sections of one name")
    if empty := re.findall(r"^(#+ .+)\n+(?=#|\Z)", prose, flags=re.MULTILINE):
        problems.append(f"empty sections {empty}")
    for line, following in zip(prose.splitlines(), prose.splitlines()[1:], strict=False):
        if line.startswith("|") and following.startswith("|") and line.count("|") != following.count("|"):
            problems.append(f"table row {following}")
    for target in re.findall(r"\]\(([^)]*)\)", prose):
        if not re.fullmatch(r"https://[\w.-]+/[\w./-]+|[\w-][\w./-]*", target):
            problems.append(f"link {target}")
    if re.search(r"\n\n\n|[ \t]\n", prose):
        problems.append("white space")
    return problems


def validate_metadata(card: ModelCard) -> dict:
    """As the Hub's validator does, the part that needs no Hub: it parses, and the figures come back."""
    data = card.data.to_dict()
    assert ModelCardData(**{**data, "ignore_metadata_errors": False}).to_dict() == data
    assert re.fullmatch(r"[a-z-]+", data["pipeline_tag"]) and data["library_name"] == "transformers"
    assert all(re.fullmatch(r"[\w./:-]+", tag) for tag in [*data["tags"], *(data.get("datasets") or [])])
    return data


def write_config(folder, name):
    config, task = build_published_config(name)
    config.architectures = [TASK_CLASSES[task].__name__]
    config.save_pretrained(folder)


@pytest.mark.parametrize("name", ZOO)
def test_card_of_every_released_model(name, tmp_path):
    entry = ZOO[name]
    write_config(tmp_path, name)
    card = build_model_card(tmp_path, entry)
    assert lint(str(card)) == []
    data = validate_metadata(card)
    assert data["license"] == "unknown" and data["base_model"] == "OpenGVLab/UMT"
    metrics = [
        m["value"] for result in data.get("model-index", [{"results": []}])[0]["results"] for m in result["metrics"]
    ]
    assert metrics == [figure.value for figure in entry.figures]
    sections = re.findall(r"^## (.+)$", str(card), flags=re.MULTILINE)
    assert {"How to use", "Training", "Limits", "Licence", "Citation"} <= set(sections)
    assert ("Evaluation" in sections) == bool(entry.figures) and ("Compute" in sections) == (name == "umt-vit-l16-25m")
    licence = str(card).partition("## Licence\n")[2].partition("##")[0]
    assert "Weights: no licence of the released weights is known here; ask at [OpenGVLab/UMT](https://" in licence
    assert "Published code: MIT, at [OpenGVLab/unmasked_teacher](https://" in licence
    for figure in entry.figures:
        assert f"| {figure.metric} | {figure.value} |" in str(card)
    assert (
        ("trust_remote_code=True" in str(card)) == (f'"your-name/{name}"' in str(card)) == (entry.task != "detection")
    )


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    """A finished stage-1 run of a tiny model."""
    folder = tmp_path_factory.mktemp("run") / "my-encoder"
    torch.manual_seed(0)
    config = UMTVideoConfig(**TINY)
    UMTVideoForPreTraining(config).save_pretrained(folder)
    UMTVideoProcessor.from_model_config(config).save_pretrained(folder)
    run = {
        "model": {"num_frames": 4, "model_name_or_path": None},
        "teacher": {"teacher_name_or_path": "/data/somewhere/clip"},
        "data": {
            "train_data": "/data/secret/train.csv",
            "validation_data": "clips/held_out.csv",
            "data_root": "/data",
        },
        "training": {"output_dir": "/data/out", "data_root": "/data", "max_steps": 20, "hub_token": "hf_secret"},
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(run))
    (folder / "versions.json").write_text('{"umt_hf": "0.1.0", "torch": "2.15.0"}')
    lines = [{"step": s, "loss": 1.0 / s, "clips_per_second": 3.0} for s in (10, 20)]
    lines.append({"step": 20, "eval_loss": 0.625, "eval_unreadable_videos": 0})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def test_card_of_a_pre_training_run(encoder):
    text = write_model_card(encoder, repo_id="me/my-encoder").read_text()
    assert lint(text) == []
    data = validate_metadata(ModelCard(text))
    assert "license" not in data and "base_model" not in data
    assert data["model-index"][0]["results"][0]["metrics"][0]["value"] == 0.625
    assert "| held_out | validation | loss | 0.6250 |" in text and "20 optimizer steps" in text
    assert "3 clips a second" in text and "umt_hf 0.1.0, torch 2.15.0." in text and '"me/my-encoder"' in text
    assert "max_steps: 20" in text and "train.csv" in text
    for private in ("/data", "secret", "output_dir", "unreadable"):
        assert private not in text
    assert "![Losses of the run](losses.png)" in text and (encoder / "losses.png").stat().st_size > 5000


def test_a_name_that_the_hub_does_not_take_is_refused(encoder):
    before = sorted(path.name for path in encoder.iterdir())
    for name in ("a/b/c", "my model", "me/-encoder"):
        with pytest.raises(ValueError, match=f"'{name}'"):
            write_model_card(encoder, repo_id=name)
    assert sorted(path.name for path in encoder.iterdir()) == before


def run_example(folder, monkeypatch, capsys):
    """What the card's first example prints, run beside the folder and a video."""
    write_video(folder.parent / "video.mp4", num_frames=48)
    monkeypatch.chdir(folder.parent)
    text = write_model_card(folder.name).read_text()
    example = re.search(r"^```python\n(import umt_hf\n.*?)^```$", text, flags=re.DOTALL | re.MULTILINE)[1]
    exec(example, {})
    return capsys.readouterr().out


def test_example_of_an_encoder_runs(encoder, tmp_path, monkeypatch, capsys):
    shutil.copytree(encoder, tmp_path / "my-encoder")
    assert "torch.Size([1, 16, 24])" in run_example(tmp_path / "my-encoder", monkeypatch, capsys)


@pytest.mark.parametrize(
    "model_class,task", [(UMTVideoForVideoClassification, "classification"), (UMTVideoForActionDetection, "detection")]
)
def test_examples_of_heads_run(model_class, task, tmp_path, monkeypatch, capsys):
    folder = tmp_path / "my-model"
    config = UMTVideoConfig(**TINY, id2label={0: "run", 1: "jump"}, label2id={"run": 0, "jump": 1})
    model_class(config).save_pretrained(folder)
    UMTVideoProcessor.from_model_config(config, task).save_pretrained(folder)
    if task == "classification" and "video_processor" not in inspect.signature(pipeline).parameters:
        pytest.skip("this pipeline of Transformers takes no video processor")
    printed = run_example(folder, monkeypatch, capsys)
    assert "run" in printed and "jump" in printed


@pytest.mark.parametrize(
    "case,model_class",
    [("umt_pretrain_video", "UMTVideoTextForPreTraining"), ("video_qa", "UMTVideoTextForQuestionAnswering")],
)
def test_examples_of_models_with_text_run(case, model_class, tmp_path, monkeypatch, capsys):
    config = build_config(load_case(case)[0])
    folder = tmp_path / "my-model"
    getattr(umt_hf, model_class)(config).save_pretrained(folder)
    write_bert_tokenizer(tmp_path / "bert", config.text_config.vocab_size)
    tokenizer = build_tokenizer(tmp_path / "bert", max_length=8)
    UMTVideoTextProcessor(UMTVideoProcessor.from_model_config(config), tokenizer).save_pretrained(folder)
    assert "[" in run_example(folder, monkeypatch, capsys)


@pytest.fixture
def classifier(tmp_path):
    config = UMTVideoConfig(**TINY, id2label={0: "run", 1: "jump"}, label2id={"run": 0, "jump": 1})
    UMTVideoForVideoClassification(config).save_pretrained(tmp_path)
    return tmp_path


def test_card_of_a_classifier_with_reports(classifier):
    history = [{"step": 5, "loss": 0.7}, {"step": 10, "loss": 0.5}, {"step": 10, "train_runtime": 7200.0}]
    (classifier / "trainer_state.json").write_text(json.dumps({"log_history": history}))
    (classifier / "run.yaml").write_text(
        "classification: {model_name_or_path: outputs/mine, validation_data: clips/val}"
    )
    results = {"eval_top1_accuracy": 0.5, "eval_top5_accuracy": np.nan, "eval_unreadable_videos": 0.0}
    (classifier / "eval_results.json").write_text(json.dumps(results))
    (classifier / "test").mkdir()
    report = {"metrics": {"top1_accuracy": 0.75}, "data": "/data/clips/test", "num_frames": 4, "num_clips": 2}
    (classifier / "test" / "report.json").write_text(json.dumps({**report, "num_crops": 3}))
    text = write_model_card(classifier).read_text()
    assert lint(text) == [] and validate_metadata(ModelCard(text))["pipeline_tag"] == "video-classification"
    assert "| own data | validation | top-1 accuracy | 0.5000 |  | `eval_results.json` |" in text
    assert "| own data |  | top-1 accuracy | 0.7500 | 4x3x2 | `test/report.json` |" in text
    assert "top-5" not in text and "unreadable" not in text
    assert "2.0 hours of training" in text and "classes | 2: run, jump |" in text and "outputs/mine" in text


def test_a_folder_without_records_says_so(classifier):
    text = write_model_card(classifier).read_text()
    assert lint(text) == [] and "no record of its training" in text
    assert "## Evaluation" not in text and "## Compute" not in text and "losses.png" not in text


def test_detector(tmp_path):
    UMTVideoForActionDetection(UMTVideoConfig(**TINY, num_labels=3)).save_pretrained(tmp_path)
    text = write_model_card(tmp_path).read_text()
    assert lint(text) == [] and "detector = ActionDetector(" in text and "without names" in text
    assert "AVA" not in text and "trust_remote_code" not in text


def test_attentive_probe(tmp_path):
    UMTVideoForVideoClassification(UMTVideoConfig(**TINY, pooling_type="attentive")).save_pretrained(tmp_path)
    text = write_model_card(tmp_path).read_text()
    assert lint(text) == [] and "learned query" in text and "trust_remote_code=True" in text


def test_command(classifier, tmp_path_factory):
    result = runner.invoke(cli.app, ["card", str(classifier), "--repo-id", "me/model", "--json"])
    assert result.exit_code == 0, result.output
    described = json.loads(result.stdout)
    assert described == describe_card(classifier / "README.md")
    assert described["headings"][0] == "model" and described["metadata"]["pipeline_tag"] == "video-classification"
    empty = tmp_path_factory.mktemp("empty")
    assert "no config.json" in runner.invoke(cli.app, ["card", str(empty)]).output
    (empty / "config.json").write_text('{"model_type": "bert", "architectures": ["BertModel"]}')
    assert runner.invoke(cli.app, ["card", str(empty)]).exit_code == 2


@pytest.mark.parametrize(
    "name,words,kind",
    [
        ("dual_softmax_video_to_text_r10", "video to text R@10, dual softmax", "recall"),
        ("dual_mean_recall", "mean recall, dual encoder", "recall"),
        ("reranked_text_to_video_median_rank", "text to video median rank, re-ranked", "median_rank"),
        ("top5_accuracy", "top-5 accuracy", "accuracy"),
        ("accuracy", "accuracy", "accuracy"),
        ("loss", "loss", "loss"),
    ],
)
def test_names_of_figures(name, words, kind):
    assert name_metric(name) == (words, kind)


def test_lint_finds_what_is_wrong():
    good = "---\na: 1\n---\n# Title\n\nText.\n"
    assert lint(good) == []
    for bad in (
        "## Empty\n",
        "```python\nx =\n```\n",
        "# Two\n\nText.\n",
        "[x](http:/y)\n",
        "| a | b |\n| - |\n",
        "{{ x }}\n",
    ):
        assert lint(good + "\n" + bad) != [], bad
