"""Behaviour of the losses that no reference number covers, and their equality over one and two processes."""

from pathlib import Path

import pytest
import torch
from torch import distributed as dist
from torch.nn.parallel import DistributedDataParallel

from tests.parity.multi_modality import assert_equal, load_case
from tests.processes import run_ranks
from tests.unit.modeling.test_modeling_video_text import TINY, build_batch, build_draws
from umt_hf.modeling.configuration_umt_video_text import UMTVideoTextConfig
from umt_hf.modeling.losses_umt import (
    compute_negative_weights,
    compute_similarity,
    find_true_pairs,
    mlm_loss,
    sample_negatives,
    vtc_loss,
    vtm_loss,
)
from umt_hf.modeling.modeling_umt_video_text import UMTVideoTextForPreTraining


def test_similarity_is_the_mean_of_the_frames_cosines():
    videos, texts = torch.randn(3, 4, 8), torch.randn(5, 8)
    expected = torch.cosine_similarity(videos[:, None], texts[None, :, None], dim=-1).mean(-1)
    torch.testing.assert_close(compute_similarity(videos, texts), expected)
    pooled = torch.nn.functional.normalize(videos, dim=-1).mean(1)
    torch.testing.assert_close(compute_similarity(pooled, texts), expected)  # not made to unit length once more
    torch.testing.assert_close(vtc_loss(pooled, texts[:3], 0.1), vtc_loss(videos, texts[:3], 0.1))


def test_numbers_stay_in_float32_under_autocast():
    videos, texts = torch.randn(4, 8), torch.randn(4, 8)
    expected = compute_similarity(videos, texts), vtc_loss(videos, texts, 0.01)
    with torch.autocast("cpu", torch.bfloat16):
        ours = compute_similarity(videos, texts), vtc_loss(videos, texts, 0.01)
    for one, other in zip(ours, expected, strict=True):
        assert one.dtype == torch.float32 and torch.equal(one, other)


def test_repeated_ids_share_the_target():
    videos = torch.eye(4)[[0, 0, 1, 2]]
    assert vtc_loss(videos, videos, 0.01, torch.tensor([7, 7, 1, 2])).item() == pytest.approx(
        torch.tensor(2.0).log().item() / 2, abs=1e-5
    )


def test_negatives_are_never_true_pairs_and_prefer_the_similar():
    ids = torch.tensor([5, 5, 1, 2])
    is_pair = find_true_pairs(4, ids, "cpu")
    logits = torch.zeros(4, 4)
    logits[2, 3] = 3.0  # video 2 looks like text 3
    videos, texts = compute_negative_weights(logits, is_pair)
    assert torch.equal(videos[0] > 0, torch.tensor([False, False, True, True]))
    draws = torch.stack([sample_negatives(texts) for _ in range(400)])
    assert not is_pair[torch.arange(4).expand(400, 4), draws].any()
    share = (draws[:, 2] == 3).float().mean().item()
    assert share == pytest.approx(torch.tensor([0.0, 0, 3]).softmax(0)[2].item(), abs=0.06)
    even, _ = compute_negative_weights(logits, is_pair, hard=False)
    assert len(even[even > 0].unique()) == 1


@pytest.mark.parametrize("temperature", [0.001, 0.005, 0.007, 0.01, 0.07, 0.5])
@pytest.mark.parametrize("ids", [range(8), [0, 0, 1, 2, 3, 3, 3, 4], [0, 0, 0, 0, 0, 0, 0, 1]])
def test_negatives_are_never_true_pairs_at_any_allowed_temperature(temperature, ids):
    """Pairs far above all others leave these no weight in a softmax over all: 0.9 of cosine is 900 at 0.001."""
    generator = torch.Generator().manual_seed(0)
    is_pair = find_true_pairs(8, torch.tensor(ids), "cpu")
    cosines = torch.rand(8, 8, generator=generator) * 0.01 + 0.9 * is_pair
    for weights, rows in zip(
        compute_negative_weights(cosines / temperature, is_pair), (cosines.T, cosines), strict=True
    ):
        draws = torch.stack([sample_negatives(weights, generator) for _ in range(200)])
        assert not is_pair[torch.arange(8).expand(200, 8), draws].any()
        # The distribution by an independent way: each row's negatives alone, in double precision.
        for weight, row, pairs in zip(weights, rows, is_pair, strict=True):
            expected = (row[~pairs].double() / temperature).softmax(0)
            torch.testing.assert_close((weight / weight.sum())[~pairs].double(), expected, atol=1e-5, rtol=1e-3)
            assert not weight[pairs].any()


def test_published_weights_stay_as_they_are_to_the_last_bit():
    logits, is_pair = torch.randn(6, 6) * 4, find_true_pairs(6, torch.tensor([0, 0, 1, 2, 2, 3]), "cpu")
    videos, texts = compute_negative_weights(logits, is_pair)
    assert torch.equal(videos, logits.T.softmax(1) * ~is_pair) and torch.equal(texts, logits.softmax(1) * ~is_pair)


def test_a_row_of_pairs_alone_is_zero_beside_others_that_are_not():
    is_pair = torch.eye(3, dtype=torch.bool)
    is_pair[1] = is_pair[:, 1] = True
    for temperature in (0.001, 0.5):
        for weights in compute_negative_weights(torch.randn(3, 3) / temperature, is_pair):
            assert weights.isfinite().all() and not weights[1].any() and (weights[[0, 2]].sum(1) > 0).all()


def test_rows_without_negatives_still_draw():
    weights, _ = compute_negative_weights(torch.randn(3, 3), torch.ones(3, 3, dtype=torch.bool))
    assert not weights.any()
    assert sample_negatives(weights).max() < 3


def test_nothing_to_predict_is_no_loss():
    logits = torch.randn(2, 3, 11, requires_grad=True)
    loss = mlm_loss(logits, torch.full((2, 3), -100))
    loss.backward()
    assert loss.item() == 0 and not logits.grad.any()


@pytest.mark.parametrize(
    "call,message",
    [
        (lambda: vtc_loss(torch.randn(3, 4), torch.randn(2, 4), 0.1), "3 videos and 2 texts"),
        (lambda: vtc_loss(torch.randn(3, 4), torch.randn(3, 4), 0.1, torch.arange(2)), "pair_ids"),
        (lambda: vtc_loss(torch.randn(3, 4), torch.randn(3, 4), 0.1, gather="local"), "gather"),
        (lambda: vtm_loss(torch.randn(4, 2)), "three rows"),
    ],
)
def test_what_does_not_fit_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def run_student(rows: slice, wrap=lambda model: model) -> dict[str, torch.Tensor]:
    """Total loss and gradients of stage 2 on part of a batch of four, with recorded masks and draws."""
    torch.manual_seed(0)
    student = UMTVideoTextForPreTraining(UMTVideoTextConfig(**TINY))
    batch = build_batch(4)
    features = batch.pop("teacher_features")
    batch |= build_draws(batch) | {"pair_ids": torch.tensor([0, 1, 0, 2])}  # a true pair across the processes
    batch = {name: tensor[rows] for name, tensor in batch.items()}
    for name in ("video_negatives", "text_negatives"):
        batch[name] = batch[name] - rows.start
    model = wrap(student)  # kept, since its hooks work in backward
    loss = model(**batch, teacher_features=features[:, rows], return_loss=True).loss
    loss.backward()
    gradients = {f"grad/{name}": parameter.grad for name, parameter in student.named_parameters()}
    return {"loss": loss.detach(), **gradients}


def run_contrast(rows: slice, gather: str) -> dict[str, torch.Tensor]:
    """Contrastive loss and gradients on part of the recorded tensors."""
    inputs = load_case("losses")[1]["inputs"]
    tensors = {
        "vision_proj": inputs["vision_proj_1"][rows],
        "text_proj": inputs["text_proj"][rows],
        "temp": inputs["temp"],
    }
    tensors = {name: tensor.clone().requires_grad_() for name, tensor in tensors.items()}
    loss = vtc_loss(*tensors.values(), inputs["idx_dup"][rows], gather)
    loss.backward()
    return {"loss": loss.detach(), **{f"grad_{name}": tensor.grad for name, tensor in tensors.items()}}


def work(folder: Path) -> None:
    """One of two processes: its half of every batch."""
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    third, half = slice(3 * rank, 3 * rank + 3), slice(2 * rank, 2 * rank + 2)
    results = {gather: run_contrast(third, gather) for gather in ("exact", "published")}
    results["student"] = run_student(half, DistributedDataParallel)
    torch.save(results, folder / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def processes(tmp_path_factory) -> list[dict[str, dict[str, torch.Tensor]]]:
    folder = tmp_path_factory.mktemp("processes")
    run_ranks(work, folder)
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


def test_contrast_over_two_processes_is_that_of_one(processes):
    """After averaging over processes, as DDP does; a process's rows are its own, the temperature is everybody's."""
    expected = run_contrast(slice(0, 6), "exact")
    for results in processes:
        torch.testing.assert_close(results["exact"]["loss"], expected["loss"], atol=0, rtol=1e-6)
    for name in ("grad_vision_proj", "grad_text_proj"):
        ours = torch.cat([results["exact"][name] for results in processes]) / 2
        torch.testing.assert_close(ours, expected[name], atol=1e-7, rtol=1e-6)
    ours = sum(results["exact"]["grad_temp"] for results in processes) / 2
    torch.testing.assert_close(ours, expected["grad_temp"], atol=0, rtol=1e-6)


def test_published_gather_scales_the_projections_down(processes):
    published = load_case("losses")[1]["outputs"]
    expected = run_contrast(slice(0, 6), "exact")
    for rank, results in enumerate(processes):
        for name, tensor in results["published"].items():
            assert_equal(tensor, published[f"vtc_world2/rank{rank}/{name}"], name)
    ours = torch.cat([results["published"]["grad_text_proj"] for results in processes])
    torch.testing.assert_close(ours, expected["grad_text_proj"])  # averaging then halves it


def test_stage_2_over_two_processes_is_that_of_one(processes):
    """Every loss, under DDP, where the halves have unequal numbers of words to predict."""
    expected = run_student(slice(0, 4))
    loss = sum(results["student"]["loss"] for results in processes) / 2
    torch.testing.assert_close(loss, expected["loss"], atol=0, rtol=1e-6)
    assert not torch.allclose(processes[0]["student"]["loss"], processes[1]["student"]["loss"])
    for name, gradient in expected.items():
        if name != "loss":
            tolerance = 1e-5 * max(gradient.abs().max().item(), 1e-2)
            for results in processes:
                torch.testing.assert_close(results["student"][name], gradient, atol=tolerance, rtol=0, msg=name)
