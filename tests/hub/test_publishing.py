"""Folders go up complete and come back to people who do not have this package."""

import ast
import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from huggingface_hub import HfApi, ModelCard
from huggingface_hub.errors import RepositoryNotFoundError
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForVideoClassification, AutoModelForVisualQuestionAnswering, AutoProcessor
from typer.testing import CliRunner

import umt_hf
from tests.hub.conftest import read_files
from tests.hub.server import OTHER_TOKEN, READ_TOKEN, TOKEN, LoopbackHub
from tests.unit.modeling.test_modeling_video_text import TINY, TINY_TEXT, TINY_VISION
from tests.unit.processing.test_processing_video_text import WORDS, build_processor
from tests.unit.video_files import write_video
from umt_hf import (
    UMTVideoConfig,
    UMTVideoForActionDetection,
    UMTVideoForPreTraining,
    UMTVideoForVideoClassification,
    UMTVideoModel,
    UMTVideoProcessor,
    UMTVideoTextConfig,
    UMTVideoTextForPreTraining,
    UMTVideoTextForQuestionAnswering,
    UMTVideoTextForRetrieval,
    UMTVideoTextModel,
    UMTVideoTextProcessor,
    cli,
)
from umt_hf.hub_cards.publishing import EXCLUDED, PublishingError, build_remote_code, push_folder

QUESTION = "A man?"
# A process without this package, wherever it may be installed, and with torch, torchvision, transformers and av alone.
PULL = """
import importlib.abc, importlib.util, json, os, sys

MISSING = ("umt_hf", "decord", "torchcodec", "einops", "datasets", "evaluate", "matplotlib", "typer", "faiss")

class NotInstalled(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in MISSING:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

def find_installed(name, package=None, find_spec=importlib.util.find_spec):
    return None if name.split(".")[0] in MISSING else find_spec(name, package)

sys.meta_path.insert(0, NotInstalled())
importlib.util.find_spec = find_installed  # how Transformers looks for a package without importing it
import torch
import transformers
from safetensors.torch import load_file
from transformers import AutoModelForVisualQuestionAnswering

torch.set_num_threads(1)
transformers.logging.set_verbosity_error()
expected = load_file(sys.argv[1])
options = {"trust_remote_code": True}
found = {}

def load(auto_class, name):
    model, info = auto_class.from_pretrained(name, **options, output_loading_info=True)
    found[name] = sorted(info["missing_keys"])
    return model.eval()

processor = transformers.AutoVideoProcessor.from_pretrained("me/stage1", **options)
clip = processor(sys.argv[2], return_tensors="pt")["pixel_values"]
found["clip"] = (clip - expected["clip"]).abs().max().item()
text_processor = transformers.AutoProcessor.from_pretrained("me/retrieval", **options)
inputs = text_processor(videos=sys.argv[2], text=sys.argv[3], return_tensors="pt")
with torch.no_grad():
    outputs = {
        "stage1": load(transformers.AutoModel, "me/stage1")(clip).last_hidden_state,
        "classifier": load(transformers.AutoModelForVideoClassification, "me/classifier")(clip).logits,
        "retrieval": load(transformers.AutoModel, "me/retrieval")(**inputs).logits_per_text,
        "answering": load(AutoModelForVisualQuestionAnswering, "me/answering")(**inputs).last_hidden_state,
    }
for name, value in outputs.items():
    found[name] = (value - expected[name]).abs().max().item()
found["modules"] = sorted(name for name in sys.modules if name.split(".")[0] == "umt_hf")
print(json.dumps(found))
"""


@pytest.mark.slow
def test_loads_where_the_package_is_not_installed(hub, folders, tmp_path):
    """The same numbers to the last bit, from the code and weights on the Hub alone."""
    for name, folder in folders.items():
        before = read_files(folder)
        assert push_folder(folder, f"me/{name}").startswith(f"{hub.url}/me/{name}/commit/")
        assert read_files(folder) == before
    video = str(write_video(tmp_path / "clip.mp4"))
    clip = UMTVideoProcessor.from_pretrained(folders["stage1"])(video, return_tensors="pt")["pixel_values"]
    processor = AutoProcessor.from_pretrained(folders["retrieval"])
    inputs = processor(videos=video, text=QUESTION, return_tensors="pt")

    def load(auto_class, name):
        return auto_class.from_pretrained(folders[name]).eval()

    with torch.no_grad():
        expected = {
            "clip": clip,
            "stage1": load(AutoModel, "stage1")(clip).last_hidden_state,
            "classifier": load(AutoModelForVideoClassification, "classifier")(clip).logits,
            "retrieval": load(AutoModel, "retrieval")(**inputs).logits_per_text,
            "answering": load(AutoModelForVisualQuestionAnswering, "answering")(**inputs).last_hidden_state,
        }
    save_file({name: tensor.contiguous() for name, tensor in expected.items()}, tmp_path / "expected.safetensors")
    (tmp_path / "pull.py").write_text(PULL)
    command = [sys.executable, "-I", "pull.py", "expected.safetensors", video, QUESTION]
    environment = hub.environment(token=None, home=tmp_path / "clean")
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout.splitlines()[-1])
    assert found.pop("modules") == []
    assert {name: found.pop(f"me/{name}") for name in folders} == {name: [] for name in folders}
    assert found == {"clip": 0.0, **dict.fromkeys(folders, 0.0)}


def test_auto_map_names_every_class_and_each_of_its_files_travels(folders):
    code = build_remote_code(folders["answering"])
    auto_map = json.loads(code["config.json"])["auto_map"]
    assert auto_map == {
        "AutoConfig": "configuration_umt_video_text.UMTVideoTextConfig",
        "AutoModel": "modeling_umt_video_text.UMTVideoTextModel",
        "AutoModelForPreTraining": "modeling_umt_video_text.UMTVideoTextForPreTraining",
        "AutoModelForVisualQuestionAnswering": "modeling_umt_video_text.UMTVideoTextForQuestionAnswering",
        "AutoModelForZeroShotImageClassification": "modeling_umt_video_text.UMTVideoTextModel",
    }
    settings = json.loads(code["processor_config.json"])
    assert settings["auto_map"] == {"AutoProcessor": "processing_umt_video_text.UMTVideoTextProcessor"}
    expected = {"AutoVideoProcessor": "video_processing_umt_video.UMTVideoProcessor"}
    assert settings["video_processor"]["auto_map"] == expected
    files = {name for name in code if name.endswith(".py")}
    assert {f"{reference.split('.')[0]}.py" for reference in auto_map.values()} <= files
    for name in files:
        for line in code[name].decode().splitlines():
            assert not line.strip().startswith(("import umt_hf", "from umt_hf", "from ..")), (name, line)
            if line.strip().startswith("from ."):
                assert f"{line.split()[1][1:]}.py" in files, (name, line)


VIDEO_FILES = {
    "configuration_umt_video.py",
    "containers.py",
    "decoding.py",
    "images.py",
    "fresh_heads_umt.py",
    "losses_umt.py",
    "masking_umt_video.py",
    "frame_folders.py",
    "media_files.py",
    "modeling_umt_video.py",
    "outputs_umt_video.py",
    "quantization_umt.py",
    "resizing.py",
    "sampling.py",
    "video_processing_umt_video.py",
}
VIDEO_TEXT_FILES = VIDEO_FILES | {
    "configuration_umt_video_text.py",
    "modeling_umt_text.py",
    "modeling_umt_video_text.py",
    "processing_umt_video_text.py",
    "outputs_umt_video_text.py",
    "towers_umt_video_text.py",
}
PUSHED_FILES = {
    UMTVideoModel: VIDEO_FILES,
    UMTVideoForPreTraining: VIDEO_FILES,
    UMTVideoForVideoClassification: VIDEO_FILES,
    UMTVideoForActionDetection: VIDEO_FILES,
    UMTVideoTextModel: VIDEO_TEXT_FILES,
    UMTVideoTextForPreTraining: VIDEO_TEXT_FILES,
    UMTVideoTextForRetrieval: VIDEO_TEXT_FILES,
    UMTVideoTextForQuestionAnswering: VIDEO_TEXT_FILES,
}


def find_imports(source: str) -> set[str]:
    """Siblings that a file imports, anywhere in it."""
    nodes = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.ImportFrom) and node.level]
    assert all(node.level == 1 and node.module for node in nodes)
    return {f"{node.module}.py" for node in nodes}


def find_circle(imports: dict[str, set[str]]) -> list[str]:
    """Files that import each other in a circle; empty if files can be loaded one after another."""
    left = dict(imports)
    while ready := [name for name, needed in left.items() if not needed & left.keys()]:
        for name in ready:
            del left[name]
    return sorted(left)


@pytest.mark.parametrize("model_class", PUSHED_FILES)
def test_the_files_of_a_pushed_repository(model_class, tmp_path):
    """Models and processors alone: no converter, nothing that reads a pickle, no labels of a data set, no circle."""
    is_video = model_class.config_class is UMTVideoConfig
    text = {**TINY_TEXT, "vocab_size": len(WORDS)}
    config = UMTVideoConfig(**TINY_VISION) if is_video else UMTVideoTextConfig(**{**TINY, "text_config": text})
    processor = UMTVideoProcessor.from_model_config(config) if is_video else build_processor(max_length=16)
    model_class(config).save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)

    pushed = {name: code for name, code in build_remote_code(tmp_path).items() if name.endswith(".py")}
    assert set(pushed) == PUSHED_FILES[model_class]
    package = Path(umt_hf.__file__).parent
    for name, code in pushed.items():
        (path,) = [package / wing / name for wing in ("modeling", "processing") if (package / wing / name).exists()]
        assert path.read_bytes() == code, name
        source = code.decode()
        for forbidden in ("torch.load", "pickle", "convert_state_dict", "ava_labels"):
            assert forbidden not in source, (name, forbidden)
    assert not [name for name in pushed if "convert" in name or "label" in name or "teacher" in name]
    imports = {name: find_imports(code.decode()) for name, code in pushed.items()}
    assert set().union(*imports.values()) <= set(pushed)
    assert find_circle(imports) == []
    assert find_circle(imports | {"losses_umt.py": {f"{model_class.__module__.split('.')[-1]}.py"}}) != []


def test_no_code_travels_but_in_a_push(hub, folders, tmp_path):
    push_folder(folders["stage1"], "me/model")
    model = UMTVideoForPreTraining.from_pretrained(folders["stage1"])
    model.save_pretrained(tmp_path / "saved")
    UMTVideoProcessor.from_pretrained(folders["stage1"]).save_pretrained(tmp_path / "saved")
    assert not list((tmp_path / "saved").glob("*.py"))
    assert b"auto_map" not in b"".join(read_files(tmp_path / "saved").values())
    push_folder(folders["stage1"], "me/plain", with_code=False)
    assert not any(path.endswith(".py") for path in hub.list_files("me/plain"))
    assert b"auto_map" not in hub.read_file("me/plain", "config.json")


def test_what_belongs_to_the_run_stays_here(hub, folders, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(folders["classifier"], folder)
    kept = {"README.md": "---\nlicense: mit\n---\n", "metrics.jsonl": "{}\n", "adapter/adapter_config.json": "{}"}
    excluded = {
        "training_state/model.txt",
        "checkpoint-4/model.safetensors",
        "checkpoint-8.unfinished/config.json",
        "optimizer.pt",
        "training_args.bin",
        "umt-hf/events.out.tfevents.1",
        "runs/now/hparams.yml",
        ".hub-x/model.safetensors",
    }
    for name, content in {**kept, **dict.fromkeys(excluded, "x")}.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(content)
    push_folder(folder, "me/model")
    files = set(hub.list_files("me/model"))
    assert kept.keys() | {"run.yaml", "model.safetensors", "video_preprocessor_config.json"} <= files
    assert not files & excluded and "*.bin" in EXCLUDED


def test_no_folder_of_this_machine_goes_up(hub, folders, tmp_path):
    """Settings, configurations, reports and the card, with absolute and relative places planted in each."""
    folder = tmp_path / "secret_user" / "run"
    shutil.copytree(folders["classifier"], folder)
    shutil.rmtree(tmp_path / "secret_user" / "teacher", ignore_errors=True)
    (tmp_path / "secret_user" / "teacher").mkdir()
    config = json.loads((folder / "config.json").read_text())
    places = {"teacher_name_or_path": "secret_user/teacher", "_name_or_path": "/home/secret_user/mine"}
    (folder / "config.json").write_text(json.dumps(config | places))
    run = {
        "model": {"model_name_or_path": str(tmp_path / "secret_user" / "start")},
        "data": {
            "train_data": "../secret_user/videos/train",
            "validation_data": "secret_user/validation",
            "train_corpora": ["secret_user/one.json", "/secret_user/two.json"],
            "class_names": "secret_user/names.txt",
            "data_root": "/secret_user",
        },
        "training": {"output_dir": "secret_user/run", "run_name": "secret_user"},
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(run))
    (folder / "eval_results.json").write_text('{"eval_top1_accuracy": 0.5}')
    (folder / "test").mkdir()
    report = {"metrics": {"top1_accuracy": 0.75}, "data": "secret_user/clips/test.csv", "model": str(folder)}
    (folder / "test" / "report.json").write_text(json.dumps(report))
    predictions = [{"video": "secret_user/a.mp4", "label": "on/off", "error": None}]
    (folder / "test" / "predictions.json").write_text(json.dumps(predictions))
    (folder / ".lock").write_text("process 1 on secret_user\n")  # as a run leaves it
    before = read_files(folder)

    push_folder(folder, "me/model")
    files = hub.list_files("me/model")
    assert {"run.yaml", "README.md", "test/report.json", "config.json"} <= set(files)
    assert "test/predictions.json" not in files
    for name in files:
        assert b"secret_user" not in hub.read_file("me/model", name), name
    settings = yaml.safe_load(hub.read_file("me/model", "run.yaml"))
    assert settings["data"]["train_corpora"] == ["one.json", "two.json"] and settings["data"]["train_data"] == "train"
    assert json.loads(hub.read_file("me/model", "config.json"))["teacher_name_or_path"] == "teacher"
    assert json.loads(hub.read_file("me/model", "config.json"))["id2label"] == config["id2label"]
    (result, *_) = ModelCard(hub.read_file("me/model", "README.md").decode()).data.eval_results
    assert result.dataset_name == "own data" and result.dataset_split == "validation"

    push_folder(folder, "me/all", with_predictions=True)
    assert json.loads(hub.read_file("me/all", "test/predictions.json")) == [predictions[0] | {"video": "a.mp4"}]
    assert read_files(folder) == before


def test_weights_that_are_not_finite_are_not_published(hub, folders, tmp_path):
    shutil.copytree(folders["classifier"], tmp_path / "model")
    weights = load_file(tmp_path / "model" / "model.safetensors")
    weights["classifier.bias"][0] = float("nan")
    save_file(weights, tmp_path / "model" / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match="model.safetensors is not fit to be published: classifier.bias is NaN"):
        push_folder(tmp_path / "model", "me/model")
    assert not hub.requests


def test_a_folder_without_a_card_gets_one_on_the_hub_alone(hub, folders, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(folders["stage1"], folder)
    (folder / "metrics.jsonl").write_text('{"step": 1, "loss": 1.5}\n{"step": 2, "loss": 1.0}\n')
    before = read_files(folder)
    push_folder(folder, "me/model")
    card = ModelCard(hub.read_file("me/model", "README.md").decode())
    assert card.data.model_name == "model" and 'from_pretrained("me/model"' in card.text
    assert "losses.png" in card.text and hub.read_file("me/model", "losses.png").startswith(b"\x89PNG")
    assert read_files(folder) == before


def test_old_weights_do_not_outlive_an_update(hub, folders, tmp_path):
    model = UMTVideoForVideoClassification.from_pretrained(folders["classifier"])
    model.save_pretrained(tmp_path, max_shard_size="30KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    push_folder(tmp_path, "me/model")
    push_folder(folders["classifier"], "me/model")
    assert [path for path in hub.list_files("me/model") if "safetensors" in path] == ["model.safetensors"]
    commits = len(hub.repo("me/model").commits)
    push_folder(folders["classifier"], "me/model")
    assert len(hub.repo("me/model").commits) == commits  # nothing new, no commit


def test_an_interrupted_upload_goes_on_where_it_stopped(hub, folders, tmp_path, caplog):
    model = UMTVideoForVideoClassification.from_pretrained(folders["classifier"])
    model.save_pretrained(tmp_path, max_shard_size="30KB")
    shards = len(list(tmp_path.glob("*.safetensors")))
    hub.fail("POST .*/commit/", times=1)
    hub.cut("PUT /lfs/", after_bytes=1000)
    hub.fail("PUT /lfs/", status=500, times=2)
    push_folder(tmp_path, "me/retried")
    uploads = [request.status for request in hub.requests if request.method == "PUT"]
    assert uploads == [0, 500, 500, *[200] * shards]  # after the failed commit, no file is sent again

    hub.add_repo("me/resumed")
    (tmp_path / "config.json").write_text((tmp_path / "config.json").read_text().replace("0.1", "0.2"))
    hub.large_files.clear()
    hub.requests.clear()
    last = hashlib.sha256(sorted(tmp_path.glob("*.safetensors"))[-1].read_bytes()).hexdigest()
    hub.fail(f"PUT /lfs/{last}", times=float("inf"))
    with pytest.raises(PublishingError, match="sends only what is missing"):
        push_folder(tmp_path, "me/resumed", max_attempts=1)
    assert hub.list_files("me/resumed") == [".gitattributes"]  # all or nothing
    hub.heal()
    hub.requests.clear()
    push_folder(tmp_path, "me/resumed")
    assert hub.count_requests("PUT /lfs/") == 1
    assert hub.read_file("me/resumed", "config.json")


@pytest.mark.parametrize("mode", ["xet", "regular"])
def test_other_ways_to_upload(mode, folders, tmp_path, monkeypatch):
    if mode == "xet":
        pytest.importorskip("hf_xet", reason="needs hf_xet")
    with LoopbackHub(tmp_path / "hub", upload_mode=mode) as hub:
        hub.connect(monkeypatch)
        push_folder(folders["stage1"], "me/model")
        assert hub.count_requests("PUT /lfs/") == 0 and hub.count_requests("xet-write") == (mode == "xet")
        pulled = UMTVideoForPreTraining.from_pretrained("me/model").state_dict()
    for name, tensor in load_file(folders["stage1"] / "model.safetensors").items():
        assert torch.equal(pulled[name], tensor), name


def test_private_repositories_and_branches(hub, folders):
    push_folder(folders["stage1"], "secret", private=True)  # in the account's own namespace
    assert hub.repo("me/secret").private
    with pytest.raises(RepositoryNotFoundError):
        HfApi(token=False).model_info("me/secret")
    with pytest.raises(OSError, match="not a valid model identifier|token"):
        UMTVideoModel.from_pretrained("me/secret", token=False)
    assert UMTVideoModel.from_pretrained("me/secret", token=TOKEN)
    push_folder(folders["stage1"], "me/model", revision="feature/new")
    assert "model.safetensors" not in hub.list_files("me/model")
    assert "model.safetensors" in hub.list_files("me/model", "feature/new")
    assert UMTVideoModel.from_pretrained("me/model", revision="feature/new")
    with pytest.raises(PublishingError, match="exists and is public"):
        push_folder(folders["stage1"], "me/model", private=True)


def test_errors_say_what_to_do(hub, folders, tmp_path, monkeypatch):
    folder = folders["stage1"]
    hub.add_repo("me/model")
    with pytest.raises(PublishingError, match="the Hub does not know your token"):
        push_folder(folder, "me/model", token="hf_wrong")
    for token in (READ_TOKEN, OTHER_TOKEN):
        with pytest.raises(PublishingError, match="token with write permission"):
            push_folder(folder, "me/model", token=token)
    with pytest.raises(ValueError, match="repo id|repo_id|Repo id"):
        push_folder(folder, "me/a model/x")
    hub.down()
    with pytest.raises(PublishingError, match="could not be reached"):
        push_folder(folder, "me/model", max_attempts=2)
    hub.heal()
    with pytest.raises(ValueError, match="no config.json"):
        push_folder(tmp_path, "me/model")
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match="is an adapter, not a complete model: merge it"):
        push_folder(tmp_path, "me/model")
    (tmp_path / "adapter_config.json").unlink()
    shutil.copy(folder / "config.json", tmp_path)
    with pytest.raises(ValueError, match="has no weights: there is no model.safetensors"):
        push_folder(tmp_path, "me/model")
    stored = load_file(folder / "model.safetensors")
    save_file({f"_orig_mod.{name}": tensor for name, tensor in stored.items()}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"is not a complete UMTVideo\w+: it lacks .*and holds _orig_mod\."):
        push_folder(tmp_path, "me/model")
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(ValueError, match="is not a UMT model: .* of type 'bert'"):
        push_folder(tmp_path, "me/model")
    shutil.copytree(folder, tmp_path / "card")
    (tmp_path / "card" / "README.md").write_text("---\na: [\n---\n")
    with pytest.raises(PublishingError, match="README.md"):
        push_folder(tmp_path / "card", "me/model")
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(PublishingError, match="Nobody is logged in"):
        push_folder(folder, "me/model")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(PublishingError, match="HF_HUB_OFFLINE is set"):
        push_folder(folder, "me/model", token=TOKEN)


def test_push_to_hub_of_models_and_processors(hub, folders):
    """What Transformers gives to every model and processor; it ships no code."""
    UMTVideoForVideoClassification.from_pretrained(folders["classifier"]).push_to_hub("me/classifier")
    UMTVideoProcessor.from_pretrained(folders["classifier"]).push_to_hub("me/classifier")
    assert UMTVideoForVideoClassification.from_pretrained("me/classifier").num_labels == 3
    assert UMTVideoProcessor.from_pretrained("me/classifier").num_frames == 2
    UMTVideoTextForRetrieval.from_pretrained(folders["retrieval"]).push_to_hub("me/retrieval")
    UMTVideoTextProcessor.from_pretrained(folders["retrieval"]).push_to_hub("me/retrieval")
    loaded = UMTVideoTextForRetrieval.from_pretrained("me/retrieval")
    original = UMTVideoTextForRetrieval.from_pretrained(folders["retrieval"])
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), original.parameters(), strict=True))
    assert type(AutoProcessor.from_pretrained("me/retrieval")) is UMTVideoTextProcessor
    assert not any(path.endswith(".py") for path in hub.list_files("me/retrieval"))


def test_command(hub, folders, tmp_path):
    runner = CliRunner()
    arguments = [str(folders["classifier"]), "me/model", "--private", "--revision", "v2", "--no-code", "--json"]
    result = runner.invoke(cli.app, ["push", *arguments])
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["commit_url"].startswith(hub.url)
    assert "model.safetensors" in hub.list_files("me/model", "v2") and hub.repo("me/model").private
    assert runner.invoke(cli.app, ["push", str(tmp_path / "missing"), "me/model"]).exit_code == 2
    hub.fail("", status=403, times=float("inf"))
    result = runner.invoke(cli.app, ["push", str(folders["classifier"]), "me/model"])
    assert result.exit_code == 1 and "write permission" in result.output
    assert os.environ["HF_TOKEN"] not in result.output
