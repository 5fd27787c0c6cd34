"""The benchmark of two teachers: arms of equal time, and every part of it at its smallest."""

import pytest
import torch
from transformers import CLIPVisionModelWithProjection

from benchmarks.stage1_step.workload import SIZES, build_teacher_config
from benchmarks.two_teachers import run, video_teacher
from tests.bench.test_benchmarks import SUMMARY, read_report
from umt_hf.moving_shapes.render import write_moving_shapes


def test_arms_take_equal_time():
    assert run.plan_steps(200, {run.IMAGE: 0.1, run.BOTH: 0.16}) == {run.IMAGE: 200, run.BOTH: 125}


def test_the_demo_is_wanted(tmp_path):
    with pytest.raises(SystemExit, match="make demo"):
        run.main(["--folder", str(tmp_path)])


@pytest.mark.slow
@pytest.mark.heavy
def test_a_row_is_written_for_each_arm_and_teacher(tmp_path, monkeypatch):
    write_moving_shapes(tmp_path / "data", 36, 4, 4, num_workers=1)
    torch.manual_seed(0)
    CLIPVisionModelWithProjection(build_teacher_config(SIZES["tiny"])).save_pretrained(tmp_path / "teacher")
    monkeypatch.setattr(run, "SHORT", 1)
    monkeypatch.setattr(run, "LONG", 2)
    monkeypatch.setattr(video_teacher, "TRAINING", video_teacher.TRAINING | {"batch_size": 4})
    monkeypatch.setitem(run.shared.PRETRAINING, "per_device_train_batch_size", 4)
    steps = ["--steps", "2", "--video_teacher_steps", "2", "--probe_steps", "50", "--seeds", "3"]
    arguments = ["--folder", str(tmp_path), *steps, "--output_dir", str(tmp_path), "--name", "here"]
    rows = read_report(run.main(arguments), "two_teachers")["rows"]
    assert [row["arm"] for row in rows[2:]] == [run.IMAGE, run.BOTH]
    for row in rows:
        assert all(0 <= row[column]["median"] <= 1 for column in run.COLUMNS)
    for row in rows[2:]:
        assert row["seconds"].keys() == SUMMARY and row["seconds"]["min"] > 0
