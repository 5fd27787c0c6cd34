"""The table of the scripts: the module of each, its verb in the `umt-hf` command, and the recipes it takes.

Imports nothing, so that the command can show its verbs without PyTorch.
"""

from dataclasses import dataclass

MISTAKE_CODE = 2  # exit code of a script, and of the `umt-hf` command, after a user's error
MACHINE_CODE = 4  # after a fault of the machine: the same command may work later, or on another one
# Trackers make a folder of this name. One named umt_hf would be the package for Python in the run's folder.
TRACKED_PROJECT = "umt-hf"
LAUNCHER_VARIABLE = "UMT_HF_LAUNCHER"  # number of the process of `umt-hf` that starts a script


@dataclass(frozen=True)
class ScriptEntry:
    """A script that `accelerate launch -m` or the `umt-hf` command starts.

    Attributes:
        module: Its name in Python.
        group: First word of its verb: "pretrain", "finetune" or "evaluate".
        verb: Second word.
        title: What it does, for help.
        recipes: How the names of its recipes start.
    """

    module: str
    group: str
    verb: str
    title: str
    recipes: tuple[str, ...]

    @property
    def command(self) -> str:
        """How it is called."""
        return f"umt-hf {self.group} {self.verb}"


SCRIPTS = (
    ScriptEntry(
        "umt_hf.training.stage1",
        "pretrain",
        "stage1",
        "Pre-train a video encoder on videos alone, aligned with a frozen teacher, say a CLIP, on visible tokens.",
        ("stage1_",),
    ),
    ScriptEntry(
        "umt_hf.training.stage2",
        "pretrain",
        "stage2",
        "Pre-train a video encoder and a BERT on videos and images with texts.",
        ("stage2_",),
    ),
    ScriptEntry(
        "umt_hf.finetuning.classification",
        "finetune",
        "classification",
        "Fine-tune a video classifier: all weights, a probe, or LoRA.",
        ("classification_",),
    ),
    ScriptEntry(
        "umt_hf.finetuning.detection",
        "finetune",
        "detection",
        "Fine-tune an action detector on key frames with boxes.",
        ("detection_",),
    ),
    ScriptEntry(
        "umt_hf.finetuning.retrieval",
        "finetune",
        "retrieval",
        "Fine-tune a stage-2 model for search among videos by text.",
        ("retrieval_", "multiple_choice_"),
    ),
    ScriptEntry(
        "umt_hf.finetuning.question_answering",
        "finetune",
        "question-answering",
        "Fine-tune a stage-2 model to answer questions about videos.",
        ("question_answering_",),
    ),
    ScriptEntry(
        "umt_hf.evaluation.classification",
        "evaluate",
        "classification",
        "Test a classifier with several clips and crops per video.",
        (),
    ),
    ScriptEntry(
        "umt_hf.evaluation.zero_shot",
        "evaluate",
        "zero-shot",
        "Test a model with text on classes that it was not trained on.",
        (),
    ),
    ScriptEntry(
        "umt_hf.evaluation.detection",
        "evaluate",
        "detection",
        "Test an action detector by the frame mAP.",
        (),
    ),
    ScriptEntry(
        "umt_hf.evaluation.retrieval",
        "evaluate",
        "retrieval",
        "Test search in both directions, with and without the matching head.",
        ("zero_shot_",),
    ),
    ScriptEntry(
        "umt_hf.evaluation.moments",
        "evaluate",
        "moments",
        "Test when in a video a text is found.",
        (),
    ),
    ScriptEntry(
        "umt_hf.evaluation.multiple_choice",
        "evaluate",
        "multiple-choice",
        "Test the choice among several captions of a video.",
        (),
    ),
    ScriptEntry(
        "umt_hf.evaluation.question_answering",
        "evaluate",
        "question-answering",
        "Test answers to questions about videos.",
        (),
    ),
)
SCRIPTS_BY_MODULE = {entry.module: entry for entry in SCRIPTS}
GROUP_TITLES = {
    "pretrain": "Pre-train models.",
    "finetune": "Fine-tune models.",
    "evaluate": "Test models on held-out data.",
}


def find_script_of_recipe(name: str) -> ScriptEntry | None:
    """The script that takes a recipe of the package, by the recipe's name."""
    return next((entry for entry in SCRIPTS if name.startswith(entry.recipes)), None)
