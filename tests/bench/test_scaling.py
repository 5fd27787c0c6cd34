"""Costs of a run as docs/scaling.md states them, compared with counters at small size; the benchmarks behind it."""

import json
import re
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.common import TABLE_BEGIN, TABLE_END
from benchmarks.scale import model as costs
from benchmarks.scale import run as scale
from benchmarks.scale.counting import Text, build_student, build_teacher, count, make_batch, saved_bytes
from benchmarks.scale.loop import DDP, FSDP2, run
from benchmarks.scale.traffic import Traffic
from benchmarks.stage1_step.workload import SIZES
from benchmarks.training import run as training
from benchmarks.training.inputs import STAGE1, STAGE2, Inputs, build_flags, write_inputs
from benchmarks.training.loop import LOOP, STEP, Found, Job, run_job
from tests.bench.test_benchmarks import read_report
from umt_hf.runs.config import load_recipe
from umt_hf.training import stage1, trainer
from umt_hf.training.alignment import compute_targets
from umt_hf.training.reporting.flops import OTHER_ATTENTION

TINY = SIZES["tiny"]
TINY_TEXT = Text(width=128, layers=4, heads=4, fusion_layer=2, tokens=12, frames=8, projection=64, vocabulary=200)
TEXTS = pytest.mark.parametrize("text", [None, TINY_TEXT], ids=["stage 1", "stage 2"])


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Inputs:
    return write_inputs("tiny", tmp_path_factory.mktemp("inputs"))


def run_forward(student, teacher, batch):
    config = getattr(student.config, "vision_config", student.config)
    visible, features = compute_targets(
        teacher, batch["pixel_values"], batch["mask_noise"], config.mask_type, config.mask_ratio
    )
    texts = {name: batch[name] for name in ("input_ids", "attention_mask") if name in batch}
    return student(
        pixel_values=batch["pixel_values"],
        visible_indices=visible,
        teacher_features=features,
        normalize_teacher_features=False,
        **(texts | {"return_loss": True} if texts else {}),
    )


@TEXTS
def test_operations_are_those_of_real_steps(text):
    """With the backward pass, which the model takes for two forward ones: no gradient flows into pixels."""
    student, teacher = build_student(TINY, text), build_teacher(TINY, torch.float32)
    found = count(TINY, text, torch.float32)
    totals = []
    for clips in (2, 3):
        counter = FlopCounterMode(display=False, custom_mapping=OTHER_ATTENTION)
        with counter:
            loss = run_forward(student, teacher, make_batch(TINY, text, clips)).loss
        forward = counter.get_total_flops()
        with counter:
            loss.backward()
        totals.append((forward, forward + counter.get_total_flops()))  # the counter began anew
    forward, total = (totals[1][i] - totals[0][i] for i in range(2))
    assert found.student_flops / 3 + found.teacher_flops == pytest.approx(forward, rel=1e-6)
    assert found.student_flops + found.teacher_flops == pytest.approx(total, rel=0.05)


def test_stage_1_operations_are_those_of_the_formula():
    """That of benchmarks/stage1_step, apart from the teacher's last layer, which runs at visible tokens alone."""
    for name in ("b16", "l16"):
        found, size = count(SIZES[name]), SIZES[name]
        patches = size.student.count_patch_flops(size.visible_tokens)
        assert found.student_flops == pytest.approx(size.count_student_flops() + patches, rel=1e-3)
        assert found.teacher_flops == pytest.approx(size.count_teacher_flops(), rel=0.06)


@TEXTS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bf16"])
def test_saved_bytes_are_those_of_a_real_forward_pass(text, dtype):
    student, teacher = build_student(TINY, text), build_teacher(TINY, dtype)
    found = count(TINY, text, dtype)
    for clips in (2, 5):
        batch = make_batch(TINY, text, clips)
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32), saved_bytes(student) as read_saved:
            run_forward(student, teacher, batch)
            saved = read_saved()
        assert found.copy_bytes + clips * found.clip_bytes == pytest.approx(saved, rel=0.01)


def test_weights_gradients_and_moments_take_16_bytes_a_weight(inputs, tmp_path, monkeypatch):
    taken = []
    original = stage1.train

    def train(stage, args, accelerator, schedule, *rest):
        state = original(stage, args, accelerator, schedule, *rest)
        taken.append(stage.model)
        return state

    optimizers, make = [], trainer.build_optimizer
    monkeypatch.setattr(stage1, "train", train)
    monkeypatch.setattr(trainer, "build_optimizer", lambda *given: optimizers.append(make(*given)) or optimizers[-1])
    found = count(TINY)
    run_stage1(inputs, tmp_path)
    weights = [weight for weight in taken[0].parameters() if weight.requires_grad]
    moments = [state[name] for state in optimizers[0].state.values() for name in ("exp_avg", "exp_avg_sq")]
    measured = 2 * sum(weight.nbytes for weight in weights) + sum(moment.nbytes for moment in moments)
    assert sum(weight.numel() for weight in weights) == found.parameters
    assert measured == costs.list_memory(found, 0)[0] == 16 * found.parameters
    # The files of its checkpoint: the model, and what resuming needs.
    checkpoint = tmp_path / "run" / "checkpoint-1"
    sizes = {file: file.stat().st_size for file in checkpoint.rglob("*") if file.is_file()}
    assert sum(sizes.values()) == pytest.approx(costs.SAVED_BYTES * found.parameters, rel=0.05)
    assert sizes[checkpoint / "model.safetensors"] == pytest.approx(4 * found.parameters, rel=0.05)


def run_stage1(inputs: Inputs, folder: Path) -> None:
    fields = build_flags(STAGE1, inputs) | {
        "output_dir": folder / "run", "per_device_train_batch_size": 2, "max_steps": 1, "warmup_steps": 1,
        "dataloader_num_workers": 0, "mixed_precision": "no",
    }  # fmt: skip
    AcceleratorState._reset_state(reset_partial_state=True)
    stage1.main([text for name, value in fields.items() for text in (f"--{name}", str(value))])
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.heavy
@pytest.mark.slow
@pytest.mark.parametrize(("kind", "precision"), scale.COUNTED)
def test_bytes_of_a_step_are_those_of_the_formula(inputs, kind, precision):
    """`measure_traffic` stops the benchmark where they are not."""
    found = scale.measure_traffic(inputs, kind, precision, 1)
    assert found["counted"] == found["predicted"] and found["parameters"] == count(TINY).parameters
    assert found["small_bytes"] < 4096
    root = count(TINY).root_parameters
    assert found["counted"] == asdict(scale.predict_traffic(kind, found["parameters"], root, precision))


def test_what_is_sent_goes_round_a_ring():
    assert scale.predict_traffic(DDP, 100) == Traffic(reduced=400)
    assert scale.predict_traffic(DDP, 100).count_sent(4) == 600
    assert scale.predict_traffic(FSDP2, 100, 10).count_sent(2) == (760 + 400) / 2
    assert scale.predict_traffic("zero2", 100).count_sent(2) == scale.predict_traffic(DDP, 100).count_sent(2)
    assert scale.predict_traffic("zero3", 100, precision="bf16") == Traffic(gathered=400, scattered=200)
    with pytest.raises(ValueError, match="kind must be ddp, fsdp2, zero2 or zero3, got 'zero1'"):
        scale.predict_traffic("zero1", 100)


@pytest.mark.slow
def test_the_page_shows_what_the_command_prints():
    page = costs.PAGE.read_text()
    shown = page.partition(TABLE_BEGIN)[2].partition(TABLE_END)[0].strip()
    assert shown == costs.main([]), "Run `python -m benchmarks.scale.model --write true`."


def test_an_estimate_that_is_changed_changes_the_tables_and_nonsense_is_refused():
    counts = {model: count(TINY, TINY_TEXT if model.is_stage2 else None) for model in costs.MODELS[1:3]}
    tables = costs.format_tables(counts, costs.Arguments())
    other = costs.format_tables(counts, costs.Arguments(device="A100", network_gb=50.0))
    assert "one A100" in other and tables != other
    assert "estimate" in tables and "measured" in tables and "data sheet" in tables
    with pytest.raises(ValueError, match="utilisation takes three shares from 0 to 1"):
        costs.Arguments(utilisation=[0.3, 1.4, 0.5])
    with pytest.raises(ValueError, match="device must be one of .*H100.*, got 'abacus'"):
        costs.Arguments(device="abacus")


@pytest.mark.parametrize("model", costs.MODELS, ids=lambda model: model.name)
def test_sizes_and_saves_are_those_of_the_recipes(model):
    """At the estimated speeds a save costs under 1 % of the time between two, and a crash half an hour at most."""
    recipe = load_recipe(f"stage2_umt_vit_{model.size}_25m" if model.is_stage2 else f"stage1_umt_vit_{model.size}")
    sizes = recipe["data"]["batch_sizes"] if model.is_stage2 else [recipe["training"]["per_device_train_batch_size"]]
    assert sizes == [model.batch_size] and recipe["training"]["save_steps"] == model.save_steps
    # The table is what the command prints, see above.
    (row,) = re.findall(
        rf"^\| {model.name} \|.*\| ([\d.]+) \| ([\d,]+) \| ([\d.]+)% \|$", costs.PAGE.read_text(), re.M
    )
    seconds, steps, share = (float(cell.replace(",", "")) for cell in row)
    assert steps == model.save_steps and share < 1 and seconds / (share / 100) < 1800


def test_measured_figures_are_those_of_the_results(tmp_path):
    folder = tmp_path / "machine"
    folder.mkdir()
    rate = {"median": 12.5}
    rows = [{"width": 340, "height": 256, "reader": costs.RAW, "batched_clips_per_core_second": rate}]
    (folder / "decoding.json").write_text(json.dumps({"rows": rows}))
    found = costs.read_measured(tmp_path)
    assert found.readers == {"340 x 256 files": 12.5} and found.lists == {}


@pytest.mark.slow
@pytest.mark.heavy
def test_scale_writes_a_row_for_each_number_of_processes(tmp_path):
    sizes = ["--sizes", "tiny", "--processes", "1", "2", "--batch_size", "2", "--steps", "1", "--repeats", "1"]
    report = read_report(scale.main([*sizes, "--output_dir", str(tmp_path), "--name", "here"]), "scale")
    assert [(row["size"], row["processes"]) for row in report["rows"]] == [("tiny", 1), ("tiny", 2)]
    assert report["rows"][0]["efficiency"]["samples"] == [1]
    assert report["rows"][1]["efficiency"]["median"] == report["rows"][1]["relative_to_first"]["median"] / 2
    assert [(row["kind"], row["precision"]) for row in report["traffic"]] == list(scale.COUNTED)


@pytest.mark.slow
@pytest.mark.heavy
def test_training_writes_a_row_for_the_script_and_for_the_step_alone(tmp_path):
    sizes = ["--batch_size", "2", "--steps", "2", "--repeats", "1", "--compiled_repeats", "1", "--threads", "1"]
    report = read_report(training.main([*sizes, "--output_dir", str(tmp_path), "--name", "here"]), "training")
    assert [(row["stage"], row["mode"], row["what"]) for row in report["rows"]] == [
        (stage, mode, what) for stage in (STAGE1, STAGE2) for mode in ("eager", "aot_eager") for what in (STEP, LOOP)
    ]
    for row in report["rows"]:
        assert row["clips_per_second"]["min"] > 0 and row["recompilations"] == row["graph_breaks"] == 0
        assert row["graphs"] == (2 if row["mode"] == "aot_eager" else 0)
        is_counted = row["mode"] == "eager" and row["what"] == LOOP
        assert row["waits_per_step"] == (0 if is_counted else None)
        assert (row["data_wait_share"] is None) == (row["what"] == STEP)


def test_a_step_that_reads_back_is_counted(inputs, monkeypatch):
    """In this process, with a planted `.item()` and `nonzero` in every step."""
    original = stage1.Stage1.forward_step

    def forward_step(self, batch):
        losses = original(self, batch)
        losses["uta_loss"].item()
        batch["mask_noise"].nonzero()
        return losses

    AcceleratorState._reset_state(reset_partial_state=True)
    monkeypatch.setattr(stage1.Stage1, "forward_step", forward_step)
    found = run_job(Job(STAGE1, inputs, batch_size=2, steps=2, workers=0, counts_waits=True))
    AcceleratorState._reset_state(reset_partial_state=True)
    assert found.waits == {"aten._local_scalar_dense": 2, "aten.nonzero": 2} and found.counted_steps == 2


def test_runs_that_train_otherwise_are_not_compared():
    def find(losses):
        return Found(1.0, 1.0, None, losses, (0, 0), 0, {}, 0)

    training.check_agreement({STEP: [find([1.0, 2.0])], LOOP: [find([1.00001, 2.0])]}, 1e-4)
    with pytest.raises(RuntimeError, match="the script has other losses than the step alone"):
        training.check_agreement({STEP: [find([1.0, 2.0])], LOOP: [find([1.001, 2.0])]}, 1e-4)


@pytest.mark.heavy
@pytest.mark.slow
def test_a_process_that_fails_says_why(inputs):
    with pytest.raises(RuntimeError, match=r"(?s)Process \d of the benchmark ended with 1:.*mixed_precision"):
        run(inputs, 2, 1, batch_size=1, steps=1, precision="fp3")
