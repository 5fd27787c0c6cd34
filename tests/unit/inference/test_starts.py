"""Every kind of folder meets every command that starts from one: it works, or it is refused by name."""

import json
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file
from transformers import (
    BertConfig,
    BertForPreTraining,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
    VideoMAEConfig,
    VideoMAEForVideoClassification,
)
from typer.testing import CliRunner

from tests.unit.finetuning.test_classification import tiny_config
from tests.unit.inference.test_search import SPECIAL, WORDS, save_model
from umt_hf import (
    ActionDetector,
    UMTVideoForActionDetection,
    UMTVideoForPreTraining,
    UMTVideoForVideoClassification,
    UMTVideoModel,
    UMTVideoProcessor,
    UMTVideoTextForPreTraining,
    UMTVideoTextForQuestionAnswering,
    UMTVideoTextForRetrieval,
    UMTVideoTextModel,
    VideoAnswerer,
    VideoClassifier,
)
from umt_hf.cli import app
from umt_hf.evaluation.setup import load_model_and_processor
from umt_hf.finetuning.classification import ClassificationModelArguments, build_classifier
from umt_hf.finetuning.detection import DetectionModelArguments, build_detector
from umt_hf.finetuning.question_answering import QuestionDataArguments, load_question_model
from umt_hf.finetuning.retrieval import RetrievalDataArguments, load_retrieval_model
from umt_hf.finetuning.trainer import FinetunedModelArguments, build_processor
from umt_hf.hub_cards.card import write_model_card
from umt_hf.hub_cards.model_info import describe_model
from umt_hf.hub_cards.publishing import check_model_folder
from umt_hf.inference.features import load_encoder
from umt_hf.inference.loading import load_complete_model, load_video_processor, load_video_text_processor
from umt_hf.inference.search import VideoTextEncoder
from umt_hf.inference.starts import looks_like_path, require_safetensors, require_start, require_tokenizer
from umt_hf.moving_shapes.render import write_video
from umt_hf.processing.processing_umt_video_text import build_tokenizer
from umt_hf.runs.arguments import EvaluatedModelArguments, EvaluationDataArguments
from umt_hf.runs.models import MODELS_BY_NAME
from umt_hf.teachers.teacher import TEACHERS
from umt_hf.training import stage2
from umt_hf.training.alignment import load_teacher
from umt_hf.training.arguments import (
    LossArguments,
    MaskArguments,
    ModelArguments,
    TeacherArguments,
    VideoTextModelArguments,
)
from umt_hf.training.stage1 import build_student
from umt_hf.training.stage2 import build_video_text_student

runner = CliRunner()
TEXT = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 40}
TEXT |= {"vocab_size": len(SPECIAL) + len(WORDS), "max_position_embeddings": 20}
TEACHER = {"num_aligned_layers": 1, "teacher_image_size": 32}
VIDEO_CLASSES = (
    UMTVideoModel,
    UMTVideoForPreTraining,
    UMTVideoForVideoClassification,
    UMTVideoForActionDetection,
)
TEXT_CLASSES = (
    UMTVideoTextModel,
    UMTVideoTextForPreTraining,
    UMTVideoTextForRetrieval,
    UMTVideoTextForQuestionAnswering,
)
OURS = [model_class.__name__ for model_class in VIDEO_CLASSES + TEXT_CLASSES]
# What others hand in, and what must be said of it by every command.
FOREIGN = {
    "videomae": "is not a.*type 'videomae' and names VideoMAEForVideoClassification",
    "clip": "is not a.*type 'clip_vision_model'.*such an image tower is a teacher: --teacher_name_or_path",
    "bert": "is not a.*type 'bert'.*--text_name_or_path",
    "torch": r"no config.json; convert its weights with `umt-hf convert .*torch/weights.pth`",
    "empty": "no config.json; it is empty",
    "dataset": "no config.json; it holds data",
    "videos": "no config.json; it holds data",
    "adapter": "is an adapter of some/base, not a complete model: merge it",
    "run": "no config.json; give the model in it: .*checkpoint-20",
    "file.pth": r"is a file of weights, not a model folder: convert it with `umt-hf convert .*file.pth`",
    "file.bin": r"is a file of weights, not a model folder: convert it with `umt-hf convert .*file.bin`",
    "missing": "missing: no such folder",
    "broken": r"broken/model.safetensors is damaged: it ends after \d+ bytes, within ",
    "no_weights": "has no weights: there is no model.safetensors",
    "config": r"config.json is damaged: it cannot be read as JSON",
}
# Stage-1 folders that are broken.
DAMAGED = ("broken", "no_weights")


@dataclass
class Command:
    """How a model is loaded.

    Args:
        load: Gets the folder and those of teacher and BERT.
        accepted: Names of our classes whose folders it takes.
        wanted: Title of what it needs, for those it does not take.
        others: Foreign kinds that are right here.
    """

    load: object
    accepted: tuple[str, ...]
    wanted: str = ""
    others: tuple[str, ...] = ()


def build_stage2(folders, **changes):
    tokenizer = build_tokenizer(SPECIAL + WORDS, max_length=16)
    fields = {"text_name_or_path": str(folders["bert"]), "fusion_layer": 2, "projection_dim": 16, **changes}
    return build_video_text_student(VideoTextModelArguments(**fields), LossArguments(), {}, tokenizer)


def teach(name):
    return load_teacher(TeacherArguments(teacher_name_or_path=str(name), **TEACHER), "eager", Accelerator(cpu=True))


def evaluate(model_class):
    def load(folder, folders):
        model = EvaluatedModelArguments(model_name_or_path=str(folder))
        return load_model_and_processor(model_class, model, EvaluationDataArguments(data="data.json"))

    return load


def continue_stage1(folder, folders):
    arguments = ModelArguments(model_name_or_path=str(folder)), TeacherArguments(num_aligned_layers=1)
    teacher = teach(folders["clip"])
    return build_student(*arguments, MaskArguments(), teacher)


def run_cli(*words):
    result = runner.invoke(app, list(map(str, words)), env={"COLUMNS": "500"})
    if result.exit_code:
        assert result.exit_code == 2 and result.stdout == "" and "Traceback" not in result.stderr, result.output
        raise ValueError(" ".join(result.stderr.replace("│", " ").split()))


ENCODERS = tuple(OURS)
MATCHERS = ("UMTVideoTextForPreTraining", "UMTVideoTextForRetrieval")
COMMANDS = {
    "finetune classification": Command(
        lambda folder, _: build_classifier(ClassificationModelArguments(model_name_or_path=str(folder)), ["a", "b"]),
        ENCODERS,
    ),
    "finetune detection": Command(
        lambda folder, _: build_detector(DetectionModelArguments(model_name_or_path=str(folder)), ["a", "b"]), ENCODERS
    ),
    "finetune retrieval": Command(
        lambda folder, _: load_retrieval_model(
            FinetunedModelArguments(model_name_or_path=str(folder)), RetrievalDataArguments()
        ),
        MATCHERS,
        "video-text retrieval",
    ),
    "finetune question answering": Command(
        lambda folder, _: load_question_model(
            FinetunedModelArguments(model_name_or_path=str(folder)), QuestionDataArguments()
        ),
        ("UMTVideoTextForPreTraining", "UMTVideoTextForQuestionAnswering"),
        "video question answering",
    ),
    "stage1": Command(continue_stage1, ("UMTVideoForPreTraining",), "stage-1 pre-training"),
    "teacher": Command(lambda folder, _: teach(folder), (), f"{TEACHERS}, which the teacher must be", ("clip",)),
    "stage2": Command(
        lambda folder, folders: build_stage2(folders, model_name_or_path=str(folder)),
        ("UMTVideoTextForPreTraining",),
        "stage-2 pre-training",
    ),
    "stage2 vision": Command(lambda folder, folders: build_stage2(folders, vision_name_or_path=str(folder)), ENCODERS),
    "stage2 text": Command(
        lambda folder, folders: build_stage2(
            folders, vision_name_or_path=str(folders["UMTVideoForPreTraining"]), text_name_or_path=str(folder)
        ),
        (),
        "a BERT, where the text tower starts",
        ("bert",),
    ),
    "evaluate retrieval": Command(evaluate(UMTVideoTextModel), ("UMTVideoTextModel", *MATCHERS), "video and text"),
    "evaluate reranked": Command(evaluate(UMTVideoTextForRetrieval), MATCHERS, "video-text retrieval"),
    "evaluate questions": Command(
        evaluate(UMTVideoTextForQuestionAnswering), ("UMTVideoTextForQuestionAnswering",), "video question answering"
    ),
    "VideoClassifier": Command(
        lambda folder, _: VideoClassifier(folder), ("UMTVideoForVideoClassification",), "video classification"
    ),
    "ActionDetector": Command(
        lambda folder, _: ActionDetector(folder), ("UMTVideoForActionDetection",), "action detection"
    ),
    "VideoAnswerer": Command(
        lambda folder, _: VideoAnswerer(folder), ("UMTVideoTextForQuestionAnswering",), "video question answering"
    ),
    "VideoTextEncoder": Command(
        lambda folder, _: VideoTextEncoder(folder), ("UMTVideoTextModel", *MATCHERS), "video-text retrieval"
    ),
    "load_encoder": Command(lambda folder, _: load_encoder(folder), ENCODERS),
    "umt-hf classify": Command(
        lambda folder, folders: run_cli("classify", folders["clip.mp4"], "--model", folder, "--num-workers", 0),
        ("UMTVideoForVideoClassification",),
        "video classification",
    ),
    "umt-hf detect": Command(
        lambda folder, folders: run_cli(
            *("detect", folders["clip.mp4"], "--model", folder, "--boxes", "2,2,20,20", "--frame", 3)
        ),
        ("UMTVideoForActionDetection",),
        "action detection",
    ),
    "umt-hf ask": Command(
        lambda folder, folders: run_cli("ask", folders["clip.mp4"], "a red circle", "--model", folder),
        ("UMTVideoTextForQuestionAnswering",),
        "video question answering",
    ),
    "umt-hf embed": Command(
        lambda folder, folders: run_cli(
            *("embed", folders["clip.mp4"], "--model", folder, "--num-workers", 0, "--out"),
            folders["root"] / "indexes" / Path(folder).name,
        ),
        ("UMTVideoTextModel", *MATCHERS),
        "video-text retrieval",
    ),
    "umt-hf features": Command(
        lambda folder, folders: run_cli(
            *("features", folders["clip.mp4"], "--model", folder, "--out"),
            folders["root"] / "features" / Path(folder).name,
        ),
        ENCODERS,
    ),
    "umt-hf info": Command(lambda folder, _: run_cli("info", folder), ENCODERS, others=("no_weights",)),
    "umt-hf push": Command(lambda folder, _: check_model_folder(Path(folder)), ENCODERS),
}


def save_others(root: Path) -> dict[str, Path]:
    """Folders and files of all the kinds that are not models of ours."""
    size = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    VideoMAEForVideoClassification(VideoMAEConfig(**size, image_size=32, num_frames=4)).save_pretrained(
        root / "videomae"
    )
    clip = CLIPVisionConfig(**size, image_size=32, patch_size=16, projection_dim=512)
    CLIPVisionModelWithProjection(clip).save_pretrained(root / "clip")
    BertForPreTraining(BertConfig(**TEXT)).save_pretrained(root / "bert")
    build_tokenizer(SPECIAL + WORDS, max_length=16).save_pretrained(root / "bert")
    names = ("torch", "empty", "dataset", "videos/running", "adapter", "no_weights", "broken", "config")
    for name in (*names, "run/checkpoint-20"):
        (root / name).mkdir(parents=True)
    for name in ("torch/weights.pth", "file.pth", "file.bin"):
        torch.save({"weight": torch.zeros(2)}, root / name)
    (root / "dataset" / "train.csv").write_text("a.mp4,0\n")
    (root / "videos" / "running" / "a.mp4").write_bytes(b"")
    (root / "adapter" / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "some/base"}))
    (root / "config" / "config.json").write_text('{"model_type": "umt_')
    tiny_config().save_pretrained(root / "run" / "checkpoint-20")
    return {name: root / name for name in FOREIGN}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("starts")
    made = save_others(root)
    torch.manual_seed(0)
    config = tiny_config(hidden_size=32)
    for model_class in VIDEO_CLASSES:
        task = "detection" if model_class is UMTVideoForActionDetection else "classification"
        folder = made[model_class.__name__] = root / model_class.__name__
        model_class(config).save_pretrained(folder)
        UMTVideoProcessor.from_model_config(config, task, size={"shortest_edge": 32}).save_pretrained(folder)
    for model_class in TEXT_CLASSES:
        made[model_class.__name__] = save_model(root / model_class.__name__, model_class)
    for name in ("config.json", "video_preprocessor_config.json"):
        shutil.copy(made["UMTVideoForPreTraining"] / name, root / "broken")
    shutil.copy(made["UMTVideoForPreTraining"] / "config.json", root / "no_weights")
    whole = (made["UMTVideoForPreTraining"] / "model.safetensors").read_bytes()
    (root / "broken" / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    clip = root / "clip.mp4"
    write_video(clip, np.random.default_rng(0).integers(0, 255, (8, 32, 32, 3), dtype=np.uint8))
    return made | {"root": root, "clip.mp4": clip}


@pytest.mark.parametrize("kind", [*OURS, *FOREIGN])
@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_takes_the_right_folders_and_names_the_others(command, kind, folders):
    row = COMMANDS[command]
    if kind in row.accepted or kind in row.others:
        row.load(folders[kind], folders)
        return
    with pytest.raises((ValueError, OSError)) as raised:
        row.load(folders[kind], folders)
    message = " ".join(str(raised.value).split())
    for word in ("identifier", "huggingface.co", "repo", "Hub"):  # nothing here is a Hub id
        assert word not in message
    if kind in FOREIGN and not (kind in DAMAGED and row.wanted not in ("", "stage-1 pre-training")):
        assert re.search(FOREIGN[kind], message), message
    elif row.others:
        found = MODELS_BY_NAME["UMTVideoForPreTraining" if kind in DAMAGED else kind]
        assert f"is not {row.wanted}" in message and found.title in message
    else:  # what it is comes before what is wrong with it
        found = MODELS_BY_NAME["UMTVideoForPreTraining" if kind in DAMAGED else kind]
        assert f"is a {found.title} folder ({found.name}), and this step needs a {row.wanted}" in message
        assert found.command.split("{model}")[0].strip() in message


def test_a_stage_1_folder_is_pointed_to_the_script_that_finetunes_it(folders):
    start = folders["UMTVideoForPreTraining"]
    for load, script in (
        (VideoClassifier, "classification"),
        (ActionDetector, "detection"),
    ):
        with pytest.raises(ValueError, match=f"umt-hf finetune {script} --model_name_or_path {start} "):
            load(start)
    with pytest.raises(ValueError, match=f"train it with .*umt-hf pretrain stage2 --vision_name_or_path {start} "):
        require_start(start, "UMTVideoTextForPreTraining")
    stage2 = folders["UMTVideoTextForPreTraining"]
    with pytest.raises(ValueError, match=f"umt-hf finetune question-answering --model_name_or_path {stage2} "):
        VideoAnswerer(stage2)


LOST = {
    "finetune classification": ("UMTVideoForPreTraining", "vision_model.layers.0.mlp.fc1.weight"),
    "finetune detection": ("UMTVideoForPreTraining", "vision_model.embeddings.patch_embeddings.projection.weight"),
    "finetune retrieval": ("UMTVideoTextForPreTraining", "text_model.layers.3.mlp.fc1.weight"),
    "finetune question answering": ("UMTVideoTextForPreTraining", "vision_model.layers.1.mlp.fc2.weight"),
    "stage1": ("UMTVideoForPreTraining", "alignment_heads.0.dense.weight"),
    "stage2": ("UMTVideoTextForPreTraining", "mlm_head.dense.weight"),
    "stage2 vision": ("UMTVideoForPreTraining", "vision_model.layers.1.attention.q_proj.weight"),
    "stage2 text": ("bert", "bert.encoder.layer.1.attention.self.query.weight"),
    "teacher": ("clip", "visual_projection.weight"),
    "evaluate retrieval": ("UMTVideoTextForRetrieval", "video_projection.weight"),
    "evaluate reranked": ("UMTVideoTextForRetrieval", "matching_head.weight"),
    "evaluate questions": ("UMTVideoTextForQuestionAnswering", "answer_decoder.lm_head.dense.weight"),
    "VideoClassifier": ("UMTVideoForVideoClassification", "classifier.weight"),
    "ActionDetector": ("UMTVideoForActionDetection", "vision_model.norm.weight"),
    "VideoAnswerer": ("UMTVideoTextForQuestionAnswering", "text_model.layers.0.mlp.fc1.bias"),
    "VideoTextEncoder": ("UMTVideoTextForPreTraining", "text_projection.weight"),
    "load_encoder": ("UMTVideoTextForRetrieval", "vision_model.layers.0.mlp.fc1.weight"),
    "umt-hf classify": ("UMTVideoForVideoClassification", "fc_norm.weight"),
    "umt-hf features": ("UMTVideoForVideoClassification", "vision_model.layers.0.mlp.fc1.weight"),
}


@pytest.mark.parametrize("change", ["lost", "reshaped"])
@pytest.mark.parametrize("command", LOST)
def test_a_weight_that_is_lost_or_of_another_shape_is_named(command, change, folders, tmp_path):
    kind, name = LOST[command]
    folder = tmp_path / "model"
    shutil.copytree(folders[kind], folder)
    state = load_file(folder / "model.safetensors")
    tensor = state.pop(name)
    if change == "reshaped":
        state[name] = tensor.repeat(2, *[1] * (tensor.ndim - 1))
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError) as raised:
        COMMANDS[command].load(folder, folders)
    message = " ".join(str(raised.value).split())
    own = name.removeprefix("vision_model.") if command in ("load_encoder", "umt-hf features") else name
    assert own in message and ("model" in message), message
    if change == "reshaped":
        assert str((2 * tensor.shape[0], *tensor.shape[1:])) in message and "which should be" in message, message


@pytest.mark.parametrize("command", ["finetune classification", "finetune detection"])
def test_heads_of_another_size_start_fresh(command, folders):
    """Three classes in the folder, two in the run."""
    for kind in ("UMTVideoForVideoClassification", "UMTVideoForActionDetection"):
        model = COMMANDS[command].load(folders[kind], folders)
        assert model.classifier.out_features == 2
    stored = load_file(folders["UMTVideoForVideoClassification"] / "model.safetensors")
    weight = model.state_dict()["vision_model.layers.0.mlp.fc1.weight"]
    assert weight.shape == stored["vision_model.layers.0.mlp.fc1.weight"].shape


@pytest.fixture
def sharded(tmp_path):
    torch.manual_seed(0)
    UMTVideoForPreTraining(tiny_config()).save_pretrained(tmp_path / "shards", max_shard_size="10KB")
    files = sorted((tmp_path / "shards").glob("model-*.safetensors"))
    assert len(files) > 2
    return tmp_path / "shards", files


def test_shards_are_all_there_and_complete(sharded):
    folder, files = sharded
    load_complete_model(UMTVideoForPreTraining, folder)
    content = files[1].read_bytes()
    for damaged, reason in (
        (content[:-1], "within "),
        (content[:20], "ends after 20 bytes, in its header"),
        (b"", "it is empty"),
    ):
        files[1].write_bytes(damaged)
        with pytest.raises(ValueError, match=f"{files[1].name} is damaged: .*{reason}"):
            load_complete_model(UMTVideoForPreTraining, folder)
        with pytest.raises(ValueError, match=f"{files[1].name} is damaged: .*{reason}"):
            describe_model(folder)
    files[1].unlink()
    with pytest.raises(ValueError, match=f"lacks {files[1].name}, which its model.safetensors.index.json names for "):
        load_complete_model(UMTVideoForPreTraining, folder)
    files[1].write_bytes(files[0].read_bytes())
    with pytest.raises(ValueError, match=f"{files[1].name} lacks .*which model.safetensors.index.json says it holds"):
        load_complete_model(UMTVideoForPreTraining, folder)
    (folder / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(ValueError, match=r"index.json names no files"):
        load_complete_model(UMTVideoForPreTraining, folder)


def test_headers_that_do_not_fit_are_named(tmp_path):
    file = tmp_path / "model.safetensors"
    save_file({"one": torch.zeros(4), "two": torch.zeros(2, 3)}, file)
    assert require_safetensors(file) == {"one", "two"}
    content = file.read_bytes()
    file.write_bytes(content.replace(b'"shape":[2,3]', b'"shape":[2,4]'))
    with pytest.raises(ValueError, match=r"two has shape \(2, 4\) of F32, but 24 bytes"):
        require_safetensors(file)
    file.write_bytes(content[:8] + b"x" * (len(content) - 8))
    with pytest.raises(ValueError, match="its header cannot be read"):
        require_safetensors(file)
    file.write_bytes(content + b"more")
    with pytest.raises(ValueError, match="model.safetensors is damaged"):
        require_safetensors(file)


def test_names_of_paths_and_of_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "outputs" / "mine").mkdir(parents=True)
    for name in ("./x", "/x/y", "a/b/c", "outputs/mime", "x/", "~/x", "weights.pth"):
        assert looks_like_path(name), name
        with pytest.raises(OSError, match="no such (folder|file)"):
            VideoClassifier(name)
    with pytest.raises(OSError, match=r"outputs/mime: no such folder. Near it: mine"):
        VideoClassifier("outputs/mime")
    assert not looks_like_path("owner/model") and not looks_like_path("gpt2")
    with pytest.raises(OSError, match="owner/model is not a folder here, and cannot be read from the Hub"):
        VideoClassifier("owner/model")
    for load in (VideoClassifier, describe_model):
        with pytest.raises(OSError, match="umt-vit-b16-k400 is a released .* run `umt-hf convert umt-vit-b16-k400`"):
            load("umt-vit-b16-k400")


def test_processors_that_are_missing_or_of_another_model(folders, tmp_path):
    shutil.copytree(folders["UMTVideoForVideoClassification"], tmp_path / "model")
    settings = tmp_path / "model" / "video_preprocessor_config.json"
    fields = json.loads(settings.read_text()) | {"video_processor_type": "VideoMAEVideoProcessor"}
    settings.write_text(json.dumps(fields))
    with pytest.raises(ValueError, match="is of another model, a VideoMAEVideoProcessor"):
        VideoClassifier(tmp_path / "model")
    settings.rename(tmp_path / "model" / "preprocessor_config.json")
    with pytest.raises(ValueError, match="preprocessor_config.json is of another model"):
        load_encoder(tmp_path / "model")
    (tmp_path / "model" / "preprocessor_config.json").unlink()
    with pytest.raises(OSError, match="has no video processor .*from_model_config"):
        load_video_processor(tmp_path / "model")
    shutil.copytree(folders["UMTVideoTextForRetrieval"], tmp_path / "text")
    (tmp_path / "text" / "tokenizer_config.json").unlink()
    with pytest.raises(OSError, match="has no UMTVideoTextProcessor: tokenizer_config.json is missing"):
        load_video_text_processor(tmp_path / "text")
    with pytest.raises(OSError, match="tokenizer_config.json is missing"):
        VideoTextEncoder(tmp_path / "text")
    with pytest.raises(OSError, match="tokenizer_config.json is missing"):
        build_processor(str(tmp_path / "text"), None, QuestionDataArguments(), None)


def test_stage_2_wants_the_tokenizer_of_its_text_tower(folders, tmp_path):
    shutil.copytree(folders["bert"], tmp_path / "bert")
    require_tokenizer(tmp_path / "bert")
    (tmp_path / "bert" / "tokenizer.json").unlink()
    start = ["--vision_name_or_path", str(folders["UMTVideoForPreTraining"]), "--train_corpora", "captions.json"]
    with pytest.raises(OSError, match="bert has no tokenizer: tokenizer.json or vocab.txt is missing"):
        stage2.main([*start, "--text_name_or_path", str(tmp_path / "bert"), "--output_dir", str(tmp_path / "run")])


def test_values_of_a_configuration_that_describe_no_model_are_named(folders, tmp_path):
    shutil.copytree(folders["UMTVideoForVideoClassification"], tmp_path / "model")
    file = tmp_path / "model" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"patch_size": 0}))
    loads = [COMMANDS[name].load for name in ("VideoClassifier", "load_encoder", "finetune classification")]
    for load in (*loads, COMMANDS["stage2 vision"].load, lambda folder, _: describe_model(folder)):
        with pytest.raises(ValueError) as raised:
            load(tmp_path / "model", folders)
        message = str(raised.value)
        assert "config.json does not describe a model: patch_size must be 1 or more, got 0." in message


def test_the_page_refuses_them_by_name(folders):
    from umt_hf.demo.models import load_demo_models
    from umt_hf.demo.settings import DemoSettings

    for field, kind, reason in (
        ("classifier", "videomae", FOREIGN["videomae"]),
        ("classifier", "UMTVideoForPreTraining", "umt-hf finetune classification"),
        ("question_answering", "UMTVideoTextForRetrieval", "umt-hf embed"),
        ("teacher", "bert", "is not a CLIP"),
        ("classifier", "file.pth", "umt-hf convert"),
    ):
        with pytest.raises(ValueError, match=reason):
            load_demo_models(DemoSettings(**{field: str(folders[kind])}))


def test_a_card_is_written_for_models_of_ours_alone(folders):
    for kind in FOREIGN.keys() - {"broken", "no_weights"}:
        with pytest.raises(ValueError, match=FOREIGN[kind]):
            write_model_card(folders[kind])
