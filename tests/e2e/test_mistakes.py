"""A user's mistake is one line with its cure, and exit code 2, in every script."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from tests.e2e.mistakes import fail, read_error, run_script
from tests.e2e.runs import read_losses
from tests.processes import ROOT, Output, build_environment, find_free_port, read_output, run_ranks, start_process
from umt_hf.runs.disk import hold_lock
from umt_hf.training import stage1

PRETRAINING = ("training.stage1", "training.stage2")
FINETUNING = tuple(f"finetuning.{task}" for task in ("classification", "detection", "retrieval", "question_answering"))
EVALUATION = tuple(
    f"evaluation.{task}"
    for task in ("classification", "detection", "retrieval", "moments", "multiple_choice", "question_answering")
)
SCRIPTS = (*PRETRAINING, *FINETUNING, *EVALUATION)


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


def write_files(folder: Path, shapes: Path, student: Path) -> dict[str, Path]:
    """What a user may give by mistake."""
    video = (shapes / "train.csv").read_text().split(",")[0]
    files = {
        "list.yaml": "- mask_ratio\n",
        "broken.yaml": "mask: [\n",
        "tagged.yaml": "mask: !!python/object/apply:os.getcwd []\n",
        "section.yaml": "masks:\n  mask_ratio: 0.5\n",
        "key.yaml": "training:\n  lerning_rate: 1\n",
        "value.yaml": "training:\n  learning_rate: fast\n",
        "notes.txt": "these are notes\n",
        "weights.pth": "x",
        "classes.json": '{"red": ["a"]}',
        "empty.json": "[]",
        "moments.json": json.dumps(
            [{"video": f"{shapes}/{video}", "caption": "a", "start_seconds": 0, "end_seconds": 1}]
        ),
        "choices.json": json.dumps([{"video": f"{shapes}/{video}", "caption": ["a", "b"], "answer": 0}]),
    }
    for name, text in files.items():
        (folder / name).write_text(text)
    (folder / "empty").mkdir()
    (folder / "foreign").mkdir()
    (folder / "foreign" / "config.json").write_text('{"model_type": "videomae", "architectures": ["VideoMAEModel"]}')
    for kind in ("cut", "lacking", "misshapen"):
        shutil.copytree(student, folder / kind)
        path = folder / kind / "model.safetensors"
        if kind == "cut":
            path.write_bytes(path.read_bytes()[:-1000])
            continue
        weights = load_file(path)
        (name,) = [name for name in weights if name.endswith("layers.0.mlp.fc1.bias")]
        weights[name] = weights[name][:3].clone()
        if kind == "lacking":
            del weights[name]
        save_file(weights, path, {"format": "pt"})
    return {"F": folder, "S": shapes, "M": student}


# Words of the command line, and words of the line that names the mistake. {F} is the folder above, {S} the rendered
# clips, {M} a stage-1 folder, {T} a teacher.
STAGE1 = "--train_data {S}/train.csv --teacher_name_or_path {T} --output_dir {F}/run --dataloader_num_workers 0"
TINY = "--image_size 64 --hidden_size 32 --num_hidden_layers 2 --num_attention_heads 2 --intermediate_size 48"
TINY += " --num_frames 4 --num_aligned_layers 2 --max_steps 2 --report_to none --per_device_train_batch_size 4"
FILLED = f"{STAGE1} {TINY}"
CLASSES = "--train_data {S}/train.csv --validation_data {S}/validation.csv --output_dir {F}/run --use_cpu true"
STAGE2 = "--vision_name_or_path {M} --train_corpora {S}/train_captions.json --media_types video --output_dir {F}/run"
TEXTS = "--train_data {S}/train_captions.json --validation_data {S}/train_captions.json --use_cpu true"
STAGE1_FOLDER = "stage-1 pre-training folder"
MISTAKES = [
    ("training.stage1", "--config {F}/list.yaml", "list.yaml"),
    ("training.stage1", "--config {F}/broken.yaml", "broken.yaml is not YAML"),
    ("training.stage1", "--config {F}/tagged.yaml", "tagged.yaml is not YAML"),
    ("training.stage1", "--config {F}/section.yaml", "mask_ratio belongs in section 'mask'"),
    ("training.stage1", "--config {F}/key.yaml", "unknown keys ['lerning_rate']"),
    ("training.stage1", "--config {F}/value.yaml", "learning_rate in section 'training' is 'fast'"),
    ("training.stage1", "--config {F}/none.yaml", "neither a file nor a recipe"),
    ("training.stage1", "--config stage2_umt_vit_b16_5m", "a recipe of `umt-hf pretrain stage2`"),
    ("training.stage1", "", "Set train_data"),
    ("training.stage1", "--mask_ratio", "expected one argument"),
    ("training.stage1", "--mask_ratio 1.5", "mask_ratio must be in [0, 1)"),
    ("training.stage1", "--mask_type atention", "invalid choice: 'atention'"),
    ("training.stage1", "--save_steps 0", "save_steps"),
    ("training.stage1", "--preemption_signal SIGHUP", "'SIGUSR2', 'none')."),
    ("training.stage1", "--profile maybe", "(case insensitive)."),
    ("training.stage1", "--max_skipped_ratio 5", "max_skipped_ratio must be in [0, 1], got 5.0."),
    ("training.stage1", "--preemption_exit_code 300", "preemption_exit_code must be in [1, 255], got 300."),
    ("training.stage2", "--train_data x", "Unknown flag --train_data: here it is --train_corpora."),
    ("finetuning.retrieval", "--train_corpora x", "Unknown flag --train_corpora: here it is --train_data."),
    ("evaluation.classification", "--validation_data x", "Unknown flag --validation_data: here it is --data."),
    ("training.stage1", "words", "'words' belongs to no flag"),
    ("training.stage1", STAGE1.replace("train.csv", "trian.csv"), "trian.csv: no such file"),
    ("training.stage1", STAGE1.replace("{S}/train.csv", "{F}/empty"), "empty"),
    ("training.stage1", STAGE1.replace("{S}/train.csv", "{F}/notes.txt"), "notes.txt"),
    ("training.stage1", FILLED.replace("{T}", "{F}/nobody"), "--teacher_name_or_path"),
    ("training.stage1", FILLED.replace("{T}", "{F}/foreign"), "of type 'videomae'"),
    ("training.stage1", f"{STAGE1} {TINY} --patch_size 32", "patch"),
    ("training.stage1", f"{STAGE1} {TINY} --hidden_size 33", "hidden_size"),
    ("training.stage1", f"{STAGE1} {TINY} --model_name_or_path {{F}}/foreign", "of type 'videomae'"),
    ("training.stage1", f"{STAGE1} {TINY} --model_name_or_path {{F}}/weights.pth", "umt-hf convert"),
    ("training.stage1", f"{STAGE1} {TINY} --model_name_or_path {{F}}/cut", "model.safetensors is damaged"),
    ("training.stage1", f"{STAGE1} {TINY} --model_name_or_path {{F}}/lacking", "layers.0.mlp.fc1.bias"),
    ("training.stage1", f"{STAGE1} {TINY} --model_name_or_path umt-vit-b16", "umt-hf convert umt-vit-b16"),
    ("training.stage1", f"{STAGE1} {TINY} --report_to wandb", "wandb"),
    ("training.stage1", f"{STAGE1} {TINY} --report_to nothing", "nothing"),
    ("training.stage1", f"{STAGE1} {TINY} --output_dir {{F}}/notes.txt", "notes.txt"),
    ("training.stage1", f"{STAGE1} {TINY} --output_dir /proc/run", "/proc/run"),
    ("training.stage1", f"{STAGE1} {TINY} --resume_from_checkpoint {{F}}/empty", "empty"),
    ("training.stage1", f"{STAGE1} {TINY} --per_device_train_batch_size 1000", "batch"),
    ("training.stage2", "", "Set train_corpora"),
    ("training.stage2", STAGE2, "bert-base-uncased is not a folder here"),
    ("training.stage2", STAGE2, "The text model is missing, give a BERT by --text_name_or_path: google-bert/"),
    (
        "training.stage1",
        FILLED.replace("{T}", "openai/clip"),
        "give a CLIP, SigLIP or DINO by --teacher_name",
    ),
    ("training.stage2", STAGE2 + " --media_types video image", "media_types"),
    ("training.stage2", STAGE2 + " --vision_name_or_path {F}/foreign", "of type 'videomae'"),
    ("finetuning.classification", CLASSES, "Set --model_name_or_path"),
    ("finetuning.classification", CLASSES + " --model_name_or_path {F}/misshapen", "layers.0.mlp.fc1.bias (3,)"),
    (
        "finetuning.classification",
        CLASSES + " --model_name_or_path {M} --class_names {F}/classes.json",
        "classes.json",
    ),
    ("finetuning.classification", CLASSES + " --model_name_or_path {M} --train_split x", "train_split"),
    ("finetuning.classification", CLASSES + " --model_name_or_path {M} --mode lorra", "invalid choice: 'lorra'"),
    ("finetuning.detection", "--model_name_or_path {M} --train_data {F}/empty.json", "validation_data"),
    ("finetuning.retrieval", TEXTS + " --model_name_or_path {M}", STAGE1_FOLDER),
    ("finetuning.question_answering", TEXTS + " --model_name_or_path {M} --mode linear_probe", "for classification"),
    ("evaluation.classification", "--model_name_or_path {M} --data {S}/validation.csv", STAGE1_FOLDER),
    ("evaluation.classification", "--model_name_or_path {F}/none --data {S}/validation.csv", "no such folder"),
    ("evaluation.classification", "--data {S}/validation.csv", "model_name_or_path"),
    ("evaluation.detection", "--model_name_or_path {M} --data {F}/empty.json", STAGE1_FOLDER),
    ("evaluation.retrieval", "--model_name_or_path {M} --data {S}/train_captions.json", STAGE1_FOLDER),
    ("evaluation.multiple_choice", "--model_name_or_path {F}/empty --data {F}/choices.json", "it is empty"),
    (
        "evaluation.question_answering",
        "--model_name_or_path {F}/foreign --data {S}/train_questions.json",
        "of type 'videomae'",
    ),
]
# What a script needs beside its model.
DATA = {
    "training.stage1": f"{STAGE1} {TINY}",
    "training.stage2": STAGE2.replace("--vision_name_or_path {M} ", ""),
    "finetuning.classification": CLASSES,
    "finetuning.detection": "--train_data {S}/train_boxes.json --validation_data {S}/train_boxes.json "
    "--label_keys shape --output_dir {F}/run --use_cpu true",
    "finetuning.retrieval": TEXTS,
    "finetuning.question_answering": TEXTS.replace("captions", "questions"),
    **dict.fromkeys(EVALUATION, "--data {S}/train_captions.json"),
    "evaluation.moments": "--data {F}/moments.json",
    "evaluation.multiple_choice": "--data {F}/choices.json",
    "evaluation.question_answering": "--data {S}/train_questions.json",
}


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize(
    ("flags", "cure"),
    [
        ("umt-vit-b16", "that is not on this machine yet: run `umt-hf convert umt-vit-b16`, or add --convert"),
        ("umt-vit-b16 --convert", "b16_ptk710_f8_res224.pth at revision 'main' cannot be fetched"),
        ("owner/model", "HF_HUB_OFFLINE"),
    ],
)
def test_a_model_that_is_not_here(script, flags, cure, places, tmp_path):
    flag = "vision_name_or_path" if script == "training.stage2" else "model_name_or_path"
    words = f"{DATA[script]} --{flag} {flags}".format(**places).split()
    error = read_error(fail(script, words, environment={"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}))
    assert error.startswith("Error: ") and cure in error and not error.endswith(".."), error


@pytest.fixture(scope="module")
def places(shapes, student, teacher, tmp_path_factory) -> dict[str, Path]:
    return write_files(tmp_path_factory.mktemp("mistakes"), shapes, student) | {"T": teacher}


@pytest.mark.parametrize(("script", "line", "cure"), MISTAKES)
def test_a_mistake_is_one_line_with_its_cure(script, line, cure, places):
    words = [word.format(**places) for word in line.split()]
    error = read_error(fail(script, words))
    assert error.startswith("Error: ") and cure in error, error


def write_broken_list(folder: Path, shapes: Path) -> Path:
    """A list of clips of which none can be read."""
    lines = (shapes / "train.csv").read_text().splitlines()
    for i in range(len(lines)):
        (folder / f"broken_{i}.mp4").write_bytes(b"no video")
    path = folder / "train.csv"
    labels = [line.split(",")[1] for line in lines]
    path.write_text("".join(f"{folder}/broken_{i}.mp4,{label}\n" for i, label in enumerate(labels)))
    return path


@pytest.mark.parametrize("num_workers", [0, pytest.param(1, marks=pytest.mark.heavy)])
def test_too_many_unreadable_videos_end_a_run_by_one_line(flags, shapes, tmp_path, num_workers):
    """In a worker of the loader the error has a traceback in its words."""
    train = write_broken_list(tmp_path, shapes)
    error = read_error(fail("training.stage1", flags(train_data=train, dataloader_num_workers=num_workers)))
    assert error.startswith("Error: No video of a batch could be read: ") and "broken_" in error


def test_unreadable_videos_of_a_fine_tuning_end_it_by_one_line(shapes, student, tmp_path):
    train = write_broken_list(tmp_path, shapes)
    words = f"--train_data {train} --validation_data {shapes}/validation.csv --model_name_or_path {student}"
    words += f" --output_dir {tmp_path}/run --use_cpu true --dataloader_num_workers 0 --max_steps 1 --report_to none"
    error = read_error(fail("finetuning.classification", words.split()))
    assert "videos in a row could not be read. The last: " in error and "broken_" in error


def test_a_run_that_diverges_ends_by_one_line_and_its_own_code(flags):
    words = flags(learning_rate="1e30", warmup_steps=0, max_steps=20, max_nonfinite_steps=1, validation_data=None)
    error = read_error(fail("training.stage1", words, exit_code=3))
    assert error.startswith("Error: 2 steps in a row had NaN or Inf gradients: lower learning_rate")


@pytest.mark.parametrize("script", ["training.stage1", "finetuning.classification"])
def test_a_push_by_nobody_ends_by_one_line(script, flags, shapes, student, tmp_path):
    words = flags()
    if script != "training.stage1":
        words = f"{CLASSES} --model_name_or_path {{M}} --report_to none".format(
            F=tmp_path, S=shapes, M=student
        ).split()
    words += ["--push_to_hub", "true", "--hub_model_id", "me/model"]
    error = read_error(fail(script, words, environment={"HF_HOME": str(tmp_path), "HF_TOKEN": ""}))
    assert error.startswith("Error: Nobody is logged in to the Hub. Run `hf auth login`")


@pytest.mark.parametrize(
    "number,code,word", [(signal.SIGINT, 130, "Interrupted"), (signal.SIGTERM, 143, "Terminated")]
)
def test_what_was_saved_is_said_after_an_interruption(number, code, word, flags, tmp_path):
    words = flags(save_steps=1, max_steps=1000, save_total_limit=2)
    output = tmp_path / "output"
    process = start_process(
        run_script, "training.stage1", words, environment=build_environment(0, 1, 0), output=output
    )
    deadline = time.monotonic() + 60
    while not list((tmp_path / "run").glob("checkpoint-[0-9]")) and time.monotonic() < deadline:
        time.sleep(0.01)
    os.kill(process.pid, number)
    process.join(30)
    error = read_error(read_output(output))
    assert process.exitcode == code, error
    newest = max(int(path.name[11:]) for path in (tmp_path / "run").glob("checkpoint-*") if path.name[11:].isdigit())
    assert error == (
        f"{word}. The newest checkpoint is {tmp_path}/run/checkpoint-{newest}; the same command with "
        "--resume_from_checkpoint auto goes on from it."
    )


def test_an_interruption_before_the_first_checkpoint(flags, tmp_path):
    output = tmp_path / "output"
    process = start_process(
        run_script, "training.stage1", flags(max_steps=1000), environment=build_environment(0, 1, 0), output=output
    )
    deadline = time.monotonic() + 60
    while not (tmp_path / "run" / "metrics.jsonl").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGINT)
    process.join(30)
    assert process.exitcode == 130 and read_error(read_output(output)) == "Interrupted. No checkpoint was saved."


def test_a_second_run_is_one_line(flags, tmp_path):
    with hold_lock(tmp_path / "run" / ".lock", "run"):
        error = read_error(fail("training.stage1", flags()))
    assert error.startswith(f"Error: output_dir={tmp_path}/run is being written by another run (process ")
    assert error.endswith(". Wait until it ends, or choose another one.")


def test_several_processes_say_it_once():
    """The launcher stops those that fail like the main process; here the time they give it is over at once."""
    output = run_ranks(run_script, "training.stage1", ["--mask_ratio", "7"], 0.0, num_processes=2, exit_code=2)
    lines = [line for line in output.stderr.splitlines() if line.startswith(("Error", "Process"))]
    assert lines == [
        "Error: mask_ratio must be in [0, 1), got 7.0.",
        "Process 1: Error: mask_ratio must be in [0, 1), got 7.0.",
    ]


def run_verb(*words: str, **environment: str) -> subprocess.CompletedProcess:
    """The installed command."""
    command = [sys.executable, "-c", "import sys, umt_hf_launcher; sys.argv[0] = 'umt-hf'; umt_hf_launcher.main()"]
    variables = os.environ | {"PYTHONPATH": str(ROOT)} | environment
    return subprocess.run([*command, *words], cwd=ROOT, env=variables, capture_output=True, text=True, timeout=300)


@pytest.mark.heavy
@pytest.mark.slow
def test_the_verb_runs_the_script_in_several_processes(flags, tmp_path):
    stage1.main(flags(output_dir=tmp_path / "one", per_device_train_batch_size=8, max_steps=2))
    options = ["--num_processes", "2", "--main_process_port", str(find_free_port())]
    result = run_verb("pretrain", "stage1", *options, *flags(output_dir=tmp_path / "two", max_steps=2))
    assert result.returncode == 0, result.stderr[-3000:]
    assert read_losses(tmp_path / "two") == pytest.approx(read_losses(tmp_path / "one"), abs=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("num_processes", [pytest.param("1", marks=pytest.mark.heavy), "2"])
def test_the_verb_ends_with_the_scripts_line_and_code(num_processes):
    options = ["--num_processes", num_processes, "--main_process_port", str(find_free_port())]
    result = run_verb("finetune", "classification", *options, "--lerning_rate", "1")
    assert result.returncode == 2, result.stderr
    error = read_error(Output(result.stdout, result.stderr))
    assert error == "Error: Unknown flag --lerning_rate: did you mean --learning_rate?"


def test_a_configuration_of_the_launcher_that_is_broken(tmp_path):
    (tmp_path / "accelerate.yaml").write_text("distributed_type: [")
    result = run_verb("evaluate", "retrieval", "--accelerate_config", str(tmp_path / "accelerate.yaml"))
    assert result.returncode == 2 and "accelerate.yaml" in read_error(Output(result.stdout, result.stderr))
