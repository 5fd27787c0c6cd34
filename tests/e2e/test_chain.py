"""The whole way on rendered videos: stage 1, stage 2, retrieval before and after fine-tuning, answers, search."""

import json

import torch
from transformers import AutoModel, AutoModelForVisualQuestionAnswering, AutoProcessor
from typer.testing import CliRunner

from tests.e2e.runs import FINE_TUNING, to_flags
from tests.e2e.test_stage2 import TINY as STAGE_2
from tests.unit.hub_cards.test_card import lint
from umt_hf import UMTVideoModel
from umt_hf.cli import app
from umt_hf.evaluation import question_answering as evaluate_question_answering
from umt_hf.evaluation import retrieval as evaluate_retrieval
from umt_hf.finetuning import question_answering as finetune_question_answering
from umt_hf.finetuning import retrieval as finetune_retrieval
from umt_hf.hub_cards.card import write_model_card
from umt_hf.moving_shapes.tiny_bert import TextTowerArguments, write_text_tower
from umt_hf.training import stage1, stage2

QUICK = {
    **FINE_TUNING,
    "num_frames": 4,
    "drop_path_rate": 0.0,
    "horizontal_flip_probability": 0.0,
    "per_device_train_batch_size": 8,
    "warmup_epochs": 0,
    "max_steps": 3,
}


def test_from_pixels_to_answers(flags, shapes, teacher, tmp_path):
    """Each step takes the former one's folder by its name alone."""
    stage1.main(flags(output_dir=tmp_path / "student", max_steps=3))
    write_text_tower(
        TextTowerArguments(
            data=str(shapes),
            output_dir=str(tmp_path / "bert"),
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
        )
    )
    stage2.main(
        to_flags(
            **STAGE_2 | {"max_steps": 3},
            train_corpora=shapes / "train_captions.json",
            teacher_name_or_path=teacher,
            vision_name_or_path=tmp_path / "student",
            text_name_or_path=tmp_path / "bert",
            output_dir=tmp_path / "video_text",
        )
    )
    finetune_retrieval.main(
        to_flags(
            **QUICK,
            model_name_or_path=tmp_path / "video_text",
            train_data=shapes / "train_captions.json",
            multiple_videos_per_text=True,
            output_dir=tmp_path / "retrieval",
        )
    )
    finetune_question_answering.main(
        to_flags(
            **QUICK,
            model_name_or_path=tmp_path / "video_text",
            train_data=shapes / "train_questions.json",
            output_dir=tmp_path / "answers",
        )
    )
    evaluation = {"data": shapes / "test_captions.json", "multiple_videos_per_text": "true", "rerank_top_k": 3}
    for name in ("video_text", "retrieval"):
        output = tmp_path / name / "test"
        evaluate_retrieval.main(to_flags(**evaluation, model_name_or_path=tmp_path / name, output_dir=output))
        report = json.loads((output / "report.json").read_text())
        assert 0 <= report["metrics"]["reranked_text_to_video_r1"] <= 1 and report["num_videos"] == 6
    evaluate_question_answering.main(
        to_flags(
            model_name_or_path=tmp_path / "answers",
            data=shapes / "test_questions.json",
            answers=shapes / "answers.json",
            output_dir=tmp_path / "report_answers",
        )
    )
    predictions = json.loads((tmp_path / "report_answers" / "predictions.json").read_text())
    assert len(predictions) == 18

    video = str(next((shapes / "videos" / "test").iterdir()))
    processor = AutoProcessor.from_pretrained(tmp_path / "answers")
    model = AutoModelForVisualQuestionAnswering.from_pretrained(tmp_path / "answers")
    inputs = processor(text=["what color is the ring?"], videos=[video], return_tensors="pt")
    assert model.generate(**inputs, max_new_tokens=4).shape[0] == 1
    with torch.no_grad():
        outputs = AutoModel.from_pretrained(tmp_path / "video_text")(**inputs)
    assert outputs.logits_per_video.shape == (1, 1)
    reference = UMTVideoModel.from_pretrained(tmp_path / "video_text").state_dict()
    stage_1 = UMTVideoModel.from_pretrained(tmp_path / "student").state_dict()
    assert reference.keys() == stage_1.keys()
    assert any(not torch.equal(reference[name], stage_1[name]) for name in reference)  # stage 2 trained the ViT

    for name in ("student", "video_text", "retrieval", "answers"):
        card = write_model_card(tmp_path / name).read_text()
        assert lint(card) == [] and str(tmp_path) not in card
        assert ("](losses.png)" in card) == (name in ("student", "video_text"))  # the others are too short to log one
        assert ("| text to video R@1, re-ranked |" in card) == (name in ("video_text", "retrieval"))

    runner, index = CliRunner(), str(tmp_path / "index")
    result = runner.invoke(
        app,
        ["embed", str(shapes / "videos/test"), "--model", str(tmp_path / "retrieval"), "--out", index]
        + ["--num-workers", "0"],
    )
    assert result.exit_code == 0, result.output
    result = runner.invoke(app, ["search", index, "a red circle", "--top-k", "3", "--rerank", "--json"])
    assert result.exit_code == 0, result.output
    hits = json.loads(result.stdout.strip().splitlines()[-1])
    assert len(hits) == 3 and all(hit["matching_score"] is not None for hit in hits)
