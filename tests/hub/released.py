"""Files with the names and shapes of the released checkpoints, and the tokenizers that go with them."""

import json
from pathlib import Path

import torch
from transformers import BertTokenizerFast

from umt_hf.modeling.modeling_umt_video import compute_sinusoid_table, interpolate_position_table
from umt_hf.zoo import ZooEntry

FIXTURES = Path(__file__).parent.parent / "fixtures"
SIZES = {"b16": "base", "l16": "large"}
NUM_WORDS = 30522
# B/16 and BERT so narrow that a model takes milliseconds: the same names, depth, patches and heads of features.
NARROW = {"hidden_size": 24, "num_attention_heads": 2, "intermediate_size": 96}
NARROW_WIDTHS = {768: 24, 2304: 72, 3072: 96}


def read_table(name: str) -> dict[str, list[int]]:
    return json.loads((FIXTURES / f"{name}.json").read_text())["state_dict"]


def list_released_shapes(entry: ZooEntry) -> dict[str, list[int]]:
    """Names and shapes of an entry's file, from the tables of the published models."""
    size = SIZES[entry.size]
    if entry.task == "pretraining":
        return read_table(f"single_modality/names_pretrain_umt_{size}_patch16_224")
    if entry.task in ("classification", "detection"):
        labels = "mit339" if entry.resolution == 384 else "k400"
        table = read_table(f"single_modality/names_vit_{size}_patch16_{entry.resolution}_{entry.frames}f_{labels}")
        shapes = {
            name: [entry.num_labels, *shape[1:]] if name.startswith("head.") else shape
            for name, shape in table.items()
        }
        if entry.task == "detection":
            shapes = {name.replace("fc_norm.", "norm."): shape for name, shape in shapes.items()}
        return shapes
    pretraining = read_table(f"multi_modality/shapes/pretrain_{entry.size}_25m")
    if entry.task == "video_text_pretraining":
        return pretraining
    kind = {"retrieval": "retrieval", "question_answering": "qa"}[entry.task]
    shapes = read_table(f"multi_modality/shapes/{kind}_{entry.size}")
    # The published zoo says that all its video-text weights are saved together with the teacher.
    return shapes | {name: shape for name, shape in pretraining.items() if name.startswith("clip_teacher.")}


def build_released_tensors(entry: ZooEntry, shapes: dict[str, list[int]] | None = None) -> dict[str, torch.Tensor]:
    """Random weights, by default of the real size; what must agree does: tied words, tables of positions."""
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for name, shape in (shapes or list_released_shapes(entry)).items():
        if name.endswith("position_ids"):
            tensors[name] = torch.arange(shape[-1]).expand(shape).clone()
        elif name == "pos_embed":
            grid = (entry.frames, entry.resolution // 16, entry.resolution // 16)
            tensors[name] = interpolate_position_table(compute_sinusoid_table(1568, shape[-1]), (8, 14, 14), grid)
        else:
            tensors[name] = torch.randn(shape, generator=generator) * 0.02
    for name in tensors:
        for repeated, original in (
            ("cls.predictions.decoder.weight", "bert.embeddings.word_embeddings.weight"),
            ("cls.predictions.decoder.bias", "cls.predictions.bias"),
        ):
            other = name.replace(repeated, original)
            if other != name and other in tensors:
                tensors[name] = tensors[other]
    return tensors


def write_bert_tokenizer(folder: Path, num_words: int = NUM_WORDS) -> dict[str, Path]:
    """A BERT tokenizer of made-up words with the real ones' special ids, as files of a repository."""
    special = {0: "[PAD]", 100: "[UNK]", 101: "[CLS]", 102: "[SEP]", 103: "[MASK]"}
    folder.mkdir(parents=True, exist_ok=True)
    words = [special.get(i, f"word{i}") for i in range(num_words)]
    (folder / "vocab.txt").write_text("\n".join(words) + "\n")
    BertTokenizerFast(vocab=str(folder / "vocab.txt")).save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps({"model_type": "bert", "vocab_size": num_words}))
    return {path.name: path for path in folder.iterdir()}
