"""Each benchmark runs at its smallest, its results have their fields, and what it counts and compares is right."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPVisionModelWithProjection

from benchmarks.common import TABLE_BEGIN, TABLE_END, PhaseClock, format_spread, run_interleaved, summarize
from benchmarks.stage1_step import run as stage1_step
from benchmarks.stage1_step.memory import MemoryJob, measure_peak_memory, measure_saved_bytes
from benchmarks.stage1_step.steps import PHASES, VARIANTS, build_step
from benchmarks.stage1_step.workload import SIZES, build_student_config, sample_pixel_values
from umt_hf import UMTVideoForPreTraining

CPU = torch.device("cpu")
TINY = SIZES["tiny"]
SUMMARY = {"median", "min", "max", "samples"}


def read_report(path: Path, question: str) -> dict:
    assert path.name == f"{question}.json"
    assert path.with_suffix(".md").read_text().count("\n| ") > 2
    report = json.loads(path.read_text())
    assert {"question", "machine", "settings", "rows"} <= report.keys()
    assert {"cpu", "cores", "threads", "accelerator", "torch", "transformers"} <= report["machine"].keys()
    assert "output_dir" not in report["settings"]  # results name no path
    return report


def build_tiny(variant: str, dtype: torch.dtype = torch.float32):
    return build_step(variant, TINY, CPU, dtype, "eager")


def count_flops(function) -> int:
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


@pytest.mark.heavy
def test_stage1_step_writes_a_row_for_each_variant(tmp_path):
    arguments = ["--sizes", "tiny", "--batch_size", "2", "--steps", "2", "--repeats", "2", "--threads", "1"]
    path = stage1_step.main([*arguments, "--measure_memory", "false", "--output_dir", str(tmp_path), "--name", "here"])
    assert path.parent == tmp_path / "here"
    report = read_report(path, "stage1_step")
    assert [row["variant"] for row in report["rows"]] == list(VARIANTS)
    for row in report["rows"]:
        assert (row["size"], row["batch_size"], row["peak_memory_bytes"]) == ("tiny", 2, None)
        assert row["saved_bytes_per_clip"] > 0
        assert row["clips_per_second"].keys() == SUMMARY and row["clips_per_second"]["min"] > 0
        assert len(row["clips_per_second"]["samples"]) == 2
        assert list(row["phase_shares"]) == list(PHASES)
        assert row["flops_per_clip"]["student"] > 0
        fractions = row["ceiling_fraction"]
        assert fractions["with_teacher"]["median"] >= fractions["without_teacher"]["median"] > 0
    plain, videomae = report["rows"][1:]
    assert plain["relative_to_plain"]["samples"] == [1, 1]
    umt = report["rows"][0]
    # With 32 visible tokens attention maps are small; see the next test.
    assert umt["saved_relative_to_plain"] < 1.1 and plain["saved_relative_to_plain"] == 1
    shares = [row["phase_shares"]["teacher and mask"]["median"] for row in (plain, videomae)]
    assert shares[0] > shares[1]  # VideoMAE has no teacher
    found = report["agreement"]["tiny, float32"]
    assert found["gradient norm of umt_hf"] == pytest.approx(found["gradient norm of plain"], rel=1e-5)


def test_stage2_writes_a_row_for_each_choice_of_losses(tmp_path, monkeypatch):
    from benchmarks.stage2 import run as stage2

    arguments = ["--sizes", "tiny", "--batch_size", "2", "--repeats", "2", "--threads", "1"]
    monkeypatch.setattr(stage2, "STRETCH_SECONDS", 0.01)
    path = stage2.main([*arguments, "--output_dir", str(tmp_path), "--name", "here"])
    rows = read_report(path, "stage2")["rows"]
    assert [row["losses"] for row in rows] == ["UTA", "UTA + VTC", "UTA + VTC + VTM", "UTA + VTC + VTM + MLM"]
    for row in rows:
        assert row["step_seconds"].keys() == SUMMARY and row["step_seconds"]["min"] > 0
        assert 0 < row["teacher_share"] < 1
    students = [row["flops_per_pair"]["student"] for row in rows]
    assert students == sorted(students) and students[-1] > 1.5 * students[0]
    assert len({row["flops_per_pair"]["teacher"] for row in rows}) == 1
    assert rows[-1]["relative_to_all"]["samples"] == [1, 1]


def test_stage2_computes_the_losses_that_are_chosen():
    from benchmarks.stage2.workload import LOSSES, SIZES_OF_PAIRS, Stage2Step, sample_pairs

    step, batch = Stage2Step("tiny", CPU, torch.float32), sample_pairs(SIZES_OF_PAIRS["tiny"], 2, CPU)
    for losses in (LOSSES[:1], LOSSES, ("vtc", "mlm")):
        step.choose(losses)
        assert set(step.run(batch)) == {"loss", *(f"video_{name}_loss" for name in losses)}
        assert (step.teacher is None) == ("uta" not in losses)
    # Alignment costs what stage 1 costs for clips of four frames, and the text tower's first layers.
    step.choose(("uta",))
    size = SIZES_OF_PAIRS["tiny"].video
    student, teacher = step.count_flops(batch)
    assert teacher <= 2 * size.count_teacher_flops() < 1.05 * teacher
    assert student > 2 * (size.count_student_flops() - 2 * size.student.count_patch_flops(size.visible_tokens))


@pytest.mark.slow
@pytest.mark.heavy
def test_precisions_of_the_teacher_write_a_row_each(tmp_path):
    pytest.importorskip("torchao", reason="torchao is not installed")
    from benchmarks.stage1_step.workload import build_teacher_config
    from benchmarks.teacher_precision import run as teacher_precision
    from umt_hf.moving_shapes.render import write_moving_shapes

    write_moving_shapes(tmp_path / "data", 8, 4, 4, num_workers=1)
    torch.manual_seed(0)
    CLIPVisionModelWithProjection(build_teacher_config(TINY)).save_pretrained(tmp_path / "teacher")
    precisions = ["float32", "bfloat16", "int8_dynamic"]
    sizes = ["--precisions", *precisions, "--seeds", "3", "--steps", "2", "--batch_size", "4", "--sizes", "tiny"]
    arguments = ["--folder", str(tmp_path), *sizes, "--output_dir", str(tmp_path), "--name", "here"]
    rows = read_report(teacher_precision.main(arguments), "teacher_precision")["rows"]
    assert [row["precision"] for row in rows] == precisions
    for row in rows:
        assert row["least_cosine"].keys() == {"moving_shapes", "tiny, random"}
        assert min(row["least_cosine"].values()) > 0.999
        assert row["relative_to_float32"]["median"] == pytest.approx(1, abs=0.01)
        assert 0.5 < row["held_out_loss"]["median"] < 4
    assert rows[0]["relative_to_float32"]["samples"] == [1]
    assert rows[0]["held_out_loss"] != rows[2]["held_out_loss"]


def test_precisions_of_the_teacher_want_the_demo(tmp_path):
    from benchmarks.teacher_precision import run as teacher_precision

    with pytest.raises(SystemExit, match="make demo"):
        teacher_precision.main(["--folder", str(tmp_path)])


@pytest.mark.heavy
@pytest.mark.slow
def test_threads_write_a_row_for_each_number(tmp_path):
    from benchmarks.threads import run as threads

    sizes = ["--sizes", "tiny", "--threads", "1", "2", "--batch_size", "2", "--steps", "1", "--repeats", "1"]
    report = read_report(threads.main([*sizes, "--output_dir", str(tmp_path), "--name", "here"]), "threads")
    assert [(row["size"], row["threads"]) for row in report["rows"]] == [("tiny", 1), ("tiny", 2)]
    for row in report["rows"]:
        assert row["clips_per_second"].keys() == SUMMARY and row["cpu_seconds_per_clip"]["min"] > 0
    assert report["rows"][0]["speed_relative_to_first"]["samples"] == [1]


@pytest.mark.slow
@pytest.mark.heavy
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from Linux's /proc")
def test_annotations_write_a_row_for_each_list(tmp_path):
    from benchmarks.annotations import run as annotations
    from benchmarks.annotations.lists import FORMS

    sizes = ["--num_rows", "30", "--num_tar_rows", "20", "--folder", str(tmp_path / "new")]
    report = read_report(annotations.main([*sizes, "--output_dir", str(tmp_path), "--name", "here"]), "annotations")
    assert [(row["num_rows"], row["form"]) for row in report["rows"]] == [(30, form) for form in FORMS] + [
        (20, "tars")
    ]
    assert all(row["first"]["num_rows"] == row["second"]["num_rows"] == row["num_rows"] for row in report["rows"])
    size = report["rows"][-1]["list_bytes"]
    assert size > 20 * 4096 and size % 10_240 == 0  # tars come in records of that size


@pytest.mark.heavy
@pytest.mark.slow
def test_peak_memory_of_a_variant_holds_its_weights_gradients_and_optimizer_state():
    job = MemoryJob("plain", "tiny", batch_size=2, device="cpu", dtype="float32", attn="sdpa", threads=1)
    parameters = sum(p.numel() for p in build_tiny("plain").model.parameters())
    assert 4 * 4 * parameters < measure_peak_memory(job) < 2**30


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_plain_step_computes_the_same_gradients(dtype, tolerance):
    umt, plain = build_tiny("umt_hf", dtype), build_tiny("plain", dtype)
    plain.load_weights(umt)
    found = stage1_step.check_agreement(umt, plain, sample_pixel_values(TINY, 2, CPU))
    assert found["loss of umt_hf"] == pytest.approx(found["loss of plain"], rel=tolerance)
    _, saliency = plain.teacher(sample_pixel_values(TINY, 2, CPU))
    if dtype == torch.float32:
        torch.testing.assert_close(
            umt.teacher.encode(sample_pixel_values(TINY, 2, CPU))[1], saliency, atol=1e-6, rtol=1e-5
        )


def test_disagreement_stops_the_benchmark():
    umt, plain = build_tiny("umt_hf"), build_tiny("plain")
    plain.load_weights(umt)
    with torch.no_grad():
        plain.model.norm.weight.mul_(1.1)
    with pytest.raises(RuntimeError, match="disagree"):
        stage1_step.check_agreement(umt, plain, sample_pixel_values(TINY, 2, CPU))


def test_plain_mask_hides_as_many_patches_in_every_frame_and_follows_the_saliency():
    from benchmarks.stage1_step.plain import draw_mask

    saliency = torch.full((6, 10), 1e-6)
    saliency[:, 3] = 1
    mask = draw_mask(saliency, 2, 0.8).view(6, 10)
    assert (~mask).sum(dim=1).tolist() == [2] * 6 and not mask[:, 3].any()


def test_counted_operations_are_those_that_pytorch_sees():
    pixel_values = sample_pixel_values(TINY, 1, CPU)
    plain, umt, videomae = (build_tiny(variant) for variant in ("plain", "umt_hf", "videomae"))
    assert count_flops(lambda: plain.teacher(pixel_values)) == TINY.count_complete_teacher_flops()
    # The last layer's products over the visible tokens and the class token's row of scores included.
    assert count_flops(lambda: umt.run_backward(pixel_values, PhaseClock(CPU))) == (
        umt.flops_of_student + umt.flops_of_teacher
    )
    # VideoMAE embeds the hidden patches too, forward and for the weights' gradient.
    hidden = 2 * TINY.student.count_patch_flops(TINY.tokens - TINY.visible_tokens)
    seen = count_flops(lambda: videomae.run_backward(pixel_values, PhaseClock(CPU)))
    assert seen == videomae.flops_of_student + hidden


def test_the_step_is_that_of_the_training_loop(monkeypatch):
    """A step whose gradients are NaN changes neither weights nor moments, and is counted without waiting."""
    from umt_hf.training.step.waits import WaitCounter

    step, pixel_values = build_tiny("umt_hf"), sample_pixel_values(TINY, 2, CPU)
    with WaitCounter() as counter:
        step.run(pixel_values, PhaseClock(CPU))
    assert not counter.counts
    before = {name: weight.clone() for name, weight in step.model.state_dict().items()}
    step.run(pixel_values * float("nan"), PhaseClock(CPU))
    step.guard.read()
    assert step.guard.state.nonfinite_steps == 1
    assert all(torch.equal(weight, before[name]) for name, weight in step.model.state_dict().items())
    step.run(pixel_values, PhaseClock(CPU))
    assert not all(torch.equal(weight, before[name]) for name, weight in step.model.state_dict().items())


def test_less_is_kept_for_the_backward_pass_than_in_the_plain_step():
    size = SIZES["b16-2+2"]
    clips = sample_pixel_values(size, 2, CPU)
    ours, plain = (
        measure_saved_bytes(build_step(variant, size, CPU, torch.float32, "sdpa"), clips)
        for variant in ("umt_hf", "plain")
    )
    maps = 4 * size.student.layers * size.student.heads * size.visible_tokens**2
    assert ours < 0.83 * plain and plain - ours < 1.1 * maps


@pytest.mark.parametrize("variant", ["umt_hf", "plain"])
def test_saved_bytes_leave_weights_and_their_copies_out(variant):
    """In bfloat16 weights are cast for each step; per clip the same is kept, whatever the batch."""
    step = build_tiny(variant, torch.bfloat16)
    per_clip = [measure_saved_bytes(step, sample_pixel_values(TINY, clips, CPU)) for clips in (2, 5)]
    assert per_clip[0] == pytest.approx(per_clip[1], rel=0.02)
    # Both norms' inputs, queries, keys, values and what the MLP's activation sees, at least.
    least = 2 * TINY.visible_tokens * TINY.student.layers * TINY.student.width * (2 + 3 + 4)
    assert least < per_clip[0] < 10 * least


def test_a_compiled_step_gives_the_losses_of_the_plain_one(monkeypatch):
    from benchmarks.stage1_step import steps

    monkeypatch.setattr(steps, "choose_compiler", lambda _: "aot_eager")
    compiled, plain = build_tiny(steps.COMPILED), build_tiny("plain")
    plain.load_weights(compiled)
    found = stage1_step.check_agreement(compiled, plain, sample_pixel_values(TINY, 2, CPU))
    assert found["loss of umt_hf"] == pytest.approx(found["loss of plain"], rel=1e-5)
    torch._dynamo.reset()


def test_published_sizes_cost_what_their_shapes_say():
    # 12 (24) layers of 320 visible tokens, and of 8 x 197 teacher tokens; see Kaplan et al. 2020 for 2 x parameters.
    assert SIZES["b16"].visible_tokens == SIZES["l16"].visible_tokens == 320
    for name, parameters in (("b16", 85e6), ("l16", 302e6)):
        size = SIZES[name]
        assert size.count_student_flops() == pytest.approx(6 * parameters * 320, rel=0.15)
        assert size.count_complete_teacher_flops() == pytest.approx(2 * parameters * 8 * 197, rel=0.15)
        assert 0.9 * size.count_complete_teacher_flops() < size.count_teacher_flops()


@pytest.mark.parametrize("name", ["moving_shapes", "340x256_gop12"])
def test_decoding_writes_a_row_for_each_reader(tmp_path, monkeypatch, name):
    pytest.importorskip("decord")
    from benchmarks.decoding import run as decoding
    from benchmarks.decoding import videos
    from umt_hf.moving_shapes.render import FRAME_SIZE, NUM_FRAMES

    monkeypatch.setattr(videos, "NUM_FRAMES", 40)
    arguments = ["--videos", name, "--clips_per_file", "1", "--repeats", "2"]
    path = decoding.main([*arguments, "--output_dir", str(tmp_path), "--name", "here"])
    report = read_report(path, "decoding")
    readers = [row["reader"] for row in report["rows"]]
    assert readers[:3] == ["decord + PIL, frame by frame", "umt_hf, pyav", "umt_hf, decord"]
    assert {"umt_hf, shards (PIL)", "shards, torchvision", "load_video, pyav + torchvision"} <= set(readers)
    known = {"umt_hf, torchcodec", "torchcodec, exact + torchvision", "load_video, torchcodec + torchvision"}
    known |= {"torchcodec, approximate + torchvision", "shards, turbo"}
    assert known <= set(readers) | set(report["unusable"]) and not set(readers) & set(report["unusable"])
    size = {"moving_shapes": (FRAME_SIZE, FRAME_SIZE, NUM_FRAMES, 8), "340x256_gop12": (340, 256, 40, 1)}[name]
    for row in report["rows"]:
        assert (row["width"], row["height"], row["num_frames"], row["batch_size"]) == size
        decoded, batched = row["decoded_clips_per_core_second"], row["batched_clips_per_core_second"]
        assert decoded.keys() == SUMMARY and len(batched["samples"]) == 2
        assert decoded["median"] > batched["median"] > 0 and row["bytes_per_video"] > 0
    first = report["rows"][0]
    assert first["relative_to_baseline"]["samples"] == [1, 1] and first["lost_grey_levels"] < 6
    assert first["opening_milliseconds"].keys() >= {"PyAV", "PyAV, first picture not decoded", "decord"}
    best = first["best_reader_relative_to_others"]
    assert best["best"] in readers and not best["best"].startswith("umt_hf")


def test_decoding_puts_key_frames_where_it_says(tmp_path):
    import av

    from benchmarks.decoding.videos import encode, find_real_clips, iterate_footage, iterate_pan

    frames = list(iterate_pan(30, 64, 96))
    if clip := find_real_clips().get("bikes"):
        frames = list(iterate_footage(clip, 30, 64, 96))
    encode(tmp_path / "a.mp4", frames, 12)
    with av.open(str(tmp_path / "a.mp4")) as container:
        numbers = [i for i, frame in enumerate(container.decode(video=0)) if frame.key_frame]
    assert numbers == [0, 12, 24] and len(frames) == 30 and frames[0].shape == (64, 96, 3)


def test_other_frames_in_shards_stop_the_benchmark(tmp_path):
    from benchmarks.decoding.shards import check_frames, write_shards
    from benchmarks.decoding.videos import write_kinetics_like

    videos = [tmp_path / "a.mp4", tmp_path / "b.mp4"]
    for path, num_frames in zip(videos, (40, 80), strict=True):
        write_kinetics_like(path, num_frames=num_frames, height=64, width=96)
    shards = write_shards(videos, tmp_path / "shards")
    assert 0 < check_frames(videos, shards) < 6
    with pytest.raises(RuntimeError, match="The frames kept differ from those of the videos by"):
        check_frames(videos[::-1], shards)


@pytest.mark.slow
@pytest.mark.heavy
def test_prepared_frames_write_a_row_for_each_case(tmp_path):
    from benchmarks.prepared_frames import run as prepared_frames

    sizes = ["--num_clips", "40", "--num_eval_clips", "8", "--kept", "4", "--seeds", "0", "1", "--max_steps", "4"]
    sizes += ["--eval_steps", "2", "--teacher_steps", "4"]
    path = prepared_frames.main([*sizes, "--output_dir", str(tmp_path), "--name", "here"])
    report = read_report(path, "prepared_frames")
    assert [(row["case"], row["choices_per_part"]) for row in report["rows"]] == [("videos", 6), ("4 frames kept", 1)]
    for row in report["rows"]:
        assert len(row["held_out_losses"]) == 2 and [step for step, _ in row["curves"][0]] == [2, 4]
    assert report["rows"][0]["differences"] == [0, 0] and path.with_name("prepared_frames.png").stat().st_size > 5000


def test_decoding_compares_readers_on_the_same_pixels(tmp_path):
    pytest.importorskip("decord")
    from benchmarks.decoding import run as decoding
    from benchmarks.decoding.readers import FrameByFrameReader, UMTReader
    from benchmarks.decoding.videos import write_kinetics_like
    from umt_hf.processing.train_transforms import PretrainingTransform

    video = tmp_path / "pan.mp4"
    write_kinetics_like(video, num_frames=20, height=96, width=128)
    transform = PretrainingTransform(64)
    readers = [FrameByFrameReader(transform), UMTReader(transform, "pyav")]
    decoding.check_agreement(readers, [video])
    readers[1].transform = PretrainingTransform(64, flip_probability=1.0, scales=(0.5,))
    with pytest.raises(RuntimeError, match=r"pan\.mp4: umt_hf, pyav differs"):
        decoding.check_agreement(readers, [video])


def test_search_writes_a_row_for_each_way(tmp_path):
    pytest.importorskip("lancedb")
    from benchmarks.search import run as search

    rng = np.random.default_rng(0)
    stored = {"vectors": search.draw_unit_vectors(rng, 300, 16), "queries": search.draw_unit_vectors(rng, 2, 16)}
    np.savez(tmp_path / "model.npz", **stored)
    sizes = ["--num_videos", "30", "600", "--width", "8", "--queries", "2", "--repeats", "2", "--num_appended", "5"]
    flags = [*sizes, "--flat_rows", "500", "--kinds", "ivf_sq", "--vectors", str(tmp_path / "model.npz")]
    report = read_report(search.main([*flags, "--output_dir", str(tmp_path), "--name", "here"]), "search")
    faiss = [search.FAISS] if search.has_faiss() else []
    flat = [search.UMT, search.SCAN, search.NUMPY, *faiss, "ivf_sq"]
    lists = [search.UMT, search.EXACT, search.SCAN, search.NUMPY, *faiss, "ivf_sq"]
    assert [(row["num_videos"], row["vectors"], row["way"]) for row in report["rows"]] == [
        (size, vectors, way)
        for size, ways in ((30, flat), (600, lists))
        for vectors in ("random", "model")
        for way in ways
    ]
    for row in report["rows"]:
        assert len(row["search_seconds"]["samples"]) == 2 and row["search_seconds"]["min"] > 0
        assert row["first_seconds"]["min"] > 0 and 0.1 <= row["recall"] <= 1 and row["memory_bytes"] is None
        if row["way"] == search.UMT:
            assert row["last_append_seconds"]["min"] > 0 and row["disk_relative_after_appends"] > 1
        if row["way"] == search.NUMPY:
            assert row["search_relative_to_numpy"]["samples"] == [1, 1]
    assert report["text_encoding_seconds"].keys() == SUMMARY


def test_search_compares_the_same_answers():
    pytest.importorskip("lancedb")
    from benchmarks.search import run as search

    truth = np.array([[0.1], [0.9], [0.5]], np.float32)
    found = {search.UMT: lambda _: ["/videos/1.mp4", "/videos/0.mp4"]}
    assert search.check_answers(found, np.ones((1, 2)), truth) == {search.UMT: pytest.approx(2 / 3)}
    with pytest.raises(RuntimeError, match="not the same search"):
        search.check_answers({search.NUMPY: found[search.UMT]}, np.ones((1, 2)), truth)


def test_vectors_grow_between_neighbours():
    from benchmarks.search.vectors import draw_unit_vectors, find_neighbours, grow

    vectors = draw_unit_vectors(np.random.default_rng(0), 200, 8)
    grown = grow(vectors, 1000)
    assert grown.dtype == np.float32 and (grown[:200] == vectors).all() and (grown == grow(vectors, 1000)).all()
    np.testing.assert_allclose(np.linalg.norm(grown, axis=1), 1, atol=1e-5)
    scores = vectors @ vectors.T - 2 * np.eye(200, dtype=np.float32)
    assert (scores.argmax(1)[:, None] == find_neighbours(vectors)).any(1).all()
    nearest = (grown[200:] @ vectors.T).max(1)
    assert nearest.min() > scores.max(1).min() - 0.1
    assert len(grow(vectors, 100)) == 100


@pytest.mark.slow
@pytest.mark.heavy
def test_an_index_stays_small_and_quick_over_ten_thousand_appends(tmp_path):
    """One row a commit: in the end the folder is at most 1.5 times its vectors, and a commit twice the first."""
    pytest.importorskip("lancedb")
    from benchmarks.search import run as search

    vectors = search.draw_unit_vectors(np.random.default_rng(0), 100, 512)
    search.build_index(tmp_path / "index", vectors, {})
    found = search.measure_growth(tmp_path / "index", vectors, 10_000, {})
    assert found["disk_relative_after_appends"] <= 1.5
    assert found["last_append_seconds"]["median"] <= 2 * found["first_append_seconds"]["median"]


def test_features_write_a_row_for_each_length_and_way(tmp_path, monkeypatch):
    """In this process, with peaks that are given: 1 to 4 MiB. The next test has a process and a peak of its own."""
    from benchmarks.features import extraction
    from benchmarks.features import run as features

    peaks = iter([0, 1, 0, 2, 0, 3, 0, 4])
    monkeypatch.setattr(extraction, "read_peak_resident_memory", lambda: next(peaks) * 2**20)
    monkeypatch.setattr(
        extraction, "run_in_new_process", lambda _, job, __: extraction.run_job(extraction.ExtractionJob(**job))
    )
    sizes = ["--minutes", "0.05", "0.1", "--fps", "4", "--repeats", "1", "--batch_size", "1"]
    report = read_report(features.main([*sizes, "--output_dir", str(tmp_path), "--name", "here"]), "features")
    assert [(row["minutes"], row["way"], row["num_windows"]) for row in report["rows"]] == [
        (minutes, way, windows) for minutes, windows in ((0.05, 2), (0.1, 3)) for way in features.WAYS
    ]
    for row in report["rows"]:
        assert row["windows_per_second"].keys() == SUMMARY and row["windows_per_second"]["min"] > 0
    assert [row["peak_memory_bytes"]["median"] for row in report["rows"]] == [2**20 * peak for peak in (1, 2, 3, 4)]
    assert [row["memory_relative_to_baseline"]["median"] for row in report["rows"]] == [0.5, 1, 0.75, 1]
    assert [row["memory_relative_to_shortest"]["median"] for row in report["rows"]] == [1, 1, 3, 2]
    with pytest.raises(RuntimeError, match="not the same work"):
        features.check_agreement(torch.zeros(2, 3).numpy(), torch.full((2, 3), 0.1).numpy())


@pytest.mark.heavy
@pytest.mark.slow
def test_memory_of_features_counts_what_a_video_decoded_at_once_holds(tmp_path):
    from benchmarks.decoding.videos import write_kinetics_like
    from benchmarks.features.extraction import AT_ONCE, ExtractionJob, measure_extraction

    video = tmp_path / "video.mp4"
    write_kinetics_like(video, num_frames=160, height=32, width=32)
    found = measure_extraction(ExtractionJob(AT_ONCE, str(video), str(tmp_path / "features.npy"), 30, 8, 1))
    prepared_bytes = 4 * 160 * 3 * 224 * 224
    assert found.num_windows == 20 and prepared_bytes < found.peak_bytes < 2**30


def test_forward_writes_a_row_for_each_encoder(tmp_path, monkeypatch):
    from benchmarks.forward import run as forward

    monkeypatch.setattr(forward, "STRETCH_SECONDS", 0.01)
    sizes = ["--frames", "4", "2", "--width", "32", "--heads", "2", "--layers", "2", "--image_size", "32"]
    sizes += ["--patch_size", "8", "--keep_ratios", "0.5", "--repeats", "2"]
    report = read_report(forward.main([*sizes, "--output_dir", str(tmp_path), "--name", "here"]), "forward")
    half = forward.name_kept(0.5)
    for count in (4, 2):
        rows = {row["encoder"]: row for row in report["rows"] if row["frames"] == count}
        assert list(rows)[:4] == [forward.ALL, half, forward.VIDEOMAE, forward.HALVED] and len(rows) == 7
        tokens = {name: row["tokens"] for name, row in rows.items()}
        assert tokens[forward.ALL] == tokens[forward.VIDEOMAE] == 16 * count == tokens["TimeSformer"] - 1
        assert tokens[half] == tokens[forward.HALVED] == 8 * count
        assert rows[forward.ALL]["speed_of_ours"][forward.ALL]["samples"] == [1, 1]
        for row in rows.values():
            assert row["clips_per_second"].keys() == SUMMARY and row["speed_of_ours"].keys() == {forward.ALL, half}
    assert report["agreement"].keys() == {forward.VIDEOMAE, half} and max(report["agreement"].values()) < 1e-4


def test_forward_compares_the_same_work():
    from benchmarks.forward import run as forward

    sizes = {"width": 32, "heads": 2, "layers": 1, "image_size": 32, "patch_size": 8}
    args = forward.Arguments(**sizes, keep_ratios=[0.5])
    encoders, pixels = forward.build_encoders(args, 2), torch.randn(1, 2, 3, 32, 32)
    forward.check_agreement(encoders, pixels, args)
    encoders[forward.name_kept(0.5)].model.config.token_selector = "random"
    with pytest.raises(RuntimeError, match=r"Not the same work: tokens differ by .*50%"):
        forward.check_agreement(encoders, pixels, args)
    encoders = forward.build_encoders(args, 2)
    encoders["TimeSformer"].num_tokens -= 1
    with pytest.raises(RuntimeError, match="TimeSformer has 33 tokens, not 32"):
        forward.check_agreement(encoders, pixels, args)


def test_rerank_writes_a_row_for_each_way(tmp_path, monkeypatch):
    pytest.importorskip("lancedb")
    from benchmarks.rerank import run as rerank
    from benchmarks.rerank import through_index

    monkeypatch.setattr(rerank, "STRETCH_SECONDS", 0.01)
    monkeypatch.setattr(through_index, "NUM_FRAMES", 8)
    sizes = ["--sizes", "tiny", "--num_videos", "6", "--num_queries", "2", "--batch_size", "4", "--repeats", "2"]
    rows = read_report(rerank.main([*sizes, "--output_dir", str(tmp_path), "--name", "here"]), "rerank")["rows"]
    assert [row["way"] for row in rows] == [
        rerank.VIDEOS, rerank.TOKENS, rerank.HALF_TOKENS, rerank.KEYS, rerank.HALF_KEYS, *through_index.STORES
    ]  # fmt: skip
    again, tokens, half_tokens, keys, half_keys, searched, from_tokens, from_keys = rows
    assert again["speed"]["samples"] == [1, 1] and again["bytes_per_video"] == 0
    # 4 frames of 16 patches, and one fusion layer of width 128.
    assert tokens["bytes_per_video"] == 2 * half_tokens["bytes_per_video"] == 4 * 64 * TINY.student.width
    assert keys["bytes_per_video"] == 2 * half_keys["bytes_per_video"] == 4 * 64 * 2 * 128
    assert min(row["speed"]["median"] for row in rows[1:]) > 0
    assert searched["speed"]["samples"] == [1, 1] and searched["bytes_per_video"] == 0
    assert from_tokens["bytes_per_video"] == half_tokens["bytes_per_video"]
    assert from_keys["bytes_per_video"] == half_keys["bytes_per_video"]
    for row in (from_tokens, from_keys):
        assert 0 < row["agreement"]["largest_difference"] < 0.01
    for row in (tokens, keys):
        assert row["agreement"]["largest_difference"] < 1e-5 and row["agreement"]["same_order"]
    assert 0 < half_tokens["agreement"]["largest_difference"] < 0.01
    with pytest.raises(RuntimeError, match="not the same work"):
        rerank.check_agreement(
            {rerank.VIDEOS: lambda text: text[0, 0], rerank.KEYS: lambda text: text[0, 0] + 1}, torch.ones(1, 1, 3)
        )
    with pytest.raises(RuntimeError, match="not the same work"):
        through_index.check_searches(
            {through_index.SEARCH: lambda query: {"a": 1.0}, through_index.SEARCH_KEYS: lambda query: {"a": 1.1}},
            ["a"], 1e-5,
        )  # fmt: skip


@pytest.mark.slow
def test_kept_tokens_write_a_row_for_each_share_and_selector(tmp_path, monkeypatch):
    from benchmarks.kept_tokens import run as kept_tokens
    from benchmarks.stage1_step.workload import build_student_config, build_teacher_config
    from umt_hf import UMTVideoModel, UMTVideoProcessor
    from umt_hf.moving_shapes.render import write_moving_shapes

    monkeypatch.setattr(kept_tokens, "STRETCH_SECONDS", 0.01)
    write_moving_shapes(tmp_path / "data", 8, 4, 8, num_workers=1)
    torch.manual_seed(0)
    config = build_student_config(TINY)
    config.num_hidden_layers = config.num_aligned_layers = 1
    UMTVideoModel(config).save_pretrained(tmp_path / "student")
    UMTVideoProcessor.from_model_config(config).save_pretrained(tmp_path / "student")
    CLIPVisionModelWithProjection(build_teacher_config(TINY)).save_pretrained(tmp_path / "teacher")
    sizes = ["--keep_ratios", "0.5", "--head_steps", "5", "--batch_size", "4", "--repeats", "2"]
    path = kept_tokens.main(["--folders", str(tmp_path), *sizes, "--output_dir", str(tmp_path), "--name", "here"])
    report = read_report(path, "kept_tokens")
    assert str(tmp_path) not in json.dumps(report)
    names = [(row["selector"], row["keep_ratio"]) for row in report["rows"]]
    assert names == [(kept_tokens.ALL, 1.0), *((selector, 0.5) for selector in kept_tokens.SELECTORS)]
    for row in report["rows"]:
        assert row["speed"]["min"] > 0 and all(len(values) == 3 for values in row["accuracy"].values())
        assert all(0 <= value <= 1 for values in row["accuracy"].values() for value in values)
    first, random, changes, _ = report["rows"]
    assert first["speed"]["samples"] == [1, 1]
    assert (
        first["against_all_tokens"]["motion"] == {"mean": 0, "standard_error": 0} == random["against_random"]["motion"]
    )
    gained = [
        one - other for one, other in zip(changes["accuracy"]["motion"], random["accuracy"]["motion"], strict=True)
    ]
    assert changes["against_random"]["motion"]["mean"] == pytest.approx(sum(gained) / 3)
    assert kept_tokens.describe([1.0, 3.0]) == {"mean": 2.0, "standard_error": 1.0}


def test_kept_tokens_want_the_demo(tmp_path):
    from benchmarks.kept_tokens import run as kept_tokens

    with pytest.raises(SystemExit, match="make demo"):
        kept_tokens.main(["--folders", str(tmp_path)])


def test_inference_writes_a_row_for_each_command_and_way(tmp_path):
    pytest.importorskip("lancedb")
    from benchmarks.inference import commands
    from benchmarks.inference import run as inference

    sizes = ["--num_videos", "3", "--num_frames", "20", "--repeats", "1", "--num_workers", "1", "--hidden_size", "64"]
    sizes += ["--num_hidden_layers", "1", "--batch_size", "2"]
    report = read_report(inference.main([*sizes, "--output_dir", str(tmp_path), "--name", "here"]), "inference")
    assert [(row["command"], row["way"]) for row in report["rows"]] == [
        (command, way) for command in commands.COMMANDS for way in commands.WAYS
    ]
    for row in report["rows"]:
        assert row["num_videos"] == 3 and row["videos_per_second"]["min"] > 0
        shares = row["waiting_ratio"]["median"], row["model_ratio"]["median"]
        assert min(shares) > 0 and sum(shares) <= 1
        assert row["way"] == commands.ENGINE or row["speed_relative_to_baseline"]["samples"] == [1]
    assert report["settings"]["dtype"] == "float32"


def test_inference_compares_the_same_work():
    from benchmarks.inference import commands

    job = commands.Job("classify", (), Path(), 4, 2, 0)
    found = [commands.Found(1, 1, 0, torch.full((2, 3), value).numpy()) for value in (0.0, 0.1)]
    with pytest.raises(RuntimeError, match="classify: the two ways have other results"):
        commands.check_agreement(job, *found)
    with pytest.raises(RuntimeError, match="other shapes"):
        commands.check_agreement(job, found[0], commands.Found(1, 1, 0, found[1].results[:1]))


def test_interleaving_starts_each_round_elsewhere():
    order = []
    cases = {name: (lambda name=name: order.append(name) or len(order)) for name in "abc"}
    measurements = run_interleaved(cases, 3)
    assert "".join(order) == "abcbcacab"
    assert measurements["a"] == [1, 6, 8]


def test_summary_and_its_text():
    summary = summarize([3.0, 1.0, 2.0])
    assert summary == {"median": 2.0, "min": 1.0, "max": 3.0, "samples": [3.0, 1.0, 2.0]}
    assert format_spread(summary) == "2 (1-3)"
    assert format_spread(None) == "-"


def test_phases_are_added_up_and_time_between_steps_is_left_out(monkeypatch):
    times = iter([0.0, 1.0, 3.0, 10.0, 14.0, 15.0])
    clock = PhaseClock(CPU)
    monkeypatch.setattr("benchmarks.common.time.perf_counter", lambda: next(times))
    for _ in range(2):
        clock.start()
        clock.mark("first")
        clock.mark("second")
    assert clock.compute_phase_seconds() == {"first": 5.0, "second": 3.0}


@pytest.mark.parametrize("question", [
    "stage1_step", "stage2", "cuda", "teacher_precision", "decoding", "search", "features", "threads", "annotations",
    "prepared_frames", "exports",
    "prepared_frames", "forward", "rerank", "kept_tokens",
    "prepared_frames", "inference", "two_teachers",
])  # fmt: skip
def test_readme_has_the_place_for_its_table(question):
    text = (Path(stage1_step.__file__).parents[1] / question / "README.md").read_text()
    assert text.count(TABLE_BEGIN) == text.count(TABLE_END) == 1
    assert f"python -m benchmarks.{question}.run" in text


@pytest.mark.slow
def test_exports_write_a_row_for_each_variant(tmp_path):
    from benchmarks.exports import run as exports
    from tests.unit.finetuning.test_classification import tiny_config
    from umt_hf import UMTVideoForVideoClassification, UMTVideoProcessor
    from umt_hf.inference.export import require_exporters
    from umt_hf.moving_shapes.render import write_moving_shapes

    try:
        require_exporters("onnx")
    except ImportError as error:
        pytest.skip(str(error))
    write_moving_shapes(tmp_path / "data", 4, 2, 6, num_workers=1)
    torch.manual_seed(0)
    config = tiny_config(num_labels=36)
    UMTVideoForVideoClassification(config).save_pretrained(tmp_path / "classifier")
    UMTVideoProcessor.from_model_config(config).save_pretrained(tmp_path / "classifier")
    names = ["ONNX Runtime", "ONNX Runtime, int8 weights"]
    flags = ["--folder", str(tmp_path), "--repeats", "2", "--calls", "1", "--batch_size", "2", "--variants", *names]
    rows = read_report(exports.main([*flags, "--output_dir", str(tmp_path), "--name", "here"]), "exports")["rows"]
    assert [row["variant"] for row in rows] == [exports.PYTORCH, *names]
    assert rows[1]["drop_points"] == 0 and rows[1]["same_answers"] == 100
    assert rows[0]["relative_to_pytorch"]["samples"] == [1, 1]
    for row in rows:
        assert 0 <= row["accuracy"] <= 100 and row["clips_per_second"].keys() == SUMMARY and row["size_bytes"] > 0
    logits = {exports.PYTORCH: np.ones((2, 3)), "ONNX Runtime": np.full((2, 3), 1.1)}
    with pytest.raises(RuntimeError, match="not the same work"):
        exports.check_agreement(logits)


def test_drops_of_an_export_have_the_error_of_the_difference():
    from benchmarks.exports import run as exports

    labels = np.arange(100) % 4
    exact = np.eye(4)[labels]
    other = exact.copy()
    other[:10] = np.eye(4)[(labels[:10] + 1) % 4]
    logits, seconds = {exports.PYTORCH: exact, "OpenVINO": other}, {exports.PYTORCH: [1.0], "OpenVINO": [0.5]}
    row = exports.build_row("OpenVINO", logits, labels, seconds, {"OpenVINO": 1}, exports.Arguments())
    assert (row["accuracy"], row["drop_points"], row["same_answers"]) == (90, 10, 90)
    assert row["drop_standard_error"] == pytest.approx(100 * (0.09 / 99) ** 0.5)
    assert row["relative_to_pytorch"]["median"] == 2


def test_saves_write_a_row_for_the_checkpoint_and_for_its_bytes(tmp_path, monkeypatch):
    from benchmarks.saves import run as saves

    sizes = ["--sizes", "tiny", "--repeats", "1", "--folder", str(tmp_path)]
    report = read_report(saves.main([*sizes, "--output_dir", str(tmp_path), "--name", "here"]), "saves")
    assert [row["what"] for row in report["rows"]] == [saves.SAVE, saves.BYTES]
    weights = sum(own.numel() for own in build_student().parameters())
    assert all(16 * weights < row["bytes"] < 17 * weights for row in report["rows"])  # twice the weights, two moments
    assert report["rows"][1]["relative_to_bytes"]["samples"] == [1] and not list(tmp_path.glob("tmp*"))
    monkeypatch.setattr(
        saves, "export_run", lambda accelerator, model, *others: build_student().save_pretrained(others[-1])
    )
    with pytest.raises(RuntimeError, match="does not hold the run: "):
        saves.measure("tiny", tmp_path, 1)


def build_student() -> UMTVideoForPreTraining:
    return UMTVideoForPreTraining(build_student_config(TINY))
