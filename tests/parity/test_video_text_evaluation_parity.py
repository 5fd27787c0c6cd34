"""Retrieval scores, multiple choice and question answering against the published implementation."""

import pytest
import torch
from accelerate import Accelerator
from datasets import Dataset

from tests.parity.multi_modality import assert_equal, build_model, load_case, read_video
from umt_hf.data.annotations import RetrievalSet
from umt_hf.evaluation.multiple_choice import compute_choice_accuracy, compute_choice_scores
from umt_hf.evaluation.retrieval import encode_retrieval_set, evaluate_retrieval, match_candidates, select_candidates
from umt_hf.hub_cards.convert_umt_checkpoint import _convert_video_text_tensor
from umt_hf.modeling.losses_umt import compute_similarity


@pytest.fixture(scope="module")
def retrieval():
    """Model, features and scores of six videos and nine texts."""
    info, data = load_case("retrieval_eval")
    model = build_model(info, data["weights"], "retrieval")
    with torch.no_grad():
        video = model.get_video_features(read_video(data["inputs"]["video_u8"]))
        text = model.get_text_features(data["inputs"]["input_ids"], data["inputs"]["attention_mask"])
    return model, video, text, data


def test_dual_encoder_scores(retrieval):
    model, video, text, data = retrieval
    published = data["outputs"]
    assert_equal(video.last_hidden_state, published["image_feats"][:, 0])
    assert_equal(text.last_hidden_state, published["text_feats"])
    scores = compute_similarity(video.pooler_output, text.pooler_output)
    assert_equal(scores, published["i2t_scores"])
    assert_equal(scores.T, published["t2i_scores"])
    outputs = model(
        **{k: data["inputs"][k] for k in ("input_ids", "attention_mask")},
        pixel_values=read_video(data["inputs"]["video_u8"]),
    )
    assert outputs.loss is None and outputs.vtm_loss is None
    assert_equal(outputs.logits_per_video * model.temperature, published["i2t_scores"])
    assert torch.equal(outputs.logits_per_text, outputs.logits_per_video.T)


class PublishedInputs:
    """Stands in for a processor: the recorded tokens and pixels, whichever texts and videos are asked for."""

    def __init__(self, inputs: dict[str, torch.Tensor], texts: list[str]):
        self.inputs, self.texts, self.video_processor = inputs, texts, self.read_videos

    def __call__(self, text: list[str], **kwargs) -> dict[str, torch.Tensor]:
        rows = [self.texts.index(item) for item in text]
        return {name: self.inputs[name][rows] for name in ("input_ids", "attention_mask")}

    def read_videos(self, source: str, **kwargs) -> dict[str, torch.Tensor]:
        return {"pixel_values": read_video(self.inputs["video_u8"][int(source)])[None]}

    read_videos.num_frames = 4


def build_retrieval_set(info: dict) -> RetrievalSet:
    videos_of_text = [[video] for video in info["txt2img"].values()]
    return RetrievalSet(
        [str(i) for i in range(len(info["img2txt"]))], info["texts"], videos_of_text, list(info["img2txt"].values())
    )


@pytest.mark.parametrize("k", [3, 5, 128])
@pytest.mark.parametrize("batch_size", [4, 32])
def test_reranked_scores_and_metrics(k, batch_size):
    info, data = load_case("retrieval_eval")
    model = build_model(info, data["weights"], "retrieval")
    processor = PublishedInputs(data["inputs"], info["texts"])
    found, accelerator = build_retrieval_set(info), Accelerator(cpu=True)
    options = {"batch_size": batch_size, "num_workers": 0}
    features = encode_retrieval_set(model, processor, found, accelerator, **options)
    dual = features.video_embeds @ features.text_embeds.T
    assert_equal(dual, data["outputs"]["i2t_scores"])
    assert_equal(features.video_tokens, data["outputs"]["image_feats"][:, 0])

    by_text = select_candidates(dual.T, min(k, 6))
    by_video = select_candidates(dual, min(k, 9))
    logits = match_candidates(model, features, by_text, by_video, accelerator, batch_size=batch_size)
    for name, candidates, scores in (("t2i", by_text, logits[0]), ("i2t", by_video, logits[1])):
        published = data["outputs"][f"{name}_scores_x_k{k}"]
        ours = torch.full_like(published, -100).scatter(1, candidates, scores)
        assert torch.equal(ours == -100, published == -100)
        torch.testing.assert_close(ours, published, atol=1e-4, rtol=0)

    metrics = evaluate_retrieval(model, processor, found, accelerator, top_k=k, **options)
    compare_metrics(metrics, "dual", info["metrics"][f"k{k}"]["test_emb/"])
    if info["metrics_independent_of_tie_order"][f"k{k}"]:
        compare_metrics(metrics, "reranked", info["metrics"][f"k{k}"]["test/"])
    else:  # what is first has been judged
        published = info["metrics"][f"k{k}"]["test/"]
        assert round(100 * metrics["reranked_text_to_video_r1"], 2) == published["img_r1"]
        assert round(100 * metrics["reranked_video_to_text_r1"], 2) == published["txt_r1"]


def compare_metrics(ours: dict[str, float], scores: str, published: dict[str, float]) -> None:
    expected = {f"{scores}_mean_recall": published["r_mean"]}
    for theirs, direction in (("img", "text_to_video"), ("txt", "video_to_text")):
        for figure, name in (("r1", "r1"), ("r5", "r5"), ("r10", "r10"), ("r_mean", "mean_recall")):
            expected[f"{scores}_{direction}_{name}"] = published[f"{theirs}_{figure}"]
    assert {name: round(100 * ours[name], 2) for name in expected} == expected


def test_multiple_choice():
    info, data = load_case("retrieval_mc")
    model = build_model(info, data["weights"], "retrieval")
    published, mask = data["outputs"], data["inputs"]["attention_mask"]
    with torch.no_grad():
        video = model.get_video_features(read_video(data["inputs"]["video_u8"]))
        text = model.get_text_features(data["inputs"]["input_ids"], mask)
        similarities = compute_similarity(video.pooler_output, text.pooler_output) / model.temperature
        similarities = torch.stack([similarities[i, 5 * i : 5 * i + 5] for i in range(len(similarities))]).softmax(1)
        logits = model.match(video.last_hidden_state.repeat_interleave(5, 0), text.last_hidden_state, mask)
        scores = compute_choice_scores(
            model, read_video(data["inputs"]["video_u8"]), data["inputs"]["input_ids"], mask, [5, 5, 5, 5]
        )
    assert_equal(similarities, published["sim_softmax"], scale=2)
    assert_equal(logits, published["itm_logits"])
    scores = torch.stack(scores)
    assert_equal(scores, published["scores"])
    assert torch.equal(scores.argmax(1), published["pred"])
    accuracy = compute_choice_accuracy(scores.tolist(), Dataset.from_dict({"answer": info["answers"]}))
    assert 100 * accuracy["accuracy"] == info["result"]["acc"]


@pytest.fixture(scope="module")
def question_answering():
    info, data = load_case("video_qa")
    return build_model(info, data["weights"], "question_answering"), data


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_question_answering_loss_and_gradients(question_answering, attention):
    model, data = question_answering
    model.zero_grad()
    model.set_attn_implementation(attention)
    inputs, published = data["inputs"], {k.removeprefix("train/"): t for k, t in data["outputs"].items()}
    outputs = model(
        read_video(inputs["video_u8"]),
        inputs["question_ids"],
        inputs["question_mask"],
        labels=inputs["answer_ids"].masked_fill(inputs["answer_mask"] == 0, -100),
        answer_weights=inputs["weights"],
        answers_per_question=inputs["answers_per_question"],
    )
    assert_equal(outputs.last_hidden_state, published["question_states"])
    real = inputs["answer_mask"].bool()
    assert_equal(outputs.logits[real], published["answer_logits"][real])
    assert_equal(outputs.answer_loss, published["answer_loss"])
    assert outputs.loss.item() == pytest.approx(published["loss"].item(), rel=2e-5)
    outputs.loss.backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    names = [name for name in published if name.startswith("grad/")]
    assert len(names) == 6
    for name in names:
        for ours, expected in _convert_video_text_tensor(name.removeprefix("grad/"), published[name]).items():
            assert_equal(gradients[ours], expected, ours, scale=5)
    assert [name for name, gradient in gradients.items() if gradient is None] == []


@pytest.mark.parametrize("k", [5, 14])
def test_answer_ranking(question_answering, k):
    model, data = question_answering
    inputs, published = data["inputs"], data["outputs"]
    arguments = (
        read_video(inputs["video_u8"]),
        inputs["question_ids"],
        inputs["question_mask"],
        inputs["answer_list_ids"],
        inputs["answer_list_mask"],
    )
    ids, probabilities = model.rank_answers(*arguments, top_k=k)
    assert torch.equal(ids, published[f"infer_k{k}/topk_ids"])
    torch.testing.assert_close(probabilities, published[f"infer_k{k}/topk_probs"], atol=2e-5, rtol=0)

    once = model.rank_answers(*arguments, top_k=k, count_first_token_twice=False)
    assert not torch.allclose(once[1], probabilities, atol=1e-3)
    with pytest.raises(ValueError, match="top_k=15"):
        model.rank_answers(*arguments, top_k=15)


def test_first_token_probabilities_and_answer_losses(question_answering):
    """What the ranking is made of, in the order that ties leave open."""
    model, data = question_answering
    inputs, published = data["inputs"], data["outputs"]
    states = model(read_video(inputs["video_u8"]), inputs["question_ids"], inputs["question_mask"]).last_hidden_state
    answers = inputs["answer_list_ids"]
    with torch.no_grad():
        logits = model.answer_decoder(
            answers[:1, :1].expand(3, 1),
            encoder_hidden_states=states,
            encoder_attention_mask=inputs["question_mask"],
        ).logits[:, 0]
    assert_equal(logits, published["infer_k14/start_logits"])
    probabilities = logits.softmax(1)[:, answers[:, 1]].sort(descending=True).values
    expected = published["infer_k14/first_token_prob"].sort(descending=True).values
    torch.testing.assert_close(probabilities, expected, atol=1e-6, rtol=1e-4)
