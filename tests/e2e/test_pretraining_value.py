"""The benchmark of pre-training on a tiny budget: every kind of run, its tables and its picture."""

import dataclasses
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from transformers import VideoMAEForVideoClassification

from benchmarks.pretraining_value import run, settings
from benchmarks.pretraining_value.jobs import Job, run_jobs
from benchmarks.pretraining_value.pretraining import build_student
from benchmarks.pretraining_value.videomae import build_videomae, take_encoder
from umt_hf import UMTVideoForVideoClassification, UMTVideoModel

BUDGET = settings.Budget(
    num_clips=(24, 6, 6),
    pretraining_steps=2,
    head_steps=5,
    finetuning_steps=2,
    low_data_steps=2,
    num_curve_points=2,
    num_curve_clips=6,
    num_corrupted_clips=4,
)


@pytest.fixture
def small(monkeypatch):
    """Four frames, few clips a step, no subset of a tenth (24 clips have too few of a kind)."""
    monkeypatch.setitem(settings.STUDENT, "num_frames", 4)
    monkeypatch.setitem(settings.STUDENT, "num_hidden_layers", 2)
    for flags in (settings.PRETRAINING, settings.FINETUNING):
        monkeypatch.setitem(flags, "per_device_train_batch_size", 4)
        monkeypatch.setitem(flags, "logging_steps", 1)
    monkeypatch.setattr("umt_hf.moving_shapes.variants.write_low_data", copy_training_annotations)


def copy_training_annotations(data, ratio):
    for task in settings.TASKS:
        (data / f"train_low_data_{task}.csv").write_text((data / f"train_{task}.csv").read_text())


@pytest.mark.heavy
@pytest.mark.slow
def test_demo_measures_and_draws(small, shapes, teacher, tmp_path, monkeypatch, capsys):
    (tmp_path / "data").symlink_to(shapes)
    (tmp_path / "teacher").symlink_to(teacher)
    monkeypatch.setattr(run, "build_pool", lambda num_processes, folder: ThreadPoolExecutor(1))
    monkeypatch.setattr(settings, "STARTS", {name: settings.STARTS[name] for name in ("semantic", "pixel")})
    monkeypatch.setattr(settings, "LOW_DATA_STARTS", ["semantic"])
    monkeypatch.setattr(settings, "CORRUPTED_STARTS", ["semantic"])
    monkeypatch.setattr(settings, "CORRUPTIONS", ("noise",))
    # Two seeds in one process: it pre-trains again after it has fine-tuned.
    arguments = ["--output_dir", str(tmp_path), "--seeds", "3", "4", "--num_processes", "1"]
    run.main(arguments, BUDGET)
    folder = tmp_path / "finetune"
    result = json.loads((folder / "seed_3" / "semantic_motion_full" / "result.json").read_text())
    assert [step for step, _ in result["curve"]] == [0, 1, 2]
    assert 0 <= result["test"] <= 1 and result["corrupted"].keys() == {"intact", "noise"}
    tables = (folder / "tables.md").read_text()
    assert tables.strip() in capsys.readouterr().out
    assert "UMT, semantic mask" in tables and "VideoMAE" in tables and tables.count("\n| ") == 4 + 4 + 4
    assert " ± " in tables
    assert (folder / "accuracy.png").stat().st_size > 10000

    scratch, pixel = (
        UMTVideoModel.from_pretrained(folder / "seed_3" / start).state_dict() for start in ("pixel/scratch", "pixel")
    )
    assert not torch.equal(scratch["layers.0.attention.q_proj.weight"], pixel["layers.0.attention.q_proj.weight"])

    longer = dataclasses.replace(BUDGET, finetuning_steps=4)
    files = [folder / "seed_3" / name / "result.json" for name in ("pixel", "pixel_heads", "pixel_motion_full")]
    before = [file.stat().st_mtime_ns for file in files]
    run.main(arguments, longer)  # only what depends on a changed setting is done again
    assert [file.stat().st_mtime_ns == old for file, old in zip(files, before, strict=True)] == [True, True, False]


def test_videomae_starts_with_the_students_weights_and_gives_its_own_back(small, tmp_path):
    """The encoder carried over classifies as VideoMAE's own classifier does with the same head."""
    student = build_student(0)
    videomae = build_videomae(student)
    with torch.no_grad():
        for parameter in videomae.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    student.config.use_final_norm = False
    encoder = take_encoder(videomae, UMTVideoModel(student.config))
    encoder.save_pretrained(tmp_path)
    ours = UMTVideoForVideoClassification.from_pretrained(tmp_path, num_labels=5).eval()
    videomae.config.num_labels = 5
    theirs = VideoMAEForVideoClassification(videomae.config).eval()
    theirs.videomae.load_state_dict(videomae.videomae.state_dict())
    theirs.fc_norm.eps = ours.fc_norm.eps
    theirs.classifier.load_state_dict(ours.classifier.state_dict())
    clips = torch.randn(2, 4, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(ours(clips).logits, theirs(clips).logits, atol=1e-5, rtol=0)


def test_jobs_wait_for_what_they_need_and_errors_name_the_log(tmp_path):
    order = []
    jobs = {
        "second": Job(order.append, (2,), frozenset({"first"})),
        "first": Job(order.append, (1,)),
        "third": Job(order.index, (7,), frozenset({"first", "second"})),
    }
    with ThreadPoolExecutor(2) as pool, pytest.raises(RuntimeError, match=r"third failed: 7.*\n.*log_\d+\.txt"):
        run_jobs(jobs, pool, 2, tmp_path)
    assert order == [1, 2]


def test_parts_are_short_and_the_page_names_the_command():
    folder = Path(run.__file__).parent
    for path in folder.glob("*.py"):
        assert len(path.read_text().splitlines()) <= 300, path
    page = (folder / "README.md").read_text()
    assert "make demo-finetune" in page and "python -m benchmarks.pretraining_value.run" in page
    for start in settings.STARTS.values():
        assert start in page
