"""A head that was never trained says so once, when it first answers; trained and loaded heads never do."""

import copy
import io
import logging

import pytest
import torch
from torch.optim.swa_utils import AveragedModel
from transformers import AutoModelForVideoClassification, Trainer, TrainingArguments

from tests.unit.finetuning.test_classification import tiny_config
from tests.unit.inference.test_search import save_model
from tests.unit.modeling.test_modeling_video_text import TINY, build_batch
from umt_hf import (
    UMTVideoForActionDetection,
    UMTVideoForPreTraining,
    UMTVideoForVideoClassification,
    UMTVideoTextConfig,
    UMTVideoTextForPreTraining,
    UMTVideoTextForQuestionAnswering,
    UMTVideoTextForRetrieval,
    UMTVideoTextModel,
)

CLIP = torch.randn(2, 2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
BOXES = torch.tensor([[[2.0, 2.0, 20.0, 20.0]]] * 2)


def run_detector(model):
    return model(pixel_values=CLIP, boxes=BOXES, labels=torch.zeros(2, 1, 3)).loss


def run_classifier(model):
    return model(pixel_values=CLIP, labels=torch.tensor([0, 1])).loss


def run_matching(model):
    batch = build_batch()
    return model(input_ids=batch["input_ids"], pixel_values=batch["pixel_values"], return_loss=True).loss


def run_answers(model):
    answers = torch.tensor([[101, 105, 106, 102]] * 2)
    questions = torch.tensor([[101, 104, 107]] * 2)
    return model(pixel_values=CLIP, input_ids=questions, labels=answers).loss


HEADS = {
    "classification": (
        UMTVideoForVideoClassification,
        run_classifier,
        ["classifier of UMTVideoForVideoClassification"],
    ),
    "detection": (UMTVideoForActionDetection, run_detector, ["classifier of UMTVideoForActionDetection"]),
    "retrieval": (UMTVideoTextForRetrieval, run_matching, ["matching_head of UMTVideoTextForRetrieval"]),
    "stage 2": (
        UMTVideoTextForPreTraining,
        run_matching,
        ["matching_head of UMTVideoTextForPreTraining", "mlm_head of UMTVideoTextForPreTraining"],
    ),
    "questions": (UMTVideoTextForQuestionAnswering, run_answers, ["lm_head of UMTTextLMHeadModel"]),
}


@pytest.fixture
def warned(caplog):
    """Heads that have warned since the last call."""

    def read() -> list[str]:
        found = [record.getMessage() for record in caplog.records if "is not trained" in record.getMessage()]
        caplog.clear()
        return sorted(message.split(" is not trained")[0] for message in found)

    caplog.set_level(logging.WARNING)
    return read


def build(model_class):
    torch.manual_seed(0)
    # Set beforehand, since old versions of Dynamo do not trace the loss that sets it.
    fields = {"hidden_size": 32, "problem_type": "single_label_classification"}
    is_video = not issubclass(model_class, UMTVideoTextModel | UMTVideoTextForQuestionAnswering)
    return model_class(tiny_config(**fields) if is_video else UMTVideoTextConfig(**TINY))


@pytest.mark.parametrize("head", HEADS)
def test_a_fresh_head_warns_once(head, warned):
    model_class, run, names = HEADS[head]
    model = build(model_class).eval()
    run(model)
    assert warned() == names
    run(model)
    assert warned() == []


@pytest.mark.parametrize("head", HEADS)
def test_a_folder_without_the_head_leaves_it_fresh(head, warned, tmp_path):
    model_class, run, names = HEADS[head]
    if head in ("classification", "detection"):
        UMTVideoForPreTraining(tiny_config(hidden_size=32)).save_pretrained(tmp_path)
    else:
        UMTVideoTextModel(UMTVideoTextConfig(**TINY)).save_pretrained(tmp_path)
    run(
        model_class.from_pretrained(tmp_path, num_labels=3)
        if head == "detection"
        else model_class.from_pretrained(tmp_path)
    )
    assert warned() == names


@pytest.mark.parametrize("head", HEADS)
def test_a_trained_head_is_silent_and_stays_so(head, warned, tmp_path):
    model_class, run, _ = HEADS[head]
    model = build(model_class)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    run(model).backward()
    optimizer.step()
    run(model.eval())
    model.save_pretrained(tmp_path)
    reloaded = model_class.from_pretrained(tmp_path)
    run(reloaded)
    run(copy.deepcopy(reloaded))
    plain = build(model_class).eval()
    plain.load_state_dict(model.state_dict())
    run(plain)
    assert warned() == []


def test_weights_trained_in_a_compiled_graph_count_as_trained(warned):
    model = build(UMTVideoForVideoClassification)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    compiled(pixel_values=CLIP, labels=torch.tensor([0, 1])).loss.backward()
    optimizer.step()
    run_classifier(model.eval())
    assert warned() == []


@pytest.mark.parametrize("head", ["classification", "retrieval", pytest.param("questions", marks=pytest.mark.heavy)])
def test_a_fresh_head_breaks_no_graph(head, warned):
    model_class, run, _ = HEADS[head]
    torch._dynamo.reset()
    model = build(model_class).eval()
    reference = run(build(model_class).eval()) if head != "retrieval" else None
    warned()
    if head == "classification":
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        found = run(compiled)
    elif head == "questions":
        compiled = torch.compile(model, backend="aot_eager")
        found = run(compiled)
        explained = torch._dynamo.explain(model.answer_decoder.lm_head)(torch.zeros(1, 2, 32))
        assert explained.graph_break_count == 0
    else:
        explained = torch._dynamo.explain(model.matching_head)(torch.zeros(1, 32))
        assert explained.graph_break_count == 0
        return
    torch.testing.assert_close(found, reference, atol=1e-5, rtol=1e-5)


def test_a_pooling_that_the_folder_lacks_is_fresh(warned, tmp_path):
    build(UMTVideoForVideoClassification).save_pretrained(tmp_path)
    run_classifier(UMTVideoForVideoClassification.from_pretrained(tmp_path, pooling_type="attentive"))
    assert warned() == ["attentive_pooling of UMTVideoForVideoClassification"]


def test_a_head_for_other_classes_is_fresh(warned, tmp_path):
    build(UMTVideoForVideoClassification).save_pretrained(tmp_path)
    options = {"num_labels": 5, "ignore_mismatched_sizes": True}
    run_classifier(UMTVideoForVideoClassification.from_pretrained(tmp_path, **options))
    assert warned() == ["classifier of UMTVideoForVideoClassification"]


def test_copies_know_what_they_are_copies_of(warned):
    model = build(UMTVideoForVideoClassification)
    run_classifier(copy.deepcopy(model).eval())
    assert warned() == ["classifier of UMTVideoForVideoClassification"]
    stream = io.BytesIO()
    torch.save(model, stream)
    stream.seek(0)
    run_classifier(torch.load(stream, weights_only=False).eval())
    assert warned() == ["classifier of UMTVideoForVideoClassification"]
    averaged = AveragedModel(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    run_classifier(model).backward()
    optimizer.step()
    averaged.update_parameters(model)
    run_classifier(averaged.module.eval())
    assert warned() == []


def test_a_decoder_copied_from_stage_2_is_silent(warned, tmp_path):
    save_model(tmp_path, UMTVideoTextForPreTraining)
    run_answers(UMTVideoTextForQuestionAnswering.from_pretraining(tmp_path))
    assert warned() == []


def test_the_auto_class_of_the_pipeline_warns_on_a_stage_1_folder(warned, tmp_path):
    config = tiny_config()
    UMTVideoForPreTraining(config).save_pretrained(tmp_path)
    with torch.no_grad():
        AutoModelForVideoClassification.from_pretrained(tmp_path)(pixel_values=CLIP)
    assert warned() == ["classifier of UMTVideoForVideoClassification"]


def test_the_trainer_trains_in_silence(warned, tmp_path):
    rows = [{"pixel_values": CLIP[0], "labels": 0}, {"pixel_values": CLIP[1], "labels": 1}]
    arguments = TrainingArguments(
        str(tmp_path),
        max_steps=1,
        report_to="none",
        use_cpu=True,
        save_strategy="no",
        eval_strategy="steps",
        eval_steps=1,
    )
    Trainer(build(UMTVideoForVideoClassification), arguments, train_dataset=rows, eval_dataset=rows).train()
    assert warned() == []
