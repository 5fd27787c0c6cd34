"""A user's mistake is one line with its cure, and exit code 2, in every script."""

import pytest

from tests.e2e.mistakes import fail, read_error
from tests.e2e.runs import FINE_TUNING, to_flags

PRETRAINING = ("training.stage1", "training.stage2")
FINETUNING = tuple(f"finetuning.{task}" for task in ("classification", "detection", "retrieval", "question_answering"))
EVALUATION = tuple(
    f"evaluation.{task}"
    for task in ("classification", "detection", "retrieval", "multiple_choice", "question_answering")
)
SCRIPTS = (*PRETRAINING, *FINETUNING, *EVALUATION)


def build_flags(script: str, **changes) -> list[str]:
    """Flags that no run can do without."""
    fields = {"model_name_or_path": "missing_model"} if script not in PRETRAINING else {}
    fields |= FINE_TUNING if script in FINETUNING else {"dataloader_num_workers": 0}
    return to_flags(**fields | changes)


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_misspelt_flag_is_named_with_the_nearest(script):
    error = read_error(fail(script, ["--dataloader_num_worker", "1"]))
    assert error == "Error: Unknown flag --dataloader_num_worker: did you mean --dataloader_num_workers?"


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_misspelt_recipe_is_named_with_the_nearest(script):
    error = read_error(fail(script, ["--config", "stage1_umt_vit_b17"]))
    assert "'stage1_umt_vit_b17' is neither a file nor a recipe: did you mean stage1_umt_vit_b16" in error


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_script_of_another_recipe_is_named(script):
    recipe, owner = ("stage1_umt_vit_b16", "umt-hf pretrain stage1")
    if script == "training.stage1":
        recipe, owner = ("classification_k400:b16", "umt-hf finetune classification")
    assert f"Error: {recipe} is a recipe of `{owner}`, not of `umt-hf " in read_error(
        fail(script, ["--config", recipe])
    )


@pytest.mark.parametrize("script", SCRIPTS)
def test_missing_data_is_named(script, tmp_path):
    name = "data" if script in EVALUATION else "train_data"
    words = build_flags(script, **{name: tmp_path / "trian.csv"}, output_dir=tmp_path / "run")
    if script == "training.stage2":
        words = to_flags(train_corpora=[tmp_path / "trian.json"], media_types=["video"], output_dir=tmp_path / "run")
    error = read_error(fail(script, words))
    print(script, error)
