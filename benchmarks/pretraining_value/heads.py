"""A head for each task, fitted on the frozen encoder: an MLP on one mean per frame, in time order."""

from pathlib import Path

import torch

from umt_hf import UMTVideoForVideoClassification, UMTVideoModel, UMTVideoProcessor
from umt_hf.moving_shapes.probes import build_mlp, embed_split

from . import settings
from .jobs import finish_run, measure, start_run
from .settings import Budget, describe_heads


def fit_heads(folder: Path, seed: int, start: str, budget: Budget) -> None:
    """Fit a head on the frozen encoder for each task and amount of data: an MLP on one mean per frame, in order."""
    output = folder / "finetune" / f"seed_{seed}" / f"{start}_heads"
    if (result := start_run(output, **describe_heads(start, budget))) is None:
        return
    encoder = UMTVideoModel.from_pretrained(output.parent / start, use_final_norm=False).eval()
    processor = UMTVideoProcessor.from_model_config(encoder.config)

    pooling = FrameOrderPooling(encoder.config.num_frames)

    @torch.no_grad()
    def embed_clips(pixel_values: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"frames": pooling(encoder(pixel_values).last_hidden_state)}

    with measure(result):
        frames = folder / "finetune" / "frames"
        test = embed_split(frames, "test", processor, embed_clips)
        for data, split in settings.SPLITS.items():
            if data == "low" and start not in settings.LOW_DATA_STARTS:
                continue
            train = embed_split(frames, split, processor, embed_clips)
            for task, num_classes in settings.TASKS.items():
                head = fit_head(train["frames"], train[task], num_classes, budget.head_steps, seed)
                with torch.no_grad():
                    is_right = head(test["frames"]).argmax(1) == test[task]
                result[f"{task}_{data}"] = is_right.float().mean().item()
                torch.save(head.state_dict(), output / f"{task}_{data}.pt")
    finish_run(output, result)


class FrameOrderPooling(torch.nn.Module):
    """One mean per frame, in time order."""

    def __init__(self, num_frames: int):
        super().__init__()
        self.num_frames = num_frames

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """`(B, N, D)` to `(B, T * D)`."""
        return tokens.unflatten(1, (self.num_frames, -1)).mean(2).flatten(1)


class Standardize(torch.nn.Module):
    """Shift and scale features to a mean and spread that were measured on frozen ones."""

    def __init__(self, num_features: int):
        super().__init__()
        self.register_buffer("mean", torch.zeros(num_features))
        self.register_buffer("std", torch.ones(num_features))

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """`(B, num_features)` to the same shape."""
        return (features - self.mean) / self.std


def build_head(num_features: int, num_classes: int) -> torch.nn.Sequential:
    """The MLP of `make demo` on standardised features."""
    return torch.nn.Sequential(Standardize(num_features), build_mlp(num_features, num_classes))


def fit_head(
    features: torch.Tensor, labels: torch.Tensor, num_classes: int, max_steps: int, seed: int
) -> torch.nn.Sequential:
    """Fit a head on frozen features `(clips, T * D)`; nothing is chosen by held-out clips."""
    torch.manual_seed(seed)
    head = build_head(features.shape[1], num_classes)
    head[0].mean.copy_(features.mean(0))
    head[0].std.copy_(features.std(0) + 1e-6)
    optimizer = torch.optim.AdamW(
        head.parameters(), lr=settings.HEAD["learning_rate"], weight_decay=settings.HEAD["weight_decay"]
    )
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max_steps)
    for _ in range(max_steps):
        batch = torch.randint(len(features), (settings.HEAD["batch_size"],))
        loss = torch.nn.functional.cross_entropy(head(features[batch]), labels[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return head.eval()


def replace_head(model: UMTVideoForVideoClassification, state: dict[str, torch.Tensor]) -> None:
    """Give a classifier a fitted head, in place of the mean over all tokens that makes frames forget their order."""
    config = model.config
    head = build_head(config.hidden_size * config.num_frames, config.num_labels)
    head.load_state_dict(state)
    model.attentive_pooling = FrameOrderPooling(config.num_frames)
    model.fc_norm, model.classifier = head.to(model.device)
