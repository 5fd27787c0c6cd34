"""Behaviour of the models that no reference number covers."""

import copy
import re
import subprocess
import sys

import pytest
import torch
from transformers import (
    AttentionInterface,
    AutoConfig,
    AutoModel,
    AutoModelForPreTraining,
    AutoModelForVideoClassification,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
)

import umt_hf
from tests.parity.reference import load_table
from umt_hf.modeling.configuration_umt_video import UMTVideoConfig
from umt_hf.modeling.losses_umt import normalize_features, uta_loss
from umt_hf.modeling.masking_umt_video import compute_visible_indices, sample_random_mask
from umt_hf.modeling.modeling_umt_video import (
    UMTVideoForPreTraining,
    UMTVideoForVideoClassification,
    UMTVideoModel,
    compute_sinusoid_table,
    gather_tokens,
)
from umt_hf.modeling.quantization_umt import NEVER_QUANTIZED
from umt_hf.teachers.teacher import UMTTeacher

TINY = {
    "image_size": 32,
    "patch_size": 8,
    "num_frames": 4,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "num_aligned_layers": 2,
    "teacher_hidden_size": 12,
    "position_embedding_frames": 4,
    "position_embedding_image_size": 32,
}


@pytest.fixture
def video() -> torch.Tensor:
    return torch.randn(2, 4, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def mask() -> torch.Tensor:
    return sample_random_mask(2, 64, 0.75, torch.Generator().manual_seed(0))


def test_auto_classes_know_the_family(tmp_path):
    config = UMTVideoConfig(**TINY)
    config.save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert type(loaded) is UMTVideoConfig
    assert {name: getattr(loaded, name) for name in TINY} == TINY
    assert type(AutoModel.from_config(loaded)) is UMTVideoModel
    assert type(AutoModelForPreTraining.from_config(loaded)) is UMTVideoForPreTraining
    assert type(AutoModelForVideoClassification.from_config(loaded)) is UMTVideoForVideoClassification


def test_eager_and_sdpa_agree_and_switch_on_a_live_model(video, mask):
    model = UMTVideoForPreTraining(UMTVideoConfig(**TINY)).eval()
    assert model.config._attn_implementation == "sdpa"
    expected = model(video, mask).aligned_features
    model.set_attn_implementation("eager")
    assert model.vision_model.config._attn_implementation == "eager"
    torch.testing.assert_close(model(video, mask).aligned_features, expected, atol=1e-5, rtol=1e-5)


def test_attention_goes_through_the_registry(video, mask):
    """Whatever is registered is called once a layer, on visible tokens only: this is how flash and flex get there."""
    shapes = []

    def attend(module, query, key, value, attention_mask, scaling, dropout=0.0, **kwargs):
        shapes.append(tuple(query.shape))
        assert attention_mask is None and not module.is_causal
        return torch.nn.functional.scaled_dot_product_attention(query, key, value, scale=scaling).transpose(1, 2), None

    AttentionInterface.register("probe", attend)
    model = UMTVideoModel(UMTVideoConfig(**TINY)).eval()
    expected = model(video, mask).last_hidden_state
    model.set_attn_implementation("probe")
    torch.testing.assert_close(model(video, mask).last_hidden_state, expected, atol=1e-5, rtol=1e-5)
    assert shapes == [(2, 2, 16, 16)] * 3
    assert model._supports_flash_attn and model._supports_flex_attn and model._supports_attention_backend


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("attention", ["flash_attention_2", "flex_attention"])
def test_gpu_attention_agrees_with_sdpa(attention, video, mask):
    if attention == "flash_attention_2":
        pytest.importorskip("flash_attn", reason="needs flash-attn")
    model = UMTVideoModel(UMTVideoConfig(**TINY)).to("cuda", torch.bfloat16)
    expected = model(video.cuda(), mask.cuda()).last_hidden_state
    model.set_attn_implementation(attention)
    torch.testing.assert_close(model(video.cuda(), mask.cuda()).last_hidden_state, expected, atol=3e-2, rtol=3e-2)


def test_gradient_checkpointing_changes_nothing(video, mask):
    config = UMTVideoConfig(**TINY, layer_scale_init_value=0.5)
    plain = UMTVideoForPreTraining(config).train()
    checkpointed = copy.deepcopy(plain)
    checkpointed.gradient_checkpointing_enable()
    targets = torch.randn(2, 2, 16, 12)
    plain(video, mask, targets).loss.backward()
    checkpointed(video, mask, targets).loss.backward()
    for (name, one), other in zip(plain.named_parameters(), checkpointed.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, msg=name)


@pytest.mark.parametrize("fresh", [False, True])
def test_compiles_to_one_graph_with_visible_indices(fresh, video, mask):
    fields = TINY | ({"position_embedding_frames": None, "position_embedding_image_size": None} if fresh else {})
    model = UMTVideoForPreTraining(UMTVideoConfig(**fields)).eval()
    indices = compute_visible_indices(mask, 16)
    targets = torch.randn(2, 2, 16, 12)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    expected = model(video, visible_indices=indices, teacher_features=targets)
    outputs = compiled(video, visible_indices=indices, teacher_features=targets)
    torch.testing.assert_close(outputs.loss, expected.loss)
    outputs.loss.backward()
    assert model.alignment_heads[0].dense.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("norm", ["l2", "none"])
@pytest.mark.parametrize("covers_all_tokens", [False, True])
def test_teacher_features_may_be_raw(norm, covers_all_tokens, video, mask):
    """By default the model normalises them as it does its own; those of a teacher need not be normalised once more."""
    model = UMTVideoForPreTraining(UMTVideoConfig(**TINY, alignment_norm=norm)).eval()
    raw = torch.randn(2, 2, 64, 12) * 3
    visible = gather_tokens(raw, compute_visible_indices(mask, 16))
    outputs = model(video, mask, raw if covers_all_tokens else visible)
    torch.testing.assert_close(outputs.loss, uta_loss(outputs.aligned_features, visible, norm), atol=1e-6, rtol=1e-6)
    normalized = normalize_features(raw if covers_all_tokens else visible, norm)
    loss = model(video, mask, normalized, normalize_teacher_features=False).loss
    torch.testing.assert_close(loss, outputs.loss, atol=1e-7, rtol=1e-6)


def test_several_teachers_have_heads_and_weighted_losses_of_their_own(video, mask, tmp_path):
    other = {"name_or_path": "a-videomae", "image_size": 32, "hidden_size": 6}
    fields = TINY | {"other_teachers": [other], "teacher_weights": [1.0, 0.5]}
    model = UMTVideoForPreTraining(UMTVideoConfig(**fields)).eval()
    first, second = torch.randn(2, 2, 16, 12), torch.randn(2, 2, 64, 6)  # at visible tokens, and at all
    outputs = model(video, mask, [first, second])
    (features,) = outputs.other_aligned_features
    own = uta_loss(features, gather_tokens(second, compute_visible_indices(mask, 16)))
    torch.testing.assert_close(outputs.teacher_losses[1], 0.5 * own)
    torch.testing.assert_close(outputs.teacher_losses[0], uta_loss(outputs.aligned_features, first))
    assert torch.equal(outputs.loss, outputs.teacher_losses[0] + outputs.teacher_losses[1])
    outputs.loss.backward()
    assert all(head.dense.weight.grad.abs().sum() > 0 for head in model.other_alignment_heads[0])
    with pytest.raises(ValueError, match="are those of 1 teachers, and the configuration names 2"):
        model(video, mask, first)
    names = [name for name, _ in model.named_modules() if name.endswith("dense") and "alignment" in name]
    assert len(names) == 4
    assert all(any(re.fullmatch(pattern, name) for pattern in NEVER_QUANTIZED) for name in names)

    # Without the second one everything is where it was.
    model.save_pretrained(tmp_path)
    alone = UMTVideoForPreTraining.from_pretrained(tmp_path, other_teachers=None, teacher_weights=None)
    expected = UMTVideoForPreTraining(UMTVideoConfig(**TINY)).state_dict().keys()
    assert alone.state_dict().keys() == expected
    found = alone(video, mask, first)
    torch.testing.assert_close(found.loss, outputs.teacher_losses[0])
    assert found.teacher_losses is found.other_aligned_features is None


def test_a_checked_grid_takes_indices_only(video, mask):
    model = UMTVideoModel(UMTVideoConfig(**TINY)).eval()
    indices = compute_visible_indices(mask, 16)
    expected = model(video, mask).last_hidden_state
    assert torch.equal(model(video, visible_indices=indices, token_grid=(4, 4, 4)).last_hidden_state, expected)
    with pytest.raises(ValueError, match="visible_indices"):
        model(video, mask, token_grid=(4, 4, 4))


def test_hidden_states_and_attentions(video, mask):
    model = UMTVideoForPreTraining(UMTVideoConfig(**TINY)).eval()
    model.set_attn_implementation("eager")
    outputs = model(video, mask, output_hidden_states=True, output_attentions=True)
    assert len(outputs.hidden_states) == 4 and outputs.hidden_states[0].shape == (2, 16, 32)
    assert len(outputs.attentions) == 3 and outputs.attentions[0].shape == (2, 2, 16, 16)
    torch.testing.assert_close(outputs.attentions[0].sum(-1), torch.ones(2, 2, 16))
    states = model.vision_model(video, mask, output_aligned_states=True, output_hidden_states=True)
    torch.testing.assert_close(states.aligned_hidden_states[-1], states.last_hidden_state)
    torch.testing.assert_close(states.aligned_hidden_states[0], model.vision_model.norm(states.hidden_states[2]))


def test_masked_tokens_have_no_influence(video, mask):
    model = UMTVideoModel(UMTVideoConfig(**TINY)).eval()
    expected = model(video, mask).last_hidden_state
    patches = mask.view(2, 4, 4, 4).repeat_interleave(8, -1).repeat_interleave(8, -2)[:, :, None]
    noise = torch.where(patches, torch.randn_like(video) * 100, video)
    torch.testing.assert_close(model(noise, mask).last_hidden_state, expected)


def test_patches_equal_a_strided_convolution(video):
    config = UMTVideoConfig(**TINY | {"tubelet_size": 2})
    embeddings = UMTVideoModel(config).embeddings.patch_embeddings
    convolution = torch.nn.Conv3d(3, 32, (2, 8, 8), stride=(2, 8, 8))
    convolution.weight.data = embeddings.projection.weight.data.view_as(convolution.weight)
    convolution.bias.data = embeddings.projection.bias.data
    expected = convolution(video.transpose(1, 2)).flatten(2).transpose(1, 2)
    torch.testing.assert_close(embeddings(video), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("shape", [(8, 32, 32), (4, 48, 32), (1, 16, 40), (16, 64, 64)])
@pytest.mark.parametrize("kind", ["interpolated", "fresh", "learnable"])
def test_any_frame_count_and_size(shape, kind):
    fields = dict(TINY)
    if kind == "fresh":
        fields |= {"position_embedding_frames": None, "position_embedding_image_size": None}
    model = UMTVideoModel(UMTVideoConfig(**fields, learnable_position_embedding=kind == "learnable")).eval()
    frames, height, width = shape
    outputs = model(torch.randn(1, frames, 3, height, width))
    assert outputs.last_hidden_state.shape == (1, frames * (height // 8) * (width // 8), 32)
    torch.testing.assert_close(outputs.pooler_output, outputs.last_hidden_state.mean(1))


def test_fresh_table_is_indexed_by_flat_position():
    fields = TINY | {"position_embedding_frames": None, "position_embedding_image_size": None}
    model = UMTVideoModel(UMTVideoConfig(**fields))
    table = model.embeddings.compute_position_embeddings((9, 5, 6))
    torch.testing.assert_close(table, compute_sinusoid_table(270, 32))


@pytest.mark.parametrize(
    "shape,message",
    [
        ((1, 4, 3, 33, 32), "33 x 32 pixels"),
        ((1, 4, 4, 32, 32), "3 channels"),
        ((4, 3, 32, 32), "batch, frames"),
        ((1, 0, 3, 32, 32), "0 frames"),
    ],
)
def test_clips_that_do_not_fit(shape, message):
    with pytest.raises(ValueError, match=message):
        UMTVideoModel(UMTVideoConfig(**TINY))(torch.randn(shape))


def test_masks_that_do_not_fit(video, mask):
    model = UMTVideoModel(UMTVideoConfig(**TINY))
    uneven = mask.clone()
    uneven[0, mask[0].nonzero()[0]] = False
    with pytest.raises(ValueError, match="same number"):
        model(video, uneven)
    with pytest.raises(ValueError, match="same number"):
        model(video, torch.ones_like(mask))
    with pytest.raises(ValueError, match=r"\(2, 64\)"):
        model(video, mask[:, :-1])
    with pytest.raises(ValueError, match="not both"):
        model(video, mask, compute_visible_indices(mask, 16))
    with pytest.raises(ValueError, match="visible_indices"):
        model(video, visible_indices=torch.zeros(3, 4, dtype=torch.long))


def test_tubelets_and_a_framewise_teacher_do_not_mix(video):
    model = UMTVideoForPreTraining(UMTVideoConfig(**TINY | {"tubelet_size": 2}))
    assert model(video).loss is None
    with pytest.raises(ValueError, match="tubelet_size"):
        model(video, teacher_features=torch.randn(2, 2, 32, 12))


@pytest.mark.parametrize(
    "fields",
    [
        {"hidden_size": 33},
        {"image_size": 30},
        {"num_frames": 3, "tubelet_size": 2},
        {"mask_ratio": 1.0},
        {"position_embedding_frames": None},
        {"alignment_loss": "l1"},
        {"pooling_type": "max"},
        {"drop_path_rate": "much"},
    ],
)
def test_configurations_that_make_no_sense(fields):
    with pytest.raises((ValueError, TypeError, Exception), match=next(iter(fields))):
        UMTVideoConfig(**TINY | fields)


def test_stochastic_depth_grows_with_depth_and_keeps_the_mean(video):
    model = UMTVideoModel(UMTVideoConfig(**TINY | {"drop_path_rate": 0.4}))
    assert [layer.mlp_residual.drop_path for layer in model.layers] == pytest.approx([0.0, 0.2, 0.4])
    residual = model.layers[2].mlp_residual.train()
    branch = torch.ones(20000, 1, 1)
    outputs = residual(torch.zeros_like(branch), branch).flatten()
    assert outputs.unique().tolist() == pytest.approx([0.0, 1 / 0.6])
    assert outputs.mean() == pytest.approx(1.0, abs=0.02)
    assert torch.equal(residual.eval()(torch.zeros_like(branch), branch), branch)


def test_position_table_survives_meta_construction(tmp_path):
    model = UMTVideoForPreTraining(UMTVideoConfig(**TINY))
    model.save_pretrained(tmp_path)
    loaded = UMTVideoForPreTraining.from_pretrained(tmp_path)
    expected = compute_sinusoid_table(64, 32)
    assert torch.equal(loaded.vision_model.embeddings.sinusoid_table, expected)
    half = UMTVideoForPreTraining.from_pretrained(tmp_path, dtype=torch.bfloat16)
    torch.testing.assert_close(half.vision_model.embeddings.sinusoid_table.float(), expected, atol=4e-3, rtol=0)


def test_learnable_table_is_saved_and_trained(tmp_path, video):
    model = UMTVideoModel(UMTVideoConfig(**TINY, learnable_position_embedding=True))
    model(video).pooler_output.square().sum().backward()
    assert model.embeddings.position_embeddings.grad.abs().sum() > 0
    model.save_pretrained(tmp_path)
    loaded, info = UMTVideoModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert torch.equal(loaded.embeddings.position_embeddings, model.embeddings.position_embeddings)


def test_encoder_loads_from_stage1_and_classification_folders(tmp_path, video):
    student = UMTVideoForPreTraining(UMTVideoConfig(**TINY)).eval()
    student.save_pretrained(tmp_path / "stage1")
    encoder, info = AutoModel.from_pretrained(tmp_path / "stage1", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    torch.testing.assert_close(encoder(video).pooler_output, student.vision_model(video).pooler_output)

    classifier = UMTVideoForVideoClassification(UMTVideoConfig(**TINY, num_labels=5)).eval()
    classifier.save_pretrained(tmp_path / "classifier")
    encoder, info = AutoModel.from_pretrained(tmp_path / "classifier", output_loading_info=True)
    assert not info["missing_keys"]
    assert info["unexpected_keys"] == {"fc_norm.weight", "fc_norm.bias", "classifier.weight", "classifier.bias"}
    torch.testing.assert_close(encoder(video).pooler_output, classifier.vision_model(video).pooler_output)


@pytest.fixture
def attentive() -> UMTVideoForVideoClassification:
    """Every weight random: a fresh query sees all tokens nearly alike, and a fresh head says nothing."""
    torch.manual_seed(0)
    model = UMTVideoForVideoClassification(UMTVideoConfig(**TINY, num_labels=3, pooling_type="attentive")).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    torch.nn.init.normal_(model.attentive_pooling.query, std=3)
    return model


def test_attentive_pooling_equals_torchs_multi_head_attention(attentive, video):
    pooling = attentive.attentive_pooling
    theirs = torch.nn.MultiheadAttention(32, 2, batch_first=True)
    theirs.in_proj_weight.data = torch.cat([torch.eye(32), pooling.key.weight, pooling.value.weight])
    theirs.in_proj_bias.data = torch.cat([torch.zeros(64), pooling.value.bias])
    theirs.out_proj.load_state_dict(pooling.dense.state_dict())
    tokens = attentive.vision_model(video).last_hidden_state
    states = pooling.norm(tokens)
    expected, weights = theirs(pooling.query.expand(2, -1, -1), states, states)
    torch.testing.assert_close(pooling(tokens), expected[:, 0])
    assert weights.max() > 4 / 64  # far from a mean of the 64 tokens
    torch.testing.assert_close(attentive(video).logits, attentive.classifier(attentive.fc_norm(expected[:, 0])))


def test_attentive_pooling_loads_by_the_auto_class(attentive, video, tmp_path):
    attentive.save_pretrained(tmp_path)
    loaded, info = AutoModelForVideoClassification.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    torch.testing.assert_close(loaded(video).logits, attentive(video).logits)
    # Nothing is dropped or drawn in silence when a folder is loaded against its configuration.
    _, info = UMTVideoForVideoClassification.from_pretrained(tmp_path, pooling_type="mean", output_loading_info=True)
    names = {f"attentive_pooling.{name}" for name in attentive.attentive_pooling.state_dict()}
    assert info["unexpected_keys"] == names and "attentive_pooling.query" in names


def test_attentive_pooling_on_a_folder_with_the_mean_is_reported_as_fresh(tmp_path):
    UMTVideoForVideoClassification(UMTVideoConfig(**TINY)).save_pretrained(tmp_path)
    model, info = UMTVideoForVideoClassification.from_pretrained(
        tmp_path, pooling_type="attentive", output_loading_info=True
    )
    assert info["missing_keys"] == {f"attentive_pooling.{name}" for name in model.attentive_pooling.state_dict()}
    assert model.attentive_pooling.query.abs().max() > 0  # drawn, not left as it was allocated
    assert model.attentive_pooling.query.std().item() == pytest.approx(0.02, rel=0.6)


def test_offloaded_attentive_pooling_gives_the_same(attentive, video, tmp_path):
    attentive.save_pretrained(tmp_path / "model")
    device_map = {"vision_model": "cpu", "attentive_pooling": "disk", "fc_norm": "cpu", "classifier": "cpu"}
    loaded = UMTVideoForVideoClassification.from_pretrained(
        tmp_path / "model", device_map=device_map, offload_folder=tmp_path / "offload"
    )
    assert loaded.attentive_pooling.query.is_meta
    with torch.no_grad():
        torch.testing.assert_close(loaded(video).logits, attentive(video).logits)


def test_classifier_does_not_touch_the_given_configuration():
    config = UMTVideoConfig(**TINY)
    UMTVideoForVideoClassification(config)
    assert config.use_final_norm


def test_every_parameter_gets_a_gradient(video, mask):
    """No unused parameter: DDP needs no `find_unused_parameters`."""
    model = UMTVideoForPreTraining(UMTVideoConfig(**TINY))
    model(video, mask, torch.randn(2, 2, 16, 12)).loss.backward()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []
    classifier = UMTVideoForVideoClassification(UMTVideoConfig(**TINY, pooling_type="attentive"))
    classifier(video, labels=torch.tensor([0, 1])).loss.backward()
    assert [name for name, parameter in classifier.named_parameters() if parameter.grad is None] == []


@pytest.mark.parametrize("plan", ["base_model_tp_plan", "base_model_fsdp_plan"])
def test_parallel_plans_name_modules_that_exist(plan):
    import fnmatch

    names = [name for name, _ in UMTVideoModel(UMTVideoConfig(**TINY)).named_modules()]
    for pattern in getattr(UMTVideoConfig, plan):
        assert fnmatch.filter(names, pattern), pattern


def test_attention_under_tensor_parallel_shapes(video):
    """With half the heads on each of two devices, the row-wise output projections add up to the full output."""
    model = UMTVideoModel(UMTVideoConfig(**TINY)).eval()
    attention = model.layers[0].attention
    states = torch.randn(2, 10, 32)
    expected, _ = attention(states)
    total = -attention.o_proj.bias
    for half in (slice(0, 16), slice(16, 32)):
        part = copy.deepcopy(attention)
        for name in ("q_proj", "k_proj", "v_proj"):
            linear = getattr(part, name)
            linear.weight.data = linear.weight.data[half]
            if linear.bias is not None:
                linear.bias.data = linear.bias.data[half]
        part.o_proj.weight.data = part.o_proj.weight.data[:, half]
        total = total + part(states)[0]
    torch.testing.assert_close(total, expected, atol=1e-5, rtol=1e-5)


def test_lora_on_query_and_value(video, tmp_path):
    from peft import LoraConfig, PeftModel, get_peft_model

    classifier = UMTVideoForVideoClassification(UMTVideoConfig(**TINY, num_labels=3)).eval()
    base = copy.deepcopy(classifier)
    lora = LoraConfig(target_modules=["q_proj", "v_proj"], modules_to_save=["classifier", "fc_norm"], r=4)
    model = get_peft_model(classifier, lora)
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.1)
    expected = model.eval()(video).logits
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(base, tmp_path).eval()
    torch.testing.assert_close(loaded(video).logits, expected)


def test_real_size_teachers_have_the_published_parameters():
    for table, fields, size in (
        ("names_clip_b16_224", {"hidden_size": 768, "patch_size": 16, "projection_dim": 512}, 224),
        ("names_clip_l14_196", {"hidden_size": 1024, "patch_size": 14, "projection_dim": 768}, 196),
    ):
        depth = 12 if fields["hidden_size"] == 768 else 24
        config = CLIPVisionConfig(
            **fields,
            image_size=224,
            num_hidden_layers=depth,
            num_attention_heads=fields["hidden_size"] // 64,
            intermediate_size=4 * fields["hidden_size"],
        )
        with torch.device("meta"):
            teacher = UMTTeacher(CLIPVisionModelWithProjection(config), image_size=size)
        published = load_table(table)["state_dict"]
        counted = sum(parameter.numel() for parameter in teacher.vision_tower.parameters())
        assert counted == sum(torch.Size(shape).numel() for shape in published.values())
        assert teacher.grid_size == 14 and teacher.aligned_layer_indices == list(range(depth - 6, depth))


def test_teacher_features_at_visible_tokens(video):
    config = CLIPVisionConfig(
        image_size=32,
        patch_size=8,
        hidden_size=24,
        num_hidden_layers=3,
        num_attention_heads=2,
        intermediate_size=32,
        projection_dim=12,
    )
    teacher = UMTTeacher(CLIPVisionModelWithProjection(config), num_aligned_layers=2)
    indices = torch.tensor([[0, 5, 17], [3, 40, 63]])
    all_tokens, visible = teacher(video).features, teacher(video, indices).features
    assert all_tokens.shape == (2, 2, 64, 12) and visible.shape == (2, 2, 3, 12)
    torch.testing.assert_close(visible[:, 1, 1], all_tokens[:, 1, 40])
    with pytest.raises(ValueError, match="do not fit"):
        UMTTeacher(CLIPVisionModelWithProjection(config), num_aligned_layers=4)
    with pytest.raises(ValueError, match="multiple"):
        UMTTeacher(CLIPVisionModelWithProjection(config), num_aligned_layers=1, image_size=30)


@pytest.mark.slow
def test_import_stays_light():
    """Importing the package loads no decoder, no datasets, no PEFT beyond what torch and Transformers load."""
    code = (
        "import sys, torch, torchvision, transformers.modeling_utils; before = set(sys.modules); import umt_hf;"
        "heavy = {'datasets', 'decord', 'av', 'peft', 'torchcodec', 'matplotlib', 'accelerate', 'gradio'};"
        "loaded = heavy & (set(sys.modules) - before); sys.exit(f'loaded {loaded}' if loaded else 0)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert umt_hf.__version__


def test_residual_stream_stays_float32_under_autocast(video, mask):
    model = UMTVideoForPreTraining(UMTVideoConfig(**TINY)).eval()
    with torch.autocast("cpu", torch.bfloat16):
        outputs = model(video, mask, torch.randn(2, 2, 16, 12), output_hidden_states=True)
    assert {state.dtype for state in outputs.hidden_states} == {torch.float32}
    assert outputs.loss.dtype == outputs.aligned_features.dtype == torch.float32
    half = UMTVideoForPreTraining(UMTVideoConfig(**TINY)).to(torch.bfloat16).eval()
    assert half(video, mask, output_hidden_states=True).hidden_states[-1].dtype == torch.bfloat16


def test_offloaded_layers_give_the_same(tmp_path, video, mask):
    """`device_map`: every weight is reached through a module, so that Accelerate's hooks can bring it back."""
    model = UMTVideoModel(UMTVideoConfig(**TINY, layer_scale_init_value=0.5)).eval()
    model.save_pretrained(tmp_path / "model")
    device_map = {"embeddings": "cpu", "layers.0": "cpu", "layers.1": "disk", "layers.2": "disk", "norm": "cpu"}
    loaded = UMTVideoModel.from_pretrained(
        tmp_path / "model", device_map=device_map, offload_folder=tmp_path / "offload"
    )
    assert loaded.layers[1].attention.q_proj.weight.is_meta
    with torch.no_grad():
        torch.testing.assert_close(loaded(video, mask).last_hidden_state, model(video, mask).last_hidden_state)


@pytest.mark.parametrize("wrong", [-1, 64, 1000])
@pytest.mark.parametrize("kind", [UMTVideoModel, UMTVideoForPreTraining])
def test_indices_of_no_token_are_named(kind, wrong, video):
    """Found by properties: -1, as padding is often written, was the last token in silence."""
    model = kind(UMTVideoConfig(**TINY)).eval()
    with pytest.raises(
        ValueError, match=rf"visible_indices must be from 0 to 63, the tokens of this clip, got \[{wrong}\]"
    ):
        model(video, visible_indices=torch.tensor([[0, 1], [2, wrong]]))
