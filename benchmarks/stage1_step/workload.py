"""The work that is timed: model sizes, their configurations, the input and the floating-point operations it takes.

Legend: B batch, T frames, P patches a frame, N tokens of a clip, V visible tokens, D width, K aligned layers.
"""

from dataclasses import dataclass

import torch
from transformers import CLIPVisionConfig, VideoMAEConfig

from umt_hf.modeling.configuration_umt_video import UMTVideoConfig


@dataclass(frozen=True)
class Encoder:
    """Shape of a vision transformer."""

    width: int
    layers: int
    heads: int
    patch_size: int
    image_size: int
    mlp_ratio: int = 4

    @property
    def patches(self) -> int:
        """Patches of a frame."""
        return (self.image_size // self.patch_size) ** 2

    def count_layers_flops(self, tokens: int) -> int:
        """Operations of a forward pass of all layers over one sequence."""
        linear = (4 + 2 * self.mlp_ratio) * tokens * self.width**2
        attention = 2 * tokens**2 * self.width
        return 2 * self.layers * (linear + attention)

    def count_patch_flops(self, patches: int) -> int:
        """Operations of a forward pass of the patch embedding."""
        return 2 * patches * 3 * self.patch_size**2 * self.width


@dataclass(frozen=True)
class Size:
    """A student with its teacher, and the batch that is timed by default.

    Only matrix products are counted, two operations for a multiplication with its addition; a backward pass costs
    twice its forward pass, except that no gradient flows into the pixels.
    """

    student: Encoder
    teacher: Encoder
    teacher_channels: int
    aligned_layers: int
    cpu_batch_size: int
    cuda_batch_size: int
    frames: int = 8
    mask_ratio: float = 0.8

    @property
    def tokens(self) -> int:
        """N."""
        return self.frames * self.student.patches

    @property
    def visible_tokens(self) -> int:
        """V: `P - int(P * mask_ratio)` in each frame."""
        return self.frames * (self.student.patches - int(self.student.patches * self.mask_ratio))

    def count_student_flops(self) -> int:
        """Operations of the student's forward and backward pass for one clip."""
        heads = 2 * self.aligned_layers * self.visible_tokens * self.student.width * self.teacher_channels
        patches = self.student.count_patch_flops(self.visible_tokens)
        return 3 * (self.student.count_layers_flops(self.visible_tokens) + heads) + 2 * patches

    def count_teacher_flops(self) -> int:
        """Operations of the teacher's forward pass for one clip, as the method needs it.

        The last layer's keys and values are of all tokens, all else in it is needed at the visible tokens alone, and
        so is the projection of the features. The saliency takes the class token's query and its row of scores.
        """
        teacher = self.teacher
        tokens, visible = teacher.patches + 1, self.visible_tokens // self.frames
        layers = teacher.count_layers_flops(tokens)
        hidden = tokens - visible
        spared = 2 * hidden * ((2 + 2 * teacher.mlp_ratio) * teacher.width**2 + 2 * tokens * teacher.width)
        saliency = 2 * (teacher.width**2 + tokens * teacher.width)
        frame = teacher.count_patch_flops(teacher.patches) + layers - spared + saliency
        return self.frames * frame + self._count_projection_flops(self.visible_tokens)

    def count_complete_teacher_flops(self) -> int:
        """Operations of the teacher's forward pass for one clip where all layers see, and give, all tokens."""
        patches = self.teacher.patches
        frame = self.teacher.count_patch_flops(patches) + self.teacher.count_layers_flops(patches + 1)
        return self.frames * frame + self._count_projection_flops(self.tokens)

    def _count_projection_flops(self, tokens: int) -> int:
        return 2 * self.aligned_layers * tokens * self.teacher.width * self.teacher_channels

    def count_videomae_flops(self) -> int:
        """Operations of VideoMAE's forward and backward pass for one clip, its decoder seeing all tokens."""
        config = build_videomae_config(self)
        decoder = Encoder(
            width=config.decoder_hidden_size,
            layers=config.decoder_num_hidden_layers,
            heads=config.decoder_num_attention_heads,
            patch_size=config.patch_size,
            image_size=config.image_size,
            mlp_ratio=config.decoder_intermediate_size // config.decoder_hidden_size,
        )
        bridge = 2 * self.visible_tokens * self.student.width * decoder.width
        head = decoder.count_patch_flops(self.tokens - self.visible_tokens)
        layers = self.student.count_layers_flops(self.visible_tokens) + decoder.count_layers_flops(self.tokens)
        return 3 * (layers + bridge + head) + 2 * self.student.count_patch_flops(self.visible_tokens)


# "tiny" is the recipe stage1_moving_shapes, the others are the published ones.
SIZES = {
    "tiny": Size(
        student=Encoder(width=128, layers=4, heads=4, patch_size=16, image_size=64),
        teacher=Encoder(width=96, layers=4, heads=3, patch_size=16, image_size=64),
        teacher_channels=64,
        aligned_layers=1,
        cpu_batch_size=32,
        cuda_batch_size=256,
    ),
    "b16": Size(
        student=Encoder(width=768, layers=12, heads=12, patch_size=16, image_size=224),
        teacher=Encoder(width=768, layers=12, heads=12, patch_size=16, image_size=224),
        teacher_channels=512,
        aligned_layers=6,
        cpu_batch_size=1,
        cuda_batch_size=64,
    ),
    # As wide as B/16, with as many tokens, but quick enough for batches on a CPU.
    "b16-2+2": Size(
        student=Encoder(width=768, layers=2, heads=12, patch_size=16, image_size=224),
        teacher=Encoder(width=768, layers=2, heads=12, patch_size=16, image_size=224),
        teacher_channels=512,
        aligned_layers=2,
        cpu_batch_size=4,
        cuda_batch_size=64,
    ),
    "l16": Size(
        student=Encoder(width=1024, layers=24, heads=16, patch_size=16, image_size=224),
        teacher=Encoder(width=1024, layers=24, heads=16, patch_size=14, image_size=196),
        teacher_channels=768,
        aligned_layers=6,
        cpu_batch_size=1,
        cuda_batch_size=64,
    ),
}


def build_student_config(size: Size) -> UMTVideoConfig:
    """Configuration of the student, without stochastic depth so that steps can be compared."""
    student = size.student
    return UMTVideoConfig(
        image_size=student.image_size,
        patch_size=student.patch_size,
        num_frames=size.frames,
        hidden_size=student.width,
        num_hidden_layers=student.layers,
        num_attention_heads=student.heads,
        intermediate_size=student.width * student.mlp_ratio,
        position_embedding_frames=size.frames,
        position_embedding_image_size=student.image_size,
        num_aligned_layers=size.aligned_layers,
        teacher_hidden_size=size.teacher_channels,
        mask_ratio=size.mask_ratio,
        teacher_image_size=size.teacher.image_size,
    )


def build_teacher_config(size: Size) -> CLIPVisionConfig:
    """Configuration of the CLIP vision tower."""
    teacher = size.teacher
    return CLIPVisionConfig(
        image_size=teacher.image_size,
        patch_size=teacher.patch_size,
        hidden_size=teacher.width,
        num_hidden_layers=teacher.layers,
        num_attention_heads=teacher.heads,
        intermediate_size=teacher.width * teacher.mlp_ratio,
        projection_dim=size.teacher_channels,
        hidden_act="quick_gelu",
    )


def build_videomae_config(size: Size) -> VideoMAEConfig:
    """Configuration of a VideoMAE whose encoder is the student's, with Transformers' default decoder.

    The default (384 wide) suits encoders from B/16 up; smaller ones get a decoder of half their width, as B/16 has.
    """
    student = size.student
    decoder = {}
    if student.width // 2 < VideoMAEConfig().decoder_hidden_size:
        decoder = {
            "decoder_hidden_size": student.width // 2,
            "decoder_num_attention_heads": student.heads // 2,
            "decoder_intermediate_size": student.width // 2 * student.mlp_ratio,
        }
    return VideoMAEConfig(
        **decoder,
        image_size=student.image_size,
        patch_size=student.patch_size,
        num_frames=size.frames,
        tubelet_size=1,
        hidden_size=student.width,
        num_hidden_layers=student.layers,
        num_attention_heads=student.heads,
        intermediate_size=student.width * student.mlp_ratio,
        layer_norm_eps=1e-6,
    )


def sample_pixel_values(size: Size, batch_size: int, device: torch.device) -> torch.Tensor:
    """Draw noise in the shape of a normalised video, `(B, T, 3, height, width)`."""
    side = size.student.image_size
    generator = torch.Generator().manual_seed(0)
    return torch.randn(batch_size, size.frames, 3, side, side, generator=generator).to(device)
