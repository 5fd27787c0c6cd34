"""What scripts and commands write on a normal run: their own lines, and nothing of the libraries."""

import re
import shutil
from pathlib import Path

import pytest
import torch
from transformers import CLIPConfig, CLIPModel

from tests.e2e.labelled import save_classifier, write_colors
from tests.e2e.mistakes import run_script
from tests.e2e.runs import PRETRAINING, save_student, save_video_text_model, to_flags
from tests.processes import Output, run_ranks
from umt_hf import cli
from umt_hf.moving_shapes.tiny_bert import TextTowerArguments, write_text_tower

# The logging of our modules, whose messages other tests read, and bars.
OWN_LINES = (
    r"(INFO|WARNING) umt_hf\.[\w.]+: .+",
    r"((pre-training|evaluating|videos|scoring|encoding|classifying|reranking)\b.*)?\s*\d+%\|.*",
)
# Left as by default, so that their remarks would come.
DEFAULTS = {"dataloader_num_workers": None}


def find_foreign_lines(stderr: str) -> list[str]:
    """Lines that the package has not written."""
    lines = [line.rstrip() for line in re.split(r"[\r\n]+", stderr)]
    return [line for line in lines if line and not any(re.fullmatch(own, line) for own in OWN_LINES)]


def run_command(words: list[str]) -> None:
    """What `umt-hf WORDS` does, in this process."""
    cli.app(words)


@pytest.fixture(scope="module")
def clip(tmp_path_factory) -> Path:
    """A complete CLIP, whose text tower the teacher does not need."""
    torch.manual_seed(0)
    tower = {"hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 32}
    config = CLIPConfig(
        vision_config={**tower, "image_size": 64, "patch_size": 16, "projection_dim": 12},
        text_config={**tower, "vocab_size": 20, "max_position_embeddings": 8},
        projection_dim=12,
    )
    folder = tmp_path_factory.mktemp("clip")
    CLIPModel(config).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("n", [1, 2])
def test_explore(n, flags, clip, shapes, colors, student, tmp_path):
    def show(name, out):
        print("=====", n, name)
        print(out.stderr)
        print("-- foreign:")
        print("\n".join(find_foreign_lines(out.stderr)))

    run = lambda m, w: run_ranks(run_script, m, w, num_processes=n)
    show("stage1", run("training.stage1", flags(teacher_name_or_path=clip, save_steps=2, **DEFAULTS)))
    st = tmp_path / "run"
    tower = tmp_path / "text"
    write_text_tower(
        TextTowerArguments(
            data=str(shapes), output_dir=str(tower), hidden_size=32, num_hidden_layers=2, num_attention_heads=2
        )
    )
    w = to_flags(
        **{
            **PRETRAINING,
            "fusion_layer": 1,
            "projection_dim": 16,
            "max_text_tokens": 12,
            "mask_ratio": 0.5,
            "rerank_top_k": 2,
            "lr_scheduler_type": "cosine_above_minimum",
            "vision_name_or_path": st,
            "text_name_or_path": tower,
            "teacher_name_or_path": clip,
            "train_corpora": shapes / "train_captions.json",
            "media_types": "video",
            "validation_data": shapes / "validation_captions.json",
            "pair_by": "caption",
            "multiple_videos_per_text": True,
            "output_dir": tmp_path / "s2",
            **DEFAULTS,
        }
    )
    show("stage2", run("training.stage2", w))
    w = to_flags(
        model_name_or_path=st,
        train_data=colors / "few_train.csv",
        validation_data=colors / "few_validation.csv",
        output_dir=tmp_path / "cls",
        max_steps=2,
        per_device_train_batch_size=4,
        report_to="none",
        use_cpu=True,
        num_clips=1,
        num_crops=1,
    )
    show("finetune", run("finetuning.classification", w))
    w = to_flags(
        model_name_or_path=tmp_path / "s2",
        train_data=shapes / "train_captions.json",
        validation_data=shapes / "validation_captions.json",
        output_dir=tmp_path / "ret",
        max_steps=2,
        per_device_train_batch_size=4,
        report_to="none",
        use_cpu=True,
        num_frames=2,
    )
    show("finetune retrieval", run("finetuning.retrieval", w))
    w = to_flags(
        model_name_or_path=tmp_path / "s2",
        train_data=shapes / "train_questions.json",
        output_dir=tmp_path / "qa",
        max_steps=2,
        per_device_train_batch_size=4,
        report_to="none",
        use_cpu=True,
        num_frames=2,
    )
    show("finetune qa", run("finetuning.question_answering", w))
    w = to_flags(
        model_name_or_path=tmp_path / "cls",
        data=colors / "few_validation.csv",
        num_clips=1,
        num_crops=1,
        output_dir=tmp_path / "e1",
    )
    show("evaluate cls", run("evaluation.classification", w))
    w = to_flags(
        model_name_or_path=tmp_path / "s2", data=shapes / "validation_captions.json", output_dir=tmp_path / "e2"
    )
    show("evaluate ret", run("evaluation.retrieval", w))
    cmd = lambda *w: run_ranks(run_command, list(map(str, w)), num_processes=n)
    show("classify", cmd("classify", colors / "validation", "--model", tmp_path / "cls"))
    show("embed", cmd("embed", colors / "validation", "--model", tmp_path / "s2", "--out", tmp_path / "ix"))
    show("features", cmd("features", colors / "validation" / "red", "--model", st, "--out", tmp_path / "ft"))
