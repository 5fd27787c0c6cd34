"""Fine-tuning and tests from the frames that `umt-hf prepare` keeps: as from the files they are of."""

import json
import shutil

import pytest

from tests.e2e.labelled import NAMES, build_test_flags, save_classifier, write_colors
from tests.e2e.runs import FINE_TUNING, assert_same_weights, save_video_text_model, to_flags
from tests.processes import run_ranks
from umt_hf.data.prepare import ShardSettings, prepare_shards
from umt_hf.evaluation import classification as evaluate_classification
from umt_hf.finetuning import classification, retrieval


@pytest.fixture(scope="module")
def colored(tmp_path_factory):
    """Videos in JSON lists with the names of their colours, and all frames of each in shards, by split."""
    folder = tmp_path_factory.mktemp("colored")
    for split, rows in write_colors(folder).items():
        (folder / f"{split}.json").write_text(json.dumps([{"video": v, "label": label} for v, label in rows]))
        settings = ShardSettings(videos_per_shard=5, split=split)
        prepare_shards([str(folder / f"{split}.json")], folder / "shards", settings, num_workers=0)
    return folder


@pytest.fixture
def flags(student, tmp_path):
    def build(name: str, data, **changes) -> list[str]:
        fields = {
            **FINE_TUNING,
            "model_name_or_path": student,
            "train_data": data,
            "validation_data": data,
            "output_dir": tmp_path / name,
            "per_device_train_batch_size": 4,
            "learning_rate": 1e-3,
            "max_steps": 6,
            "logging_steps": 1,
            "num_frames": 2,
            "save_strategy": "steps",
            "save_steps": 3,
        }
        return to_flags(**fields | changes)

    return build


def read_losses(run) -> dict[int, float]:
    history = json.loads((run / "trainer_state.json").read_text())["log_history"]
    return {line["step"]: line["loss"] for line in history if "loss" in line}


def test_classification_learns_from_kept_frames_as_from_files(colored, flags, tmp_path):
    """With all frames kept, losses differ by what JPEG loses; a resumed run, with workers, is the same to the bit."""
    kept = classification.main(flags("kept", colored / "shards"))
    files = {"train_data": colored / "train.json", "validation_data": colored / "validation.json"}
    plain = classification.main(flags("files", None, **files))
    assert kept["eval_top1_accuracy"] == pytest.approx(plain["eval_top1_accuracy"], abs=0.2)
    losses = read_losses(tmp_path / "kept")
    assert list(losses) == [1, 2, 3, 4, 5, 6] and losses == pytest.approx(read_losses(tmp_path / "files"), rel=0.05)
    config = json.loads((tmp_path / "kept" / "config.json").read_text())
    assert list(config["id2label"].values()) == list(NAMES)
    shutil.copytree(tmp_path / "kept" / "checkpoint-3", tmp_path / "resumed" / "checkpoint-3")
    resumed = {"resume_from_checkpoint": "auto", "dataloader_num_workers": 1}
    classification.main(flags("resumed", colored / "shards", **resumed))
    assert read_losses(tmp_path / "resumed") == losses
    assert_same_weights(tmp_path / "kept", tmp_path / "resumed")


def test_two_processes_fine_tune_from_kept_frames(colored, flags, tmp_path):
    classification.main(flags("one", colored / "shards", num_train_epochs=1, max_steps=2))
    run_ranks(
        classification.main,
        flags("two", colored / "shards", num_train_epochs=1, max_steps=2, per_device_train_batch_size=2),
    )
    assert read_losses(tmp_path / "two") == pytest.approx(read_losses(tmp_path / "one"), abs=1e-3)


def test_a_classifier_is_tested_on_kept_frames(colored, tmp_path):
    model = save_classifier(tmp_path / "model")
    reports = []
    for name, data in (("kept", colored / "shards"), ("files", colored / "test.json")):
        evaluate_classification.main(build_test_flags(model, data, tmp_path / name, num_clips=2))
        reports.append(json.loads((tmp_path / name / "report.json").read_text()))
    assert reports[0]["num_videos"] == reports[1]["num_videos"] == 3
    assert reports[0]["metrics"] == pytest.approx(reports[1]["metrics"])


def test_samplings_that_kept_frames_cannot_give_are_refused_at_the_start(colored, flags, tmp_path):
    for changes, said in (
        ({"num_frames": 16}, "num_frames=16 is more than the 8 frames kept of each video. Prepare the shards with"),
        ({"sampling_strategy": "dense"}, "sampling_strategy=dense takes frames at distances that the 8 frames kept"),
    ):
        with pytest.raises(ValueError, match=said):
            classification.main(flags("run", colored / "shards", **changes))
    model = save_classifier(tmp_path / "model")
    settings = json.loads((model / "video_preprocessor_config.json").read_text())
    (model / "video_preprocessor_config.json").write_text(json.dumps({**settings, "sampling_strategy": "dense"}))
    with pytest.raises(ValueError, match="sampling_strategy=dense takes frames at distances"):
        evaluate_classification.main(build_test_flags(model, colored / "shards", tmp_path / "test"))


def test_retrieval_is_trained_and_tested_from_kept_frames(shapes, tmp_path):
    stage2 = save_video_text_model(tmp_path / "stage2", shapes)
    for split in ("train", "validation"):
        settings = ShardSettings(videos_per_shard=9, split=split)
        prepare_shards([str(shapes / f"{split}_captions.json")], tmp_path / "shards", settings, num_workers=0)
    common = {**FINE_TUNING, "model_name_or_path": stage2, "num_frames": 2, "drop_path_rate": 0.0, "max_steps": 2}
    found = {}
    for name, (train, validation) in {
        "kept": (tmp_path / "shards",) * 2,
        "files": (shapes / "train_captions.json", shapes / "validation_captions.json"),
    }.items():
        data = {"train_data": train, "validation_data": validation, "output_dir": tmp_path / name}
        found[name] = retrieval.main(to_flags(**common, **data, per_device_train_batch_size=4, logging_steps=1))
    losses = [read_losses(tmp_path / name) for name in ("kept", "files")]
    assert losses[0] == pytest.approx(losses[1], rel=0.05) and found["kept"].keys() == found["files"].keys()
    with pytest.raises(ValueError, match="first_seconds=1.0 needs the times of frames"):
        data = {"train_data": tmp_path / "shards", "validation_data": tmp_path / "shards", "first_seconds": 1.0}
        retrieval.main(to_flags(**common, **data, output_dir=tmp_path / "run"))
