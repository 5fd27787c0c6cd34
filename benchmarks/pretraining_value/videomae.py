"""Our encoder as the encoder of Transformers' VideoMAE, and back."""

import torch
from transformers import VideoMAEConfig, VideoMAEForPreTraining

from umt_hf import UMTVideoModel

from . import settings


def build_videomae(student: UMTVideoModel) -> VideoMAEForPreTraining:
    """Transformers' VideoMAE whose encoder is `student`, with a decoder of half the width and half the layers."""
    config = student.config
    names = (*settings.STUDENT, "layer_norm_eps", "initializer_range", "tubelet_size")
    videomae = VideoMAEForPreTraining(
        VideoMAEConfig(
            **{name: getattr(config, name) for name in names},
            decoder_hidden_size=config.hidden_size // 2,
            decoder_num_hidden_layers=config.num_hidden_layers // 2,
            decoder_num_attention_heads=max(config.num_attention_heads // 2, 1),
            decoder_intermediate_size=config.intermediate_size // 2,
        )
    )
    encoder = videomae.videomae.state_dict()
    for name, tensor in student.state_dict().items():
        if not name.startswith("norm."):  # VideoMAE's encoder has none
            theirs = name_in_videomae(name, encoder)
            encoder[theirs] = tensor.view(encoder[theirs].shape)
    videomae.videomae.load_state_dict(encoder)
    return videomae


def take_encoder(videomae: VideoMAEForPreTraining, student: UMTVideoModel) -> UMTVideoModel:
    """Carry the weights of a VideoMAE's encoder over to `student`, an encoder of ours without a final norm."""
    encoder = videomae.videomae.state_dict()
    state = {
        name: encoder[name_in_videomae(name, encoder)].view(old.shape) for name, old in student.state_dict().items()
    }
    student.load_state_dict(state)
    return student


def name_in_videomae(name: str, target: dict[str, torch.Tensor]) -> str:
    """What VideoMAE's encoder calls a weight of ours."""
    renames = {
        "layers.": "encoder.layer.",
        "attention.q_proj.": "attention.attention.query.",
        "attention.k_proj.": "attention.attention.key.",
        "attention.v_proj.": "attention.attention.value.",
        "attention.o_proj.": "attention.output.dense.",
        "mlp.fc1.": "intermediate.dense.",
        "mlp.fc2.": "output.dense.",
    }
    for ours, theirs in renames.items():
        name = name.replace(ours, theirs)
    if name not in target:  # before Transformers 5.23
        name = name.replace("query.bias", "q_bias").replace("value.bias", "v_bias")
    return name
