"""Losses against loops over single pairs, and negatives that are never true pairs."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from umt_hf.modeling.losses_umt import (
    compute_negative_weights,
    compute_similarity,
    find_true_pairs,
    mlm_loss,
    sample_mlm_corruption,
    sample_negatives,
    vtc_loss,
    vtm_loss,
)

seeds = st.integers(0, 2**31)
batches = st.lists(st.integers(0, 3), min_size=1, max_size=7)


def draw_vectors(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * 3


def cosine(a: list[float], b: list[float]) -> float:
    norms = math.sqrt(sum(x * x for x in a)) * math.sqrt(sum(x * x for x in b))
    return sum(x * y for x, y in zip(a, b, strict=True)) / norms


@given(batches, st.booleans(), seeds, st.integers(0, 3), st.floats(0.01, 2))
def test_contrast_is_the_mean_of_both_directions(ids, has_ids, seed, num_vectors, temperature):
    count = len(ids)
    # A single vector per video is the pooled one, of unit length here.
    pooled = torch.nn.functional.normalize(draw_vectors(seed, count, 6), dim=-1)
    videos = draw_vectors(seed, count, num_vectors, 6) if num_vectors else pooled
    texts = draw_vectors(seed + 1, count, 6)
    similarity = [[0.0] * count for _ in range(count)]
    for i in range(count):
        for j in range(count):
            vectors = videos[i].tolist() if num_vectors else [videos[i].tolist()]
            similarity[i][j] = sum(cosine(vector, texts[j].tolist()) for vector in vectors) / len(vectors)
    torch.testing.assert_close(compute_similarity(videos, texts), torch.tensor(similarity), rtol=1e-4, atol=1e-5)

    terms = []
    for rows in (similarity, list(map(list, zip(*similarity, strict=True)))):
        for i, row in enumerate(rows):
            pairs = [j for j in range(count) if (ids[i] == ids[j] if has_ids else i == j)]
            logits = [value / temperature for value in row]
            log_sum = max(logits) + math.log(sum(math.exp(value - max(logits)) for value in logits))
            terms.append(-sum(logits[j] - log_sum for j in pairs) / len(pairs))
    found = vtc_loss(videos, texts, temperature, torch.tensor(ids) if has_ids else None)
    assert float(found) == pytest.approx(sum(terms) / len(terms), rel=1e-3, abs=1e-4)


@given(batches, seeds, st.booleans(), st.sampled_from([0.001, 0.01, 0.07, 0.5]))
def test_a_hard_negative_is_never_a_true_pair(ids, seed, hard, temperature):
    """At every temperature that a model may have: there the softmax of a wrong pair underflows."""
    ids = torch.tensor(ids)
    similarity = compute_similarity(draw_vectors(seed, len(ids), 4), draw_vectors(seed, len(ids), 4))
    is_pair = find_true_pairs(len(ids), ids, "cpu")
    for weights in compute_negative_weights(similarity / temperature, is_pair, hard):
        assert weights.shape == is_pair.shape and (weights[is_pair] == 0).all() and weights.isfinite().all()
        drawn = sample_negatives(weights, torch.Generator().manual_seed(seed))
        has_negative = ~is_pair.all(dim=1)
        rows = torch.arange(len(ids))
        assert not is_pair[rows, drawn][has_negative].any()


@given(st.integers(1, 6), seeds)
def test_matching_counts_the_first_third_as_pairs(pairs, seed):
    logits = draw_vectors(seed, 3 * pairs, 2)
    terms = [
        -math.log(math.exp(row[label]) / (math.exp(row[0]) + math.exp(row[1])))
        for label, rows in ((1, logits[:pairs].tolist()), (0, logits[pairs:].tolist()))
        for row in rows
    ]
    assert float(vtm_loss(logits)) == pytest.approx(sum(terms) / len(terms), rel=1e-4)
    for wrong in (3 * pairs - 1, 3 * pairs + 1):
        with pytest.raises(ValueError, match="three rows per pair"):
            vtm_loss(draw_vectors(seed, wrong, 2))


@given(st.integers(1, 3), st.integers(1, 6), st.floats(0.01, 0.99), seeds)
def test_words_to_predict_are_never_special(batch, length, probability, seed):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 12, (batch, length), generator=generator)
    corrupted, labels = sample_mlm_corruption(ids, 12, 3, (0, 1), probability, generator)
    chosen = labels != -100
    assert torch.equal(labels[chosen], ids[chosen]) and torch.equal(corrupted[~chosen], ids[~chosen])
    assert not torch.isin(labels[chosen], torch.tensor([0, 1])).any()
    assert ((corrupted >= 0) & (corrupted < 12)).all()
    logits = draw_vectors(seed, batch, length, 12)
    terms = [
        -float(logits[i, j].double().log_softmax(0)[labels[i, j]])
        for i in range(batch)
        for j in range(length)
        if chosen[i, j]
    ]
    assert float(mlm_loss(logits, labels)) == pytest.approx(sum(terms) / max(len(terms), 1), rel=1e-4, abs=1e-5)


@given(batches, st.integers(0, 8))
def test_one_id_for_each_pair(ids, count):
    if count != len(ids):
        with pytest.raises(ValueError, match="one id per pair"):
            find_true_pairs(count, torch.tensor(ids), "cpu")
        return
    found = find_true_pairs(count, torch.tensor(ids), "cpu").tolist()
    assert found == [[a == b for b in ids] for a in ids]
