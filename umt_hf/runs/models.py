"""The table of the model classes: what each is for, in words that cards, commands and the Hub share.

Strings alone, so that reading the table imports nothing; `inference.loading.get_model_class` gives the class of a row.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class ModelClass:
    """What is known of all models of a class.

    Attributes:
        name: Of the class, as `config.json` names it.
        module: File in `modeling/` that defines it.
        model_type: Of its configuration.
        title: What it is for.
        usage: Which example the model card shows.
        pipeline_tag: The Hub's name of the task.
        command: Example of a command for such a model, with `{model}` for its name.
        task: The zoo's name of the task; `None` where no released checkpoint is of this class.
        tags: Further tags of the Hub.
    """

    name: str
    module: str
    model_type: str
    title: str
    usage: str
    pipeline_tag: str
    command: str
    task: str | None = None
    tags: tuple[str, ...] = ()


VIDEO = {"module": "modeling_umt_video", "model_type": "umt_video"}
VIDEO_TEXT = {"module": "modeling_umt_video_text", "model_type": "umt_video_text"}
FEATURES_COMMAND = "umt-hf features video.mp4 --model {model} --out features"
SEARCH_COMMAND = "umt-hf embed videos/ --model {model} --out index"

# In the order of training: towers, pre-training, then the tasks.
MODEL_CLASSES = (
    ModelClass(
        "UMTVideoModel",
        **VIDEO,
        title="video features",
        usage="encoder",
        pipeline_tag="feature-extraction",
        command=FEATURES_COMMAND,
    ),
    ModelClass(
        "UMTVideoForPreTraining",
        **VIDEO,
        title="stage-1 pre-training",
        usage="encoder",
        pipeline_tag="feature-extraction",
        command=FEATURES_COMMAND,
        task="pretraining",
        tags=("masked-video-modeling",),
    ),
    ModelClass(
        "UMTVideoForVideoClassification",
        **VIDEO,
        title="video classification",
        usage="classifier",
        pipeline_tag="video-classification",
        command="umt-hf classify video.mp4 --model {model}",
        task="classification",
    ),
    ModelClass(
        "UMTVideoForActionDetection",
        **VIDEO,
        title="action detection",
        usage="detector",
        pipeline_tag="video-classification",
        command='umt-hf detect video.mp4 --model {model} --boxes "20,10,80,60" --seconds 1',
        task="detection",
        tags=("action-detection",),
    ),
    ModelClass(
        "UMTVideoTextModel",
        **VIDEO_TEXT,
        title="video and text features",
        usage="retriever",
        pipeline_tag="feature-extraction",
        command=SEARCH_COMMAND,
        tags=("video-text",),
    ),
    ModelClass(
        "UMTVideoTextForPreTraining",
        **VIDEO_TEXT,
        title="stage-2 pre-training",
        usage="retriever",
        pipeline_tag="feature-extraction",
        command=SEARCH_COMMAND,
        task="video_text_pretraining",
        tags=("video-text", "video-retrieval"),
    ),
    ModelClass(
        "UMTVideoTextForRetrieval",
        **VIDEO_TEXT,
        title="video-text retrieval",
        usage="retriever",
        pipeline_tag="feature-extraction",
        command=SEARCH_COMMAND,
        task="retrieval",
        tags=("video-text", "video-retrieval"),
    ),
    ModelClass(
        "UMTVideoTextForQuestionAnswering",
        **VIDEO_TEXT,
        title="video question answering",
        usage="answerer",
        pipeline_tag="visual-question-answering",
        command='umt-hf ask video.mp4 "what is the man doing?" --model {model}',
        task="question_answering",
        tags=("video-text", "video-question-answering"),
    ),
)
MODELS_BY_NAME = {row.name: row for row in MODEL_CLASSES}
MODELS_BY_TASK = {row.task: row for row in MODEL_CLASSES if row.task is not None}
MODEL_TYPES = tuple(dict.fromkeys(row.model_type for row in MODEL_CLASSES))
VIDEO_TEXT_TASKS = tuple(task for task, row in MODELS_BY_TASK.items() if row.model_type == "umt_video_text")
ALL_CLASSES = tuple(MODELS_BY_NAME)
DUAL_ENCODERS = ("UMTVideoTextModel", "UMTVideoTextForPreTraining", "UMTVideoTextForRetrieval")
# Class of a model -> classes whose folders hold all of its weights. Other classes: their own folders alone.
COMPLETE_FOR = {
    "UMTVideoModel": ALL_CLASSES,
    "UMTVideoTextModel": DUAL_ENCODERS,
    "UMTVideoTextForRetrieval": DUAL_ENCODERS[1:],
}
# Class of a model -> script that trains it, its flag for the start, and classes whose folders it starts from.
TRAINED_BY = {
    "UMTVideoForVideoClassification": ("umt_hf.finetuning.classification", "model_name_or_path", ALL_CLASSES),
    "UMTVideoForActionDetection": ("umt_hf.finetuning.detection", "model_name_or_path", ALL_CLASSES),
    "UMTVideoTextForPreTraining": ("umt_hf.training.stage2", "vision_name_or_path", ALL_CLASSES),
    "UMTVideoTextForRetrieval": ("umt_hf.finetuning.retrieval", "model_name_or_path", DUAL_ENCODERS[1:]),
    "UMTVideoTextForQuestionAnswering": (
        "umt_hf.finetuning.question_answering",
        "model_name_or_path",
        ("UMTVideoTextForPreTraining", "UMTVideoTextForQuestionAnswering"),
    ),
}
