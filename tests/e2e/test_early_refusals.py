"""What data rule out is refused before a model is loaded, and long before testing would find it.

Each case names a model or a teacher that is not there: an error about the data shows that it was not looked for.
"""

import json

import pytest

from tests.e2e.runs import FINE_TUNING, PRETRAINING, save_video_text_model, to_flags
from umt_hf.data.prepare import ShardSettings, prepare_shards
from umt_hf.evaluation import multiple_choice, retrieval
from umt_hf.evaluation import question_answering as answering
from umt_hf.evaluation.found import MOST_LOOKED_FOR, refuse_missing
from umt_hf.finetuning import classification, detection
from umt_hf.finetuning import question_answering as question_training
from umt_hf.finetuning import retrieval as retrieval_training
from umt_hf.moving_shapes.tiny_bert import TextTowerArguments, write_text_tower
from umt_hf.training import stage1, stage2


@pytest.fixture(scope="module")
def text_tower(shapes, tmp_path_factory):
    folder = tmp_path_factory.mktemp("text_tower")
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    write_text_tower(TextTowerArguments(data=str(shapes), output_dir=str(folder), **sizes))
    return folder


@pytest.fixture
def stage2_flags(shapes, student, text_tower, tmp_path):
    def build(**changes) -> list[str]:
        fields = {**PRETRAINING, "train_corpora": shapes / "train_captions.json", "output_dir": tmp_path / "run"}
        fields |= {"vision_name_or_path": student, "text_name_or_path": text_tower, "fusion_layer": 1}
        return to_flags(**fields | {"teacher_name_or_path": tmp_path / "no_teacher"} | changes)

    return build


def lose_videos(source, folder, count=1):
    """A copy of a JSON list whose last videos are not there."""
    rows = json.loads(source.read_text())
    for number, row in enumerate(rows):
        is_lost = number >= len(rows) - count
        row["video"] = str(source.parent / (f"lost{number}.mp4" if is_lost else row["video"]))
    path = folder / f"lost_{source.name}"
    path.write_text(json.dumps(rows))
    return path


def test_a_batch_that_stage_1_cannot_fill_is_refused_before_its_teacher_is_looked_for(flags, tmp_path):
    arguments = flags(teacher_name_or_path=tmp_path / "no_teacher", per_device_train_batch_size=100)
    with pytest.raises(ValueError, match="24 videos do not fill one batch of 100"):
        stage1.main(arguments)


def test_held_out_videos_that_are_not_there_end_stage_1_before_its_teacher_is_looked_for(flags, tmp_path, caplog):
    """All of them: a few are named, and left out when it is tested."""
    for number, other in ((2, "missing.mp4"), (1, "here.mp4")):
        (tmp_path / "held_out.csv").write_text(f"lost.mp4\n{other}\n")
        arguments = {"teacher_name_or_path": tmp_path / "no_teacher", "validation_data": tmp_path / "held_out.csv"}
        error, words = (ValueError, f"{number} of 2 validation videos are not there, such as .*lost.mp4")
        if number == 1:
            (tmp_path / other).touch()
            error, words = (FileNotFoundError, "The teacher is missing")
        with pytest.raises(error, match=words):
            stage1.main(flags(**arguments))
    assert "1 of 2 validation videos are not there, such as" in caplog.text


def test_a_batch_that_stage_2_cannot_fill_is_refused_before_its_teacher_is_looked_for(stage2_flags):
    with pytest.raises(ValueError, match=r"24 videos do not fill one batch of 100 .* set --batch_sizes to 24 or less"):
        stage2.main(stage2_flags(per_device_train_batch_size=100))


def test_held_out_videos_that_are_not_there_end_stage_2_before_its_teacher_is_looked_for(
    stage2_flags, shapes, tmp_path
):
    with pytest.raises(ValueError, match="1 of 6 validation videos are not there, such as .*lost5.mp4"):
        stage2.main(stage2_flags(validation_data=lose_videos(shapes / "test_captions.json", tmp_path)))


def test_frames_that_shards_do_not_have_are_refused_before_the_teacher_is_looked_for(flags, shapes, tmp_path):
    prepare_shards([str(shapes / "train.csv")], tmp_path / "shards", ShardSettings(num_frames=2), num_workers=0)
    arguments = {"train_data": tmp_path / "shards", "validation_data": None, "train_split": None}
    arguments["teacher_name_or_path"] = tmp_path / "no_teacher"
    with pytest.raises(ValueError, match="num_frames=4 is more than the 2 frames kept of each video"):
        stage1.main(flags(**arguments))


@pytest.mark.parametrize("role", ["validation_data", "test_data"])
@pytest.mark.parametrize(
    ("script", "name"), [(retrieval_training, "captions"), (question_training, "questions")], ids=["search", "answers"]
)
class TestFineTuningWithText:
    def arguments(self, shapes, tmp_path, name, **changes):
        fields = {"train_data": shapes / f"train_{name}.json", "output_dir": tmp_path / "run", **FINE_TUNING}
        return to_flags(**fields, model_name_or_path=tmp_path / "no_model", **changes)

    def test_held_out_videos_that_are_not_there(self, shapes, tmp_path, script, name, role):
        lost = lose_videos(shapes / f"test_{name}.json", tmp_path)
        words = rf"1 of \d {role.removesuffix('_data')} videos are not there, such as .*lost\d+.mp4"
        with pytest.raises(ValueError, match=words):
            script.main(self.arguments(shapes, tmp_path, name, **{role: lost}))

    def test_a_broken_list(self, shapes, tmp_path, script, name, role):
        (tmp_path / "broken.json").write_text('[{"video": "a.mp4"')
        with pytest.raises(ValueError, match=r"broken\.json"):
            script.main(self.arguments(shapes, tmp_path, name, **{role: tmp_path / "broken.json"}))


@pytest.mark.parametrize("role", ["validation_data", "test_data"])
def test_classification_wants_its_held_out_videos_as_far_as_it_needs_them(colors, tmp_path, role, caplog):
    def train(ratio: float) -> None:
        held_out = tmp_path / "held_out.csv"
        lines = (colors / "few_validation.csv").read_text().splitlines()
        held_out.write_text("".join(f"{colors}/{line}\n" for line in lines) + "lost.mp4,0\n")
        data = {"train_data": colors / "few_train.csv", "validation_data": colors / "few_validation.csv"}
        fields = {**data, role: held_out, "max_skipped_ratio": ratio, "output_dir": tmp_path / "run", **FINE_TUNING}
        classification.main(to_flags(**fields, model_name_or_path=tmp_path / "no_model"))

    words = f"1 of 9 {role.removesuffix('_data')} videos are not there, such as .*lost.mp4"
    with pytest.raises(ValueError, match=words):
        train(0.05)
    with pytest.raises(OSError, match="no_model"):
        train(0.5)
    assert f"1 of 9 {role.removesuffix('_data')} videos are not there" in caplog.text


def test_detection_wants_its_held_out_videos(shapes, tmp_path):
    lost = lose_videos(shapes / "test_boxes.json", tmp_path, 3)
    fields = {"train_data": shapes / "train_boxes.json", "validation_data": lost, "label_keys": ["color", "shape"]}
    fields |= {"model_name_or_path": tmp_path / "no_model", "output_dir": tmp_path / "run", **FINE_TUNING}
    with pytest.raises(ValueError, match="3 of 6 validation videos are not there, such as .*lost3.mp4"):
        detection.main(to_flags(**fields))


@pytest.mark.parametrize("script", [retrieval, multiple_choice, answering], ids=["search", "choice", "answers"])
def test_an_evaluation_reads_its_list_before_its_model(script, shapes, tmp_path, monkeypatch):
    """The folder is right, and loading it would fail the test."""
    model = save_video_text_model(tmp_path / "model", shapes)
    (tmp_path / "broken.json").write_text('[{"video": "a.mp4"')
    monkeypatch.setattr(script, "load_model_and_processor", lambda *_: pytest.fail("The model was loaded."))
    fields = {"model_name_or_path": model, "data": tmp_path / "broken.json", "output_dir": tmp_path / "report"}
    with pytest.raises(ValueError, match=r"broken\.json"):
        script.main(to_flags(**fields))


def test_only_files_are_looked_for_and_not_too_many(tmp_path, caplog):
    (tmp_path / "there.mp4").touch()
    (tmp_path / "frames").mkdir()
    names = [str(tmp_path / "there.mp4"), str(tmp_path / "frames"), "https://host/a.mp4", "row 3", "a.mp4 of 12 bytes"]
    refuse_missing(names, "validation")
    refuse_missing([f"{tmp_path}/{number}.mp4" for number in range(MOST_LOOKED_FOR + 1)], "validation")
    assert not caplog.text
    with pytest.raises(ValueError, match=r"1 of 6 test videos are not there, such as \S+lost.mp4: correct the list"):
        refuse_missing([*names, str(tmp_path / "lost.mp4")] * 2, "test")
