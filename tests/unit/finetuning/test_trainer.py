"""Recipes of fine-tuning and zero-shot retrieval, batches, optimizer and schedule."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from torch import nn

from umt_hf import UMTVideoProcessor, UMTVideoTextProcessor
from umt_hf.finetuning import question_answering as finetune_question_answering
from umt_hf.finetuning import retrieval as finetune_retrieval
from umt_hf.finetuning.trainer import FinetuningArguments, FinetuningTrainer, VideoTextClips
from umt_hf.moving_shapes.render import write_video
from umt_hf.processing.processing_umt_video_text import build_tokenizer
from umt_hf.runs.arguments import CropArguments
from umt_hf.runs.config import list_recipes, load_recipe, parse_config
from umt_hf.training.optimization import compute_learning_rate_share

FIXTURES = Path(__file__).parents[2] / "fixtures" / "multi_modality"
EXPERIMENTS = json.loads((FIXTURES / "experiments.json").read_text())
RECIPES = {"mc": "multiple_choice", "qa": "question_answering", "ret": "retrieval"}
MODELS = {"vit_b16": "b16", "vit_l14": "l16"}
# The published slips: what our recipes say instead.
MENDED = {"finetuning/qa_msrvtt/b16_25m": {"model": "vit_b16", "drop_path": 0.2, "vision_checkpointing": [True, 12]}}


def select_sections(name: str) -> dict[str, type]:
    is_answering = name.startswith("question_answering")
    return (finetune_question_answering if is_answering else finetune_retrieval).SECTIONS


def list_rows(folder: str) -> list[tuple[str, dict]]:
    return [(name, row) for name, row in EXPERIMENTS["rows"].items() if name.startswith(folder)]


def test_every_published_run_has_a_recipe():
    rows = list_rows("finetuning")
    assert len(rows) == 66
    expected = set()
    for name, _ in rows:
        _, experiment, run = name.split("/")
        task, data = experiment.split("_", 1)
        expected.add(f"{RECIPES[task]}_{data.replace('tpl', 'template')}:{run.replace(',', 'm')}")
    kinds = ("retrieval", "question_answering", "multiple_choice")
    assert {name for name in list_recipes() if name.startswith(kinds)} == expected
    assert len([name for name in list_recipes() if name.startswith("zero_shot")]) == 30


@pytest.mark.parametrize(
    "name,row", list_rows("finetuning"), ids=lambda value: value if isinstance(value, str) else ""
)
def test_fine_tuning_recipes_equal_the_published_experiments(name, row):
    _, experiment, run = name.split("/")
    row = row | MENDED.get(name, {})
    task, data_name = experiment.split("_", 1)
    run = run.replace(",", "m")
    recipe = f"{RECIPES[task]}_{data_name.replace('tpl', 'template')}:{run}"
    sections, flags = select_sections(recipe), ["--config", recipe, "--bf16", "false"]
    model, data, augmentation, evaluation, training = parse_config(sections, flags)
    size, corpus = run.split("_")
    assert MODELS[row["model"]] == size and model.model_name_or_path == f"umt-vit-{size}-{corpus}"
    assert model.drop_path_rate == row["drop_path"]
    assert data.num_frames == row["num_frames"] == row["num_frames_test"]
    assert data.first_seconds == (30 if row.get("trimmed30") else None)
    assert (augmentation.crop_scale, augmentation.horizontal_flip_probability) == ([0.5, 1.0], 0.5)
    assert training.per_device_train_batch_size == row["batch_size_per_gpu"]
    assert training.learning_rate == row["lr"]
    assert training.num_train_epochs == row["epochs"] and training.warmup_epochs == row["warmup_epochs"]
    assert training.gradient_checkpointing is row["vision_checkpointing"][0]
    common = EXPERIMENTS["common_to_all"]
    assert training.weight_decay == common["weight_decay"] and training.max_grad_norm == 0
    assert [training.adam_beta1, training.adam_beta2] == common["betas"]
    assert training.min_learning_rate_share == common["min_lr_multi"]
    top_k = evaluation.top_k if task == "qa" else evaluation.rerank_top_k
    assert top_k == common["k_test"]
    assert training.load_best_model_at_end and training.eval_strategy == training.save_strategy == "epoch"

    splits = {"finetuning/ret_anet": "val"}  # what is called test there is the published validation file
    assert splits.get(f"finetuning/{experiment}", row["stop_key"].strip("/")) in data.validation_data
    if task == "qa":
        assert data.max_question_tokens == row["max_q_len"] and data.max_answer_tokens == row["max_a_len"]
        assert training.metric_for_best_model == "eval_accuracy"
        assert data.train_data == f"{data_name}_qa_train.json"
        assert evaluation.answers == f"{data_name}_qa_answer_list.json"
    else:
        assert data.max_text_tokens == row["max_txt_l"]
        assert (data.captions == "paragraph") is row.get("is_paragraph_retrieval", False)
        assert (data.captions == "each") is row.get("multi_txt_gt", False)
        assert data.multiple_videos_per_text is row.get("has_multi_vision_gt", False)
        assert evaluation.task == ("multiple_choice" if task == "mc" else "retrieval")


@pytest.mark.parametrize("name,row", list_rows("zero_shot"), ids=lambda value: value if isinstance(value, str) else "")
def test_zero_shot_recipes_equal_the_published_experiments(name, row):
    _, experiment, size = name.split("/")
    data_name = experiment.removeprefix("ret_")
    for corpus in ("5m", "17m", "25m"):
        recipe = load_recipe(f"zero_shot_{data_name}:{size}_{corpus}")
        assert recipe["model"] == {"model_name_or_path": f"umt-vit-{size}-{corpus}"}
        data = recipe["data"]
        assert data["num_frames"] == row["num_frames_test"] and data["max_text_tokens"] == row["max_txt_l"]
        assert (recipe["evaluation"].get("captions") == "paragraph") is row.get("is_paragraph_retrieval", False)
        assert data.get("first_seconds") == (30 if row.get("trimmed30") else None)
        assert data["data"].startswith(f"{data_name}_ret_")
        assert recipe["evaluation"]["rerank_top_k"] == EXPERIMENTS["common_to_all"]["k_test"]


def test_variants_are_named_in_errors():
    with pytest.raises(ValueError, match="retrieval_msrvtt:b16_5m.*retrieval_msrvtt:l16_25m"):
        load_recipe("retrieval_msrvtt")
    with pytest.raises(ValueError, match="retrieval_msrvtt:l16_25m"):
        load_recipe("retrieval_msrvtt:h16")
    with pytest.raises(ValueError, match="no variants"):
        load_recipe("stage1_umt_vit_b16:b16")
    with pytest.raises(FileNotFoundError, match="retrieval_msrvtt"):
        load_recipe("retrieval_youcook:b16_5m")


def test_variants_of_a_file(tmp_path):
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("inherits: retrieval_msrvtt:b16_5m\nvariants:\n  short:\n    training: {num_train_epochs: 1}\n")
    arguments = ["--config", f"{recipe}:short", "--bf16", "false"]
    model, data, _, _, training = parse_config(finetune_retrieval.SECTIONS, arguments)
    assert model.model_name_or_path == "umt-vit-b16-5m" and data.train_data == "msrvtt_ret_train9k.json"
    assert training.num_train_epochs == 1 and training.learning_rate == 2e-5


WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "red", "blue", "ring", "what", "moves"]


@pytest.fixture
def processor() -> UMTVideoTextProcessor:
    return UMTVideoTextProcessor(UMTVideoProcessor(num_frames=2), build_tokenizer(WORDS, max_length=6))


def make_sample(number: int, **row) -> dict:
    return {
        "pixel_values": torch.full((2, 3, 4, 4), number),
        "row": row,
        "number": number,
        "failures": [f"bad {number}"],
    }


def test_batches_of_pairs(processor):
    samples = [
        make_sample(0, video="x.mp4", caption="a red ring"),
        make_sample(1, video="y.mp4", caption="a red ring"),
        make_sample(2, video="x.mp4", caption="a blue ring"),
        make_sample(3, video={"path": None, "bytes": b"1"}, caption="a blue ring"),
        make_sample(4, video={"path": None, "bytes": b"2"}, caption="a blue ring"),
    ]
    batch = finetune_retrieval.CaptionCollator(processor, pair_by_caption=False)(samples)
    assert batch["input_ids"].tolist()[:3] == [[2, 5, 6, 8, 0, 0], [2, 5, 6, 8, 0, 0], [2, 5, 7, 8, 0, 0]]
    assert batch["pixel_values"].shape == (5, 2, 3, 4, 4) and batch["return_loss"] is True
    assert batch["failures"] == [f"bad {number}" for number in range(5)]
    assert group_places(batch["pair_ids"]) == [[0, 2], [1], [3], [4]]
    batch = finetune_retrieval.CaptionCollator(processor, pair_by_caption=True)(samples)
    assert group_places(batch["pair_ids"]) == [[0, 1], [2, 3, 4]]


def group_places(ids: torch.Tensor) -> list[list[int]]:
    """Places of each id, in order of first appearance."""
    ids = ids.tolist()
    return [[i for i, other in enumerate(ids) if other == each] for each in dict.fromkeys(ids)]


def test_batches_of_questions(processor):
    samples = [
        make_sample(
            0, video="x.mp4", question="What moves?", answers=["ring", "red ring"], answer_weights=[0.75, 0.25]
        ),
        make_sample(1, video="y.mp4", question="what", answers=["blue"], answer_weights=[1.0]),
    ]
    batch = finetune_question_answering.QuestionCollator(processor, max_answer_tokens=4)(samples)
    assert batch["input_ids"].tolist() == [[2, 9, 10, 0, 0, 0], [2, 9, 0, 0, 0, 0]]
    assert batch["labels"].tolist() == [[2, 8, 3, -100], [2, 6, 8, 3], [2, 7, 3, -100]]
    assert batch["answer_weights"].tolist() == [0.75, 0.25, 1.0]
    assert batch["answers_per_question"].tolist() == [2, 1]


class Pairs(nn.Module):
    """Stands for a model: a matrix, a bias and a temperature."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(2, 2)
        self.temperature = nn.Parameter(torch.ones(1))


def build_trainer(tmp_path, **changes) -> FinetuningTrainer:
    fields = {"per_device_train_batch_size": 4, "num_train_epochs": 5, "learning_rate": 1.0, **changes}
    training = FinetuningArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none", **fields)
    return FinetuningTrainer(
        model=Pairs(), args=training, train_dataset=list(range(23)), evaluations={}, max_skipped_ratio=0.1
    )


def test_published_groups_and_schedule(tmp_path):
    """5 batches an epoch (3 rows are left over), 25 steps, of which 2.5 are warm-up by accumulation over 2."""
    trainer = build_trainer(tmp_path, warmup_epochs=1.0, gradient_accumulation_steps=2)
    optimizer = trainer.create_optimizer()
    decays = {name: group["weight_decay"] for group in optimizer.param_groups for name in [group["name"]]}
    assert type(optimizer).__name__ == "AdamW" and decays == {"decay": 0.02, "no_decay": 0.0}
    counts = {group["name"]: len(group["params"]) for group in optimizer.param_groups}
    assert counts == {"decay": 2, "no_decay": 1}  # the temperature is decayed, the bias not
    scheduler = trainer.create_scheduler(25)
    rates = []
    for _ in range(25):
        rates.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    expected = [
        compute_learning_rate_share(step, total_steps=25, warmup_steps=2.5, minimum_share=0.01) for step in range(25)
    ]
    assert rates == pytest.approx(expected) and rates[0] == 0.01 and max(rates) > 0.99


def test_other_schedules_are_those_of_transformers(tmp_path):
    trainer = build_trainer(tmp_path, lr_scheduler_type="constant")
    trainer.create_optimizer()
    assert trainer.create_scheduler(10).get_last_lr()[0] == 1.0
    trainer = build_trainer(tmp_path, warmup_steps=4)
    trainer.create_optimizer()
    scheduler = trainer.create_scheduler(10)
    assert scheduler.lr_lambdas[0](2) == 0.5


def test_first_seconds_limit_the_frames(tmp_path):
    """24 frames at 8 a second: half a second are frames 0 to 3."""
    frames = np.zeros((24, 32, 32, 3), dtype=np.uint8)
    frames[4:] = 255
    write_video(tmp_path / "clip.mp4", frames)
    table = Dataset.from_list([{"video": str(tmp_path / "clip.mp4"), "caption": "a ring"}])
    data, crops = finetune_retrieval.RetrievalDataArguments(num_frames=3), CropArguments()
    assert VideoTextClips(table, data, crops, image_size=32, seed=0)[0]["pixel_values"].amax(dim=(1, 2, 3))[-1] > 1
    data.first_seconds = 0.5
    assert VideoTextClips(table, data, crops, image_size=32, seed=0)[0]["pixel_values"].max() < -1
