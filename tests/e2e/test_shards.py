"""Stage 1 from tars and Parquet: the losses of a run that never stopped, whatever reads the shards."""

import json
import logging
import shutil

import pytest

from tests.e2e.runs import assert_same_weights, read_losses
from tests.processes import run_and_kill, run_ranks
from tests.unit.shard_files import write_parquets, write_tars
from umt_hf.data.prepare import ShardSettings, prepare_shards
from umt_hf.runs.folder import read_metrics
from umt_hf.training import stage1
from umt_hf.training.checkpointing import list_checkpoints, read_step

NAMES = ("tars", "parquet")


@pytest.fixture(scope="module")
def shards(shapes, tmp_path_factory):
    """22 rendered videos in tars and in Parquet files, and 2 of them damaged in tars of their own."""
    folder = tmp_path_factory.mktemp("shards")
    files = sorted((shapes / "videos" / "train").iterdir())[:22]
    write_tars(folder / "tars", [{"mp4": file.read_bytes()} for file in files], 6)
    write_parquets(folder / "parquet", [{"video": {"bytes": file.read_bytes(), "path": None}} for file in files], 8)
    contents = [file.read_bytes() for file in files]
    write_tars(folder / "damaged", [{"mp4": c if i % 11 else c[:200]} for i, c in enumerate(contents)], 6)
    write_tars(folder / "damaged", [{"mp4": content} for content in contents[:5]], 3, "validation")
    return folder


def drop_later(run, step: int) -> None:
    for checkpoint in list_checkpoints(run):
        if read_step(checkpoint) > step:
            shutil.rmtree(checkpoint)


@pytest.mark.parametrize("name", NAMES)
def test_a_run_from_shards_goes_on_to_the_same_losses_in_another_shape(flags, shards, tmp_path, name):
    """Epochs are known; other workers change no bit, other processes nothing but the order of sums."""
    common = {
        "train_data": shards / name,
        "streaming": name == "parquet",
        "validation_data": None,
        "num_train_epochs": 4,
        "max_steps": None,
        "save_steps": 1,
        "shuffle_buffer_size": 9,
    }
    stage1.main(flags(output_dir=tmp_path / "whole", per_device_train_batch_size=8, **common))
    whole = read_losses(tmp_path / "whole")
    assert sorted(whole) == list(range(1, 9))
    shutil.copytree(tmp_path / "whole", tmp_path / "run")
    drop_later(tmp_path / "run", 3)
    resumed = {"output_dir": tmp_path / "run", "resume_from_checkpoint": "auto", **common}
    stage1.main(flags(per_device_train_batch_size=8, **resumed | {"dataloader_num_workers": 2}))
    assert read_losses(tmp_path / "run") == whole
    assert_same_weights(tmp_path / "whole", tmp_path / "run")
    drop_later(tmp_path / "run", 4)
    run_ranks(stage1.main, flags(per_device_train_batch_size=2, gradient_accumulation_steps=2, **resumed))
    assert read_losses(tmp_path / "run") == pytest.approx(whole, abs=1e-6)
    place = json.loads((tmp_path / "run" / "checkpoint-5" / "training_state" / "counters.json").read_text())
    assert place["position"] == {"epoch": 2, "row": 8}


@pytest.mark.parametrize("name", ["tars", pytest.param("parquet", marks=pytest.mark.heavy)])
def test_a_killed_run_from_shards_resumes_to_the_same_losses(flags, shards, tmp_path, name):
    common = {
        "train_data": shards / name,
        "streaming": name == "parquet",
        "validation_data": None,
        "max_steps": 20,
        "save_steps": 1,
        "save_total_limit": 2,
        "dataloader_num_workers": 1,
    }
    stage1.main(flags(output_dir=tmp_path / "whole", **common))
    arguments = flags(output_dir=tmp_path / "killed", **common)
    run_and_kill(lambda: list_checkpoints(tmp_path / "killed"), stage1.main, arguments)
    stage1.main([*arguments, "--resume_from_checkpoint", "auto"])
    assert read_losses(tmp_path / "killed") == read_losses(tmp_path / "whole")
    assert_same_weights(tmp_path / "whole", tmp_path / "killed")


def test_corpora_with_weights_tested_on_shards(flags, shards, shapes, tmp_path, caplog):
    """A list and tars, workers that count damaged videos by their names, and held-out tars."""
    caplog.set_level(logging.INFO)
    common = {
        "train_data": None,
        "train_corpora": [shapes / "train.csv", shards / "damaged"],
        "corpus_weights": [0.5, 2],
        "validation_data": shards / "damaged",
        "max_eval_samples": 4,
        "num_train_epochs": 2,
        "max_steps": None,
        "save_steps": 5,
        "per_device_train_batch_size": 8,
    }
    stage1.main(flags(output_dir=tmp_path / "whole", **common))
    # 12 of 24 and twice 22 in an epoch.
    assert sorted(read_losses(tmp_path / "whole")) == list(range(1, 15))
    assert "56 training videos, 4 held out." in caplog.text
    assert "train-00000.tar/train-00000_0000.mp4: " in caplog.text
    shutil.copytree(tmp_path / "whole", tmp_path / "run")
    drop_later(tmp_path / "run", 5)
    stage1.main(flags(output_dir=tmp_path / "run", resume_from_checkpoint="auto", **common))
    assert read_losses(tmp_path / "run") == read_losses(tmp_path / "whole")
    assert_same_weights(tmp_path / "whole", tmp_path / "run")


def test_mistakes_about_corpora_are_named(flags, shards, shapes):
    both = {"train_corpora": [shards / "tars", shards / "parquet"]}
    for changes, said in (
        (both, "Set train_data or train_corpora, not both"),
        ({"train_data": None, **both, "corpus_weights": [1]}, "corpus_weights has 1 values for 2 corpora"),
        ({"train_data": None, **both, "corpus_weights": [1, 0]}, "corpus_weights must be positive"),
        ({"streaming": True}, "train.csv: is a list, not shards of videos, so it cannot be streamed"),
    ):
        with pytest.raises(ValueError, match=said):
            stage1.main(flags(**changes))


def test_kept_frames_train_as_the_videos_do(flags, shapes, tmp_path):
    """`umt-hf prepare` of lists with labels; samplings that the kept frames cannot give are refused with the cure."""
    for split in ("train", "validation"):
        settings = ShardSettings(num_frames=8, videos_per_shard=7, split=split)
        prepare_shards([str(shapes / f"{split}.csv")], tmp_path / "shards", settings, num_workers=0)
    common = {"train_data": tmp_path / "shards", "validation_data": tmp_path / "shards"}
    stage1.main(flags(output_dir=tmp_path / "kept", **common, max_steps=8))
    stage1.main(flags(output_dir=tmp_path / "videos", max_steps=8))
    kept, videos = (read_metrics(tmp_path / name / "metrics.jsonl")[-1]["eval_loss"] for name in ("kept", "videos"))
    assert kept == pytest.approx(videos, rel=0.05)
    for changes, said in (
        (
            {"sampling_strategy": "dense", "frame_stride": 4},
            "that the 8 frames kept .* cannot give. Set it to segments",
        ),
        ({"num_frames": 9}, "num_frames=9 is more than the 8 frames kept of each video. Prepare the shards with"),
    ):
        with pytest.raises(ValueError, match=said):
            stage1.main(flags(**common | changes))
