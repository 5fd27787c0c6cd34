# Copyright 2026 The umt_hf authors.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""Losses of both pre-training stages as pure functions: tensors in, scalars out.

In a distributed run `vtc_loss` and `mlm_loss` cover the batches of all processes, so that W processes with batch B
train as one process with batch W * B. All processes must call them together, with batches of the same size.

Legend: B batch, P vectors per video, D projection width, L tokens of a text.
"""

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import distributed as dist
from torch.nn import functional as F

IGNORED_LABEL = -100
TensorPair = tuple[torch.Tensor | None, torch.Tensor | None]


def normalize_features(features: torch.Tensor, norm: str = "l2") -> torch.Tensor:
    """Scale features to unit length in float32, as student and teacher are compared.

    Args:
        features: `(..., channels)`.
        norm: "l2" or "none".

    Returns:
        Float32 tensor of the same shape.

    Raises:
        ValueError: If `norm` is unknown.
    """
    features = features.float()
    if norm == "l2":
        return features / features.norm(dim=-1, keepdim=True)
    if norm == "none":
        return features
    raise ValueError(f"norm must be 'l2' or 'none', got {norm!r}.")


def uta_loss(student: torch.Tensor, teacher: torch.Tensor, norm: str = "l2", loss: str = "l2") -> torch.Tensor:
    """Unmasked token alignment: how far the student's features are from the teacher's on the visible tokens.

    Args:
        student: Projected student features `(layers, batch, visible tokens, channels)`.
        teacher: Teacher features of the same shape.
        norm: Normalisation applied to both, "l2" or "none". Unit vectors stay as they are.
        loss: "l2" (mean of `2 - 2 cos`), "mse" or "smooth_l1" (these average over channels too).

    Returns:
        Scalar float32 loss, the mean over layers, clips and tokens.

    Raises:
        ValueError: If the shapes differ, or `norm` or `loss` is unknown.

    Source: Li et al., "Unmasked Teacher", ICCV 2023, section 3.1, target alignment.

    Examples:
        >>> import torch
        >>> from umt_hf.modeling.losses_umt import uta_loss
        >>> student = torch.tensor([3.0, 0.0]).expand(6, 1, 320, 2)
        >>> teacher = torch.tensor([0.0, 1.0]).expand(6, 1, 320, 2)
        >>> uta_loss(student, teacher)  # at right angles
        tensor(2.)
    """
    if student.shape != teacher.shape:
        raise ValueError(
            f"student {tuple(student.shape)} and teacher {tuple(teacher.shape)} features differ in shape."
        )
    student, teacher = normalize_features(student, norm), normalize_features(teacher, norm)
    if loss == "l2":
        return (2 - 2 * (student * teacher).sum(dim=-1)).mean()
    if loss == "mse":
        return F.mse_loss(student, teacher)
    if loss == "smooth_l1":
        return F.smooth_l1_loss(student, teacher)
    raise ValueError(f"loss must be 'l2', 'mse' or 'smooth_l1', got {loss!r}.")


def average_video_embeds(video_embeds: torch.Tensor) -> torch.Tensor:
    """Mean of a video's unit vectors; its product with a unit text vector is the mean of their cosines.

    Args:
        video_embeds: P vectors of any length per video, `(B, P, D)`; or that mean, `(B, D)`, which is returned as it
            is: made to unit length once more, it would give other scores.

    Returns:
        Float32 `(B, D)`, shorter than 1 where the vectors differ.
    """
    return normalize_features(video_embeds).mean(dim=1) if video_embeds.ndim == 3 else video_embeds.float()


def compute_similarity(video_embeds: torch.Tensor, text_embeds: torch.Tensor) -> torch.Tensor:
    """Cosine of each video with each text, averaged over the video's vectors.

    Args:
        video_embeds: One vector per video, `(videos, D)`, as `get_video_features` pools them; or several, of any
            length, `(videos, P, D)`.
        text_embeds: `(texts, D)`; any length.

    Returns:
        Float32 `(videos, texts)`, in [-1, 1], without temperature.
    """
    with torch.autocast(video_embeds.device.type, enabled=False):
        return average_video_embeds(video_embeds) @ normalize_features(text_embeds).T


def find_true_pairs(batch_size: int, pair_ids: torch.Tensor | None, device: torch.device | str) -> torch.Tensor:
    """Find which videos and texts of a batch belong together: those with equal ids.

    Args:
        batch_size: Pairs in the batch.
        pair_ids: `(batch_size,)`; default: all distinct.
        device: Device of the result.

    Returns:
        Boolean `(batch_size, batch_size)`, symmetric, `True` on the diagonal.

    Raises:
        ValueError: If there is not one id per pair.
    """
    if pair_ids is None:
        return torch.eye(batch_size, dtype=torch.bool, device=device)
    if tuple(pair_ids.shape) != (batch_size,):
        raise ValueError(f"pair_ids must be ({batch_size},), one id per pair, got {tuple(pair_ids.shape)}.")
    pair_ids = pair_ids.to(device)
    return pair_ids[:, None] == pair_ids[None]


def lacks_negatives(pair_ids: torch.Tensor | None, batch_size: int) -> bool:
    """Whether a batch is known to have a single id; ids on an accelerator, which would wait, are not looked at."""
    if pair_ids is None or pair_ids.device.type != "cpu":
        return batch_size == 1
    return len(set(pair_ids.tolist())) == 1


def has_negatives(pair_ids: torch.Tensor | None, batch_size: int, device: torch.device) -> torch.Tensor:
    """Whether a batch has two different ids, as a boolean scalar on the device."""
    return ~find_true_pairs(batch_size, pair_ids, device).all()


def vtc_loss(
    video_embeds: torch.Tensor,
    text_embeds: torch.Tensor,
    temperature: torch.Tensor | float,
    pair_ids: torch.Tensor | None = None,
    gather: Literal["exact", "published"] = "exact",
) -> torch.Tensor:
    """Video-text contrast over the batches of all processes, both ways, with soft targets for repeated ids.

    Args:
        video_embeds: One vector per video, `(B, D)`, as `get_video_features` pools them; or several, of any length,
            `(B, P, D)`. Row i belongs to text i.
        text_embeds: Projected texts `(B, D)`, any length.
        temperature: Positive divisor of the similarities.
        pair_ids: `(B,)`; equal ids are true pairs, between which a target is spread evenly. default: all distinct.
        gather: "exact": after averaging over processes, gradients are those of one process with all batches.
            "published": those of the embeddings are that divided by the number of processes.

    Returns:
        Scalar float32 loss, the mean of both directions' cross entropies; equal on all processes.

    Raises:
        ValueError: If shapes do not fit one another or `gather` is unknown.

    Source: Li et al., "Unmasked Teacher", ICCV 2023, section 3.2; Radford et al., "CLIP", 2021.

    Examples:
        >>> import torch
        >>> from umt_hf.modeling.losses_umt import vtc_loss
        >>> videos = texts = torch.eye(4)  # each pair agrees, others do not
        >>> vtc_loss(videos, texts, temperature=0.07) < 1e-4
        tensor(True)
    """
    if gather not in ("exact", "published"):
        raise ValueError(f"gather must be 'exact' or 'published', got {gather!r}.")
    if video_embeds.shape[0] != text_embeds.shape[0]:
        raise ValueError(f"Got {video_embeds.shape[0]} videos and {text_embeds.shape[0]} texts; row i is pair i.")
    with torch.autocast(video_embeds.device.type, enabled=False):
        # Averaged before they are gathered: one vector per video crosses the processes.
        videos, texts = average_video_embeds(video_embeds), normalize_features(text_embeds)
        if is_distributed():
            videos, texts = _Gather.apply(videos, gather), _Gather.apply(texts, gather)
            pair_ids = None if pair_ids is None else _gather(pair_ids.to(videos.device))
        logits = videos @ texts.T / temperature
        targets = find_true_pairs(videos.shape[0], pair_ids, logits.device).to(logits.dtype)
        targets = targets / targets.sum(dim=1, keepdim=True)
        return (F.cross_entropy(logits, targets) + F.cross_entropy(logits.T, targets)) / 2


def compute_negative_weights(
    logits: torch.Tensor, is_pair: torch.Tensor, hard: bool = True
) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights with which negatives are drawn: the softmax of the similarities, 0 for true pairs.

    Args:
        logits: Similarities over temperature, `(B videos, B texts)`.
        is_pair: Boolean `(B, B)`, see `find_true_pairs`.
        hard: Whether similar ones are likelier; otherwise all are alike.

    Returns:
        Weights of the videos for each text, and of the texts for each video, both `(B, B)` and without gradient. A row
        need not sum to 1; it is 0 only where the batch has no negative.

    Source: Li et al., "Align before Fuse", 2021, section 3.2, hard negatives.
    """
    # Detached: which negatives are drawn is a choice, through which no gradient flows.
    logits = logits.detach() if hard else torch.zeros_like(logits)
    return _weigh_negatives(logits.T, is_pair.T), _weigh_negatives(logits, is_pair)


def _weigh_negatives(logits: torch.Tensor, is_pair: torch.Tensor) -> torch.Tensor:
    """The published weights of a row; its softmax without the pairs where these leave hardly any weight to others.

    Both give the same distribution, but at low temperatures the first one underflows to a row of zeros.
    """
    published = logits.softmax(dim=1).masked_fill(is_pair, 0)
    among_negatives = logits.masked_fill(is_pair, -torch.inf).softmax(dim=1).masked_fill(is_pair, 0)
    return torch.where(published.sum(dim=1, keepdim=True) > 1e-6, published, among_negatives)


def sample_negatives(weights: torch.Tensor, generator: torch.Generator | None = None) -> torch.Tensor:
    """Draw one negative for each row.

    Args:
        weights: Non-negative `(B, B)`. For a row of zeros, which has no negative, any index is returned.
        generator: Random source on the device of `weights`.

    Returns:
        Indices `(B,)`.
    """
    # Without a host synchronisation: a row of zeros would make multinomial fail, so it gets equal weights.
    has_negative = weights.sum(dim=1, keepdim=True) > 0
    weights = torch.where(has_negative, weights, torch.ones_like(weights))
    # What `multinomial` computes for one draw, without its check of the weights, for which it waits.
    return (weights / torch.empty_like(weights).exponential_(generator=generator)).argmax(dim=1)


def draw_negatives(
    logits: torch.Tensor,
    pair_ids: torch.Tensor | None,
    hard: bool,
    given: TensorPair = (None, None),
) -> tuple[torch.Tensor, torch.Tensor]:
    """One negative video for each text, and one negative text for each video.

    Args:
        logits: Similarities over temperature, `(B videos, B texts)`.
        pair_ids: `(B,)`; equal ids are true pairs.
        hard: Whether similar ones are likelier.
        given: Indices `(B,)` of the videos and of the texts; `None` = drawn.

    Returns:
        Indices of the videos and of the texts, both `(B,)`.
    """
    videos, texts = given
    if videos is None or texts is None:
        is_pair = find_true_pairs(logits.shape[0], pair_ids, logits.device)
        weights = compute_negative_weights(logits, is_pair, hard)
        videos = sample_negatives(weights[0]) if videos is None else videos
        texts = sample_negatives(weights[1]) if texts is None else texts
    return videos, texts


def vtm_loss(matching_logits: torch.Tensor) -> torch.Tensor:
    """Video-text matching: cross entropy of true pairs against negatives.

    Args:
        matching_logits: `(3 * B, 2)`, class 1 = match: B true pairs, then 2 * B pairs that are not.

    Returns:
        Scalar float32 loss.

    Raises:
        ValueError: If there are not three rows per pair.

    Source: Li et al., "Unmasked Teacher", ICCV 2023, section 3.2; Li et al., "Align before Fuse", 2021.

    Examples:
        >>> import torch
        >>> from umt_hf.modeling.losses_umt import vtm_loss
        >>> vtm_loss(torch.zeros(12, 2))  # four pairs, eight negatives: undecided
        tensor(0.6931)
    """
    if matching_logits.shape[0] % 3:
        raise ValueError(f"matching_logits must have three rows per pair, got {tuple(matching_logits.shape)}.")
    labels = torch.zeros(matching_logits.shape[0], dtype=torch.long, device=matching_logits.device)
    labels[: matching_logits.shape[0] // 3] = 1
    return F.cross_entropy(matching_logits.float(), labels)


def sample_mlm_corruption(
    input_ids: torch.Tensor,
    vocab_size: int,
    mask_token_id: int,
    kept_ids: tuple[int, ...],
    probability: float = 0.5,
    generator: torch.Generator | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Choose the tokens to predict; of these 80 % become `[MASK]`, 10 % a random word and 10 % stay.

    Args:
        input_ids: `(B, L)`.
        vocab_size: Size of the vocabulary, from all of which random words are drawn.
        mask_token_id: Id of `[MASK]`.
        kept_ids: Ids that are never chosen: `[CLS]` and `[PAD]`, as published.
        probability: Share of the other tokens that is chosen, in (0, 1).
        generator: Random source on the device of `input_ids`.

    Returns:
        Corrupted ids, and labels: the ids at chosen tokens, -100 elsewhere; both `(B, L)`.

    Source: Devlin et al., "BERT", 2019, with the share of Li et al., "Unmasked Teacher", ICCV 2023.

    Examples:
        >>> import torch
        >>> from umt_hf.modeling.losses_umt import sample_mlm_corruption
        >>> ids = torch.tensor([[101, 1037, 2417, 4418, 0, 0]])
        >>> corrupted, labels = sample_mlm_corruption(
        ...     ids, vocab_size=30522, mask_token_id=103, kept_ids=(0, 101)
        ... )
        >>> labels[0, [0, 4, 5]].tolist()  # [CLS] and padding are never chosen
        [-100, -100, -100]
    """

    def draw() -> torch.Tensor:
        return torch.rand(input_ids.shape, device=input_ids.device, generator=generator)

    chosen = draw() < probability
    for kept in kept_ids:  # as numbers: a tensor of them would have to be brought to the device
        chosen = chosen & (input_ids != kept)
    masked = chosen & (draw() < 0.8)
    replaced = chosen & ~masked & (draw() < 0.5)
    words = torch.randint(
        vocab_size, input_ids.shape, device=input_ids.device, generator=generator, dtype=input_ids.dtype
    )
    corrupted = torch.where(masked, mask_token_id, torch.where(replaced, words, input_ids))
    return corrupted, torch.where(chosen, input_ids, IGNORED_LABEL)


def mlm_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Masked language modelling: mean cross entropy over the chosen tokens of all processes.

    Args:
        logits: `(B, L, vocabulary)`.
        labels: `(B, L)`, -100 where nothing is to be predicted.

    Returns:
        Scalar float32 loss, whose mean over processes is the mean over tokens; 0 where no token is chosen.

    Source: Devlin et al., "BERT", 2019; Li et al., "Unmasked Teacher", ICCV 2023, section 3.2.

    Examples:
        >>> import torch
        >>> from umt_hf.modeling.losses_umt import mlm_loss
        >>> logits, labels = torch.zeros(1, 3, 8), torch.tensor([[-100, 5, -100]])
        >>> mlm_loss(logits, labels)  # log 8: any word is as likely
        tensor(2.0794)
    """
    count = (labels != IGNORED_LABEL).sum()
    # Scaled by the number of processes, since DDP, FSDP and DeepSpeed average gradients over them.
    num_processes = 1
    if is_distributed():
        dist.all_reduce(count)
        num_processes = dist.get_world_size()
    total = F.cross_entropy(
        logits.float().flatten(0, -2), labels.flatten(), ignore_index=IGNORED_LABEL, reduction="sum"
    )
    return total * num_processes / count.clamp(min=1)


def compute_answer_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Cross entropy of each answer's next tokens, summed over them.

    Args:
        logits: `(A, tokens, vocabulary)`.
        labels: `(A, tokens)`, the tokens themselves, -100 on padding.

    Returns:
        Float32 `(A,)`.
    """
    losses = F.cross_entropy(
        logits[:, :-1].float().transpose(1, 2), labels[:, 1:], ignore_index=IGNORED_LABEL, reduction="none"
    )
    return losses.sum(dim=1)


def sum_losses(outputs: Mapping[str, torch.Tensor], config: Any) -> torch.Tensor | None:
    """Sum of the losses of stage 2 that an output has, by the weights of a configuration; `None` if it has none."""
    total = None
    for name in ("uta", "vtc", "vtm", "mlm"):
        loss = outputs.get(f"{name}_loss")
        if loss is not None:
            weighted = getattr(config, f"{name}_loss_weight") * loss
            total = weighted if total is None else total + weighted
    return total


def is_distributed() -> bool:
    """Whether this is one of several processes that work together."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def _gather(tensor: torch.Tensor) -> torch.Tensor:
    parts = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, tensor.contiguous())
    return torch.cat(parts)


class _Gather(torch.autograd.Function):
    """Rows of all processes, in rank order; the gradient is that of the sum of all processes' losses."""

    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, gather: str) -> torch.Tensor:
        ctx.gather, ctx.num_rows = gather, tensor.shape[0]
        return _gather(tensor)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        (gradient,) = gradients
        if ctx.gather == "exact":
            gradient = gradient.clone()
            dist.all_reduce(gradient)
        return gradient[dist.get_rank() * ctx.num_rows :][: ctx.num_rows], None


__all__ = [
    "average_video_embeds",
    "compute_answer_loss",
    "compute_negative_weights",
    "compute_similarity",
    "draw_negatives",
    "find_true_pairs",
    "has_negatives",
    "lacks_negatives",
    "mlm_loss",
    "normalize_features",
    "sample_mlm_corruption",
    "sample_negatives",
    "sum_losses",
    "uta_loss",
    "vtc_loss",
    "vtm_loss",
]
