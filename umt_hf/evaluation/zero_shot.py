r"""Test a model of videos and texts on classes that it was not trained on, each a text, and write a report.

    umt-hf evaluate zero-shot --model_name_or_path outputs/retrieval \
        --data videos/test --templates clip_kinetics

Source: Radford et al., "Learning Transferable Visual Models From Natural Language Supervision", ICML 2021.
"""

import dataclasses
from collections import Counter
from dataclasses import dataclass
from typing import Any, cast

from accelerate import Accelerator

from ..data.labels import get_label_names
from ..data.lists.sharing import shared_folders
from ..data.sources import load_videos
from ..data.streams import check_stored_frames
from ..data.targets import fit_labels, list_labels
from ..hub_cards.label_names import read_label_names
from ..inference.labels.zero_shot import DEFAULT_TEMPLATES, ZeroShotHead, ZeroShotVideoClassifier
from ..runs.arguments import ClassNameArguments, EvaluatedModelArguments
from ..runs.config import describe, script, set_defaults
from .classification import (
    ClassifiedVideos,
    LabelledDataArguments,
    ViewReportArguments,
    classify_table,
    describe_classes,
    draw_confusion,
    list_predictions,
)
from .report import describe_run, write_report
from .setup import measured_run, override_settings, require_names, say_tested


@dataclass(kw_only=True)
class NamedClassesArguments(LabelledDataArguments, ClassNameArguments):
    """Held-out videos with classes that have names."""


@dataclass(kw_only=True)
@set_defaults(num_clips=1, num_crops=1)
class ZeroShotArguments(ViewReportArguments):
    """What the classes are called, the views of each video, and the report; a batch counts views."""

    templates: list[str] = describe(
        list(DEFAULT_TEMPLATES),
        "Texts with {} for the class, files with one a line, or the names of sets: video ('a video of {}'), plain "
        "('{}'), clip_kinetics (28), clip_ucf101 (48). Several are an ensemble.",
    )


SECTIONS = {"model": EvaluatedModelArguments, "data": NamedClassesArguments, "evaluation": ZeroShotArguments}


@script(SECTIONS)
def main(
    model_args: EvaluatedModelArguments, data: NamedClassesArguments, args: ZeroShotArguments
) -> dict[str, float]:
    """Load, classify, report; also a picture of the confusion matrix.

    Returns:
        Metrics; see `ClassifiedVideos.compute_metrics`.
    """
    accelerator = Accelerator(mixed_precision=model_args.mixed_precision)
    name, source = require_names(model_args, data)
    names = None if data.class_names is None else read_label_names(data.class_names)
    with shared_folders():
        table = load_videos(source, data.data_root, data.csv_separator, **data.dataset_options(), class_names=names)
    names = names or get_label_names(table.features)
    if names is None:
        raise ValueError(f"{source}: its classes have numbers and no names, which texts are made of: set class_names.")
    classifier = ZeroShotVideoClassifier(
        name, names, args.templates, accelerator.device, model_args.attn_implementation, tokens=model_args
    )
    override_settings(classifier.processor, data, ("decoder",))
    check_stored_frames(table, classifier.processor.num_frames, classifier.processor.sampling_strategy)
    table = fit_labels(source, data.draw_rows(table), classifier.labels, many_labels=False)
    numbers = Counter(label for own in list_labels(source, table) for label in own)
    texts = len(classifier.templates or ())
    shown = f"{len(table):,} videos of {len(numbers):,} of {len(names):,} classes, {texts} texts for each class"
    say_tested(model_args, data, shown)
    with measured_run(accelerator, data):
        found = classify_table(classifier, table, accelerator, data, args)
    scored = cast("ClassifiedVideos", found)  # one label each
    metrics = scored.compute_metrics()
    if accelerator.is_main_process:
        encoder: Any = cast("ZeroShotHead", classifier.model).model
        report = {
            "task": "zero_shot_classification",
            "metrics": metrics,
            **describe_classes(scored, classifier.labels),
            "unreadable": list(scored.unreadable.values()),
            "num_videos": len(table),
            "view_merging": "mean of softmax",
            **describe_run(encoder, classifier.processor, accelerator, model_args, data),
            **dataclasses.asdict(args),
            "templates": classifier.templates,
        }
        write_report(accelerator, args.report_folder, report, list_predictions(table, scored, classifier.labels))
        draw_confusion(scored, classifier.labels, args.report_folder)
    # The others would otherwise end, and a launcher take that for the end of the run.
    accelerator.wait_for_everyone()
    return metrics


if __name__ == "__main__":
    main()
