"""Fine-tuning that diverges, is killed, or is resumed otherwise, in all four scripts."""

import json
import os
import re
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from accelerate.state import AcceleratorState
from safetensors.torch import load_file, save_file
from torch import nn

from tests.e2e.runs import (
    FINE_TUNING,
    PRETRAINING,
    assert_complete,
    assert_same_weights,
    name_fine_tuning_data,
    save_video_text_model,
    to_flags,
)
from tests.processes import START_METHOD, find_free_port, run_ranks, run_until
from umt_hf.evaluation import classification as evaluate_classification
from umt_hf.evaluation import detection as evaluate_detection
from umt_hf.evaluation import question_answering as evaluate_question_answering
from umt_hf.evaluation import retrieval as evaluate_retrieval
from umt_hf.finetuning import classification, detection, question_answering, retrieval
from umt_hf.finetuning.trainer import FinetuningTrainer
from umt_hf.modeling.modeling_umt_video import UMTVideoForActionDetection, UMTVideoForVideoClassification
from umt_hf.modeling.modeling_umt_video_text import UMTVideoTextForQuestionAnswering, UMTVideoTextForRetrieval
from umt_hf.runs.disk import hold_lock, put_folder, remove_folder
from umt_hf.training import stage1
from umt_hf.training import stage2 as stage2_script
from umt_hf.training import trainer as pretraining
from umt_hf.training.checkpointing import list_checkpoints, remove_unfinished

from .conftest import TINY

STATE = "trainer_state.json"
SCRIPTS = {
    "classification": classification,
    "detection": detection,
    "retrieval": retrieval,
    "question_answering": question_answering,
}
# Each has a loader or an evaluation that the others do not have; these tests are of what they share.
TWO_AND_THE_OTHERS = [
    "classification",
    "question_answering",
    *(pytest.param(name, marks=pytest.mark.heavy) for name in ("detection", "retrieval")),
]
SCRIPT_CLASSES = {
    "classification": UMTVideoForVideoClassification,
    "detection": UMTVideoForActionDetection,
    "retrieval": UMTVideoTextForRetrieval,
    "question_answering": UMTVideoTextForQuestionAnswering,
}
STUDENT = {"drop_path_rate": 0.0, "warmup_epochs": 0, "num_frames": 2}


@pytest.fixture(scope="module")
def stage2(shapes, tmp_path_factory) -> Path:
    return save_video_text_model(tmp_path_factory.mktemp("stage2"), shapes)


@pytest.fixture
def flags(shapes, colors, student, stage2, tmp_path):
    """Command line of a short run of a script; keyword arguments change it."""

    def build(script: str, **changes) -> list[str]:
        data = name_fine_tuning_data(shapes, student, stage2)
        data["classification"] |= {
            "train_data": colors / "few_train.csv",
            "validation_data": colors / "few_validation.csv",
        }
        fields = {**FINE_TUNING, **STUDENT, **data[script], "output_dir": tmp_path / "run"}
        fields |= {"per_device_train_batch_size": 4, "learning_rate": 1e-3, "max_steps": 4, "logging_steps": 1}
        return to_flags(**fields | changes)

    return build


def assert_no_model(folder: Path) -> None:
    assert not list(folder.glob("*.safetensors")) and not (folder / "config.json").exists()


def read_log(folder: Path) -> list[dict]:
    return [line for line in json.loads((folder / STATE).read_text())["log_history"] if "loss" in line]


def poison(monkeypatch, calls: set[int]) -> None:
    """Make the loss of some micro-batches NaN."""
    original, numbers = FinetuningTrainer.training_step, iter(range(1000))

    def training_step(self, model, inputs, *args):
        if next(numbers) in calls:
            inputs = inputs | {"pixel_values": inputs["pixel_values"] * float("nan")}
        return original(self, model, inputs, *args)

    monkeypatch.setattr(FinetuningTrainer, "training_step", training_step)


def spoil(folder: Path, copy: Path) -> tuple[Path, str]:
    """A copy of a model folder with a single NaN, and the name of its tensor."""
    shutil.copytree(folder, copy)
    weights = load_file(copy / "model.safetensors")
    name = next(name for name in weights if name.endswith("layers.1.mlp.up_proj.weight") or "layers.1" in name)
    weights[name].view(-1)[3] = float("nan")
    save_file(weights, copy / "model.safetensors", {"format": "pt"})
    return copy, name


@pytest.mark.parametrize("script", SCRIPTS)
def test_divergence_stops_every_script(flags, tmp_path, monkeypatch, script):
    """The loss is NaN from the second step on: no final folder, and one sentence."""
    poison(monkeypatch, set(range(1, 1000)))
    with pytest.raises(RuntimeError, match=r"^4 steps in a row had NaN or Inf gradients: lower learning_rate, "):
        SCRIPTS[script].main(flags(script, max_steps=30, max_nonfinite_steps=3))
    assert_no_model(tmp_path / "run")


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_nan_in_the_start_folder_is_named_before_the_first_step(flags, student, stage2, tmp_path, script):
    start = student if script in ("classification", "detection") else stage2
    spoiled, name = spoil(start, tmp_path / "spoiled")
    with pytest.raises(ValueError, match=rf"spoiled: weights are NaN or infinite \({name}"):
        SCRIPTS[script].main(flags(script, model_name_or_path=spoiled))
    assert_no_model(tmp_path / "run")


def test_a_short_run_does_not_end_in_bad_steps(flags, tmp_path, monkeypatch):
    """A rate of 1e30 ruins the weights in the first of 6 steps; 20 bad steps in a row never come."""
    with pytest.raises(RuntimeError, match=r"^4 steps in a row"):
        classification.main(flags("classification", max_steps=6, learning_rate=1e30))
    assert_no_model(tmp_path / "run")


def test_bad_steps_change_no_weight_and_are_shown(flags, tmp_path, monkeypatch):
    """The second of 4 steps, each of two micro-batches: the log shows NaN, and weights stay finite."""
    poison(monkeypatch, {2})
    fields = {"gradient_accumulation_steps": 2, "ema_decay": 0.5, "mode": "lora", "max_grad_norm": 1.0}
    classification.main(flags("classification", per_device_train_batch_size=2, **fields))
    log = read_log(tmp_path / "run")
    assert [line["loss"] == line["loss"] for line in log] == [True, False, True, True]
    assert [line["nonfinite_steps"] for line in log] == [0, 1, 1, 1]
    weights = load_file(tmp_path / "run" / "model.safetensors")
    assert all(tensor.isfinite().all() for tensor in weights.values())


def diverge_in_rank_1(arguments: list[str]) -> None:
    """The clips of rank 1 are NaN from its second step on."""
    original, numbers = FinetuningTrainer.training_step, iter(range(1000))

    def training_step(self, model, inputs, *args):
        if next(numbers) > 0 and self.args.process_index == 1:
            inputs = inputs | {"pixel_values": inputs["pixel_values"] * float("nan")}
        return original(self, model, inputs, *args)

    FinetuningTrainer.training_step = training_step
    with pytest.raises(RuntimeError, match="^3 steps in a row"):
        classification.main(arguments)


def test_two_processes_stop_together(flags, tmp_path):
    arguments = flags("classification", max_steps=20, max_nonfinite_steps=2, per_device_train_batch_size=2)
    run_ranks(diverge_in_rank_1, arguments)
    assert_no_model(tmp_path / "run")


def test_a_loss_scaler_sees_bad_steps_and_they_are_counted(tmp_path, monkeypatch):
    """As in pre-training: gradients stay, so that it lowers its scale, and only a long row of them stops the run."""
    from tests.unit.finetuning.test_trainer import build_trainer

    trainer = build_trainer(tmp_path)
    trainer.state.max_steps = 4
    parameter = nn.Parameter(torch.ones(1))
    model = nn.Module()
    model.register_parameter("weight", parameter)
    monkeypatch.setattr(type(trainer.accelerator), "scaler", object(), raising=False)
    trainer.accelerator.scaler = object()
    for _ in range(20):
        parameter.grad = torch.full((1,), float("inf"))
        trainer._get_grad_norm(model, torch.tensor(float("inf")))
        assert parameter.grad is not None
    with pytest.raises(RuntimeError, match="^21 steps in a row"):
        trainer._get_grad_norm(model, torch.tensor(float("inf")))
    assert pretraining.limit_nonfinite_steps(20, 4, has_scaler=False) == 2


# -------------------------------------------------------------------------------------------------------- being killed
MOMENTS = {
    "folder": "checkpoint-2.unfinished/*",
    "weights": "checkpoint-2.unfinished/*/model.safetensors",
    "state": "checkpoint-2.unfinished/*/trainer_state.json",
    "last_file": "checkpoint-2.unfinished/*/run.yaml",
    "name": "checkpoint-2",
    "deletion": "checkpoint-1.deleted",
}


@pytest.fixture(scope="module")
def uninterrupted() -> dict[str, Path]:
    return {}


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_kill_during_a_save_never_bricks_auto(flags, tmp_path, tmp_path_factory, uninterrupted, moment):
    changes = {"save_strategy": "steps", "save_steps": 1, "save_total_limit": 1, "ema_decay": 0.5}
    if not uninterrupted:
        uninterrupted["run"] = tmp_path_factory.mktemp("uninterrupted")
        classification.main(flags("classification", **changes, output_dir=uninterrupted["run"]))
    run = tmp_path / "run"
    arguments = flags("classification", **changes)
    run_until(run, MOMENTS[moment], classification.main, arguments)
    for checkpoint in list_checkpoints(run, STATE):
        assert {"model.safetensors", "optimizer.pt", "averaged_weights.pt", "run.yaml"} <= {
            path.name for path in checkpoint.iterdir()
        }
    classification.main([*arguments, "--resume_from_checkpoint", "auto"])
    assert_same_weights(uninterrupted["run"], run)
    assert [path.name for path in sorted(run.glob("*checkpoint*"))] == ["checkpoint-4"]
    assert not [path for path in run.rglob("*") if path.suffix in (".unfinished", ".deleted", ".replaced")]


def test_an_incomplete_checkpoint_is_refused_by_name(flags, tmp_path):
    run = tmp_path / "run"
    classification.main(flags("classification", save_strategy="steps", save_steps=2))
    for name, lost, missing in (
        ("checkpoint-5", "trainer_state.json", "trainer_state.json"),
        ("checkpoint-6", "model.safetensors", "weights"),
    ):
        shutil.copytree(run / "checkpoint-4", run / name)
        (run / name / lost).unlink()
        with pytest.raises(FileNotFoundError, match=f"{name} is not a complete checkpoint: it has no {missing}"):
            classification.main(flags("classification", resume_from_checkpoint=run / name))
    shutil.copytree(run / "checkpoint-4", run / "checkpoint-9.unfinished")
    with pytest.raises(FileNotFoundError, match=r"checkpoint-9.unfinished is not a complete checkpoint"):
        classification.main(flags("classification", resume_from_checkpoint=run / "checkpoint-9.unfinished"))
    assert [path.name for path in list_checkpoints(run, STATE)] == ["checkpoint-2", "checkpoint-4"]


def test_an_older_checkpoint_begins_a_new_line(flags, tmp_path):
    """What the run had saved after it lies aside; neither `auto` nor the limit on checkpoints takes account of it."""
    run = tmp_path / "run"
    changes = {"save_strategy": "steps", "save_steps": 1}
    classification.main(flags("classification", **changes))
    arguments = flags("classification", **changes, save_total_limit=2, seed=5)
    classification.main([*arguments, "--resume_from_checkpoint", str(run / "checkpoint-1")])
    assert [path.name for path in list_checkpoints(run, STATE)] == ["checkpoint-3", "checkpoint-4"]
    aside = sorted(path.name.split(".superseded-")[0] for path in run.glob("*.superseded-*"))
    assert aside == ["checkpoint-2", "checkpoint-3", "checkpoint-4"]


def test_the_best_checkpoint_outlives_rotation(flags, tmp_path):
    """Its path in the state is the one that it has at the end, and it is what is tested and saved."""
    changes = {"save_strategy": "steps", "save_steps": 1, "save_total_limit": 1, "eval_strategy": "steps"}
    changes |= {"eval_steps": 1, "load_best_model_at_end": True, "metric_for_best_model": "eval_top1_accuracy"}
    classification.main(flags("classification", **changes))
    run = tmp_path / "run"
    best = Path(json.loads((run / STATE).read_text())["best_model_checkpoint"])
    assert best.parent == run and [path.name for path in list_checkpoints(run, STATE)] == [best.name]
    assert_same_weights(best, run)


@pytest.mark.parametrize("script", TWO_AND_THE_OTHERS)
def test_a_finished_run_that_is_started_again_trains_no_further(flags, tmp_path, script):
    """Also where its last step is within an epoch: the `Trainer` would take another one at each start."""
    run, changes = tmp_path / "run", {"save_strategy": "steps", "save_steps": 1, "save_total_limit": 1}
    SCRIPTS[script].main(flags(script, **changes, max_steps=3))
    shutil.copytree(run, tmp_path / "finished")
    SCRIPTS[script].main(flags(script, **changes, max_steps=3, resume_from_checkpoint="auto"))
    assert [line["step"] for line in read_log(run)] == [1, 2, 3]
    assert [path.name for path in list_checkpoints(run, STATE)] == ["checkpoint-3"]
    assert_same_weights(run, tmp_path / "finished")


@pytest.mark.skipif(torch.__version__.startswith("2.6"), reason="Trainer asks for cpu:0, which PyTorch 2.6 refuses")
def test_two_processes_save_and_resume(flags, tmp_path):
    changes = {"save_strategy": "steps", "save_steps": 2, "per_device_train_batch_size": 2}
    run_ranks(classification.main, flags("classification", **changes))
    run = tmp_path / "run"
    assert {"rng_state_0.pth", "rng_state_1.pth"} <= {path.name for path in (run / "checkpoint-2").iterdir()}
    shutil.copytree(run, tmp_path / "resumed")
    shutil.rmtree(tmp_path / "resumed" / "checkpoint-4")
    resumed = flags("classification", **changes, output_dir=tmp_path / "resumed", resume_from_checkpoint="auto")
    run_ranks(classification.main, resumed)
    assert_same_weights(run, tmp_path / "resumed")


# ------------------------------------------------------------------------------------------------------ other settings
@pytest.mark.parametrize("script", TWO_AND_THE_OTHERS)
@pytest.mark.parametrize("schedule", ["cosine", "constant"])
def test_settings_that_changed_are_named_used_and_recorded(flags, tmp_path, caplog, script, schedule):
    common = {"lr_scheduler_type": schedule, "save_strategy": "steps", "save_steps": 2}
    if script != "classification" and schedule == "cosine":
        pytest.skip("the schedule is the same in all scripts")
    main, run = SCRIPTS[script].main, tmp_path / "run"
    main(flags(script, **common, max_steps=2))
    caplog.clear()
    changes = {"learning_rate": 1e-2, "weight_decay": 0.3, "max_steps": 4, "logging_steps": 1}
    main(flags(script, **common | changes, resume_from_checkpoint="auto"))
    (warning,) = [record.message for record in caplog.records if "other settings than before" in record.message]
    named = {part.split(" ")[0] for part in warning.split(": ", 1)[1].split("; ")}
    assert named == {"learning_rate", "weight_decay", "max_steps"}
    assert "learning_rate 0.001 -> 0.01" in warning
    rates = [line["learning_rate"] for line in read_log(run)]
    largest = max(rates[2:])
    assert rates[0] < 2e-3 and 2e-3 < largest <= 1e-2
    recorded = yaml.safe_load((run / "run.yaml").read_text())["training"]
    assert (recorded["learning_rate"], recorded["weight_decay"]) == (1e-2, 0.3)
    groups = torch.load(run / "checkpoint-4" / "optimizer.pt", weights_only=True)["param_groups"]
    assert {group["weight_decay"] for group in groups} == {0.0, 0.3}


def test_the_same_settings_are_not_named(flags, tmp_path, caplog):
    fields = {"save_strategy": "steps", "save_steps": 2}
    classification.main(flags("classification", **fields))
    caplog.clear()
    changes = {"save_steps": 1, "dataloader_num_workers": 1, "logging_steps": 2, "save_total_limit": 3}
    classification.main(flags("classification", **fields | changes, resume_from_checkpoint="auto"))
    assert "other settings" not in caplog.text


# --------------------------------------------------------------------------------------------------- files and folders
def test_what_a_kill_leaves_of_folders_is_put_right(tmp_path):
    """Between the two renames of a replacement the earlier checkpoint comes back; parts of folders go."""
    for name in ("checkpoint-1.unfinished", "checkpoint-2.deleted", "checkpoint-3.replaced", "checkpoint-4.replaced"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "old").touch()
    (tmp_path / "checkpoint-4").mkdir()
    remove_unfinished(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-3", "checkpoint-4"]
    assert (tmp_path / "checkpoint-3" / "old").exists() and not (tmp_path / "checkpoint-4" / "old").exists()


def test_replacing_and_deleting_leave_nothing_behind(tmp_path):
    for name in ("final", "final.unfinished", "final.replaced", "final.replaced.deleted"):
        (tmp_path / name).mkdir()
        (tmp_path / name / name).touch()
    put_folder(tmp_path / "final.unfinished", tmp_path / "final")
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["final", "final.unfinished"]
    remove_folder(tmp_path / "final")
    remove_folder(tmp_path / "final")
    assert list(tmp_path.iterdir()) == []


# ------------------------------------------------------------------------------------------------------------- workers
EVALUATIONS = {"classification": evaluate_classification, "detection": evaluate_detection}


@pytest.mark.parametrize("script", TWO_AND_THE_OTHERS)
def test_workers_that_are_not_forked(flags, shapes, colors, forkserver, tmp_path, script):
    """Over two epochs, with validation and, where the model has one, its evaluation script."""
    main, fields = SCRIPTS[script].main, {"num_train_epochs": 2, "max_steps": -1, "per_device_train_batch_size": 8}
    if script in ("retrieval", "question_answering"):
        kind = "captions" if script == "retrieval" else "questions"
        fields["validation_data"] = shapes / f"validation_{kind}.json"
    found = [
        main(flags(script, **fields, output_dir=tmp_path / name, dataloader_num_workers=count))
        for name, count in (("workers", 1), ("none", 0))
    ]
    assert found[0] == found[1]
    assert_same_weights(tmp_path / "workers", tmp_path / "none")
    if script in EVALUATIONS:
        data = colors / "few_validation.csv" if script == "classification" else shapes / "train_boxes.json"
        options = {"label_keys": ["color", "shape"]} if script == "detection" else {"num_clips": 1, "num_crops": 1}
        options |= {"model_name_or_path": tmp_path / "workers", "data": data, "dataloader_num_workers": 1}
        assert EVALUATIONS[script].main(to_flags(**options, output_dir=tmp_path / "report"))


def run_one_after_the_other(commands: list[list[str]], ports: list[int]) -> None:
    """Each run meets at a port of its own: at one port, a process may still find the store of the run before."""
    scripts = (stage1.main, stage2_script.main, retrieval.main)
    for main, arguments, port in zip(scripts, commands, ports, strict=True):
        os.environ["MASTER_PORT"] = str(port)
        main(arguments)
        AcceleratorState._reset_state(reset_partial_state=True)  # a stage ends with its process group


@pytest.mark.heavy
@pytest.mark.slow
def test_two_processes_with_workers_that_are_not_forked(flags, shapes, teacher, stage2, tmp_path):
    """Both stages and a fine-tuning: workers of ranks belong to no process group."""
    short = PRETRAINING | {"max_steps": 2, "num_frames": 2, "dataloader_num_workers": 1, "num_aligned_layers": 1}
    short |= {"teacher_name_or_path": teacher}
    stage1_fields = {**short, **TINY, "train_data": shapes / "train.csv"}
    stage2_fields = {**short, "train_corpora": shapes / "train_captions.json", "model_name_or_path": stage2}
    commands = [
        to_flags(**stage1_fields, output_dir=tmp_path / "stage1"),
        to_flags(**stage2_fields, output_dir=tmp_path / "stage2"),
        flags("retrieval", max_steps=2, dataloader_num_workers=1, output_dir=tmp_path / "retrieval"),
    ]
    ports = [find_free_port() for _ in commands]
    run_ranks(run_one_after_the_other, commands, ports, environment={START_METHOD: "forkserver"})
    assert all((tmp_path / name / "config.json").is_file() for name in ("stage1", "stage2", "retrieval"))


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_second_run_in_one_folder_is_refused_by_name(flags, tmp_path, script):
    with (
        hold_lock(tmp_path / "run" / ".lock", "run"),
        pytest.raises(BlockingIOError, match=rf"^output_dir={tmp_path}/run is being written by another run \(pro"),
    ):
        SCRIPTS[script].main(flags(script))
    assert not (tmp_path / "run").exists()


def break_last_video(source: Path, folder: Path, name: str) -> Path:
    """Annotations whose last row has a video that cannot be read."""
    rows = json.loads(source.read_text())
    for row in rows:
        row["video"] = str(source.parent / row["video"])
    (folder / "broken.mp4").write_bytes(b"not a video at all")
    rows[-1]["video"] = str(folder / "broken.mp4")
    (folder / name).write_text(json.dumps(rows))
    return folder / name


@pytest.mark.parametrize("script", TWO_AND_THE_OTHERS)
def test_an_unreadable_held_out_video_leaves_the_final_model(flags, shapes, colors, tmp_path, script):
    """It is written before it is tested; figures of an earlier run do not stay beside it."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "eval_results.json").write_text('{"eval_accuracy": 1.0}')
    if script == "classification":
        (colors / "broken.mp4").write_bytes(b"not a video at all")
        validation = colors / "broken.csv"
        validation.write_text((colors / "few_validation.csv").read_text() + "broken.mp4,0\n")
    else:
        name = {"detection": "boxes", "retrieval": "captions", "question_answering": "questions"}[script]
        validation = break_last_video(shapes / f"test_{name}.json", tmp_path, "held_out.json")
    with pytest.raises(ValueError, match="holds the trained model, but testing it failed: .*broken.mp4") as caught:
        SCRIPTS[script].main(flags(script, validation_data=validation, max_steps=1))
    assert "umt-hf evaluate" in str(caught.value) and "\n" not in str(caught.value)
    assert_complete(tmp_path / "run", SCRIPT_CLASSES[script])
    assert not list((tmp_path / "run").glob("*_results.json"))


FOUND = {
    "classification": (
        r"16 training, 8 validation videos of 2 classes: LABEL_0 \(8\), LABEL_1 \(8\)\.",
        r"16 videos of 2 of the model's 2 classes\.",
    ),
    "detection": (
        r"training: 24 key frames with \d+ boxes of people, in 24 videos; validation: 24 key frames with .* classes: ",
        r"24 key frames with \d+ boxes of people, in 24 videos\.",
    ),
    "retrieval": (
        r"training: 24 videos with 24 captions; validation: 24 videos with 24 captions\.",
        r"24 videos with 24 captions\.",
    ),
    "question_answering": (
        r"training: 24 videos with \d+ questions .* different answers; validation: 24 videos with \d+ questions",
        r"24 videos with \d+ questions \(.* per video\) and \d+ different answers\.",
    ),
}
TESTS = {
    "classification": evaluate_classification,
    "detection": evaluate_detection,
    "retrieval": evaluate_retrieval,
    "question_answering": evaluate_question_answering,
}


@pytest.mark.parametrize("script", TWO_AND_THE_OTHERS)
def test_what_is_found_is_said_and_how_far_a_test_is(flags, shapes, colors, tmp_path, caplog, capfd, script):
    """Training and held-out data are the same here, which both scripts say; the report goes to the model's folder."""
    words = flags(script, max_steps=1)
    train = words[words.index("--train_data") + 1]
    if script in ("retrieval", "question_answering"):
        words += ["--validation_data", train]
    with caplog.at_level("INFO"):
        SCRIPTS[script].main(words)
    assert re.search(FOUND[script][0], caplog.text), caplog.text
    assert ("videos are training videos" in caplog.text) == (script != "classification")
    assert not re.search(r"\d+/\d+ \[.*(video|frame)", capfd.readouterr().err)  # disable_tqdm
    caplog.clear()
    test = to_flags(model_name_or_path=tmp_path / "run", data=train, dataloader_num_workers=0)
    test += ["--label_keys", "color", "shape"] if script == "detection" else []
    with caplog.at_level("INFO"):
        TESTS[script].main(test)
    unit = "frame" if script == "detection" else "video"
    assert re.search(rf"(\d+)/\1 \[.*{unit}/s", capfd.readouterr().err)
    assert re.search(FOUND[script][1], caplog.text), caplog.text
    assert f"{tmp_path}/run was trained on {train}, as {tmp_path}/run/run.yaml says" in caplog.text
    assert (tmp_path / "run" / "test" / "report.json").is_file()
    TESTS[script].main([*test, "--disable_tqdm", "true", "--output_dir", str(tmp_path / "other")])
    assert not re.search(rf"\d+/\d+ \[.*{unit}", capfd.readouterr().err)
    assert (tmp_path / "other" / "report.json").is_file()
