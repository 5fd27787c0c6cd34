"""Facts of a folder agree with the model it holds, and its cost with a count by hand."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from tests.hub.server import LoopbackHub
from tests.unit.finetuning.test_classification import tiny_config
from tests.unit.inference.test_search import save_model
from umt_hf import (
    UMTVideoConfig,
    UMTVideoForPreTraining,
    UMTVideoForVideoClassification,
    UMTVideoProcessor,
    UMTVideoTextForPreTraining,
    UMTVideoTextForQuestionAnswering,
)
from umt_hf.cli import app
from umt_hf.hub_cards.model_info import describe_model

runner = CliRunner()


def save_classifier(folder, **options):
    config = tiny_config(id2label={0: "run", 1: "jump", 2: "stand"}, label2id={"run": 0, "jump": 1, "stand": 2})
    model = UMTVideoForVideoClassification(config)
    model.save_pretrained(folder, **options)
    UMTVideoProcessor.from_model_config(config).save_pretrained(folder)
    return model


def count_encoder_flops(tokens: int, width: int, layers: int, mlp: int, pixels: int) -> int:
    """Two operations a multiply-add: patches; then q, k, v, o; scores and their use; the perceptron."""
    layer = 4 * tokens * width**2 + 2 * tokens**2 * width + 2 * tokens * width * mlp
    return 2 * (tokens * pixels * width + layers * layer)


def test_cost_of_vit_b16_by_hand(tmp_path):
    """8 frames of 224 x 224 are 8 * 14 * 14 = 1568 tokens; the paper's ViT-B/16 costs 180 G multiply-adds a clip."""
    config = UMTVideoConfig(num_labels=400, architectures=["UMTVideoForVideoClassification"])
    config.save_pretrained(tmp_path)
    info = describe_model(tmp_path, num_clips=4, num_crops=3)
    assert info.tokens_per_clip == 1568 and info.image_size == (224, 224) and info.num_frames == 8
    expected = count_encoder_flops(1568, 768, 12, 3072, 3 * 16 * 16) + 2 * 768 * 400
    assert info.costs[0].flops == expected == 358_839_484_416 + 614_400
    assert info.num_views == 12 and info.views_flops == 12 * expected
    assert info.weights is None and info.processor == {} and info.max_text_tokens is None
    assert info.parameters["head"] == 2 * 768 + 768 * 400 + 400
    assert 85e6 < info.parameters["vision"] < 87e6


@pytest.mark.parametrize(("mask_type", "visible"), [("attention", 2 * 1), ("random", 8 - 6)])
def test_the_student_sees_the_visible_tokens(mask_type, visible, tmp_path):
    """4 patches a frame, of which int(4 * 0.8) = 3 are hidden; at random int(8 * 0.8) = 6 of all."""
    config = tiny_config(mask_type=mask_type, teacher_hidden_size=10)
    UMTVideoForPreTraining(config).save_pretrained(tmp_path)
    whole, masked = describe_model(tmp_path).costs
    assert whole.flops == count_encoder_flops(8, 24, 2, 32, 768)
    assert masked.num_tokens == visible
    assert masked.flops == count_encoder_flops(visible, 24, 2, 32, 768) + 2 * visible * 24 * 10


def test_facts_of_a_classifier(tmp_path):
    model = save_classifier(tmp_path)
    (tmp_path / "versions.json").write_text('{"umt_hf": "0.1.0"}')
    (tmp_path / "run.yaml").write_text("data: {train_data: shapes}\ntraining: {max_steps: 7, logging_steps: 3}\n")
    result = runner.invoke(app, ["info", str(tmp_path), "--json"])
    assert result.exit_code == 0, result.output
    facts = json.loads(result.stdout)
    assert facts["architecture"] == "UMTVideoForVideoClassification" and facts["task"] == "video classification"
    assert facts["parameters"]["total"] == sum(parameter.numel() for parameter in model.parameters())
    assert facts["labels"] == ["run", "jump", "stand"]
    assert facts["processor"]["num_frames"] == 2 and facts["processor"]["crop_size"] == {"height": 32, "width": 32}
    assert facts["weights"]["num_tensors"] == len(model.state_dict()) and facts["weights"]["dtypes"] == ["F32"]
    assert facts["weights"]["size_bytes"] == 4 * facts["parameters"]["total"]
    assert facts["weights"]["missing"] == facts["weights"]["unexpected"] == []
    assert facts["size_bytes"] == sum(file.stat().st_size for file in tmp_path.iterdir())
    assert facts["versions"] == {"umt_hf": "0.1.0"} and facts["run"] == {"train_data": "shapes", "max_steps": 7}

    lines = runner.invoke(app, ["info", str(tmp_path)]).stdout.splitlines()
    assert "labels      3: run, jump, stand" in lines
    assert all(len(line) <= 80 or " " not in line.strip() for line in lines)


def test_weights_that_do_not_fit_are_named(tmp_path):
    save_classifier(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    tensors["classifier.weight"] = torch.zeros(5, 24)
    tensors["surprise"] = tensors.pop("classifier.bias").half()
    save_file(tensors, file, {"format": "pt"})
    weights = describe_model(tmp_path).weights
    assert set(weights.missing) == {"classifier.weight", "classifier.bias"} and weights.unexpected == ("surprise",)
    assert weights.dtypes == ("F16", "F32")


def test_shards_count_as_one(tmp_path):
    save_classifier(tmp_path / "whole")
    save_classifier(tmp_path / "shards", max_shard_size="40KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    assert describe_model(tmp_path / "shards").weights == describe_model(tmp_path / "whole").weights
    next((tmp_path / "shards").glob("*.safetensors")).unlink()
    with pytest.raises(ValueError, match="lacks model-0000"):
        describe_model(tmp_path / "shards")


@pytest.mark.parametrize("model_class", [UMTVideoTextForPreTraining, UMTVideoTextForQuestionAnswering])
def test_models_of_video_and_text(model_class, tmp_path):
    info = describe_model(save_model(tmp_path, model_class))
    model = model_class.from_pretrained(tmp_path)
    assert info.parameters["total"] == sum(parameter.numel() for parameter in model.parameters())
    assert info.parameters["text"] == sum(parameter.numel() for parameter in model.text_model.parameters())
    assert info.weights.missing == () and info.weights.unexpected == ()  # shared tables are stored once
    assert info.max_text_tokens == 16 and info.labels == ()
    assert all(cost.flops > 0 for cost in info.costs)
    assert len(info.costs) == (4 if model_class is UMTVideoTextForPreTraining else 2)


def test_a_hub_id_without_its_weights(tmp_path, monkeypatch):
    save_classifier(tmp_path / "model")
    with LoopbackHub(tmp_path / "hub") as hub:
        hub.connect(monkeypatch)
        hub.add_repo("me/model", {file.name: file for file in (tmp_path / "model").iterdir()})
        info, local = describe_model("me/model"), describe_model(tmp_path / "model")
        cached = {file.name for file in (tmp_path / "hub" / "home").rglob("*.safetensors")}
        with pytest.raises(FileNotFoundError, match="me/other is not a folder here"):
            describe_model("me/other")
    assert info.weights == local.weights and info.costs == local.costs and info.labels == local.labels
    assert not cached  # their headers were read, and nothing was kept


@pytest.mark.parametrize("model", ["/no/such/folder", "empty", "other", "me/nowhere"])
def test_mistakes_are_usage_errors(model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("empty", "other"):
        (tmp_path / name).mkdir()
    (tmp_path / "other" / "config.json").write_text('{"model_type": "bert", "architectures": ["BertModel"]}')
    result = runner.invoke(app, ["info", model])
    assert result.exit_code == 2 and result.stdout == ""
    assert "Traceback" not in result.stderr and model in result.stderr
