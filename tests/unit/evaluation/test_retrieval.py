"""Retrieval, answers and choices with tiny models: against plain loops over the model, and what goes wrong."""

from dataclasses import replace

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from PIL import Image

from tests.parity.multi_modality import load_table
from tests.unit.modeling.test_modeling_video_text import TINY
from tests.unit.video_files import write_video
from umt_hf import UMTVideoProcessor, UMTVideoTextConfig, UMTVideoTextProcessor
from umt_hf.data.annotations import RetrievalSet
from umt_hf.evaluation import retrieval
from umt_hf.evaluation.metrics.ranks import compute_ranks, mark_right_items
from umt_hf.evaluation.multiple_choice import compute_choice_accuracy, score_choices
from umt_hf.evaluation.question_answering import compute_answer_accuracy
from umt_hf.inference.held_out import HeldOutVideos, evaluation_mode, plan_shard
from umt_hf.inference.question_answering import answer_questions
from umt_hf.modeling.losses_umt import compute_similarity
from umt_hf.modeling.modeling_umt_video_text import (
    UMTVideoTextForQuestionAnswering,
    UMTVideoTextForRetrieval,
    UMTVideoTextModel,
)
from umt_hf.processing.decoding import VideoDecodingError
from umt_hf.processing.processing_umt_video_text import build_tokenizer
from umt_hf.processing.sampling import sample_frame_indices, trim_num_frames

WORDS = load_table("text_rules")["tokenizer"]["vocab"]
TEXTS = ["a dog", "a cat on the table", "two people", "the red car", "a boat on the water", "a man", "snow"]
OPTIONS = {"batch_size": 2, "num_workers": 0}


@pytest.fixture(scope="module")
def videos(tmp_path_factory) -> list[str]:
    folder = tmp_path_factory.mktemp("videos")
    return [str(write_video(folder / f"{i}.mp4", 12 + 9 * i, gop=4 + i)) for i in range(5)]


@pytest.fixture(scope="module")
def processor() -> UMTVideoTextProcessor:
    size = {"height": 32, "width": 32}
    return UMTVideoTextProcessor(
        UMTVideoProcessor(num_frames=2, size=size, do_center_crop=False), build_tokenizer(WORDS, 8)
    )


def build_model(cls=UMTVideoTextForRetrieval, **fields):
    torch.manual_seed(0)
    model = cls(UMTVideoTextConfig(**TINY, **fields))
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.2)  # far from the start, where all pairs are alike
    return model.eval()


@pytest.fixture
def found(videos) -> RetrievalSet:
    """Video 0 has two texts, and text 6 two videos."""
    return RetrievalSet(videos, TEXTS, [[0], [0], [1], [2], [3], [4], [1, 4]], [[0, 1], [2, 6], [3], [4], [5, 6]])


@pytest.fixture
def accelerator() -> Accelerator:
    return Accelerator(cpu=True)


def score_densely(model, processor, found) -> tuple[torch.Tensor, torch.Tensor]:
    pixels = processor(videos=found.videos, sampling_strategy="middle", return_tensors="pt")["pixel_values"]
    text_inputs = processor(text=found.texts, return_tensors="pt")
    with torch.no_grad():
        video, text = model.get_video_features(pixels), model.get_text_features(**text_inputs)
        logits = [
            model.match(tokens.expand(len(found.texts), -1, -1), text.last_hidden_state, text_inputs["attention_mask"])
            for tokens in video.last_hidden_state
        ]
    return compute_similarity(video.pooler_output, text.pooler_output), torch.stack(logits)[..., 1]


def test_metrics_equal_those_of_dense_scores(processor, found, accelerator):
    model = build_model()
    metrics = retrieval.evaluate_retrieval(model, processor, found, accelerator, **OPTIONS)
    assert len(metrics) == 22
    for name, scores in zip(("dual", "reranked"), score_densely(model, processor, found), strict=True):
        ranks = compute_ranks(scores.T, mark_right_items(found.videos_of_text, 5))
        assert metrics[f"{name}_text_to_video_r1"] == pytest.approx((ranks == 1).float().mean().item())
        assert metrics[f"{name}_text_to_video_median_rank"] == ranks.median()
        ranks = compute_ranks(scores, mark_right_items(found.texts_of_video, 7))
        assert metrics[f"{name}_video_to_text_r5"] == pytest.approx((ranks <= 5).float().mean().item())
        assert metrics[f"{name}_video_to_text_median_rank"] == ranks.median()
    assert "reranked_mean_recall" not in retrieval.evaluate_retrieval(
        build_model(UMTVideoTextModel), processor, found, accelerator, rerank=False, **OPTIONS
    )
    with pytest.raises(ValueError, match="no matching head"):
        retrieval.evaluate_retrieval(build_model(UMTVideoTextModel), processor, found, accelerator, **OPTIONS)


def test_blocks_change_nothing(processor, found, accelerator, monkeypatch):
    model = build_model()
    whole = retrieval.evaluate_retrieval(model, processor, found, accelerator, top_k=2, dual_softmax=True, **OPTIONS)
    monkeypatch.setattr(retrieval, "BLOCK_SCORES", 8)
    monkeypatch.setattr("umt_hf.inference.held_out.SHARED_ROWS", 2)
    again = retrieval.evaluate_retrieval(model, processor, found, accelerator, top_k=2, dual_softmax=True, **OPTIONS)
    assert again == whole


def test_dual_softmax_is_the_product_of_two_softmaxes(processor, found, accelerator):
    model = build_model()
    metrics = retrieval.evaluate_retrieval(
        model, processor, found, accelerator, rerank=False, dual_softmax=True, **OPTIONS
    )
    scores = (score_densely(model, processor, found)[0] / model.temperature.detach()).double()
    product = scores.softmax(0) * scores.softmax(1)
    for direction, scores, right in (
        ("text_to_video", product.T, found.videos_of_text),
        ("video_to_text", product, found.texts_of_video),
    ):
        ranks = compute_ranks(scores, mark_right_items(right, scores.shape[1])).float()
        assert metrics[f"dual_softmax_{direction}_r1"] == pytest.approx((ranks == 1).float().mean().item())
        assert metrics[f"dual_softmax_{direction}_median_rank"] == ranks.median()


def test_what_is_not_judged_stays_behind():
    ranks = torch.tensor([1, 2, 4])
    candidates = torch.tensor([[0, 1], [1, 3], [0, 1]])
    logits = torch.tensor([[-200.0, 3.0], [5.0, -1.0], [9.0, 8.0]])
    right = [[0], [1], [2]]
    assert retrieval.rerank_candidates(ranks, candidates, logits, right).tolist() == [2, 1, 4]
    assert retrieval.rerank_candidates(ranks, candidates, torch.zeros(3, 2), right).tolist() == [2, 2, 4]
    scores = torch.tensor([[0.5, 0.7, 0.5, 0.5], [1.0, 1.0, 1.0, 1.0]])
    assert retrieval.select_candidates(scores, 3).tolist() == [[0, 1, 2], [0, 1, 2]]


def test_a_model_that_knows_nothing_finds_nothing(processor, found, accelerator):
    model = build_model()
    for layer in (model.video_projection, model.matching_head):
        torch.nn.init.zeros_(layer.weight)
        torch.nn.init.ones_(layer.bias)
    metrics = retrieval.evaluate_retrieval(model, processor, found, accelerator, **OPTIONS)
    assert metrics["dual_text_to_video_r1"] == metrics["reranked_video_to_text_r1"] == 0
    assert metrics["dual_text_to_video_median_rank"] == 5


def test_nan_is_no_number(processor, found, accelerator):
    model = build_model()
    model.matching_head.bias.data.fill_(float("nan"))
    with pytest.raises(ValueError, match="NaN"):
        retrieval.evaluate_retrieval(model, processor, found, accelerator, **OPTIONS)


def test_a_bad_video_is_named(processor, found, accelerator, tmp_path):
    (tmp_path / "broken.mp4").write_bytes(b"nothing")
    videos = [*found.videos[:4], str(tmp_path / "broken.mp4")]
    for num_workers in (0, 1):
        with pytest.raises(VideoDecodingError, match=r"broken\.mp4"):
            retrieval.evaluate_retrieval(
                build_model(),
                processor,
                replace(found, videos=videos),
                accelerator,
                batch_size=2,
                num_workers=num_workers,
            )
    video = {"path": "in_memory.mp4", "bytes": b"nothing"}
    with pytest.raises(VideoDecodingError, match=r"in_memory\.mp4"):
        HeldOutVideos([video], processor.video_processor)[0]


def test_models_wrapped_by_peft(processor, found, accelerator):
    model = build_model()
    metrics = retrieval.evaluate_retrieval(model, processor, found, accelerator, **OPTIONS)
    adapted = get_peft_model(model, LoraConfig(target_modules=["q_proj"]))  # adapters start as nothing
    assert retrieval.evaluate_retrieval(adapted, processor, found, accelerator, **OPTIONS) == metrics


def test_evaluation_leaves_model_and_random_state_as_they_were(processor, found, accelerator):
    model = build_model().train()
    model.text_model.eval()
    state = torch.get_rng_state()
    in_training = retrieval.evaluate_retrieval(model, processor, found, accelerator, **OPTIONS)
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training and model.vision_model.training and not model.text_model.training
    assert in_training == retrieval.evaluate_retrieval(model.eval(), processor, found, accelerator, **OPTIONS)
    with pytest.raises(KeyError), evaluation_mode(model.train(), accelerator):
        assert not model.training and not torch.is_grad_enabled()
        raise KeyError
    assert model.training and torch.is_grad_enabled()


def test_other_numbers_of_frames_and_images(processor, videos, found, accelerator, tmp_path):
    """Position tables are computed for the frames at hand; an image is a video of one."""
    size = {"height": 32, "width": 32}
    longer = UMTVideoTextProcessor(
        UMTVideoProcessor(num_frames=6, size=size, do_center_crop=False), processor.tokenizer
    )
    features = retrieval.encode_retrieval_set(build_model(), longer, found, accelerator, **OPTIONS)
    assert features.video_tokens.shape == (5, 6 * 16, 32)
    Image.new("RGB", (70, 50), (200, 10, 10)).save(tmp_path / "red.jpg")
    longer.video_processor.num_frames = 1
    assert HeldOutVideos([str(tmp_path / "red.jpg")], longer.video_processor)[0].shape == (1, 3, 32, 32)


def test_half_precision_tokens_and_room_on_disk(processor, found, tmp_path, monkeypatch):
    AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = Accelerator(cpu=True, mixed_precision="bf16")
    features = retrieval.encode_retrieval_set(build_model(), processor, found, accelerator, **OPTIONS)
    assert features.video_tokens.dtype == features.text_tokens.dtype == torch.bfloat16
    assert features.video_embeds.dtype == torch.float32
    AcceleratorState._reset_state(reset_partial_state=True)
    monkeypatch.setattr(retrieval.shutil, "disk_usage", lambda folder: type("Usage", (), {"free": 10})())
    with pytest.raises(OSError, match="cache_dir"):
        retrieval.map_tensor((3, 4), torch.float32, tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("case", load_table("frame_indices")["trimmed30"], ids=str)
def test_first_seconds_as_published(case):
    total = case["vlen"]
    if case["trimmed30"]:
        total = trim_num_frames(total, case["fps"], 30)
    assert sample_frame_indices(total, case["num_frames"], "middle") == case["frame_indices"]


def test_first_seconds_of_a_file(videos, processor):
    """The longest video has 48 frames, 24 a second."""
    settings = {"sampling_strategy": "middle", "return_tensors": "pt", "return_metadata": True}
    configured = UMTVideoProcessor(**processor.video_processor.to_dict() | {"first_seconds": 0.5})
    for batch in (
        processor.video_processor(videos[4], num_frames=4, first_seconds=0.5, **settings),
        configured(videos[4], num_frames=4, **settings),
    ):
        assert list(batch["video_metadata"][0].frames_indices) == [1, 4, 7, 10]
    with pytest.raises(ValueError, match="first_seconds"):
        trim_num_frames(10, None, 30)


def test_shards_cover_everything_once():
    for total in (1, 4, 5, 7):
        for num_processes in (1, 2, 3):
            shards = [
                plan_shard(total, 2, type("Place", (), {"process_index": i, "num_processes": num_processes}))
                for i in range(num_processes)
            ]
            rows = [row for shard in shards for batch in shard for row in batch]
            assert sorted(rows) == list(range(total))


@pytest.fixture
def questions(videos) -> Dataset:
    """The first video has questions 0, 2 and 4."""
    rows = [
        {"video": videos[i % 2 * 3], "question": f"what is {text}", "answers": ["guitar"], "question_id": 10 + i}
        for i, text in enumerate(TEXTS[:5])
    ]
    return Dataset.from_list(rows)


ANSWERS = ["guitar", "black dog", "two", "red", "kitchen"]


def test_answers_of_a_list_are_the_models_first_choice(processor, questions, accelerator):
    model = build_model(UMTVideoTextForQuestionAnswering)
    predictions = answer_questions(model, processor, questions, accelerator, ANSWERS, top_k=3, **OPTIONS)
    encoded = processor.encode_answers(ANSWERS, return_tensors="pt")
    for row, prediction in zip(questions, predictions, strict=True):
        inputs = processor(
            text=[row["question"]], videos=[row["video"]], sampling_strategy="middle", return_tensors="pt"
        )
        indices, probabilities = model.rank_answers(
            inputs["pixel_values"],
            inputs["input_ids"],
            inputs["attention_mask"],
            encoded["input_ids"],
            encoded["attention_mask"],
            top_k=3,
        )
        assert prediction["question_id"] == row["question_id"]
        assert prediction["answer"] == ANSWERS[indices[0, 0]]
        assert prediction["probability"] == pytest.approx(probabilities[0, 0].item(), abs=1e-5)
    with pytest.raises(ValueError, match="set top_k=5"):
        answer_questions(model, processor, questions, accelerator, ANSWERS, top_k=6, **OPTIONS)
    whole = answer_questions(model, processor, questions, accelerator, ANSWERS, **OPTIONS)  # a list shorter than 128
    assert whole == answer_questions(model, processor, questions, accelerator, ANSWERS, top_k=5, **OPTIONS)


def test_answers_in_own_words(processor, questions, accelerator):
    model = build_model(UMTVideoTextForQuestionAnswering)
    predictions = answer_questions(model, processor, questions, accelerator, **OPTIONS)
    row = questions[3]
    inputs = processor(text=[row["question"]], videos=[row["video"]], sampling_strategy="middle", return_tensors="pt")
    tokens = model.generate(**inputs, max_new_tokens=4, do_sample=False)
    assert predictions[3] == {
        "question_id": 13,
        "answer": processor.decode(tokens[0], skip_special_tokens=True),
    }
    assert len({prediction["answer"] for prediction in predictions}) > 1


def test_answer_accuracy_by_hand(questions):
    predictions = [{"question_id": i, "answer": "guitar"} for i in (12, 10)] + [{"question_id": 11, "answer": "dog"}]
    assert compute_answer_accuracy(predictions, questions) == {"accuracy": 2 / 5}  # two are unanswered
    with pytest.raises(ValueError, match="twice"):
        compute_answer_accuracy(predictions * 2, questions)
    with pytest.raises(ValueError, match=r"not in the set: \[99\]"):
        compute_answer_accuracy([{"question_id": 99, "answer": "dog"}], questions)
    with pytest.raises(ValueError, match="Question 10 has no annotated answer"):
        compute_answer_accuracy(
            predictions, questions.map(lambda row: {"answers": [] if row["question_id"] == 10 else ["x"]})
        )


def test_choices_of_different_numbers_of_options(processor, videos, accelerator):
    model = build_model()
    choices = Dataset.from_list(
        [
            {"video": videos[0], "caption": TEXTS[:3], "answer": 0},
            {"video": videos[1], "caption": TEXTS[:2], "answer": 1},
            {"video": videos[2], "caption": TEXTS[2:], "answer": 2},
        ]
    )
    scores = score_choices(model, processor, choices, accelerator, **OPTIONS)
    assert [len(row) for row in scores] == [3, 2, 5]
    for row, ours in zip(choices, scores, strict=True):
        single = RetrievalSet([row["video"]], row["caption"], [], [])
        similarities, logits = (values[0] for values in score_densely(model, processor, single))
        text = processor(text=row["caption"], return_tensors="pt")
        pixels = processor(videos=[row["video"]], sampling_strategy="middle", return_tensors="pt")["pixel_values"]
        with torch.no_grad():
            tokens = model.get_video_features(pixels).last_hidden_state.expand(len(row["caption"]), -1, -1)
            both = model.match(tokens, model.get_text_features(**text).last_hidden_state, text["attention_mask"])
            expected = 0.7 * both.softmax(1)[:, 1] + 0.3 * (similarities / model.temperature).softmax(0)
        torch.testing.assert_close(logits, both[:, 1])
        torch.testing.assert_close(torch.tensor(ours), expected, atol=1e-5, rtol=0)
    right = [
        max(range(len(row)), key=row.__getitem__) == answer for row, answer in zip(scores, [0, 1, 2], strict=True)
    ]
    assert compute_choice_accuracy(scores, choices) == {"accuracy": sum(right) / 3}


def test_each_video_is_projected_once(processor, found, accelerator):
    """Keys and values of a video serve all pairs that it is in, of matching and of choices."""
    model, rows = build_model(), []
    layer = next(layer for layer in model.text_model.layers if layer.cross_attention is not None)
    layer.cross_attention.k_proj.register_forward_hook(lambda _, inputs, __: rows.append(len(inputs[0])))
    retrieval.evaluate_retrieval(model, processor, found, accelerator, top_k=4, **OPTIONS)
    assert sum(rows) == len(found.videos) and max(rows) <= OPTIONS["batch_size"]
    rows.clear()
    choices = Dataset.from_list([{"video": video, "caption": TEXTS[:3], "answer": 0} for video in found.videos])
    score_choices(model, processor, choices, accelerator, **OPTIONS)
    assert sum(rows) == len(found.videos)


@pytest.mark.parametrize("closed", [True, False])
def test_each_video_of_many_questions_is_encoded_and_projected_once(processor, questions, accelerator, closed):
    model, rows, clips = build_model(UMTVideoTextForQuestionAnswering), [], []
    layer = next(layer for layer in model.text_model.layers if layer.cross_attention is not None)
    layer.cross_attention.k_proj.register_forward_hook(lambda _, inputs, __: rows.append(len(inputs[0])))
    model.vision_model.embeddings.register_forward_hook(lambda _, inputs, __: clips.append(len(inputs[0])))
    options = {"top_k": 3} if closed else {}
    answer_questions(model, processor, questions, accelerator, ANSWERS if closed else None, **options, **OPTIONS)
    assert sum(clips) == sum(rows) == 2  # videos of five questions


def test_pairs_are_grouped_by_their_videos():
    videos = torch.tensor([0, 0, 0, 1, 3, 3, 3, 3, 4])
    groups = [videos[part].tolist() for part in retrieval.group_pairs(videos, 2)]
    assert groups == [[0, 0, 0], [1, 3, 3, 3, 3], [4]]
    assert [len(videos[part]) for part in retrieval.group_pairs(videos, 20)] == [9]
    assert list(retrieval.group_pairs(videos[:0], 2)) == []
