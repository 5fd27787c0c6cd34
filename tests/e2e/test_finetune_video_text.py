"""Fine-tuning a stage-2 folder for retrieval and for question answering, whole or by adapters."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModel, AutoModelForVisualQuestionAnswering, AutoProcessor

from tests.e2e.labelled import save_text_splits
from tests.e2e.runs import FINE_TUNING, assert_same_weights, save_video_text_model, to_flags
from tests.processes import run_ranks
from umt_hf import UMTVideoModel
from umt_hf.data.annotations import load_pairs
from umt_hf.evaluation import question_answering as evaluate_question_answering
from umt_hf.evaluation import retrieval as evaluate_retrieval
from umt_hf.finetuning import question_answering as finetune_question_answering
from umt_hf.finetuning import retrieval as finetune_retrieval
from umt_hf.finetuning.trainer import VideoTextClips
from umt_hf.modeling.modeling_umt_video_text import (
    UMTVideoTextForQuestionAnswering,
    UMTVideoTextForRetrieval,
)
from umt_hf.runs.arguments import CropArguments
from umt_hf.runs.config import parse_config

SCRIPTS = {"retrieval": finetune_retrieval, "question_answering": finetune_question_answering}


@pytest.fixture(scope="module")
def stage2(shapes, tmp_path_factory) -> Path:
    return save_video_text_model(tmp_path_factory.mktemp("stage2"), shapes)


@pytest.fixture
def flags(shapes, stage2, tmp_path):
    """Command line of a tiny run; keyword arguments change it."""

    def build(script: str, **changes) -> list[str]:
        fields = {
            **FINE_TUNING,
            "model_name_or_path": stage2,
            "train_data": shapes / f"train_{'captions' if script == 'retrieval' else 'questions'}.json",
            "output_dir": tmp_path / "run",
            "num_frames": 2,
            "horizontal_flip_probability": 0.0,
            "drop_path_rate": 0.0,
            "per_device_train_batch_size": 8,
            "learning_rate": 2e-3,
            "warmup_epochs": 0,
            "max_steps": 3,
            "logging_steps": 1,
        }
        return to_flags(**fields | changes)

    return build


def fine_tune(arguments: list[str], task: str) -> dict[str, float]:
    return SCRIPTS[task].main(arguments)


def read_log(folder: Path) -> list[dict[str, float]]:
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return [line for line in history if "loss" in line]


def average(log: list[dict[str, float]], name: str = "loss") -> float:
    return sum(line[name] for line in log) / len(log)


@pytest.fixture
def inputs(shapes, stage2):
    """Two clips and questions, as a fine-tuned model's processor makes them."""

    def build(folder: Path) -> dict[str, torch.Tensor]:
        processor = AutoProcessor.from_pretrained(folder)
        videos = sorted(str(path) for path in (shapes / "videos" / "test").iterdir())[:2]
        return dict(processor(text=["what color is the ring?", "red"], videos=videos, return_tensors="pt"))

    return build


def test_retrieval_learns_and_exports_a_folder_that_auto_classes_load(flags, stage2, inputs, tmp_path):
    fine_tune(flags("retrieval", max_steps=45), "retrieval")
    run = tmp_path / "run"
    log = read_log(run)
    assert len(log) == 45 and log[0].keys() >= {"vtc_loss", "vtm_loss", "learning_rate", "grad_norm", "skipped_videos"}
    assert log[0]["loss"] == pytest.approx(log[0]["vtc_loss"] + log[0]["vtm_loss"], abs=1e-3)
    assert average(log[-5:], "vtc_loss") < 0.8 * average(log[:5], "vtc_loss")
    assert average(log[-5:]) < average(log[:5])

    model, info = UMTVideoTextForRetrieval.from_pretrained(run, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert AutoModel.from_pretrained(run).config.vision_config.num_frames == 2
    _, info = UMTVideoModel.from_pretrained(run, output_loading_info=True)
    assert not info["missing_keys"]
    processor = AutoProcessor.from_pretrained(run)
    assert processor.tokenizer.model_max_length == 32 and processor.video_processor.sampling_strategy == "middle"
    batch = inputs(run)
    assert batch["pixel_values"].shape == (2, 2, 3, 64, 64) and batch["input_ids"].shape == (2, 32)
    assert model(**batch).logits_per_video.isfinite().all()
    # The recorded arguments are themselves a recipe.
    parsed = parse_config(finetune_retrieval.SECTIONS, ["--config", str(run / "run.yaml")])
    assert parsed[0].model_name_or_path == str(stage2) and parsed[4].max_steps == 45
    assert json.loads((run / "versions.json").read_text())["torch"] == torch.__version__


@pytest.mark.heavy
def test_question_answering_learns_and_goes_on_from_its_own_folder(flags, inputs, tmp_path):
    fine_tune(flags("question_answering", max_steps=40), "question_answering")
    run = tmp_path / "run"
    log = read_log(run)
    assert average(log[-5:]) < 0.8 * average(log[:5])
    model, info = AutoModelForVisualQuestionAnswering.from_pretrained(run, output_loading_info=True)
    assert type(model) is UMTVideoTextForQuestionAnswering
    assert not info["missing_keys"] and not info["unexpected_keys"]
    batch = inputs(run)
    assert batch["input_ids"].shape == (2, 25)
    assert model.generate(**batch, max_new_tokens=3).shape[0] == 2

    again = tmp_path / "again"
    changes = {"model_name_or_path": run, "output_dir": again, "learning_rate": 0, "max_steps": 1}
    fine_tune(flags("question_answering", **changes), "question_answering")
    assert read_log(again)[0]["loss"] < average(log[:5])
    assert_same_weights(run, again)


@pytest.mark.parametrize("task", list(SCRIPTS))
def test_adapters_make_a_round_trip_and_equal_their_merged_folder(flags, stage2, inputs, tmp_path, task):
    fine_tune(flags(task, mode="lora", lora_rank=4, max_steps=4, gradient_checkpointing="true"), task)
    run = tmp_path / "run"
    if task == "retrieval":
        base = UMTVideoTextForRetrieval.from_pretrained(stage2)
        merged, info = UMTVideoTextForRetrieval.from_pretrained(run, output_loading_info=True)
    else:
        base = UMTVideoTextForQuestionAnswering.from_pretraining(stage2)
        merged, info = UMTVideoTextForQuestionAnswering.from_pretrained(run, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    batch = inputs(run)

    def compute(model) -> torch.Tensor:
        if task == "retrieval":
            video = model.get_video_features(batch["pixel_values"])
            text = model.get_text_features(batch["input_ids"], batch["attention_mask"])
            matching = model.match(video.last_hidden_state, text.last_hidden_state, batch["attention_mask"])
            return torch.cat([matching.flatten(), video.pooler_output.flatten(), text.pooler_output.flatten()])
        return model(**batch, labels=torch.tensor([[2, 7, 8, 3, -100], [2, 9, 3, -100, -100]])).logits

    with torch.no_grad():
        before = compute(base)
        adapted = PeftModel.from_pretrained(base, run / "adapter").eval()
        torch.testing.assert_close(compute(adapted), compute(merged), atol=1e-5, rtol=1e-4)
        assert (compute(adapted) - before).abs().max() > 1e-3

    adapter = load_file(run / "adapter" / "adapter_model.safetensors")
    for tower in ("vision_model", "text_model") + (("answer_decoder",) if task == "question_answering" else ()):
        for projection in ("q_proj", "v_proj"):
            trained = [key for key in adapter if tower in key and f"{projection}.lora_B" in key]
            assert trained and all(adapter[key].abs().max() > 0 for key in trained)
    heads = SCRIPTS[task].HEADS
    assert all([key for key in adapter if f".{head}." in key] for head in heads)


def read_evaluations(folder: Path, name: str) -> list[float]:
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return [line[name] for line in history if name in line]


@pytest.mark.parametrize("mode", ["full", "lora"])
def test_best_checkpoint_is_the_one_kept(flags, shapes, tmp_path, mode):
    held_out = {"validation_data": shapes / "validation_captions.json", "test_data": shapes / "test_captions.json"}
    best = {"load_best_model_at_end": "true", "metric_for_best_model": "eval_reranked_mean_recall"}
    steps = {"eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 2, "max_steps": 6}
    metrics = fine_tune(flags("retrieval", mode=mode, rerank_top_k=3, **held_out, **best, **steps), "retrieval")
    found = read_evaluations(tmp_path / "run", best["metric_for_best_model"])
    assert len(found) == 4 and metrics["eval_reranked_mean_recall"] == found[-1] == max(found[:3])
    assert 0 < metrics["test_dual_text_to_video_r10"] <= 1
    assert json.loads((tmp_path / "run" / "test_results.json").read_text()).keys() <= metrics.keys()
    found = evaluate_retrieval.main(build_evaluation_flags(tmp_path, data=held_out["test_data"], rerank_top_k=3))
    assert found == pytest.approx({name: metrics[f"test_{name}"] for name in found})


def build_evaluation_flags(folder: Path, **fields) -> list[str]:
    """Command line that scores the folder of a run by itself."""
    fields |= {"model_name_or_path": folder / "run", "output_dir": folder / "report", "dataloader_num_workers": 0}
    return to_flags(**fields)


def test_multiple_choice(flags, shapes, tmp_path):
    """Each held-out clip with its own caption and another one's."""
    rows = json.loads((shapes / "validation_captions.json").read_text())
    captions = [row["caption"] for row in rows]
    choices = [
        {"video": str(shapes / row["video"]), "caption": [captions[i - 1], row["caption"]], "answer": 1}
        for i, row in enumerate(rows)
    ]
    (tmp_path / "choices.json").write_text(json.dumps(choices))
    changes = {"validation_data": tmp_path / "choices.json", "task": "multiple_choice", "max_steps": 1}
    assert 0 <= fine_tune(flags("retrieval", **changes), "retrieval")["eval_accuracy"] <= 1


def test_answers_from_the_list_are_counted(flags, shapes, tmp_path):
    held_out, answers = shapes / "validation_questions.json", shapes / "answers.json"
    changes = {"validation_data": held_out, "answers": answers, "top_k": 16, "max_steps": 10, "learning_rate": 5e-3}
    metrics = fine_tune(flags("question_answering", **changes), "question_answering")
    changes = {"data": held_out, "answers": answers, "top_k": 16}
    assert evaluate_question_answering.main(build_evaluation_flags(tmp_path, **changes)) == {
        "accuracy": metrics["eval_accuracy"]
    }


def test_data_that_is_missing(flags, shapes, tmp_path):
    with pytest.raises(ValueError, match="validation_data"):
        fine_tune(flags("retrieval", eval_strategy="epoch"), "retrieval")
    with pytest.raises(ValueError, match="train_data"):
        fine_tune(flags("retrieval", train_data=None), "retrieval")
    rows = json.loads((shapes / "train_questions.json").read_text())[:1]
    (tmp_path / "open.json").write_text(json.dumps([{**rows[0], "answer": []}]))
    with pytest.raises(ValueError, match="no answer to train on"):
        fine_tune(flags("question_answering", train_data=tmp_path / "open.json"), "question_answering")


def test_folder_without_the_parts(flags, tmp_path):
    """An answering model has no projections to start retrieval from."""
    fine_tune(flags("question_answering", max_steps=1), "question_answering")
    with pytest.raises(
        ValueError, match="is a video question answering folder .* needs a video-text retrieval folder"
    ):
        fine_tune(flags("retrieval", model_name_or_path=tmp_path / "run"), "retrieval")


def write_with_bad_video(shapes: Path, folder: Path) -> Path:
    """Training captions of which the first has a video that cannot be read."""
    rows = json.loads((shapes / "train_captions.json").read_text())
    for row in rows:
        row["video"] = str(shapes / row["video"])
    (folder / "broken.mp4").write_bytes(b"not a video at all")
    rows[0] = {"video": str(folder / "broken.mp4"), "caption": "never seen"}
    path = folder / "captions.json"
    path.write_text(json.dumps(rows))
    return path


def test_unreadable_video_takes_its_caption_along(flags, shapes, tmp_path):
    source = write_with_bad_video(shapes, tmp_path)
    data = finetune_retrieval.RetrievalDataArguments(train_data=str(source), num_frames=2)
    clips = VideoTextClips(load_pairs(str(source)), data, CropArguments(), image_size=64, seed=0)
    sample = clips[0]
    assert "broken.mp4" in sample["failures"][0]
    other = clips.table[sample["number"]]
    assert sample["number"] != 0 and sample["row"] == other and other["caption"] != "never seen"
    assert torch.equal(clips[0]["pixel_values"], sample["pixel_values"]) and not clips[1]["failures"]
    clips.epoch = 1
    assert not torch.equal(clips[0]["pixel_values"], sample["pixel_values"])


def test_unreadable_videos_are_counted_named_and_bounded(flags, shapes, tmp_path, caplog, monkeypatch):
    source = write_with_bad_video(shapes, tmp_path)
    arguments = flags("retrieval", train_data=source, max_steps=3, max_skipped_ratio=0.2)
    fine_tune(arguments, "retrieval")
    assert read_log(tmp_path / "run")[-1]["skipped_videos"] >= 1 and "broken.mp4" in caplog.text
    monkeypatch.setattr("umt_hf.training.trainer.MIN_SKIPS_TO_STOP", 1)
    arguments = flags("retrieval", train_data=source, max_steps=3, max_skipped_ratio=0.01)
    with pytest.raises(RuntimeError, match="max_skipped_ratio"):
        fine_tune(arguments, "retrieval")


def test_resumed_run_equals_the_uninterrupted_one(flags, tmp_path):
    """In the middle of an epoch of three steps, with dropout, stochastic depth and drawn negatives."""
    common = {"max_steps": 7, "save_strategy": "steps", "save_steps": 4, "drop_path_rate": 0.2}
    fine_tune(flags("retrieval", output_dir=tmp_path / "whole", **common), "retrieval")
    resumed = tmp_path / "resumed"
    (resumed).mkdir()
    shutil.copytree(tmp_path / "whole" / "checkpoint-4", resumed / "checkpoint-4")
    fine_tune(flags("retrieval", output_dir=resumed, resume_from_checkpoint="auto", **common), "retrieval")
    assert [line["loss"] for line in read_log(resumed)] == [line["loss"] for line in read_log(tmp_path / "whole")]
    assert_same_weights(tmp_path / "whole", resumed)


def test_two_processes_equal_one_with_both_batches(flags, stage2, tmp_path):
    """Without the matching loss, whose negatives come from each process's own batch."""
    folder = tmp_path / "contrast"
    shutil.copytree(stage2, folder)
    config = json.loads((folder / "config.json").read_text())
    config["vtm_loss_weight"] = 0.0
    config["text_config"] |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    (folder / "config.json").write_text(json.dumps(config))
    common = {"model_name_or_path": folder, "max_steps": 3}
    fine_tune(flags("retrieval", output_dir=tmp_path / "one", per_device_train_batch_size=8, **common), "retrieval")
    arguments = flags("retrieval", output_dir=tmp_path / "two", per_device_train_batch_size=4, **common)
    run_ranks(finetune_retrieval.main, arguments)
    one, two = read_log(tmp_path / "one"), read_log(tmp_path / "two")
    assert [line["loss"] for line in one] == pytest.approx([line["loss"] for line in two], abs=1e-4)
    assert [line["grad_norm"] for line in one] == pytest.approx([line["grad_norm"] for line in two], rel=1e-3)
    assert_same_weights(tmp_path / "one", tmp_path / "two", atol=2e-4, rtol=1e-3)


@pytest.mark.parametrize("task", ["retrieval", pytest.param("question_answering", marks=pytest.mark.heavy)])
def test_a_split_for_training_and_one_for_each_test(flags, shapes, tmp_path, monkeypatch, task):
    """The defaults, others by name, one of the training data, one that is missing, and one of a file."""
    kind = "captions" if task == "retrieval" else "questions"
    counts = {"train": 8, "validation": 4, "test": 2}
    rows = {
        split: json.loads((shapes / f"{split}_{kind}.json").read_text())[:count] for split, count in counts.items()
    }
    source = save_text_splits(tmp_path / "data", rows, shapes)
    reader = "load_retrieval_set" if task == "retrieval" else "load_questions"
    seen, load = [], getattr(SCRIPTS[task], reader)

    def record(*given, **options):
        seen.append(options["split"])
        return load(*given, **options)

    monkeypatch.setattr(SCRIPTS[task], reader, record)
    few = {"max_steps": 1, "per_device_train_batch_size": 2, "train_data": source}
    fine_tune(flags(task, **few, validation_data=source, test_split="train"), task)
    assert seen[-2:] == ["validation", "train"]
    held_out = {"validation_data": source, "validation_split": "test", "output_dir": tmp_path / "other"}
    fine_tune(flags(task, **few, **held_out), task)
    assert seen[-1] == "test"
    for name in ("train_split", "validation_split", "test_split"):
        with pytest.raises(ValueError, match="no split 'val'; it has"):
            fine_tune(flags(task, **few, **{name: "val"}), task)
        with pytest.raises(ValueError, match=f"{name}=val"):
            fine_tune(flags(task, **{name: "val"}), task)


@pytest.mark.parametrize("task", SCRIPTS)
def test_a_wrong_name_of_the_best_figure_lists_what_there_is(flags, tmp_path, task):
    known = "dual_text_to_video_r1, .*reranked_mean_recall" if task == "retrieval" else "but accuracy"
    with pytest.raises(ValueError, match=f"metric_for_best_model=eval_top1: .*{known}"):
        fine_tune(flags(task, metric_for_best_model="eval_top1"), task)
    assert not (tmp_path / "run").exists()
