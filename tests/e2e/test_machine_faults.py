"""A fault of the machine (a full disk, a lost shard) is one line with an exit code that a scheduler can tell."""

import shutil
from pathlib import Path

import pytest

from tests.e2e.mistakes import fail, read_error, run_script
from tests.e2e.runs import save_video_text_model, to_flags
from tests.processes import run_ranks
from umt_hf.training import stage1
from umt_hf.training.checkpointing import list_checkpoints

resource = pytest.importorskip("resource", reason="Windows limits no sizes of files")
MACHINE_CODE = 4


def run_with_small_files(module: str, words: list[str], num_bytes: int) -> None:
    """A script in a process whose files may not grow past a size: the system refuses as on a full disk."""
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    run_script(module, words)


def fail_on_a_full_disk(module: str, words: list[str], num_bytes: int) -> str:
    return read_error(
        run_ranks(run_with_small_files, module, words, num_bytes, num_processes=1, exit_code=MACHINE_CODE)
    )


@pytest.mark.parametrize("file", ["model.safetensors", "training_state/optimizer.bin"])
def test_a_full_disk_at_a_save_is_one_line_with_the_checkpoint_to_go_on_from(file, flags, tmp_path):
    """Of safetensors and of PyTorch, whose own errors do not name the disk."""
    stage1.main(flags(max_steps=2, save_steps=1, validation_data=None))
    run = tmp_path / "run"
    shutil.rmtree(run / "checkpoint-2")
    words = flags(max_steps=2, save_steps=1, validation_data=None, resume_from_checkpoint="auto")
    size = (run / "checkpoint-1" / file).stat().st_size
    error = fail_on_a_full_disk("training.stage1", words, size - 4096)
    assert error.startswith(f"Error: {run}/checkpoint-2 could not be written: file too large"), error
    assert "Make room" in error
    assert error.endswith(
        f"The newest checkpoint is {run}/checkpoint-1; the same command with --resume_from_checkpoint auto goes on "
        "from it."
    )
    assert stage1.main(words).step == 2
    assert [path.name for path in list_checkpoints(run)] == ["checkpoint-1", "checkpoint-2"]


def test_a_full_disk_before_the_first_checkpoint_of_stage_2(shapes, student, teacher, tmp_path):
    words = to_flags(
        model_name_or_path=save_video_text_model(tmp_path / "model", shapes),
        train_corpora=shapes / "train_captions.json",
        output_dir=tmp_path / "run",
        max_steps=2,
        warmup_steps=1,
        save_steps=1,
        per_device_train_batch_size=4,
        uta_loss_weight=0,
        report_to="none",
        dataloader_num_workers=0,
    )
    error = fail_on_a_full_disk("training.stage2", words, 30_000)
    assert error.startswith(f"Error: {tmp_path}/run/checkpoint-1 could not be written: file too large"), error
    assert error.endswith("No checkpoint was saved.")


@pytest.mark.parametrize("strategy", ["steps", "no"])
def test_a_full_disk_at_a_save_of_a_fine_tuning(strategy, shapes, student, tmp_path):
    """At a checkpoint, and at the final model."""
    words = f"--train_data {shapes}/train.csv --validation_data {shapes}/validation.csv --output_dir {tmp_path}/run"
    words += f" --model_name_or_path {student} --use_cpu true --dataloader_num_workers 0 --max_steps 1"
    words += f" --report_to none --save_strategy {strategy} --save_steps 1 --per_device_train_batch_size 2"
    error = fail_on_a_full_disk("finetuning.classification", words.split(), 30_000)
    written = "run/checkpoint-1" if strategy == "steps" else "run"
    assert error.startswith(f"Error: {tmp_path}/{written} could not be written: file too large"), error
    assert error.endswith("No checkpoint was saved.")


def test_a_shard_that_is_deleted_under_a_run_is_a_fault_of_the_machine(flags, shapes, tmp_path):
    from umt_hf.data.prepare import ShardSettings, prepare_shards

    prepare_shards([str(shapes / "train.csv")], tmp_path / "shards", ShardSettings(4, 64), num_workers=0)
    words = flags(train_data=tmp_path / "shards", validation_data=None, max_steps=40)
    error = read_error(
        run_ranks(run_and_lose, words, str(tmp_path / "shards"), num_processes=1, exit_code=MACHINE_CODE, timeout=60)
    )
    assert "train-000000.tar" in error and "no such file" in error.lower(), error


def run_and_lose(words: list[str], folder: str) -> None:
    """Stage 1 on shards that somebody deletes when the index is read."""
    build = stage1.build_schedule

    def build_and_lose(*given, **options):
        shutil.rmtree(folder)
        return build(*given, **options)

    stage1.build_schedule = build_and_lose
    run_script("training.stage1", words)


def test_a_typo_keeps_its_own_code(flags):
    assert "no such file" in read_error(fail("training.stage1", flags(train_data=Path("trian.csv"))))
