"""Whole stage-1 runs on rendered videos: export, resume, distribution, accumulation, and what goes wrong."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from datasets import Dataset, Features, Value
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForPreTraining, AutoVideoProcessor

from tests.e2e.runs import assert_complete, assert_same_weights, read_losses
from tests.processes import run_and_kill, run_ranks, run_until
from umt_hf.modeling.modeling_umt_video import UMTVideoForPreTraining
from umt_hf.processing.decoding import open_video
from umt_hf.processing.video_processing_umt_video import UMTVideoProcessor
from umt_hf.runs.config import parse_config
from umt_hf.runs.folder import read_metrics
from umt_hf.training import stage1
from umt_hf.training.checkpointing import list_checkpoints, require_own_weights, take_own_names


def test_run_exports_a_folder_that_auto_classes_load(flags, shapes, tmp_path):
    state = stage1.main(flags(eval_steps=2, max_steps=4, save_steps=2, report_to="tensorboard"))
    run = tmp_path / "run"
    assert list((run / "umt-hf").rglob("events.out.tfevents*"))
    assert not (run / "umt_hf").exists()  # which Python would take for the package in this folder
    assert state.step == 4 and state.videos == 16 and state.skipped_videos == 0
    assert state.position == {"epoch": 0, "row": 16}
    for folder in (run, run / "checkpoint-2", run / "checkpoint-4"):
        model, info = AutoModel.from_pretrained(folder, output_loading_info=True)
        assert not info["missing_keys"] and not info["unexpected_keys"]
        processor = AutoVideoProcessor.from_pretrained(folder)
        assert type(processor) is UMTVideoProcessor and processor.num_frames == 4
    student, info = AutoModelForPreTraining.from_pretrained(run, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert student.config.mask_type == "attention" and student.config.teacher_hidden_size == 12

    video = next((shapes / "videos" / "test").iterdir())
    with torch.no_grad():
        embedding = model(**processor(str(video), return_tensors="pt")).pooler_output
    assert embedding.shape == (1, 32) and embedding.isfinite().all()

    lines = read_metrics(run / "metrics.jsonl")
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3, 4]
    assert [line["step"] for line in lines if "eval_loss" in line] == [2, 4]
    assert all(0 < line["loss"] < 4 for line in lines if "loss" in line)
    names = {"learning_rate", "clips_per_second", "data_wait_share", "skipped_videos", "nonfinite_steps"}
    assert names <= lines[0].keys()
    assert json.loads((run / "versions.json").read_text())["torch"] == torch.__version__
    # The resolved configuration is itself a recipe.
    again = parse_config(stage1.SECTIONS, ["--config", str(run / "run.yaml")])
    assert again[0].hidden_size == 32 and again[5].max_steps == 4
    # The teacher is in no file of the run.
    assert not [name for name in load_file(run / "model.safetensors") if "teacher" in name or "tower" in name]


def test_what_is_found_is_said(flags, shapes, tmp_path, caplog, capfd):
    rows = [line for name in ("train", "validation") for line in (shapes / f"{name}.csv").read_text().splitlines()]
    (shapes / "both.csv").write_text("\n".join(rows) + "\n")
    with caplog.at_level("INFO"):
        stage1.main(flags(train_data=shapes / "both.csv", max_steps=1, warmup_steps=0, disable_tqdm=True))
    assert f"{len(rows)} training videos, 6 held out." in caplog.text
    assert "6 of 6 validation videos are training videos" in caplog.text
    assert "pre-training" not in capfd.readouterr().err


def test_null_rows_and_empty_bytes_of_parquet_are_counted_skips(flags, shapes, tmp_path, caplog):
    """A run on a table whose rows partly hold no video ends with all its steps, and says how many rows it left out."""
    good = [{"bytes": path.read_bytes(), "path": None} for path in sorted((shapes / "videos" / "train").iterdir())[:8]]
    bad = [None, {"bytes": b"", "path": None}, {"bytes": None, "path": None}, {"bytes": b"text", "path": None}]
    video = {"bytes": Value("binary"), "path": Value("string")}
    table = Dataset.from_dict({"video": [*bad, *good]}, features=Features({"video": video}))
    (tmp_path / "data").mkdir()
    table.to_parquet(tmp_path / "data" / "train.parquet")
    state = stage1.main(flags(train_data=tmp_path / "data", max_steps=6, max_skipped_ratio=0.9))
    # 6 steps of 4 videos are two epochs of 12 rows; a row drawn in place of a bad one may be bad too, and counts.
    assert state.step == 6 and state.videos == 24 and state.skipped_videos >= 2 * len(bad)
    # What is said of rows without a path is said once, and is in a list.
    said = [record.getMessage() for record in caplog.records if record.getMessage().startswith("Skipped, since it")]
    listed = (tmp_path / "run" / "unreadable.txt").read_text().splitlines()
    assert [line.split("cannot be read: ", 1)[1] for line in said] == listed and len(listed) == 2
    lines = [line for line in read_metrics(tmp_path / "run" / "metrics.jsonl") if "skipped_videos" in line]
    assert lines[-1]["skipped_videos"] == state.skipped_videos
    assert "has neither a path nor bytes" in caplog.text and "<video of 4 bytes>: cannot be decoded" in caplog.text
    assert UMTVideoForPreTraining.from_pretrained(tmp_path / "run").config.hidden_size == 32


def test_loss_falls(flags, tmp_path):
    stage1.main(flags(max_steps=40, learning_rate=5e-3, per_device_train_batch_size=8))
    losses = read_losses(tmp_path / "run")
    assert sum(losses[s] for s in range(36, 41)) < 0.8 * sum(losses[s] for s in range(1, 6))


@pytest.mark.parametrize("mask_type", ["tube", "random"])
def test_other_masks(flags, tmp_path, mask_type):
    stage1.main(flags(mask_type=mask_type, max_steps=2))
    assert AutoModel.from_pretrained(tmp_path / "run").config.mask_type == mask_type


def test_accumulation_2x4_equals_1x8(flags, tmp_path):
    stage1.main(flags(output_dir=tmp_path / "whole", per_device_train_batch_size=8, max_steps=5))
    stage1.main(
        flags(
            output_dir=tmp_path / "parts",
            per_device_train_batch_size=4,
            gradient_accumulation_steps=2,
            max_steps=5,
        )
    )
    whole, parts = read_losses(tmp_path / "whole"), read_losses(tmp_path / "parts")
    assert whole == pytest.approx(parts, abs=1e-5)
    assert_same_weights(tmp_path / "whole", tmp_path / "parts", atol=2e-4, rtol=1e-3)


def test_resumed_run_equals_the_uninterrupted_one(flags, tmp_path):
    """Mid-epoch, with stochastic depth and two workers against none."""
    common = {"max_steps": 8, "save_steps": 5, "drop_path_rate": 0.2, "gradient_accumulation_steps": 1}
    stage1.main(flags(output_dir=tmp_path / "whole", **common))
    shutil.copytree(tmp_path / "whole", tmp_path / "resumed")
    shutil.rmtree(tmp_path / "resumed" / "checkpoint-8")
    state = stage1.main(
        flags(output_dir=tmp_path / "resumed", resume_from_checkpoint="auto", dataloader_num_workers=2, **common)
    )
    assert state.step == 8 and state.videos == 32
    assert read_losses(tmp_path / "resumed") == read_losses(tmp_path / "whole")
    assert list(read_losses(tmp_path / "resumed")) == list(range(1, 9))
    assert_same_weights(tmp_path / "whole", tmp_path / "resumed")
    # Resuming a finished run changes nothing.
    stage1.main(flags(output_dir=tmp_path / "resumed", resume_from_checkpoint="auto", **common))
    assert_same_weights(tmp_path / "whole", tmp_path / "resumed")


def test_killed_run_resumes_to_the_same_losses(flags, tmp_path):
    """SIGKILL at an arbitrary moment after the first checkpoint."""
    common = {"max_steps": 30, "save_steps": 1, "save_total_limit": 2}
    stage1.main(flags(output_dir=tmp_path / "whole", **common))
    arguments = flags(output_dir=tmp_path / "killed", **common)
    run_and_kill(lambda: list_checkpoints(tmp_path / "killed"), stage1.main, arguments)
    kept = list_checkpoints(tmp_path / "killed")
    assert 1 <= len(kept) <= 3
    for checkpoint in kept:
        UMTVideoForPreTraining.from_pretrained(checkpoint)
    stage1.main([*arguments, "--resume_from_checkpoint", "auto"])
    assert read_losses(tmp_path / "killed") == read_losses(tmp_path / "whole")
    assert_same_weights(tmp_path / "whole", tmp_path / "killed")
    assert [path.name for path in list_checkpoints(tmp_path / "killed")] == ["checkpoint-29", "checkpoint-30"]


@pytest.mark.parametrize("moment", ["checkpoint-*.unfinished/training_state/counters.json", "checkpoint-*.deleted"])
def test_kills_during_saves_and_deletions(flags, tmp_path, moment):
    """What is left beside complete checkpoints is gone after the next start."""
    run, common = tmp_path / "run", {"max_steps": 12, "save_steps": 1, "save_total_limit": 1}
    stage1.main(flags(output_dir=tmp_path / "whole", **common))
    run_until(run, moment, stage1.main, flags(**common))
    for checkpoint in list_checkpoints(run):
        UMTVideoForPreTraining.from_pretrained(checkpoint)
    stage1.main(flags(**common, resume_from_checkpoint="auto"))
    assert read_losses(run) == read_losses(tmp_path / "whole")
    assert [path.name for path in run.glob("*checkpoint*")] == ["checkpoint-12"]


def test_a_nan_in_the_start_folder_is_named_before_the_first_step(flags, tmp_path):
    stage1.main(flags(max_steps=1, output_dir=tmp_path / "start"))
    weights = load_file(tmp_path / "start" / "model.safetensors")
    next(iter(weights.values())).view(-1)[0] = float("nan")
    save_file(weights, tmp_path / "start" / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"The model to start from: weights are NaN or infinite"):
        stage1.main(flags(max_steps=1, model_name_or_path=tmp_path / "start"))
    assert not (tmp_path / "run" / "config.json").exists()


def test_half_written_checkpoint_is_ignored_and_removed(flags, tmp_path):
    stage1.main(flags(max_steps=4, save_steps=2))
    run = tmp_path / "run"
    (run / "checkpoint-4").rename(run / "checkpoint-4.unfinished")
    state = stage1.main(flags(max_steps=4, save_steps=2, resume_from_checkpoint="auto"))
    assert state.step == 4
    assert [path.name for path in sorted(run.glob("checkpoint-*"))] == ["checkpoint-2", "checkpoint-4"]


def test_two_processes_equal_one(flags, tmp_path):
    """Same global batch, same weights; also resumed mid-epoch with two processes."""
    stage1.main(flags(output_dir=tmp_path / "one", per_device_train_batch_size=8, max_steps=4, eval_steps=4))
    common = {"per_device_train_batch_size": 4, "max_steps": 4, "save_steps": 2, "eval_steps": 4}
    run_ranks(stage1.main, flags(output_dir=tmp_path / "two", **common))
    one, two = read_metrics(tmp_path / "one" / "metrics.jsonl"), read_metrics(tmp_path / "two" / "metrics.jsonl")
    assert read_losses(tmp_path / "one") == pytest.approx(read_losses(tmp_path / "two"), abs=1e-5)
    assert one[-1]["eval_loss"] == pytest.approx(two[-1]["eval_loss"], abs=1e-4)
    assert_same_weights(tmp_path / "one", tmp_path / "two", atol=2e-4, rtol=1e-3)

    shutil.copytree(tmp_path / "two", tmp_path / "resumed")
    shutil.rmtree(tmp_path / "resumed" / "checkpoint-4")
    run_ranks(stage1.main, flags(output_dir=tmp_path / "resumed", resume_from_checkpoint="auto", **common))
    assert read_losses(tmp_path / "resumed") == read_losses(tmp_path / "two")
    assert_same_weights(tmp_path / "two", tmp_path / "resumed")


def test_held_out_loss_depends_on_nothing_but_the_model(flags, tmp_path):
    losses = set()
    for number, changes in enumerate(({}, {"per_device_eval_batch_size": 1}, {"dataloader_num_workers": 1})):
        stage1.main(flags(output_dir=tmp_path / str(number), max_steps=1, **changes))
        lines = read_metrics(tmp_path / str(number) / "metrics.jsonl")
        losses.add(round(lines[-1]["eval_loss"], 5))
    assert len(losses) == 1


def test_continues_from_a_folder(flags, tmp_path):
    stage1.main(flags(output_dir=tmp_path / "first", max_steps=3))
    stage1.main(
        flags(
            output_dir=tmp_path / "second",
            model_name_or_path=tmp_path / "first",
            max_steps=1,
            learning_rate=0,
            min_learning_rate=0,
            mask_ratio=0.5,
        )
    )
    assert_same_weights(tmp_path / "first", tmp_path / "second")
    assert AutoModel.from_pretrained(tmp_path / "second").config.mask_ratio == 0.5


def test_gradient_checkpointing_and_repeated_augmentation(flags, tmp_path):
    plain = flags(output_dir=tmp_path / "plain", repeated_augmentation=2, max_steps=3)
    stage1.main(plain)
    stage1.main(
        flags(
            output_dir=tmp_path / "checkpointed", repeated_augmentation=2, max_steps=3, gradient_checkpointing="true"
        )
    )
    assert_same_weights(tmp_path / "plain", tmp_path / "checkpointed", atol=1e-5, rtol=1e-4)


def test_bf16(flags, tmp_path):
    stage1.main(flags(mixed_precision="bf16", max_steps=3))
    assert all(0 < loss < 4 for loss in read_losses(tmp_path / "run").values())


def write_csv_with_bad_videos(shapes: Path, path: Path, bad: int) -> Path:
    lines = [f"{shapes / line}" for line in (shapes / "train.csv").read_text().splitlines()]
    for number in range(bad):
        broken = path.parent / f"broken_{number}.mp4"
        broken.write_bytes(b"not a video at all")
        lines[number] = f"{broken},0"
    path.write_text("\n".join(lines) + "\n")
    return path


def test_unreadable_videos_are_counted_and_named(flags, shapes, tmp_path, caplog):
    train = write_csv_with_bad_videos(shapes, tmp_path / "train.csv", bad=2)
    state = stage1.main(flags(train_data=train, max_steps=6, max_skipped_ratio=0.2))
    assert state.skipped_videos >= 2 and state.step == 6
    assert "broken_0.mp4" in caplog.text and "broken_1.mp4" in caplog.text
    lines = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert max(line.get("skipped_videos", 0) for line in lines) == state.skipped_videos


def test_too_many_unreadable_videos_stop_the_run(flags, shapes, tmp_path):
    train = write_csv_with_bad_videos(shapes, tmp_path / "train.csv", bad=12)
    with pytest.raises(RuntimeError, match="max_skipped_ratio"):
        stage1.main(flags(train_data=train, max_steps=60, max_skipped_ratio=0.2))


def poison(monkeypatch, steps: set[int]) -> None:
    """Make the loss of some calls NaN."""
    calls = iter(range(1000))
    original = stage1.Stage1.forward_step

    def forward_step(self, batch):
        losses = original(self, batch)
        return {name: loss * float("nan") for name, loss in losses.items()} if next(calls) in steps else losses

    monkeypatch.setattr(stage1.Stage1, "forward_step", forward_step)


def test_nonfinite_steps_are_skipped_and_counted(flags, tmp_path, monkeypatch):
    poison(monkeypatch, {1, 3})
    state = stage1.main(flags(max_steps=5, validation_data=None))
    assert state.step == 5 and state.nonfinite_steps == 2 and state.nonfinite_in_a_row == 0
    weights = load_file(tmp_path / "run" / "model.safetensors")
    assert all(tensor.isfinite().all() for tensor in weights.values())
    assert [line["loss"] is None for line in read_metrics(tmp_path / "run" / "metrics.jsonl")] == [
        False, True, False, True, False,
    ]  # fmt: skip


def test_too_many_nonfinite_steps_stop_the_run(flags, monkeypatch):
    poison(monkeypatch, set(range(1, 1000)))
    with pytest.raises(RuntimeError, match="learning_rate"):
        stage1.main(flags(max_steps=50, max_nonfinite_steps=3))


def test_earlier_run_is_not_overwritten(flags):
    stage1.main(flags(max_steps=1))
    with pytest.raises(FileExistsError, match="resume_from_checkpoint auto"):
        stage1.main(flags(max_steps=1))


def test_grids_that_differ(flags):
    with pytest.raises(ValueError, match="teacher_image_size=128"):
        stage1.main(flags(patch_size=8))


def test_no_data(flags):
    with pytest.raises(ValueError, match="train_data"):
        stage1.main(flags(train_data=None, validation_data=None))


def test_saved_rows_and_folders_of_frames(flags, shapes, tmp_path):
    """A saved table with a column of type Video, and frames on disk, as folder and as published list."""
    from datasets import Dataset, Features, Video
    from PIL import Image

    files = sorted((shapes / "videos" / "train").iterdir())
    table = Dataset.from_dict({"clip": [str(file) for file in files]}, features=Features({"clip": Video()}))
    table.save_to_disk(tmp_path / "saved")
    lines = []
    for file in files[:8]:
        folder = tmp_path / "frames" / file.stem
        folder.mkdir(parents=True)
        with open_video(file) as reader:
            for number, frame in enumerate(reader.get_frames(range(reader.num_frames))):
                Image.fromarray(frame).save(folder / f"img_{number + 1:05d}.jpg")
            lines.append(f"frames/{file.stem} {reader.num_frames} 7")
    (tmp_path / "list.txt").write_text("\n".join(lines))
    for name in ("saved", "frames", "list.txt"):
        state = stage1.main(flags(train_data=tmp_path / name, max_steps=1, output_dir=tmp_path / f"run_{name}"))
        assert state.step == 1 and state.skipped_videos == 0, name


def test_folder_of_videos(flags, shapes, tmp_path):
    state = stage1.main(flags(train_data=shapes / "videos" / "train", max_steps=1))
    assert state.step == 1


COMPILED = {"ACCELERATE_DYNAMO_BACKEND": "aot_eager"}


@pytest.mark.heavy
@pytest.mark.parametrize("num_processes", [1, 2])
def test_compiled_runs_export_the_models_own_weights_and_resume(flags, tmp_path, num_processes):
    common = {
        "max_steps": 4,
        "save_steps": 2,
        "drop_path_rate": 0.2,
        "per_device_train_batch_size": 4 // num_processes,
    }
    options = {"num_processes": num_processes}
    for name, environment in (("plain", {}), ("compiled", COMPILED)):
        arguments = flags(output_dir=tmp_path / name, **common)
        run_ranks(stage1.main, arguments, environment=environment, **options)
    run = tmp_path / "compiled"
    folders = [run, run / "checkpoint-2", run / "checkpoint-4"]
    early, *_ = [assert_complete(folder, UMTVideoForPreTraining) for folder in folders[1:]]
    final = assert_complete(run, UMTVideoForPreTraining)
    assert any(not torch.equal(tensor, early[name]) for name, tensor in final.items())
    assert read_losses(run) == pytest.approx(read_losses(tmp_path / "plain"), abs=1e-5)

    resumed = tmp_path / "resumed"
    shutil.copytree(run, resumed)
    shutil.rmtree(resumed / "checkpoint-4")
    arguments = flags(output_dir=resumed, resume_from_checkpoint="auto", **common)
    run_ranks(stage1.main, arguments, environment=COMPILED, **options)
    assert read_losses(resumed) == read_losses(run)
    assert_same_weights(run, resumed)


def test_weights_that_are_not_the_models_are_not_exported(tmp_path):
    model = torch.nn.Sequential(torch.nn.Linear(2, 2))
    compiled = torch.compile(model, backend="aot_eager")
    assert take_own_names(compiled.state_dict(), model).keys() == model.state_dict().keys()
    with pytest.raises(RuntimeError, match="not those of the Sequential, first: 0.bias"):
        take_own_names({"0.weight": torch.zeros(2, 2)}, model)
    for name, state in (
        ("lost", {"0.weight": torch.zeros(2, 2)}),
        ("wrong", {"0.weight": torch.zeros(1), "x": torch.ones(1)}),
    ):
        (tmp_path / name).mkdir()
        save_file(state, tmp_path / name / "model.safetensors")
        with pytest.raises(RuntimeError, match="does not hold the weights of the Sequential: 1 missing and"):
            require_own_weights(tmp_path / name, model)


def test_workers_that_are_not_forked(flags, forkserver, tmp_path):
    """The clips of a run, and held-out ones, are those that this process reads."""
    stage1.main(flags(output_dir=tmp_path / "workers", max_steps=3, dataloader_num_workers=2))
    stage1.main(flags(output_dir=tmp_path / "none", max_steps=3, dataloader_num_workers=0))
    assert read_losses(tmp_path / "workers") == read_losses(tmp_path / "none")
