"""Keys and values of a video are projected once, kept in full or half precision, and give the same answers."""

import pytest
import torch
from transformers import EncoderDecoderCache

from umt_hf import (
    UMTTextConfig,
    UMTTextModel,
    UMTVideoTextForPreTraining,
    UMTVideoTextForQuestionAnswering,
    UMTVideoTextForRetrieval,
)

from .tiny_models import TEXT, build_inputs, build_model

ANSWERS = torch.tensor([[101, 105, 106, 102], [101, 107, 102, 0], [101, 110, 111, 102]])
ANSWER_MASK = (ANSWERS != 0).long()


def count_projected_rows(model) -> list[int]:
    """Rows that go through the projection to keys of the first fusion layer, call by call."""
    rows: list[int] = []
    layer = next(layer for layer in model.layers if layer.cross_attention is not None)
    layer.cross_attention.k_proj.register_forward_hook(lambda _, inputs, __: rows.append(len(inputs[0])))
    return rows


def spread_weights(model):
    torch.manual_seed(1)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.2)  # far from the start, where all pairs are alike
    return model.eval()


@pytest.fixture
def retrieval() -> UMTVideoTextForRetrieval:
    return spread_weights(build_model(UMTVideoTextForRetrieval))


@pytest.fixture
def answering() -> UMTVideoTextForQuestionAnswering:
    return spread_weights(build_model(UMTVideoTextForQuestionAnswering))


@pytest.fixture
def encoded(retrieval) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Tokens of 4 videos, states of 4 texts and their mask."""
    inputs = build_inputs(UMTVideoTextForRetrieval, batch_size=4)
    with torch.no_grad():
        video = retrieval.get_video_features(inputs["pixel_values"]).last_hidden_state
        text = retrieval.get_text_features(inputs["input_ids"], inputs["attention_mask"]).last_hidden_state
    return video, text, inputs["attention_mask"]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@torch.no_grad()
def test_matching_from_keys_and_values_is_matching_from_tokens(retrieval, encoded, attention):
    retrieval.set_attn_implementation(attention)
    video, text, mask = encoded
    expected = retrieval.match(video, text, mask)
    key_values = retrieval.get_video_key_values(video)
    assert key_values.shape == (4, 2, 2, 32, 64)
    rows = count_projected_rows(retrieval.text_model)
    found = retrieval.match(text_tokens=text, attention_mask=mask, video_key_values=key_values)
    assert rows == []
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)
    # Each video with each text.
    videos, texts = torch.arange(4).repeat_interleave(4), torch.arange(4).repeat(4)
    expected = retrieval.match(video[videos], text[texts], mask[texts])
    rows.clear()
    by_tokens = retrieval.match(video, text[texts], mask[texts], encoder_rows=videos)
    assert rows == [4]
    by_keys = retrieval.match(None, text[texts], mask[texts], video_key_values=key_values, encoder_rows=videos)
    assert rows == [4]
    torch.testing.assert_close(by_tokens, expected, atol=1e-6, rtol=0)
    torch.testing.assert_close(by_keys, expected, atol=1e-6, rtol=0)
    # One of a kind is in all pairs.
    rows.clear()
    torch.testing.assert_close(retrieval.match(video[1:2], text, mask), expected.view(4, 4, 2)[1], atol=1e-6, rtol=0)
    assert rows == [1]
    torch.testing.assert_close(
        retrieval.match(None, text[2:3], mask[2:3], video_key_values=key_values),
        expected.view(4, 4, 2)[:, 2],
        atol=1e-6,
        rtol=0,
    )
    assert float(expected.std()) > 1e-3


@torch.no_grad()
def test_what_is_kept_may_be_in_half_precision(retrieval, encoded):
    video, text, mask = encoded
    expected = retrieval.match(video, text, mask)
    from_tokens = retrieval.match(video.half(), text, mask)
    from_keys = retrieval.match(None, text, mask, retrieval.get_video_key_values(video.half()).half())
    for logits in (from_tokens, from_keys):
        assert logits.dtype == torch.float32 and 0 < float((logits - expected).abs().max()) < 5e-3
    retrieval.to(torch.bfloat16)
    assert retrieval.match(None, text.bfloat16(), mask, retrieval.get_video_key_values(video)).dtype == torch.bfloat16
    retrieval.float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = retrieval.match(None, text, mask, retrieval.get_video_key_values(video).float())
    assert float((logits.float() - expected).abs().max()) < 0.05


@torch.no_grad()
def test_matching_says_where_words_look(retrieval, encoded):
    retrieval.set_attn_implementation("eager")
    video, text, mask = encoded
    key_values = retrieval.get_video_key_values(video)
    expected = retrieval.match(video, text, mask, output_attentions=True)
    found = retrieval.match(None, text, mask, key_values, output_attentions=True)
    for one, other in zip(found.cross_attentions, expected.cross_attentions, strict=True):
        torch.testing.assert_close(one, other)
    one_video = retrieval.match(None, text, mask, key_values[:1], output_attentions=True)
    assert one_video.cross_attentions[0].shape == (4, 4, 7, 32)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@torch.no_grad()
def test_texts_of_one_sequence_may_see_different_parts_of_it(retrieval, attention):
    retrieval.set_attn_implementation(attention)
    model, states, sequence = retrieval.text_model, torch.randn(3, 4, 64), torch.randn(1, 5, 64)
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [1, 1, 1, 0, 0]])
    options = {"inputs_embeds": states, "encoder_attention_mask": mask, "mode": "fusion"}
    expected = model(encoder_hidden_states=sequence.expand(3, -1, -1), **options).last_hidden_state
    one = model(encoder_hidden_states=sequence, **options).last_hidden_state
    kept = model(encoder_key_values=model.get_encoder_key_values(sequence), **options).last_hidden_state
    torch.testing.assert_close(one, expected)
    torch.testing.assert_close(kept, expected)


def test_gradients_go_through_keys_and_values(retrieval, encoded):
    video, text, mask = encoded
    layer = retrieval.text_model.layers[2].cross_attention.k_proj
    retrieval.match(video, text, mask).square().sum().backward()
    expected, layer.weight.grad = layer.weight.grad, None
    for reentrant in (None, False, True):
        layer.weight.grad = None
        if reentrant is not None:
            retrieval.train().text_model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        retrieval.match(None, text, mask, retrieval.get_video_key_values(video)).square().sum().backward()
        torch.testing.assert_close(layer.weight.grad, expected, atol=1e-6, rtol=1e-4)


@torch.no_grad()
def test_questions_share_a_video(answering):
    inputs = build_inputs(UMTVideoTextForQuestionAnswering, batch_size=4)
    pixels, ids, mask = (inputs[name] for name in ("pixel_values", "input_ids", "attention_mask"))
    rows = torch.tensor([0, 0, 1, 0])
    expected = answering(pixels[rows], ids, mask, decoder_input_ids=ANSWERS[[0, 1, 2, 0]])
    key_values = answering.get_video_key_values(answering.vision_model(pixels[:2]).last_hidden_state)
    looks = {"video_key_values": key_values, "encoder_rows": rows}
    found = answering(None, ids, mask, decoder_input_ids=ANSWERS[[0, 1, 2, 0]], **looks)
    torch.testing.assert_close(found.logits, expected.logits, atol=1e-5, rtol=0)
    torch.testing.assert_close(found.last_hidden_state, expected.last_hidden_state, atol=1e-6, rtol=1e-5)
    assert answering(None, ids, mask, **looks, output_hidden_states=True).video_outputs is None
    options = {"max_new_tokens": 4, "do_sample": False}
    generated = answering.generate(pixels[rows], ids, mask, **options)
    assert torch.equal(answering.generate(None, ids, mask, **looks, **options), generated)
    indices, probabilities = answering.rank_answers(pixels[rows], ids, mask, ANSWERS, ANSWER_MASK, top_k=3)
    again = answering.rank_answers(None, ids, mask, ANSWERS, ANSWER_MASK, top_k=3, **looks)
    assert torch.equal(again[0], indices)
    torch.testing.assert_close(again[1], probabilities, atol=1e-6, rtol=1e-5)
    one = answering(pixels[:1], ids, mask).last_hidden_state
    torch.testing.assert_close(one, answering(pixels[:1].expand(4, -1, -1, -1, -1), ids, mask).last_hidden_state)


@pytest.mark.parametrize("padded", [True, False])
@torch.no_grad()
def test_a_question_is_projected_once_for_all_answers(answering, padded):
    inputs = build_inputs(UMTVideoTextForQuestionAnswering)
    mask = inputs["attention_mask"] if padded else None
    rows = count_projected_rows(answering.answer_decoder.text_model)
    found = answering.rank_answers(inputs["pixel_values"], inputs["input_ids"], mask, ANSWERS, ANSWER_MASK, top_k=2)
    assert rows == [2]  # both questions at once, before their first token is tried
    states = answering(inputs["pixel_values"], inputs["input_ids"], mask).last_hidden_state
    for row in range(2):
        scores = []
        for answer in range(3):  # each answer by itself, as the model is trained
            length = int(ANSWER_MASK[answer].sum())
            logits = answering.answer_decoder(
                ANSWERS[answer : answer + 1, :length],
                encoder_hidden_states=states[row : row + 1],
                encoder_attention_mask=None if mask is None else mask[row : row + 1],
            ).logits.log_softmax(-1)
            steps = logits[0, range(length - 1), ANSWERS[answer, 1:length]]
            scores.append(float(steps.sum() + steps[0]))
        chosen = torch.tensor(scores)[found[0][row]]
        torch.testing.assert_close(found[1][row], chosen.softmax(0), atol=1e-5, rtol=1e-4)


def test_calls_that_make_no_sense(retrieval, answering, encoded):
    video, text, mask = encoded
    key_values = retrieval.get_video_key_values(video)
    with pytest.raises(ValueError, match="Give text_tokens, and video_tokens or video_key_values"):
        retrieval.match(text_tokens=text)
    with pytest.raises(ValueError, match="Give text_tokens, and video_tokens or video_key_values"):
        retrieval.match(video)
    with pytest.raises(ValueError, match="encoder_key_values stand for encoder_hidden_states"):
        retrieval.match(video, text, mask, key_values)
    with pytest.raises(ValueError, match=r"must be \(sequences, 2 fusion layers, 2, tokens, width\).*got \(4, 1, 2"):
        retrieval.match(None, text, mask, key_values[:, :1])
    with pytest.raises(ValueError, match="Give either pixel_values or video_key_values"):
        answering(input_ids=torch.ones(1, 3, dtype=torch.long))
    with pytest.raises(ValueError, match="Give either pixel_values or video_key_values"):
        answering(torch.ones(4, 2, 3, 32, 32), torch.ones(4, 3, dtype=torch.long), video_key_values=key_values)
    text_model = retrieval.text_model
    with pytest.raises(ValueError, match="encoder_key_values stand for encoder_hidden_states"):
        text_model(torch.ones(4, 3, dtype=torch.long), encoder_key_values=key_values)
    decoder = answering.answer_decoder.text_model
    states = decoder.get_encoder_key_values(torch.randn(1, 3, 64))
    with pytest.raises(ValueError, match="no cache with encoder_key_values"):
        decoder(
            torch.ones(1, 3, dtype=torch.long),
            encoder_key_values=states,
            mode="multi_modal",
            cache=EncoderDecoderCache.__new__(EncoderDecoderCache),
        )
    without = UMTTextModel(UMTTextConfig(**TEXT | {"fusion_layer": 4}))
    with pytest.raises(ValueError, match="no fusion layers"):
        without.get_encoder_key_values(torch.randn(1, 3, 64))


@torch.no_grad()
def test_keys_and_values_compile_to_one_graph(retrieval, encoded):
    torch._dynamo.reset()
    video, text, mask = encoded
    key_values = retrieval.get_video_key_values(video)
    match = torch.compile(
        lambda text, kept: retrieval.match(text_tokens=text, video_key_values=kept),
        backend="aot_eager",
        fullgraph=True,
    )
    torch.testing.assert_close(match(text, key_values), retrieval.match(video, text), atol=1e-5, rtol=0)
    project = torch.compile(retrieval.get_video_key_values, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(project(video), key_values)
    torch._dynamo.reset()


def test_pretraining_has_them_as_well():
    model = build_model(UMTVideoTextForPreTraining)
    with torch.no_grad():
        assert model.get_video_key_values(torch.randn(2, 5, 64)).shape == (2, 2, 2, 5, 64)
