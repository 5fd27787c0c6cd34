"""What scripts and commands write on a normal run: their own lines, and nothing of the libraries."""

import re
from collections import Counter
from pathlib import Path

import pytest
import torch
from transformers import CLIPConfig, CLIPModel

from tests.e2e.labelled import save_classifier
from tests.e2e.mistakes import run_script
from tests.e2e.runs import PRETRAINING, save_student, save_video_text_model, to_flags
from tests.processes import START_METHOD, run_ranks
from umt_hf import cli
from umt_hf.moving_shapes.tiny_bert import TextTowerArguments, write_text_tower

# Log lines of the package, whose words other tests read; rows of a report; bars, with a name of ours or without one.
OWN_LINES = (
    r"(INFO|WARNING) umt_hf\.[\w.]+: .+",
    r"  \w+ +-?[\d.]+",
    r"[\d,]+ videos found\b.*",
    r"[\d.]+ s: \d+% waiting for data, .+ decoding and processing took .+\.",
    r"((pre-training|testing|evaluating|scoring|encoding)[\w ]*:)? *\d+%\|.*",
)
# Workers as by default, forked, since a forked test process would start new ones by a server that imports everything.
FORKED = {START_METHOD: "fork"}
WORKERS = {"dataloader_num_workers": None}


def find_foreign_lines(stderr: str) -> list[str]:
    """Lines that the package has not written."""
    lines = [line.rstrip() for line in re.split(r"[\r\n]+|\x1b\[A", stderr)]
    return [line for line in lines if line and not any(re.fullmatch(own, line) for own in OWN_LINES)]


def run_command(words: list[str]) -> None:
    """What `umt-hf WORDS` does, in this process."""
    cli.app(words)


@pytest.fixture(scope="module")
def clip(tmp_path_factory) -> Path:
    """A complete CLIP, whose text tower a teacher does not need."""
    torch.manual_seed(0)
    tower = {"hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 32}
    config = CLIPConfig(
        vision_config={**tower, "image_size": 64, "patch_size": 16, "projection_dim": 12},
        text_config={**tower, "vocab_size": 20, "bos_token_id": 1, "eos_token_id": 2, "max_position_embeddings": 8},
        projection_dim=12,
    )
    folder = tmp_path_factory.mktemp("clip")
    CLIPModel(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def models(shapes, tmp_path_factory) -> Path:
    """What stage 2 starts from, a stage-2 folder and a classifier."""
    folder = tmp_path_factory.mktemp("models")
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    write_text_tower(TextTowerArguments(data=str(shapes), output_dir=str(folder / "bert"), **sizes))
    save_student(folder / "student", hidden_size=32, num_aligned_layers=2, teacher_hidden_size=12)
    save_video_text_model(folder / "video_text", shapes)
    save_classifier(folder / "classifier", ("blue", "red"))
    return folder


@pytest.fixture
def lines(flags, clip, models, shapes, colors, student, tmp_path):
    """Function and words of each run."""
    texts = {
        **PRETRAINING, **WORKERS, "fusion_layer": 1, "projection_dim": 16, "max_text_tokens": 12, "mask_ratio": 0.5,
        "lr_scheduler_type": "cosine_above_minimum", "max_steps": 2, "train_corpora": shapes / "train_captions.json",
        "validation_data": shapes / "validation_captions.json", "media_types": "video", "teacher_name_or_path": clip,
        "vision_name_or_path": models / "student", "text_name_or_path": models / "bert",
        "output_dir": tmp_path / "run",
    }  # fmt: skip
    classes = {
        "train_data": colors / "few_train.csv", "validation_data": colors / "few_validation.csv",
        "model_name_or_path": student, "max_steps": 2, "report_to": "none", "use_cpu": True, "save_strategy": "no",
        "num_clips": 1, "num_crops": 1, "output_dir": tmp_path / "run",
    }  # fmt: skip
    tested = {"model_name_or_path": models / "classifier", "data": colors / "few_validation.csv"}
    views = {"num_clips": 1, "num_crops": 1, "output_dir": tmp_path / "report"}
    videos = [str(path) for path in sorted((colors / "validation" / "red").iterdir())[:4]]

    def build(name: str) -> tuple:
        return {
            "stage1": lambda: (
                run_script,
                "training.stage1",
                flags(teacher_name_or_path=clip, save_steps=1, max_steps=2, **WORKERS),
            ),
            "stage2": lambda: (run_script, "training.stage2", to_flags(**texts)),
            "finetune": lambda: (run_script, "finetuning.classification", to_flags(**classes)),
            "evaluate": lambda: (run_script, "evaluation.classification", to_flags(**tested, **views)),
            "classify": lambda: (run_command, ["classify", *videos, "--model", str(models / "classifier")]),
            "embed": lambda: (
                run_command,
                ["embed", *videos, "--model", str(models / "video_text"), "--out", str(tmp_path / "index")],
            ),
        }[name]()

    return build


@pytest.mark.parametrize("num_processes", [1, 2])
@pytest.mark.parametrize("name", ["stage1", "stage2", "finetune", "evaluate", "classify", "embed"])
def test_a_normal_run_has_its_own_lines_alone(name, num_processes, lines):
    output = run_ranks(*lines(name), num_processes=num_processes, environment=FORKED)
    assert not find_foreign_lines(output.stderr), output.stderr
    logged = Counter(re.findall(r"^(?:INFO|WARNING) .*", output.stderr, re.MULTILINE))
    # The other process would say the same once more.
    assert not [line for line, count in logged.items() if count > 1], output.stderr
    # Nor would it show the same bar.
    begun = re.findall(r"(?:^|[\r\n])((?:\S+:)? *0%\|.*?\| 0/\d+ ).*?\?([^\]?]+)/s", output.stderr)
    assert begun and len(set(begun)) == len(begun), output.stderr
    if name == "classify":
        assert Counter(output.stdout.splitlines()).most_common(1)[0][1] == 1, output.stdout
