"""The baseline: a stage-1 step written straight from the paper's description, with PyTorch's basic blocks alone.

It takes no short cut. A 3D convolution embeds every patch, then a boolean index keeps the visible tokens; every
attention map is written out, in the student and in the teacher; the teacher's features are computed at all tokens,
then a boolean index keeps the visible ones. It computes the same numbers as `umt_hf` from the same weights.

Legend: B batch, T frames, P patches a frame, N tokens of a clip, V visible tokens, D width, K aligned layers,
C channels of the teacher's features.

Source: Li et al., "Unmasked Teacher", ICCV 2023, section 3.1.
"""

from collections.abc import Callable, Mapping

import torch
from torch import nn
from torch.nn import functional as F

from .workload import Encoder, Size

Weights = Mapping[str, torch.Tensor]


def quick_gelu(x: torch.Tensor) -> torch.Tensor:
    """CLIP's activation."""
    return x * torch.sigmoid(1.702 * x)


def unit_length(features: torch.Tensor) -> torch.Tensor:
    """Divide by the l2 norm in float32."""
    features = features.float()
    return features / features.norm(dim=-1, keepdim=True)


class Attention(nn.Module):
    """Multi-head self-attention that writes its map out."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens `(B, N, D)` -> tokens and the attention map `(B, heads, N, N)`."""
        query, key, value = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        scores = query @ key.transpose(-2, -1) * query.shape[-1] ** -0.5
        attention = scores.softmax(dim=-1)
        return self.out((attention @ value).transpose(1, 2).flatten(2)), attention


class Block(nn.Module):
    """Pre-norm transformer block."""

    def __init__(self, encoder: Encoder, eps: float, activation: Callable[[torch.Tensor], torch.Tensor]):
        super().__init__()
        self.norm1 = nn.LayerNorm(encoder.width, eps=eps)
        self.attention = Attention(encoder.width, encoder.heads)
        self.norm2 = nn.LayerNorm(encoder.width, eps=eps)
        self.fc1 = nn.Linear(encoder.width, encoder.width * encoder.mlp_ratio)
        self.fc2 = nn.Linear(encoder.width * encoder.mlp_ratio, encoder.width)
        self.activation = activation

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens `(B, N, D)` -> tokens and the attention map `(B, heads, N, N)`."""
        attended, attention = self.attention(self.norm1(x))
        x = x + attended
        return x + self.fc2(self.activation(self.fc1(self.norm2(x)))), attention


class Student(nn.Module):
    """ViT over the visible tokens with an alignment head for each of its last K blocks."""

    def __init__(self, size: Size):
        super().__init__()
        encoder = size.student
        patch = (1, encoder.patch_size, encoder.patch_size)
        self.patch_embedding = nn.Conv3d(3, encoder.width, kernel_size=patch, stride=patch)
        self.register_buffer("positions", compute_sinusoids(size.tokens, encoder.width), persistent=False)
        self.blocks = nn.ModuleList(Block(encoder, 1e-6, F.gelu) for _ in range(encoder.layers))
        self.norm = nn.LayerNorm(encoder.width, eps=1e-6)
        self.heads = nn.ModuleList(
            nn.Sequential(
                nn.Linear(encoder.width, size.teacher_channels), nn.LayerNorm(size.teacher_channels, eps=1e-6)
            )
            for _ in range(size.aligned_layers)
        )

    def forward(self, pixel_values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Pixels `(B, T, 3, height, width)` and mask `(B, N)`, `True` = hidden -> features `(K, B, V, C)`."""
        batch_size = pixel_values.shape[0]
        tokens = self.patch_embedding(pixel_values.transpose(1, 2)).flatten(2).transpose(1, 2) + self.positions
        tokens = tokens[~mask].unflatten(0, (batch_size, -1))
        levels = []
        for i, block in enumerate(self.blocks):
            tokens, _ = block(tokens)
            if i >= len(self.blocks) - len(self.heads):
                levels.append(tokens)
        positions = self.positions.expand(batch_size, -1, -1)[~mask].unflatten(0, (batch_size, -1))
        return unit_length(
            torch.stack([head(self.norm(x) + positions) for head, x in zip(self.heads, levels, strict=True)])
        )


class Teacher(nn.Module):
    """CLIP's image encoder."""

    def __init__(self, size: Size):
        super().__init__()
        encoder = size.teacher
        self.image_size = encoder.image_size
        self.aligned_layers = size.aligned_layers
        self.patch_embedding = nn.Conv2d(3, encoder.width, encoder.patch_size, stride=encoder.patch_size, bias=False)
        self.class_token = nn.Parameter(torch.randn(encoder.width))
        self.positions = nn.Parameter(torch.randn(encoder.patches + 1, encoder.width))
        self.norm_before = nn.LayerNorm(encoder.width)
        self.blocks = nn.ModuleList(Block(encoder, 1e-5, quick_gelu) for _ in range(encoder.layers))
        self.norm_after = nn.LayerNorm(encoder.width)
        self.projection = nn.Linear(encoder.width, size.teacher_channels, bias=False)

    @torch.no_grad()
    def forward(self, pixel_values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Pixels `(B, T, 3, height, width)` -> features `(K, B, N, C)` and saliency `(B * T, P)`."""
        batch_size = pixel_values.shape[0]
        frames = pixel_values.flatten(0, 1)
        if frames.shape[-1] != self.image_size:
            frames = F.interpolate(frames, size=(self.image_size,) * 2, mode="bicubic", align_corners=False)
        patches = self.patch_embedding(frames).flatten(2).transpose(1, 2)
        class_token = self.class_token.to(patches.dtype).expand(patches.shape[0], 1, -1)
        tokens = self.norm_before(torch.cat([class_token, patches], dim=1) + self.positions)
        levels = []
        for i, block in enumerate(self.blocks):
            tokens, attention = block(tokens)
            if i >= len(self.blocks) - self.aligned_layers:
                levels.append(self.projection(self.norm_after(tokens[:, 1:])))
        features = unit_length(torch.stack(levels)).unflatten(1, (batch_size, -1)).flatten(2, 3)
        saliency = attention.float().mean(dim=1)[:, 0, 1:]
        return features, saliency


def compute_sinusoids(tokens: int, width: int) -> torch.Tensor:
    """Table `(1, N, D)`: sine on even channels, cosine on odd ones."""
    angles = torch.arange(tokens, dtype=torch.float64)[:, None] / 10000 ** (
        torch.arange(0, width, 2, dtype=torch.float64) / width
    )
    return torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(1).float()[None]


def draw_mask(saliency: torch.Tensor, batch_size: int, mask_ratio: float) -> torch.Tensor:
    """Draw the visible patches of each frame from the saliency, without replacement -> mask `(B, N)`."""
    patches = saliency.shape[1]
    visible = torch.multinomial(saliency, patches - int(patches * mask_ratio))
    mask = torch.ones_like(saliency, dtype=torch.bool)
    return mask.scatter_(1, visible, False).view(batch_size, -1)


def compute_loss(student_features: torch.Tensor, teacher_features: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Mean squared distance of unit vectors at the visible tokens."""
    targets = teacher_features[:, ~mask].view_as(student_features)
    return (2 - 2 * (student_features * targets).sum(dim=-1)).mean()


def load_student(student: Student, weights: Weights) -> None:
    """Copy the weights of a `UMTVideoForPreTraining` into the plain student."""
    patches = weights["vision_model.embeddings.patch_embeddings.projection.weight"]
    own = {
        "patch_embedding.weight": patches.view_as(student.patch_embedding.weight),
        "patch_embedding.bias": weights["vision_model.embeddings.patch_embeddings.projection.bias"],
        **_rename("norm", "vision_model.norm", weights),
    }
    for i in range(len(student.blocks)):
        layer = f"vision_model.layers.{i}"
        own |= _rename(f"blocks.{i}.norm1", f"{layer}.layernorm_before", weights)
        own |= _rename(f"blocks.{i}.norm2", f"{layer}.layernorm_after", weights)
        own |= _rename(f"blocks.{i}.fc1", f"{layer}.mlp.fc1", weights)
        own |= _rename(f"blocks.{i}.fc2", f"{layer}.mlp.fc2", weights)
        own |= _rename(f"blocks.{i}.attention.out", f"{layer}.attention.o_proj", weights)
        own |= _join_qkv(f"blocks.{i}.attention.qkv", f"{layer}.attention", weights)
    for i in range(len(student.heads)):
        own |= _rename(f"heads.{i}.0", f"alignment_heads.{i}.dense", weights)
        own |= _rename(f"heads.{i}.1", f"alignment_heads.{i}.norm", weights)
    student.load_state_dict(own)


def load_teacher(teacher: Teacher, weights: Weights) -> None:
    """Copy the weights of a `CLIPVisionModelWithProjection` into the plain teacher."""
    own = {
        "patch_embedding.weight": weights["vision_model.embeddings.patch_embedding.weight"],
        "class_token": weights["vision_model.embeddings.class_embedding"],
        "positions": weights["vision_model.embeddings.position_embedding.weight"],
        "projection.weight": weights["visual_projection.weight"],
        **_rename("norm_before", "vision_model.pre_layrnorm", weights),
        **_rename("norm_after", "vision_model.post_layernorm", weights),
    }
    for i in range(len(teacher.blocks)):
        layer = f"vision_model.encoder.layers.{i}"
        own |= _rename(f"blocks.{i}.norm1", f"{layer}.layer_norm1", weights)
        own |= _rename(f"blocks.{i}.norm2", f"{layer}.layer_norm2", weights)
        own |= _rename(f"blocks.{i}.fc1", f"{layer}.mlp.fc1", weights)
        own |= _rename(f"blocks.{i}.fc2", f"{layer}.mlp.fc2", weights)
        own |= _rename(f"blocks.{i}.attention.out", f"{layer}.self_attn.out_proj", weights)
        own |= _join_qkv(f"blocks.{i}.attention.qkv", f"{layer}.self_attn", weights)
    teacher.load_state_dict(own)


def _rename(own_name: str, name: str, weights: Weights) -> dict[str, torch.Tensor]:
    return {f"{own_name}.{kind}": weights[f"{name}.{kind}"] for kind in ("weight", "bias")}


def _join_qkv(own_name: str, name: str, weights: Weights) -> dict[str, torch.Tensor]:
    """Join three projections; a missing bias is zero (the key's shifts all scores of a query alike: no effect)."""
    projections = [f"{name}.{role}_proj" for role in "qkv"]
    matrices = [weights[f"{projection}.weight"] for projection in projections]
    biases = [weights.get(f"{projection}.bias", torch.zeros_like(matrices[0][:, 0])) for projection in projections]
    return {f"{own_name}.weight": torch.cat(matrices), f"{own_name}.bias": torch.cat(biases)}
