"""The video-text models of Unmasked Teacher for mteb: a file of its `mteb/models/model_implementations`.

Before it goes there: publish the folders (`umt-hf convert umt-vit-b16-25m`, `umt-hf push umt-vit-b16-25m`), and set
`ACCOUNT`, each `revision`, and `license` once the authors of the weights have named one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mteb.models.abs_encoder import AbsEncoder
from mteb.models.model_meta import ModelMeta, ScoringFunction
from tqdm.auto import tqdm

if TYPE_CHECKING:
    from mteb.abstasks.task_metadata import TaskMetadata
    from mteb.types import Array, BatchedInput, PromptType
    from torch.utils.data import DataLoader
    from transformers import BatchFeature

ACCOUNT = "your-account"  # of the Hub, where the folders are


class UMTVideoTextEncoder(AbsEncoder):
    """Videos and texts in one space, compared by the inner product."""

    def __init__(self, model_name: str, revision: str | None, device: str | None = None, **kwargs: Any) -> None:
        import torch
        from transformers import AutoModel, AutoProcessor

        self.device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        source: dict[str, Any] = {"revision": revision, "trust_remote_code": True}  # repositories hold the code
        self.processor = AutoProcessor.from_pretrained(model_name, **source)
        self.model = AutoModel.from_pretrained(model_name, dtype=torch.float32, **source).to(self.device).eval()

    def _prepare(self, rows: list[dict[str, Any]]) -> BatchFeature:
        columns = {"text": "text", "videos": "video"}  # arguments of the processor, columns of mteb
        given = {key: [row[name] for row in rows] for key, name in columns.items() if name in rows[0]}
        return self.processor(**given, padding=True, return_tensors="pt")

    def encode(
        self,
        inputs: DataLoader[BatchedInput],
        *,
        task_metadata: TaskMetadata,
        hf_split: str,
        hf_subset: str,
        prompt_type: PromptType | None = None,
        show_progress_bar: bool = True,
        **kwargs: Any,
    ) -> Array:
        """Vectors of videos or texts, `(rows, embed_dim)`; of rows with both, their sums."""
        import torch

        # Not FramesCollator, which takes other frames or decodes all: the processor decodes those that the published
        # evaluation took.
        inputs.collate_fn = self._prepare
        vectors = []
        with torch.inference_mode():
            for batch in tqdm(inputs, disable=not show_progress_bar):
                batch = batch.to(self.device)
                parts = []
                if "pixel_values" in batch:
                    parts.append(self.model.get_video_features(batch["pixel_values"]))
                if "input_ids" in batch:
                    parts.append(self.model.get_text_embedding(batch["input_ids"], batch["attention_mask"]))
                vectors.append(sum(part.pooler_output for part in parts).cpu())
        return torch.cat(vectors)


# Tasks of mteb on data that models have seen: the videos of Kinetics-710, without their classes, then pairs. The test
# of WebVid-CoVR is counted as seen by all, though 5M and 17M have a part of WebVid.
_WAYS = ("T2V", "V2T", "T2VA", "VA2T", "AT2V", "VT2A", "A2V", "V2A")
_SEEN_5M = {
    *("Kinetics400V", "Kinetics400VA", "Kinetics400ZeroShot", "Kinetics400VAZeroShot"),
    *(f"Kinetics{n}V{kind}" for n in (600, 700) for kind in ("", "A", "ZeroShot", "AZeroShot")),
    *("WebVidCoVRIT2VRetrieval", "DenseWebVidCoVRVT2VRetrieval"),
}
_SEEN_25M = _SEEN_5M | {"MSCOCOI2TRetrieval", "MSCOCOT2IRetrieval"}  # those of 17M have COCO too
_MSRVTT = _SEEN_25M | {f"MSRVTT{way}" for way in _WAYS}
_DIDEMO = _SEEN_25M | {f"DiDeMo{way}Retrieval{version}" for way in _WAYS for version in ("", ".v2")}
_ACTIVITYNET = _SEEN_25M | {"ActivityNetCaptionsT2VRetrieval", "ActivityNetCaptionsV2TRetrieval"}
_MSVD = _SEEN_25M | {"MSVDT2VRetrieval", "MSVDV2TRetrieval"}
_SSV2 = _SEEN_25M | {"SomethingSomethingV2Classification"}

_B16 = {
    "n_parameters": 202_409_729,
    "n_embedding_parameters": 23_440_896,
    "memory_usage_mb": 772,
    "embed_dim": 512,
}
_L16 = {
    "n_parameters": 659_745_281,
    "n_embedding_parameters": 31_254_528,
    "memory_usage_mb": 2517,
    "embed_dim": 768,
}


def _build_meta(
    name: str,
    training_datasets: set[str],
    *,
    size: dict[str, int],
    max_tokens: int = 32,
    adapted_from: ModelMeta | None = None,
    revision: str | None = None,
) -> ModelMeta:
    return ModelMeta(
        loader=UMTVideoTextEncoder,
        name=f"{ACCOUNT}/{name}",
        revision=revision,  # None until there is a repository
        release_date=None,  # mteb takes that of the repository
        languages=["eng-Latn"],
        modalities=["video", "text"],
        model_type=["dense"],
        max_tokens=max_tokens,
        license=None,  # the code has MIT; none is stated for the weights
        open_weights=True,
        public_training_code="https://github.com/OpenGVLab/unmasked_teacher",
        public_training_data=None,  # WebVid was withdrawn
        framework=["PyTorch", "Transformers", "Sentence Transformers"],
        reference=None,  # the page of the repository
        similarity_fn_name=ScoringFunction.DOT_PRODUCT,  # a mean of unit vectors is shorter than they are
        use_instructions=False,
        training_datasets=training_datasets,
        adapted_from=adapted_from and adapted_from.name,
        citation=_CITATION,
        extra_requirements_groups=["image", "av"],
        **size,
    )


_CITATION = """@inproceedings{li2023unmasked,
  title = {Unmasked Teacher: Towards Training-Efficient Video Foundation Models},
  author = {Li, Kunchang and Wang, Yali and Li, Yizhuo and Wang, Yi and He, Yinan and Wang, Limin and Qiao, Yu},
  booktitle = {Proceedings of the IEEE/CVF International Conference on Computer Vision (ICCV)},
  year = {2023}
}"""

umt_vit_b16_5m = _build_meta("umt-vit-b16-5m", _SEEN_5M, size=_B16)
umt_vit_b16_17m = _build_meta("umt-vit-b16-17m", _SEEN_25M, size=_B16)
umt_vit_b16_25m = _build_meta("umt-vit-b16-25m", _SEEN_25M, size=_B16)
umt_vit_l16_5m = _build_meta("umt-vit-l16-5m", _SEEN_5M, size=_L16)
umt_vit_l16_17m = _build_meta("umt-vit-l16-17m", _SEEN_25M, size=_L16)
umt_vit_l16_25m = _build_meta("umt-vit-l16-25m", _SEEN_25M, size=_L16)

# Fine-tuned for one set of videos.
_B16_TUNED = {"size": _B16, "adapted_from": umt_vit_b16_25m}
_L16_TUNED = {"size": _L16, "adapted_from": umt_vit_l16_25m}
umt_vit_b16_25m_msrvtt = _build_meta("umt-vit-b16-25m-msrvtt", _MSRVTT, **_B16_TUNED)
umt_vit_l16_25m_msrvtt = _build_meta("umt-vit-l16-25m-msrvtt", _MSRVTT, **_L16_TUNED)
umt_vit_b16_25m_didemo = _build_meta("umt-vit-b16-25m-didemo", _DIDEMO, max_tokens=64, **_B16_TUNED)
umt_vit_l16_25m_didemo = _build_meta("umt-vit-l16-25m-didemo", _DIDEMO, max_tokens=64, **_L16_TUNED)
umt_vit_b16_25m_anet = _build_meta("umt-vit-b16-25m-anet", _ACTIVITYNET, max_tokens=150, **_B16_TUNED)
umt_vit_l16_25m_anet = _build_meta("umt-vit-l16-25m-anet", _ACTIVITYNET, max_tokens=150, **_L16_TUNED)
umt_vit_b16_25m_lsmdc = _build_meta("umt-vit-b16-25m-lsmdc", _SEEN_25M, max_tokens=96, **_B16_TUNED)
umt_vit_l16_25m_lsmdc = _build_meta("umt-vit-l16-25m-lsmdc", _SEEN_25M, max_tokens=96, **_L16_TUNED)
umt_vit_b16_25m_msvd = _build_meta("umt-vit-b16-25m-msvd", _MSVD, max_tokens=64, **_B16_TUNED)
umt_vit_l16_25m_msvd = _build_meta("umt-vit-l16-25m-msvd", _MSVD, max_tokens=64, **_L16_TUNED)
umt_vit_b16_25m_ssv2_label = _build_meta("umt-vit-b16-25m-ssv2-label", _SSV2, max_tokens=25, **_B16_TUNED)
umt_vit_l16_25m_ssv2_label = _build_meta("umt-vit-l16-25m-ssv2-label", _SSV2, max_tokens=25, **_L16_TUNED)
umt_vit_b16_25m_ssv2_template = _build_meta("umt-vit-b16-25m-ssv2-template", _SSV2, max_tokens=25, **_B16_TUNED)
umt_vit_l16_25m_ssv2_template = _build_meta("umt-vit-l16-25m-ssv2-template", _SSV2, max_tokens=25, **_L16_TUNED)
