"""A checkpoint that is resumed with another model, other data or damaged files is answered in one line."""

import json
import shutil
from pathlib import Path

import pytest

from tests.e2e.mistakes import fail, read_error
from tests.e2e.runs import save_student, save_video_text_model, to_flags
from umt_hf.data.prepare import ShardSettings, prepare_shards
from umt_hf.finetuning import classification
from umt_hf.training import stage1, stage2


@pytest.fixture(scope="module")
def run_of_stage1(shapes, teacher, tmp_path_factory):
    from tests.e2e.conftest import TINY
    from tests.e2e.runs import PRETRAINING

    folder = tmp_path_factory.mktemp("stage1")
    fields = PRETRAINING | TINY | {"train_data": shapes / "train.csv", "teacher_name_or_path": teacher}
    stage1.main(to_flags(**fields, output_dir=folder / "run") + ["--save_steps", "2"])
    return folder / "run"


@pytest.fixture
def resumed(run_of_stage1, flags, tmp_path):
    """Command line that goes on with a copy of the run."""
    shutil.copytree(run_of_stage1, tmp_path / "run")

    def build(**changes) -> list[str]:
        return flags(**{"validation_data": None, "save_steps": 2, "resume_from_checkpoint": "auto"} | changes)

    return build


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"num_hidden_layers": 3}, "num_hidden_layers 2 there, 3 here"),
        ({"hidden_size": 48}, "hidden_size 32 there, 48 here"),
        ({"num_aligned_layers": 1}, "num_aligned_layers 2 there, 1 here"),
        ({"intermediate_size": 64, "num_hidden_layers": 3}, "intermediate_size 48 there, 64 here"),
    ],
)
def test_another_size_of_the_model_is_named_before_anything_is_loaded(changes, named, resumed, tmp_path):
    error = read_error(fail("training.stage1", resumed(**changes)))
    assert error.startswith(f"Error: {tmp_path}/run/checkpoint-4 is of another model than this run's ("), error
    assert named in error and "another output_dir" in error


def test_a_setting_that_no_weight_depends_on_is_resumed(resumed, caplog):
    assert stage1.main(resumed(drop_path_rate=0.3)).step == 4
    assert "drop_path_rate 0.0 -> 0.3" in caplog.text


def write_stage2(shapes: Path, folder: Path, **changes) -> list[str]:
    fields = {
        "model_name_or_path": folder / "model",
        "train_corpora": shapes / "train_captions.json",
        "output_dir": folder / "run",
        "max_steps": 1,
        "warmup_steps": 0,
        "save_steps": 1,
        "per_device_train_batch_size": 4,
        "uta_loss_weight": 0,
        "report_to": "none",
        "dataloader_num_workers": 0,
    }
    return to_flags(**fields | changes)


def test_another_text_tower_of_stage_2_is_named(shapes, tmp_path):
    save_video_text_model(tmp_path / "model", shapes)
    stage2.main(write_stage2(shapes, tmp_path))
    from tests.e2e import runs

    text = runs.TINY_CONFIG["text_config"] | {"num_hidden_layers": 4}
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(runs.TINY_CONFIG, "text_config", text)
        save_video_text_model(tmp_path / "other", shapes)
    words = write_stage2(shapes, tmp_path, model_name_or_path=tmp_path / "other", resume_from_checkpoint="auto")
    error = read_error(fail("training.stage2", words))
    assert "text_config.num_hidden_layers 3 there, 4 here" in error


def write_finetuning(shapes: Path, student: Path, folder: Path, **changes) -> list[str]:
    fields = {
        "train_data": shapes / "train.csv",
        "validation_data": shapes / "validation.csv",
        "model_name_or_path": student,
        "output_dir": folder / "run",
        "use_cpu": True,
        "dataloader_num_workers": 0,
        "max_steps": 1,
        "save_strategy": "steps",
        "save_steps": 1,
        "report_to": "none",
        "per_device_train_batch_size": 2,
    }
    return to_flags(**fields | changes)


@pytest.mark.parametrize(
    ("mode", "changes", "named"),
    [
        ("full", {"model_name_or_path": "other"}, "num_hidden_layers 2 there, 3 here"),
        ("lora", {"lora_rank": 4}, "lora_rank 2 there, 4 here"),
        ("full", {"mode": "lora"}, "trained are all weights there, adapters here"),
        ("lora", {"mode": "full"}, "trained are adapters there, all weights here"),
    ],
)
def test_another_model_of_a_fine_tuning_is_named(mode, changes, named, shapes, student, tmp_path):
    start = {"mode": mode, "lora_rank": 2}
    classification.main(write_finetuning(shapes, student, tmp_path, **start))
    if changes.get("model_name_or_path"):
        changes = {"model_name_or_path": save_deeper_student(tmp_path / "deeper")}
    words = write_finetuning(shapes, student, tmp_path, resume_from_checkpoint="auto", **start | changes)
    error = read_error(fail("finetuning.classification", words))
    assert error.startswith(f"Error: {tmp_path}/run/checkpoint-1 ") and named in error, error


def save_deeper_student(folder: Path) -> Path:
    from umt_hf import UMTVideoConfig, UMTVideoForPreTraining

    config = UMTVideoConfig.from_pretrained(save_student(folder))
    config.num_hidden_layers = 3
    UMTVideoForPreTraining(config).save_pretrained(folder)
    return folder


def test_a_checkpoint_that_is_not_there_is_answered_with_those_that_are(resumed, tmp_path):
    for given in (f"{tmp_path}/run/checkpoint-36", "aut"):
        error = read_error(fail("training.stage1", resumed(resume_from_checkpoint=given)))
        assert error == (
            f"Error: {given}: there is no such folder; complete checkpoints in {tmp_path}/run: checkpoint-2, "
            "checkpoint-4. Give one of them, or `auto` for the newest."
        )


@pytest.mark.parametrize(
    "file", ["checkpoint-4/training_state/counters.json", "checkpoint-4/run.yaml", "metrics.jsonl"]
)
def test_a_damaged_file_of_a_run_is_named(file, resumed, tmp_path):
    path = tmp_path / "run" / file
    text = path.read_text()
    if path.suffix == ".jsonl":
        lines = text.splitlines()
        text = "\n".join([lines[0][:10], *lines[1:]]) + "\n"
    else:
        text = text[: len(text) // 2].rsplit(":", 1)[0] + ': {"'
    path.write_text(text)
    error = read_error(fail("training.stage1", resumed()))
    assert error.startswith(f"Error: {path}"), error


def test_a_damaged_state_of_a_fine_tuning_is_named(shapes, student, tmp_path):
    classification.main(write_finetuning(shapes, student, tmp_path))
    state = tmp_path / "run" / "checkpoint-1" / "trainer_state.json"
    state.write_text(state.read_text()[:100])
    words = write_finetuning(shapes, student, tmp_path, resume_from_checkpoint="auto")
    assert read_error(fail("finetuning.classification", words)).startswith(f"Error: {state} is damaged")


def edit_list(path: Path, edit: str) -> None:
    """Change a list in place, which its name does not show."""
    lines = path.read_text().splitlines()
    if edit == "shorter":
        lines = lines[:12]
    elif edit == "reversed":
        lines = lines[::-1]
    elif edit == "other names":
        lines[0], lines[5] = lines[5], lines[0]
    path.write_text("\n".join(lines) + "\n")


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        ("shorter", "train.csv had 24 rows then and has 12 now"),
        ("reversed", "train.csv has its 24 rows under other names"),
        ("other names", "train.csv has its 24 rows under other names"),
        ("untouched", None),
    ],
)
def test_a_list_that_was_edited_is_warned_of(edit, said, flags, shapes, tmp_path, caplog):
    path = tmp_path / "train.csv"
    path.write_text("".join(f"{shapes}/{line}\n" for line in (shapes / "train.csv").read_text().splitlines()))
    common = {"train_data": path, "validation_data": None, "save_steps": 2}
    stage1.main(flags(**common))
    shutil.rmtree(tmp_path / "run" / "checkpoint-4")
    edit_list(path, edit)
    caplog.clear()
    assert stage1.main(flags(**common, resume_from_checkpoint="auto")).step == 4
    warnings = [record.getMessage() for record in caplog.records if "have changed since" in record.getMessage()]
    assert len(warnings) == (said is not None), warnings
    assert said is None or said in warnings[0]


def test_a_caption_list_and_shards_that_were_edited_are_warned_of(shapes, tmp_path, caplog):
    """One of several corpora of stage 2 is named; the other one, of shards, is not, until it is written again."""
    save_video_text_model(tmp_path / "model", shapes)
    rows = json.loads((shapes / "train_captions.json").read_text())
    for row in rows:
        row["video"] = str(shapes / row["video"])
    (tmp_path / "a.json").write_text(json.dumps(rows))
    prepare_shards([str(shapes / "train_captions.json")], tmp_path / "b", ShardSettings(4, 64), num_workers=0)
    common = {"train_corpora": [tmp_path / "a.json", tmp_path / "b"], "num_frames": 2}
    stage2.main(write_stage2(shapes, tmp_path, **common))
    rows[3]["caption"] = "another caption"
    (tmp_path / "a.json").write_text(json.dumps(rows))
    again = write_stage2(shapes, tmp_path, resume_from_checkpoint="auto", **common)
    caplog.clear()
    stage2.main(again)
    (said,) = [record.getMessage() for record in caplog.records if "have changed since" in record.getMessage()]
    assert f"({tmp_path}/a.json has its 24 rows under other names, with other captions" in said and "/b " not in said


def test_an_edited_list_of_a_fine_tuning_is_warned_of(shapes, student, tmp_path, caplog):
    path = tmp_path / "train.csv"
    path.write_text("".join(f"{shapes}/{line}\n" for line in (shapes / "train.csv").read_text().splitlines()))
    classification.main(write_finetuning(shapes, student, tmp_path, train_data=path))
    edit_list(path, "other names")
    caplog.clear()
    words = write_finetuning(shapes, student, tmp_path, train_data=path, resume_from_checkpoint="auto")
    classification.main(words)
    assert "train_data has its 24 rows under other names" in caplog.text
