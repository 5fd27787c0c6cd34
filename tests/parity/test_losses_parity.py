"""The losses on given tensors, with their gradients, against the published implementation."""

import pytest
import torch

from tests.parity.multi_modality import assert_equal, load_case, load_table
from umt_hf.modeling.losses_umt import (
    compute_negative_weights,
    compute_similarity,
    find_true_pairs,
    sample_mlm_corruption,
    uta_loss,
    vtc_loss,
)


@pytest.fixture(scope="module")
def case():
    return load_case("losses")[1]


@pytest.mark.parametrize("norm", ["l2", "none"])
@pytest.mark.parametrize("loss", ["l2", "mse", "smooth_l1"])
def test_alignment(case, norm, loss):
    student = case["inputs"]["student"].clone().requires_grad_()
    value = uta_loss(student, case["inputs"]["clip"], norm, loss)
    published = f"uta/norm_{norm}_type_{loss}"
    assert value.item() == pytest.approx(case["outputs"][f"{published}/loss"].item(), rel=1e-5)
    value.backward()
    assert_equal(student.grad, case["outputs"][f"{published}/grad_student"])


@pytest.mark.parametrize("pooling,key", [("pooled", "vision_proj_1"), ("frames", "vision_proj_T")])
def test_contrast(case, pooling, key):
    inputs, published = case["inputs"], case["outputs"]
    similarity = compute_similarity(inputs[key], inputs["text_proj"])
    assert_equal(similarity, published[f"vtc/{pooling}/sim_v2t_notemp"])
    assert_equal(similarity / inputs["temp"], published[f"vtc/{pooling}/sim_v2t"])

    videos, texts, temperature = (inputs[name].clone().requires_grad_() for name in (key, "text_proj", "temp"))
    loss = vtc_loss(videos, texts, temperature, inputs["idx_dup"])
    assert loss.item() == pytest.approx(published[f"vtc/{pooling}_idx_dup/loss"].item(), rel=1e-5)
    loss.backward()
    assert_equal(videos.grad, published[f"vtc/{pooling}_idx_dup/grad_vision_proj"])
    assert_equal(texts.grad, published[f"vtc/{pooling}_idx_dup/grad_text_proj"])
    assert_equal(temperature.grad, published[f"vtc/{pooling}_idx_dup/grad_temp"])
    for ids, name in ((inputs["idx_unique"], "idx_unique"), (None, "none")):
        loss = vtc_loss(inputs[key], inputs["text_proj"], inputs["temp"], ids)
        assert loss.item() == pytest.approx(published[f"vtc/{pooling}_{name}/loss"].item(), rel=1e-5)


def test_true_pairs_and_targets(case):
    is_pair = find_true_pairs(6, case["inputs"]["idx_dup"], "cpu")
    assert torch.equal(is_pair.float(), case["outputs"]["vtc/mask_idx_dup"])
    targets = is_pair.float() / is_pair.float().sum(1, keepdim=True)
    torch.testing.assert_close(targets, case["outputs"]["vtc/targets_idx_dup"])


def test_random_negatives(case):
    """Ours are drawn from weights, the published by the largest of noise; both take negatives alone, all alike."""
    is_pair = find_true_pairs(6, case["inputs"]["idx_dup"], "cpu")
    videos, texts = compute_negative_weights(torch.randn(6, 6), is_pair, hard=False)
    for weights, noise, published in (
        (videos, "randneg_noise_vision", "randneg_vision_idx"),
        (texts, "randneg_noise_text", "randneg_text_idx"),
    ):
        allowed = case["inputs"][noise].masked_fill(weights == 0, -torch.inf)
        assert torch.equal(allowed.argmax(1), case["outputs"][published])
        assert len(weights[weights > 0].unique()) == 1


def test_corruption_law():
    published = load_table("mlm_rule")["statistics"]
    ids = torch.randint(104, published["vocab_size"], (4000, 39), generator=torch.Generator().manual_seed(0))
    ids[:, 0], ids[:, 30], ids[:, 31:] = 101, 102, 0
    generator = torch.Generator().manual_seed(1)
    corrupted, labels = sample_mlm_corruption(ids, published["vocab_size"], 103, (0, 101), 0.5, generator)
    chosen = labels != -100
    assert torch.equal(labels[chosen], ids[chosen])
    assert torch.equal(corrupted[~chosen], ids[~chosen])
    assert not chosen[ids == 0].any() and not chosen[ids == 101].any()
    share = chosen[(ids != 0) & (ids != 101)].float().mean().item()
    assert share == pytest.approx(published["frac_selected_of_eligible"], abs=0.01)
    assert chosen[:, 30].float().mean().item() == pytest.approx(published["frac_selected_of_sep"], abs=0.04)
    masked, same = (corrupted == 103)[chosen], (corrupted == ids)[chosen]
    assert masked.float().mean().item() == pytest.approx(published["frac_mask_of_selected"], abs=0.01)
    assert same.float().mean().item() == pytest.approx(published["frac_same_of_selected"], abs=0.01)
    words = corrupted[chosen][~masked & ~same]
    assert words.min() < 104 and words.max() > 0.99 * published["vocab_size"]
