"""Which checkpoints a run of fine-tuning may go on from: the same videos a step, and the same steps an epoch."""

import json
import logging

import pytest
import torch
from accelerate.data_loader import BatchSamplerShard
from torch import nn
from torch.utils.data import BatchSampler

from umt_hf.finetuning import trainer as finetuning
from umt_hf.finetuning.resuming import (
    FinetuningShape,
    list_needed_files,
    read_shape,
    require_same_steps,
    say_if_over,
)
from umt_hf.finetuning.trainer import FinetuningArguments, FinetuningTrainer, TrainingClips

SHAPE = FinetuningShape(1, 8, 1, num_rows=60, drop_last=False)


def write_checkpoint(folder, step: int, shape: FinetuningShape | None):
    folder.mkdir()
    state = {"global_step": step, "epoch": (shape or SHAPE).measure_epoch(step)}
    (folder / "trainer_state.json").write_text(json.dumps(state))
    if shape is not None:
        shape.save(folder)
    return state


@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize(("processes", "batch", "accumulation"), [(1, 8, 1), (2, 8, 1), (3, 4, 2), (2, 7, 3)])
@pytest.mark.parametrize("rows", [24, 57, 60, 64])
def test_steps_are_counted_as_the_loaders_count_them(processes, batch, accumulation, rows, drop_last):
    shape = FinetuningShape(processes, batch, accumulation, rows, drop_last)
    shard = BatchSamplerShard(BatchSampler(range(rows), batch, drop_last), processes, 0)
    assert shape.batches_per_epoch == len(shard)
    expected = len(shard) // accumulation + int(len(shard) % accumulation > 0)
    assert shape.steps_per_epoch == max(expected, 1)


@pytest.mark.parametrize(
    ("present", "named"),
    [
        (FinetuningShape(2, 8, 1, 60, False), "16 videos a step (2 processes x 8 x 1 accumulated)"),
        (FinetuningShape(1, 4, 1, 60, False), "4 videos a step (1 process x 4 x 1 accumulated)"),
        (FinetuningShape(1, 8, 4, 60, False), "32 videos a step (1 process x 8 x 4 accumulated)"),
    ],
)
def test_another_number_of_videos_a_step_is_refused_with_both(present, named, tmp_path):
    state = write_checkpoint(tmp_path / "checkpoint-16", 16, SHAPE)
    with pytest.raises(ValueError) as caught:
        require_same_steps(tmp_path / "checkpoint-16", state, present)
    said = str(caught.value)
    assert named in said and "a run of 8 videos a step (1 process x 8 x 1 accumulated)" in said
    assert "whose product is 8" in said and f"--model_name_or_path {tmp_path}/checkpoint-16" in said
    # The same of a checkpoint that has no record of its shape.
    (tmp_path / "checkpoint-16" / "run_shape.json").unlink()
    with pytest.raises(ValueError, match="has 8 steps an epoch, and this run"):
        require_same_steps(tmp_path / "checkpoint-16", state, present)


@pytest.mark.parametrize("recorded", [True, False])
def test_data_of_another_length_are_refused(recorded, tmp_path):
    state = write_checkpoint(tmp_path / "checkpoint-16", 16, SHAPE if recorded else None)
    for rows in (30, 120):
        with pytest.raises(ValueError, match="steps an epoch.*Give the data"):
            require_same_steps(tmp_path / "checkpoint-16", state, FinetuningShape(1, 8, 1, rows, False))
    require_same_steps(tmp_path / "checkpoint-16", state, FinetuningShape(1, 8, 1, 59, False))


@pytest.mark.parametrize("step", [1, 7, 16, 32])
def test_the_same_videos_in_another_split_go_on_and_it_is_said(step, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    state = write_checkpoint(tmp_path / "checkpoint", step, SHAPE)
    require_same_steps(tmp_path / "checkpoint", state, SHAPE)
    assert not caplog.records
    for present in (FinetuningShape(2, 4, 1, 60, False), FinetuningShape(1, 4, 2, 60, False)):
        caplog.clear()
        require_same_steps(tmp_path / "checkpoint", state, present)
        (record,) = caplog.records
        assert "the same videos as before: 8 videos a step (1 process x 8 x 1" in record.getMessage()
    # Within an epoch with a batch that is not full, the older record is exact too.
    (tmp_path / "checkpoint" / "run_shape.json").unlink()
    require_same_steps(tmp_path / "checkpoint", state, SHAPE)


def test_a_run_that_is_over_says_so(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    say_if_over(tmp_path, 16, -1, 4, SHAPE)
    assert not caplog.records
    say_if_over(tmp_path, 32, -1, 4, SHAPE)
    say_if_over(tmp_path, 32, 20, 4, SHAPE)
    said = [
        record.getMessage().removeprefix(f"{tmp_path} is at step 32, and the run has ") for record in caplog.records
    ]
    assert said == [f"{total}: nothing is left to train." for total in (32, 20)]


class Clips(TrainingClips):
    """Numbers in place of videos."""

    def __init__(self, rows: int):
        self.rows, self.epoch = rows, 0

    def __len__(self) -> int:
        return self.rows

    def __getitem__(self, index: int):
        return {"pixel_values": torch.tensor([float(index)])}

    def read_augmented(self, row, generator):
        raise NotImplementedError


class Line(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(1, 1)

    def forward(self, pixel_values, **_):
        return {"loss": self.layer(pixel_values).square().mean() * 1e-3}


def collate(samples):
    return {"pixel_values": torch.stack([sample["pixel_values"] for sample in samples]), "failures": []}


class LineTrainer(FinetuningTrainer):
    """Writes the configuration that a model of the package would write."""

    def complete_checkpoint(self, folder):
        super().complete_checkpoint(folder)
        (folder / "config.json").write_text("{}")


def fine_tune_line(folder, monkeypatch, **changes) -> FinetuningTrainer:
    """A run of the shared function of the four scripts, without a model folder at its end."""
    fields = {"per_device_train_batch_size": 8, "num_train_epochs": 4, "save_steps": 4, "save_strategy": "steps"}
    fields |= {"dataloader_num_workers": 0, "disable_tqdm": True, "dataloader_drop_last": False, **changes}
    args = FinetuningArguments(output_dir=str(folder), use_cpu=True, report_to="none", **fields)
    monkeypatch.setattr(finetuning, "fingerprint_rows", lambda table: {"rows": len(table), "names": "x"})
    monkeypatch.setattr(finetuning, "_write_model", lambda trainer, output_dir: None)
    trainer = LineTrainer(
        model=Line(), args=args, train_dataset=Clips(60), evaluations={}, max_skipped_ratio=0.1, data_collator=collate
    )
    trainer.train_dataset.table = trainer.train_dataset
    finetuning.fine_tune(trainer, {"training": args})
    return trainer


def test_a_run_goes_on_with_the_same_steps_alone(tmp_path, monkeypatch, caplog):
    caplog.set_level(logging.INFO, "umt_hf")
    assert fine_tune_line(tmp_path, monkeypatch).step == 32
    checkpoint = tmp_path / "checkpoint-16"
    assert read_shape(checkpoint) == SHAPE
    resumed = {"resume_from_checkpoint": str(checkpoint)}
    for changes in ({"per_device_train_batch_size": 16}, {"gradient_accumulation_steps": 2}):
        with pytest.raises(ValueError, match=r"8 videos a step.*16 videos a step.*whose product is 8"):
            fine_tune_line(tmp_path, monkeypatch, **resumed, **changes)
    assert (tmp_path / "checkpoint-32").is_dir()  # nothing was set aside for a run that did not start
    split = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
    assert fine_tune_line(tmp_path, monkeypatch, **resumed, **split).step == 32
    assert "the same videos as before" in caplog.text
    auto = {"resume_from_checkpoint": "auto"}
    assert fine_tune_line(tmp_path, monkeypatch, **auto).step == 32 and "nothing is left to train" in caplog.text
    assert fine_tune_line(tmp_path, monkeypatch, **auto, num_train_epochs=5).step == 40


@pytest.mark.parametrize(
    ("name", "how"),
    [("optimizer.pt", "missing"), ("scheduler.pt", "cut"), ("rng_state.pth", "missing"), ("run_shape.json", "cut")],
)
def test_damaged_files_end_in_one_sentence_before_a_step(name, how, tmp_path, monkeypatch):
    fine_tune_line(tmp_path, monkeypatch, num_train_epochs=1)
    path = tmp_path / "checkpoint-8" / name
    if how == "cut":
        path.write_bytes(path.read_bytes()[:-20])
    else:
        path.unlink()
    with pytest.raises(ValueError, match=r"checkpoint-8.* is damaged: ") as caught:
        fine_tune_line(tmp_path, monkeypatch, num_train_epochs=1, resume_from_checkpoint="auto")
    assert name in str(caught.value)
    assert str(caught.value).endswith(f"by `--resume_from_checkpoint {tmp_path}/checkpoint-4`.")


def test_random_states_are_needed_where_their_process_was_there(tmp_path):
    write_checkpoint(tmp_path / "checkpoint", 16, SHAPE)
    assert list_needed_files(tmp_path / "checkpoint", 1, has_moments=False) == ["rng_state.pth"]
    assert list_needed_files(tmp_path / "checkpoint", 2, has_moments=False) == []
    FinetuningShape(4, 2, 1, 60, False).save(tmp_path / "checkpoint")
    assert list_needed_files(tmp_path / "checkpoint", 1, has_moments=False) == []
    assert list_needed_files(tmp_path / "checkpoint", 2, has_moments=True) == [
        "optimizer.pt", "scheduler.pt", "rng_state_0.pth", "rng_state_1.pth"
    ]  # fmt: skip
