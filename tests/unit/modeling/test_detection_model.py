"""The head of action detection: what a box sees, padding, the loss, and the folders it starts from."""

import pytest
import torch
from torch import nn
from torch.nn.functional import logsigmoid

from tests.parity.reference import load_table
from tests.unit.finetuning.test_classification import tiny_config
from umt_hf import UMTVideoForActionDetection, UMTVideoForPreTraining, UMTVideoForVideoClassification, UMTVideoModel
from umt_hf.data.ava_labels import AVA_EVALUATED_IDS, AVA_LABELS
from umt_hf.hub_cards.convert_umt_checkpoint import (
    ConversionReport,
    build_published_config,
    convert_checkpoint,
    convert_state_dict,
)
from umt_hf.modeling.modeling_umt_video import pool_boxes


def build_model(**changes) -> UMTVideoForActionDetection:
    torch.manual_seed(0)
    model = UMTVideoForActionDetection(tiny_config(**{"num_labels": 5, "image_size": 64, **changes})).eval()
    nn.init.normal_(model.classifier.weight)
    nn.init.normal_(model.vision_model.norm.weight)
    return model


def interpolate(channel: torch.Tensor, y: float, x: float) -> float:
    """Bilinear value at a point, 0 more than a cell outside, else clamped: RoIAlign's own rule without a shift."""
    rows, columns = channel.shape
    if y < -1 or y > rows or x < -1 or x > columns:
        return 0.0
    y, x = min(max(y, 0), rows - 1), min(max(x, 0), columns - 1)
    top, left = int(y), int(x)
    bottom, right = min(top + 1, rows - 1), min(left + 1, columns - 1)
    dy, dx = y - top, x - left
    upper = channel[top, left] * (1 - dx) + channel[top, right] * dx
    lower = channel[bottom, left] * (1 - dx) + channel[bottom, right] * dx
    return float(upper * (1 - dy) + lower * dy)


def pool_slowly(channel: torch.Tensor, box: list[float], scale: float) -> float:
    x1, y1, x2, y2 = (value * scale for value in box)
    width, height = max(x2 - x1, 1), max(y2 - y1, 1)
    across, down = -(-width // 7), -(-height // 7)  # points of a bin: its size in cells, rounded up
    bins = []
    for row in range(7):
        for column in range(7):
            points = [
                interpolate(
                    channel,
                    y1 + height / 7 * (row + (i + 0.5) / down),
                    x1 + width / 7 * (column + (j + 0.5) / across),
                )
                for i in range(int(down))
                for j in range(int(across))
            ]
            bins.append(sum(points) / len(points))
    return max(bins)


def test_pooling_against_a_direct_computation():
    feature_map = torch.randn(2, 3, 5, 16, generator=torch.Generator().manual_seed(1))
    boxes = torch.tensor([[[0, 0, 255, 79], [20, 3, 57, 60]], [[70.5, 10, 71, 11], [-30, 40, 300, 90]]])
    found = pool_boxes(feature_map, boxes, 1 / 16)
    for clip in range(2):
        for box in range(2):
            expected = [pool_slowly(feature_map[clip, c], boxes[clip, box].tolist(), 1 / 16) for c in range(3)]
            torch.testing.assert_close(found[clip, box], torch.tensor(expected), atol=1e-5, rtol=1e-5)


def test_a_box_sees_its_own_part_of_the_mean_frame():
    """Rising from left to right, over a box the greatest value is just at its right edge."""
    ramp = torch.arange(8.0).expand(1, 1, 4, 8)
    boxes = torch.tensor([[[0, 0, 56, 64], [32, 16, 64, 32]]], dtype=torch.float32)
    # Bins are 8 and 32 / 7 pixels wide; the last has its one point in its middle.
    torch.testing.assert_close(pool_boxes(ramp, boxes, 1 / 16)[0, :, 0], torch.tensor([52 / 16, (64 - 16 / 7) / 16]))


def test_logits_by_hand():
    model = build_model()
    clip = torch.randn(1, 2, 3, 64, 96)
    boxes = torch.tensor([[[5.0, 7, 60, 50], [40, 0, 95, 63]]])
    with torch.no_grad():
        tokens = model.vision_model(clip).last_hidden_state
        frame = tokens.view(1, 2, 4, 6, -1).mean(1).permute(0, 3, 1, 2)
        expected = model.classifier(pool_boxes(frame, boxes, 1 / 16))
        torch.testing.assert_close(model(clip, boxes).logits, expected)
    assert model.vision_model.norm is not None and model.config.use_final_norm


def test_padding_changes_nothing():
    model = build_model()
    clips = torch.randn(2, 2, 3, 64, 64)
    boxes = torch.tensor([[[0.0, 0, 30, 30], [20, 10, 60, 60]], [[5, 5, 50, 40], [0, 0, 0, 0]]])
    mask = torch.tensor([[True, True], [True, False]])
    labels = torch.randint(2, (2, 2, 5)).float()
    boxes[1, 1] = torch.tensor([float("nan"), -1e9, 3, 7])
    labels[1, 1] = 1
    outputs = model(clips, boxes, mask, labels)
    assert outputs.logits[1, 1].eq(0).all()
    alone = [model(clips[:1], boxes[:1], labels=labels[:1]), model(clips[1:], boxes[1:, :1], labels=labels[1:, :1])]
    torch.testing.assert_close(outputs.logits[0], alone[0].logits[0])
    torch.testing.assert_close(outputs.logits[1, :1], alone[1].logits[0])
    torch.testing.assert_close(outputs.loss, alone[0].loss + alone[1].loss)
    outputs.loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


def test_loss_by_hand():
    """Mean over 5 classes, sum over the boxes of the batch."""
    model = build_model()
    boxes, labels = torch.tensor([[[0.0, 0, 30, 30], [20, 10, 60, 60]]]), torch.tensor([[[1, 0, 1, 0, 0], [0] * 5]])
    outputs = model(torch.randn(1, 2, 3, 64, 64), boxes, labels=labels)
    yes, no = logsigmoid(outputs.logits), logsigmoid(-outputs.logits)
    torch.testing.assert_close(outputs.loss, -(labels * yes + (1 - labels) * no).sum() / 5)


def test_shapes_that_do_not_fit():
    model, clip = build_model(), torch.randn(1, 2, 3, 64, 64)
    with pytest.raises(ValueError, match=r"boxes must be \(1, boxes of a clip, 4\)"):
        model(clip, torch.zeros(3, 4))
    with pytest.raises(ValueError, match=r"labels must be \(1, 2, 5\), got \(1, 2\)"):
        model(clip, torch.zeros(1, 2, 4), labels=torch.zeros(1, 2))
    with pytest.raises(ValueError, match=r"boxes_mask must be \(1, 2\)"):
        model(clip, torch.zeros(1, 2, 4), torch.ones(1, 3))


def test_bfloat16_weights():
    model = build_model()
    clip, boxes = torch.randn(1, 2, 3, 64, 64), torch.tensor([[[0.0, 0, 30, 30]]])
    with torch.no_grad():
        expected = model(clip, boxes).logits
        logits = model.bfloat16()(clip.bfloat16(), boxes.bfloat16()).logits
    assert logits.dtype == torch.bfloat16
    torch.testing.assert_close(logits.float(), expected, atol=0.3, rtol=0.1)


@pytest.mark.parametrize(
    "start,fresh",
    [(UMTVideoForPreTraining, {"classifier"}), (UMTVideoForVideoClassification, {"classifier", "vision_model.norm"})],
)
def test_fresh_weights_are_reported(tmp_path, start, fresh):
    config = tiny_config(num_labels=3)
    source = start(config)
    source.save_pretrained(tmp_path)
    model, info = UMTVideoForActionDetection.from_pretrained(
        tmp_path, num_labels=5, ignore_mismatched_sizes=True, output_loading_info=True
    )
    reported = {*info["missing_keys"], *(entry[0] for entry in info["mismatched_keys"])}
    assert {name.rsplit(".", 1)[0] for name in reported} == fresh and not info["unexpected_keys"]
    assert model.config.use_final_norm and model.classifier.weight.abs().max() < 1e-3
    torch.testing.assert_close(model.vision_model.norm.weight, torch.ones(24))
    for name, tensor in source.vision_model.state_dict().items():
        assert torch.equal(model.vision_model.state_dict()[name], tensor), name
    model.save_pretrained(tmp_path / "detector")
    again, info = UMTVideoForActionDetection.from_pretrained(tmp_path / "detector", output_loading_info=True)
    assert not info["missing_keys"] and torch.equal(again.classifier.weight, model.classifier.weight)
    encoder, info = UMTVideoModel.from_pretrained(tmp_path / "detector", output_loading_info=True)
    assert not info["missing_keys"] and torch.equal(encoder.norm.weight, model.vision_model.norm.weight)


def name_published(model: UMTVideoForActionDetection) -> dict[str, torch.Tensor]:
    """Our names back to the published ones: those of a classifier, with `norm` instead of `fc_norm`."""
    published = {}
    renames = (
        ("vision_model.", ""),
        ("layers.", "blocks."),
        ("layernorm_before", "norm1"),
        ("layernorm_after", "norm2"),
        ("attention.o_proj", "attn.proj"),
        ("attention.q_proj.bias", "attn.q_bias"),
        ("attention.v_proj.bias", "attn.v_bias"),
        ("embeddings.patch_embeddings.projection", "patch_embed.proj"),
        ("classifier", "head"),
    )
    state = model.state_dict()
    for name, tensor in state.items():
        if name.endswith(("k_proj.weight", "v_proj.weight")):
            continue
        if name.endswith("q_proj.weight"):
            tensor = torch.cat([tensor, *(state[name.replace("q_proj", f"{x}_proj")] for x in "kv")])
            name = name.replace("attention.q_proj", "attn.qkv")
        for ours, theirs in renames:
            name = name.replace(ours, theirs)
        published[name] = tensor.unflatten(1, (3, 1, 16, 16)) if name == "patch_embed.proj.weight" else tensor
    return published


def test_conversion_is_strict_both_ways(tmp_path):
    model = build_model()
    published = name_published(model)
    torch.save({"model": published}, tmp_path / "source.pth")
    report = convert_checkpoint(tmp_path / "source.pth", model.config, "detection", tmp_path / "model")
    assert report.used.keys() == published.keys() and not report.set_aside
    converted = UMTVideoForActionDetection.from_pretrained(tmp_path / "model").eval()
    clip, boxes = torch.randn(1, 2, 3, 64, 80), torch.tensor([[[3.0, 5, 40, 30]]])
    with torch.no_grad():
        torch.testing.assert_close(converted(clip, boxes).logits, model(clip, boxes).logits, atol=1e-6, rtol=0)
    classifier = {
        name.replace("norm.", "fc_norm.") if name.startswith("norm.") else name: tensor
        for name, tensor in published.items()
    }
    with pytest.raises(ValueError, match=r"missing vision_model\.norm"):
        convert_state_dict(classifier, model.config, "detection")


@pytest.mark.parametrize(
    "table,name",
    [
        ("vit_base_patch16_224_8f_k400", "umt-vit-b16-ava"),
        ("vit_large_patch16_224_8f_k400", "umt-vit-l16-ava"),
    ],
)
def test_names_and_shapes_of_real_sizes(table, name):
    """A released detector has the names of a classifier, with `norm.*` instead of `fc_norm.*` and 80 classes."""
    config, task = build_published_config(name)
    assert task == "detection" and config.num_labels == 80 and config.id2label[79] == "watch (a person)"
    source = {}
    for key, shape in load_table(f"names_{table}")["state_dict"].items():
        shape = [80, *shape[1:]] if key.startswith("head.") else shape
        source[key.replace("fc_norm.", "norm.")] = torch.empty(shape, device="meta")
    report = ConversionReport()
    convert_state_dict(source, config, task, report)
    assert report.used.keys() | report.set_aside.keys() == source.keys() and set(report.set_aside) <= {"pos_embed"}


def test_label_map_of_ava():
    assert len(AVA_LABELS) == len(set(AVA_LABELS)) == 80 and len(AVA_EVALUATED_IDS) == 60
    known = {1: "bend/bow (at the waist)", 12: "stand", 14: "walk", 17: "carry/hold (an object)", 57: "text on/look"}
    known |= {64: "fight/hit (a person)", 74: "listen to (a person)", 79: "talk to", 80: "watch (a person)"}
    assert all(AVA_LABELS[i - 1].startswith(name) for i, name in known.items())
