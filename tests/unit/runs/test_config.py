"""Recipes and flags."""

import json
from pathlib import Path

import pytest

from umt_hf.evaluation import retrieval as evaluate_retrieval
from umt_hf.finetuning import question_answering as finetune_question_answering
from umt_hf.finetuning import retrieval as finetune_retrieval
from umt_hf.runs.config import list_recipes, load_recipe, parse_config
from umt_hf.training import stage2
from umt_hf.training.stage1 import SECTIONS
from umt_hf.training.trainer import build_schedule

FIXTURES = Path(__file__).parents[2] / "fixtures"


@pytest.mark.parametrize("name", [name for name in list_recipes() if name.startswith("stage1")])
def test_every_stage1_recipe_parses(name):
    model, teacher, mask, data, augmentation, training = parse_config(SECTIONS, ["--config", name])
    assert model.hidden_size % model.num_attention_heads == 0
    assert 0 < mask.mask_ratio < 1 and training.learning_rate > training.min_learning_rate


def test_published_values():
    """Against the condensed launch scripts: 32 processes of 64 clips give the published rates."""
    for name, width, drop_path, teacher_size in (
        ("stage1_umt_vit_b16", 768, 0.1, 224),
        ("stage1_umt_vit_l16", 1024, 0.2, 196),
    ):
        model, teacher, mask, data, augmentation, training = parse_config(SECTIONS, ["--config", name])
        assert (model.hidden_size, model.drop_path_rate, teacher.teacher_image_size) == (
            width,
            drop_path,
            teacher_size,
        )
        assert (model.num_frames, model.image_size, mask.mask_ratio, mask.mask_type) == (8, 224, 0.8, "attention")
        assert (teacher.num_aligned_layers, teacher.alignment_loss) == (6, "l2")
        assert augmentation.crop_scales == [1.0, 0.875, 0.75, 0.66]
        assert augmentation.horizontal_flip_probability == 0.5 and augmentation.repeated_augmentation == 1
        assert (training.adam_beta1, training.adam_beta2, training.weight_decay) == (0.9, 0.95, 0.05)
        schedule = build_schedule(training, steps_per_epoch=100, num_processes=32)
        assert schedule.peak == pytest.approx(1.2e-3) and schedule.minimum == pytest.approx(8e-5)
        assert (schedule.total_steps, schedule.warmup_steps) == (20100, 4000)


@pytest.mark.parametrize(
    ("name", "width", "teacher_name"),
    [
        ("stage1_siglip2_vit_b16", 768, "google/siglip2-base-patch16-224"),
        ("stage1_siglip2_vit_l16", 1024, "google/siglip2-large-patch16-256"),
        ("stage1_dinov3_vit_b16", 768, "facebook/dinov3-vitb16-pretrain-lvd1689m"),
        ("stage1_dinov3_vit_l16", 1024, "facebook/dinov3-vitl16-pretrain-lvd1689m"),
    ],
)
def test_values_of_other_teachers_are_those_of_internvideo_next(name, width, teacher_name):
    """128 processes of 16 clips, and a layer in every 1.67 of the teacher's and the student's."""
    model, teacher, mask, _, augmentation, training = parse_config(SECTIONS, ["--config", name])
    assert (model.hidden_size, model.num_frames, model.drop_path_rate) == (width, 16, 0.1 if width == 768 else 0.2)
    assert (teacher.teacher_name_or_path, teacher.teacher_image_size) == (teacher_name, 224)
    assert (teacher.num_aligned_layers, teacher.alignment_interval, teacher.alignment_norm) == (6, 1.67, "l2")
    assert (mask.mask_type, mask.mask_ratio, augmentation.horizontal_flip_probability) == ("attention", 0.75, 0.5)
    assert (training.adam_beta1, training.adam_beta2, training.adam_epsilon) == (0.9, 0.98, 1e-6)
    assert (training.max_grad_norm, training.weight_decay, training.mixed_precision) == (5.0, 0.05, "bf16")
    schedule = build_schedule(training, steps_per_epoch=100, num_processes=128)
    assert schedule.peak == pytest.approx(8e-3)
    assert (schedule.total_steps, schedule.warmup_steps) == (6200, 700)


@pytest.mark.parametrize("name", [name for name in list_recipes() if name.startswith("stage2")])
def test_every_stage2_recipe_parses(name):
    model, _, mask, losses, data, _, training = parse_config(stage2.SECTIONS, ["--config", name])
    assert 0 < mask.mask_ratio < 1 and losses.vtc_loss_weight == 1 and len(data.train_corpora) >= 1
    assert training.lr_scheduler_type == "cosine_above_minimum" and model.max_text_tokens >= 12


@pytest.mark.parametrize("name", [name for name in list_recipes() if name.startswith("zero_shot")])
def test_every_zero_shot_recipe_parses(name):
    model, data, evaluation = parse_config(evaluate_retrieval.SECTIONS, ["--config", name])
    assert evaluation.rerank_top_k == 128 and data.num_frames == 4
    assert model.model_name_or_path.replace("umt-vit-", "").replace("-", "_") == name.split(":")[1]


@pytest.mark.parametrize("size", ["b16", "l16"])
@pytest.mark.parametrize("corpora", ["5m", "17m", "25m"])
def test_published_stage_2_values(size, corpora):
    """Against the table made of the published configurations."""
    table = json.loads((FIXTURES / "multi_modality" / "experiments.json").read_text())
    row, common = table["rows"][f"pretraining/{size}_{corpora}"], table["common_to_all"]
    model, teacher, mask, losses, data, augmentation, training = parse_config(
        stage2.SECTIONS, ["--config", f"stage2_umt_vit_{size}_{corpora}"]
    )
    assert (model.num_frames, model.max_text_tokens, model.fusion_layer, model.projection_dim) == (
        row["num_frames"],
        row["max_txt_l"],
        row["fusion_layer"],
        row["embed_dim"],
    )
    assert row["text"].replace("_", "-") in model.text_name_or_path
    assert model.drop_path_rate == row["drop_path"]
    assert model.vision_gradient_checkpointing == row["vision_checkpointing"][0]
    assert teacher.num_aligned_layers == row["clip_return_layer"]
    assert (
        teacher.teacher_name_or_path
        == {
            "clip_b16": "openai/clip-vit-base-patch16",
            "clip_l14_336": "openai/clip-vit-large-patch14-336",
            "clip_l14": "openai/clip-vit-large-patch14",
        }[row["teacher"]]
    )
    assert [mask.mask_type, mask.mask_ratio, mask.mask_type, mask.image_mask_ratio] == row["mask"]
    assert {name: getattr(losses, f"{name}_loss_weight") for name in row["loss_weight"]} == row["loss_weight"]
    assert data.batch_sizes == [row["batch_size_per_gpu"]] and data.rerank_top_k == common["k_test"]
    assert (augmentation.crop_scale, augmentation.horizontal_flip_probability) == ([0.5, 1.0], 0.5)
    assert len(data.train_corpora) == len(data.media_types) == {"5m": 2, "17m": 6, "25m": 6}[corpora]
    assert (training.learning_rate, training.num_train_epochs, training.warmup_epochs) == (
        row["lr"],
        row["epochs"],
        row["warmup_epochs"],
    )
    assert [training.adam_beta1, training.adam_beta2] == common["betas"]
    assert training.weight_decay == common["weight_decay"] and training.max_grad_norm is None
    assert training.min_learning_rate == pytest.approx(common["min_lr_multi"] * training.learning_rate)
    schedule = build_schedule(training, steps_per_epoch=100, num_processes=16)
    assert (schedule.total_steps, schedule.warmup_steps, schedule.peak) == (1000, 100, row["lr"])
    assert schedule(0) == schedule(999) == schedule.minimum


def test_flags_overrule_recipes_and_recipes_inherit(tmp_path):
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("inherits: stage1_umt_vit_b16\nmask:\n  mask_ratio: 0.7\n")
    model, _, mask, _, _, training = parse_config(SECTIONS, ["--config", str(recipe), "--seed", "7"])
    assert (model.hidden_size, mask.mask_ratio, training.seed) == (768, 0.7, 7)
    _, _, mask, _, _, _ = parse_config(SECTIONS, ["--mask_ratio", "0.6", "--config", str(recipe)])
    assert mask.mask_ratio == 0.6
    _, _, mask, _, _, _ = parse_config(SECTIONS, [f"--config={recipe}"])
    assert mask.mask_ratio == 0.7
    assert load_recipe(str(recipe))["model"]["hidden_size"] == 768


@pytest.mark.parametrize(
    "text,message",
    [
        ("masks:\n  mask_ratio: 0.5\n", "unknown section 'masks'.*mask_ratio belongs in section 'mask'"),
        ("mask:\n  ratio: 1\n", "ratio"),
    ],
)
def test_typing_errors_in_recipes(tmp_path, text, message):
    (tmp_path / "bad.yaml").write_text(text)
    with pytest.raises(ValueError, match=message):
        parse_config(SECTIONS, ["--config", str(tmp_path / "bad.yaml")])


@pytest.mark.parametrize(
    "sections,key",
    [
        (SECTIONS, "crop_scales"),
        (SECTIONS, "repeated_augmentation"),
        (stage2.SECTIONS, "crop_scale"),
        (finetune_retrieval.SECTIONS, "crop_scale"),
        (finetune_question_answering.SECTIONS, "horizontal_flip_probability"),
    ],
)
def test_a_key_in_another_section_is_refused_with_its_own(tmp_path, sections, key):
    (tmp_path / "old.yaml").write_text(f"data:\n  {key}: 1\n  unknown: 2\n")
    message = rf"section 'data' has unknown keys \['{key}', 'unknown'\]. {key} belongs in section 'augmentation'.$"
    with pytest.raises(ValueError, match=message):
        parse_config(sections, ["--config", str(tmp_path / "old.yaml")])


def test_unknown_recipe_and_impossible_values():
    with pytest.raises(FileNotFoundError, match="stage1_umt_vit_b16"):
        parse_config(SECTIONS, ["--config", "stage1_umt_vit_b17"])
    with pytest.raises(ValueError, match="name of a recipe"):
        parse_config(SECTIONS, ["--config"])
    with pytest.raises(ValueError, match="mask_ratio"):
        parse_config(SECTIONS, ["--mask_ratio", "1.5"])
    with pytest.raises(ValueError, match="save_steps"):
        parse_config(SECTIONS, ["--save_steps", "0"])
    with pytest.raises(ValueError, match="save_total_limit"):
        parse_config(SECTIONS, ["--save_total_limit", "0"])
    with pytest.raises(ValueError, match="max_steps"):
        parse_config(SECTIONS, ["--max_steps", "0"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model: 3", r"recipe\.yaml: a recipe is sections of keys and values .*, got 3"),
        ("model: [1]", r"recipe\.yaml: a recipe is sections of keys and values .*, got \[1\]"),
        ("[1]", r"recipe\.yaml: a recipe is sections of keys and values"),
        ("text", r"recipe\.yaml: a recipe is sections of keys and values"),
        ("variants: 3", r"recipe\.yaml: a recipe is sections of keys and values"),
        ("variants: {a: {model: 3}}", r"recipe\.yaml: a recipe is sections of keys and values"),
        ("inherits: 3", r"recipe\.yaml: inherits takes the name of a recipe or file, got 3"),
        ("'", r"recipe\.yaml is not YAML: while scanning a quoted scalar"),
        ("model: {num_frames: 2020-13-45}", r"recipe\.yaml is not YAML: month must be in 1\.\.12"),
        ("model: {widht: 1, 3: 1}", r"recipe\.yaml: section 'model' has unknown keys \[3, 'widht'\]"),
        ("model: {num_frames: x}", r"recipe\.yaml: num_frames in section 'model' is 'x': invalid literal for int"),
        ("model: {num_frames: [1, 2]}", r"num_frames in section 'model' is \[1, 2\]: it takes a single value"),
        ("training: {output_dir: {a: b}}", r"output_dir in section 'training' is {'a': 'b'}: it takes plain values"),
        ("augmentation: {crop_scales: [1.0, null]}", r"crop_scales .* is \[1\.0, None\]: it takes plain values"),
        ("mask: {mask_type: tub}", r"mask_type in section 'mask' is 'tub'"),
    ],
)
def test_what_is_wrong_in_a_recipe_is_named_with_its_file(text, message, tmp_path):
    """Found by properties: errors of Python, or ones that named neither the file nor the key."""
    path = tmp_path / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        parse_config(SECTIONS, ["--config", str(path)])


def test_bytes_that_are_not_text_are_named(tmp_path):
    (tmp_path / "recipe.yaml").write_bytes(b"\x80")
    with pytest.raises(ValueError, match=r"recipe\.yaml is not YAML: 'utf-8' codec"):
        parse_config(SECTIONS, ["--config", str(tmp_path / "recipe.yaml")])


def test_a_recipe_that_inherits_itself_is_named(tmp_path):
    (tmp_path / "a.yaml").write_text(f"inherits: {tmp_path / 'b.yaml'}", encoding="utf-8")
    (tmp_path / "b.yaml").write_text(f"inherits: {tmp_path / 'a.yaml'}", encoding="utf-8")
    with pytest.raises(ValueError, match=r"a\.yaml: the recipe inherits itself, by .*b\.yaml"):
        parse_config(SECTIONS, ["--config", str(tmp_path / "a.yaml")])


@pytest.mark.parametrize("word", ["--help", "-1", "--config", "--max_steps=3", "-"])
def test_a_value_of_a_recipe_is_never_a_flag(word, tmp_path):
    """Found by properties: `output_dir: --help` printed the help, and a run did not read back its record."""
    path = tmp_path / "recipe.yaml"
    path.write_text(f"training: {{output_dir: '{word}'}}\ndata: {{train_corpora: ['{word}', b]}}", encoding="utf-8")
    parsed = dict(zip(stage2.SECTIONS, parse_config(stage2.SECTIONS, ["--config", str(path)]), strict=True))
    assert parsed["training"].output_dir == word and parsed["data"].train_corpora == [word, "b"]


def test_epochs_on_the_line_win_over_steps_of_the_recipe(tmp_path):
    """They would be ignored otherwise: steps come before epochs."""
    (tmp_path / "mine.yaml").write_text("training:\n  max_steps: 700\n  warmup_steps: 50\n")
    config = ["--config", str(tmp_path / "mine.yaml")]
    *_, training = parse_config(SECTIONS, config)
    assert (training.max_steps, training.warmup_steps) == (700, 50)
    *_, training = parse_config(SECTIONS, [*config, "--num_train_epochs", "1", "--warmup-epochs=0.5"])
    assert (training.max_steps, training.num_train_epochs) == (-1, 1)
    assert (training.warmup_steps, training.warmup_epochs) == (-1, 0.5)
    *_, training = parse_config(SECTIONS, [*config, "--num_train_epochs", "1", "--max_steps", "3"])
    assert training.max_steps == 3


def test_flags_of_the_launcher_are_named():
    with pytest.raises(ValueError, match="--num_proceses: did you mean --num_processes"):
        parse_config(SECTIONS, ["--num_proceses", "2"])
    with pytest.raises(ValueError, match="--num_processes is a flag of `umt-hf`"):
        parse_config(SECTIONS, ["--num_processes", "2"])
