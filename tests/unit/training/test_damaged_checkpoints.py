"""Files of a checkpoint that are cut, empty or missing are named, with an older checkpoint to go on from."""

import json
import pickle
import shutil

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import save_file

from umt_hf.training.checkpointing import choose_checkpoint, list_checkpoints, save_checkpoint
from umt_hf.training.trainer import list_random_states

STATE = "trainer_state.json"
FINE_TUNING = ("optimizer.pt", "scheduler.pt", "rng_state.pth", "averaged_weights.pt")


@pytest.fixture
def run(tmp_path):
    """Folder of a run with three checkpoints that Accelerate has written."""
    accelerator = Accelerator(cpu=True)
    layer = torch.nn.Linear(3, 2)
    model, optimizer = accelerator.prepare(layer, torch.optim.AdamW(layer.parameters()))
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()

    def export(folder):
        save_file({"weight": torch.ones(3)}, folder / "model.safetensors")
        (folder / "config.json").write_text("{}")
        (folder / "run.yaml").write_text("training: {max_steps: 6}\n")

    def count(folder):
        (folder / "counters.json").write_text(json.dumps({"shape": {"num_processes": 1}}))

    for step in (2, 4, 6):
        save_checkpoint(accelerator, tmp_path, step, export, None, count)
    return tmp_path


@pytest.fixture
def finetuned(tmp_path):
    """The same of the `Trainer`, by its names."""
    for step in (2, 4, 6):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        save_file({"weight": torch.ones(3)}, folder / "model.safetensors")
        (folder / "config.json").write_text("{}")
        (folder / "run.yaml").write_text("training: {max_steps: 6}\n")
        (folder / STATE).write_text("{}")
        for name in (*FINE_TUNING, "training_args.bin"):
            torch.save({"state": torch.ones(3)}, folder / name)
    return tmp_path


def damage(path, how: str) -> None:
    if how == "missing":
        path.unlink()
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "cut":
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    elif how == "cut by a byte":
        path.write_bytes(path.read_bytes()[:-1])
    else:
        path.write_bytes(bytes(path.stat().st_size))


def read_refusal(output_dir, *args, **options) -> str:
    with pytest.raises(ValueError) as caught:
        choose_checkpoint("auto", output_dir, *args, **options)
    return str(caught.value)


def choose(run):
    return choose_checkpoint("auto", run, list_needed=lambda checkpoint: list_random_states(checkpoint, 1))


@pytest.mark.parametrize("how", ["empty", "cut", "cut by a byte", "zeros"])
@pytest.mark.parametrize(
    "name",
    [
        "model.safetensors",
        "training_state/model.safetensors",
        "training_state/optimizer.bin",
        "training_state/random_states_0.pkl",
    ],
)
def test_a_damaged_file_is_named_with_the_checkpoint_before_it(name, how, run):
    assert choose(run) == run / "checkpoint-6"
    damage(run / "checkpoint-6" / name, how)
    said = read_refusal(run)
    assert said.startswith(f"{run}/checkpoint-6/{name} is damaged") and "\n" not in said
    assert said.endswith(f"Go on from an older one by `--resume_from_checkpoint {run}/checkpoint-4`.")
    damage(run / "checkpoint-4" / name, how)
    assert read_refusal(run).endswith(f"`--resume_from_checkpoint {run}/checkpoint-2`.")
    damage(run / "checkpoint-2" / name, how)
    assert read_refusal(run).endswith(f"No older checkpoint of {run} is intact: start anew in another output_dir.")


@pytest.mark.parametrize("name", ["training_state/random_states_0.pkl", "config.json"])
def test_a_missing_file_is_named(name, run):
    damage(run / "checkpoint-6" / name, "missing")
    said = read_refusal(run, list_needed=lambda checkpoint: list_random_states(checkpoint, 1))
    assert said.startswith(f"{run}/checkpoint-6 is damaged: it has no {name}.") and "checkpoint-4`" in said


def test_a_flipped_byte_in_random_states_is_found(run):
    path = run / "checkpoint-6" / "training_state" / "random_states_0.pkl"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(content)
    assert f"{path} is damaged" in read_refusal(run)


@pytest.mark.parametrize("how", ["empty", "blank"])
def test_an_empty_recipe_is_named(how, run):
    (run / "checkpoint-6" / "run.yaml").write_text("" if how == "empty" else " \n")
    assert read_refusal(run).startswith(f"{run}/checkpoint-6/run.yaml is damaged: it is empty. Go on from")


def test_a_missing_part_of_divided_weights_is_named(run):
    checkpoint = run / "checkpoint-6"
    (checkpoint / "model.safetensors").rename(checkpoint / "model-00001-of-00002.safetensors")
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (checkpoint / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "has no model-00002-of-00002.safetensors" in read_refusal(run)


def test_random_states_of_processes_that_did_not_exist_are_not_needed(run):
    checkpoint = run / "checkpoint-6"
    assert list_random_states(checkpoint, 4) == ["training_state/random_states_0.pkl"]
    counters = checkpoint / "training_state" / "counters.json"
    counters.write_text(json.dumps({"shape": {"num_processes": 4}}))
    assert list_random_states(checkpoint, 2) == [f"training_state/random_states_{rank}.pkl" for rank in range(2)]
    counters.unlink()
    assert list_random_states(checkpoint, 2) == []


@pytest.mark.parametrize("how", ["empty", "cut", "cut by a byte", "zeros"])
@pytest.mark.parametrize("name", ["model.safetensors", *FINE_TUNING])
def test_damaged_files_of_fine_tuning_are_named(name, how, finetuned):
    assert choose_checkpoint("auto", finetuned, STATE) == finetuned / "checkpoint-6"
    damage(finetuned / "checkpoint-6" / "training_args.bin", how)  # nothing reads it
    assert choose_checkpoint("auto", finetuned, STATE) == finetuned / "checkpoint-6"
    damage(finetuned / "checkpoint-6" / name, how)
    said = read_refusal(finetuned, STATE)
    assert said.startswith(f"{finetuned}/checkpoint-6/{name} is damaged") and "checkpoint-4`" in said
    given = finetuned / "checkpoint-6"
    with pytest.raises(ValueError, match=name):
        choose_checkpoint(str(given), finetuned, STATE)


def test_a_checkpoint_of_another_folder_is_looked_at_too(run, tmp_path):
    last = tmp_path / "pulled" / "last-checkpoint"
    shutil.copytree(run / "checkpoint-6", last)
    assert choose_checkpoint(str(last), tmp_path / "new") == last
    damage(last / "training_state" / "optimizer.bin", "cut")
    with pytest.raises(ValueError, match="optimizer.bin is damaged.*start anew"):
        choose_checkpoint(str(last), tmp_path / "new")


def test_files_that_pickle_wrote_are_not_taken_for_tensors(run):
    """Such a file was never written here; it is refused, not run."""
    (run / "checkpoint-6" / "training_state" / "optimizer.bin").write_bytes(pickle.dumps({"a": 1}))
    assert "optimizer.bin is damaged" in read_refusal(run)
    assert [path.name for path in list_checkpoints(run)] == ["checkpoint-2", "checkpoint-4", "checkpoint-6"]
