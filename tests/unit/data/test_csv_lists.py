"""Lists of videos as text: every form that is read, and every other one refused by name."""

import itertools
import logging

import pytest
from datasets import ClassLabel
from PIL import Image

from umt_hf.data.lists.csv_lists import SEPARATORS
from umt_hf.data.sources import load_videos

pytestmark = pytest.mark.usefixtures("list_store")


def read(folder, text, name="list.csv", encoding="utf-8", **options):
    """Rows without the folder's name, and the names of the classes."""
    (folder / name).write_bytes(text.encode(encoding))
    table = load_videos(str(folder / name), **options)
    feature = table.features.get("label")
    rows = [{**row, "video": row["video"].removeprefix(f"{folder}/")} for row in table]
    return rows, feature.names if isinstance(feature, ClassLabel) else None


@pytest.mark.parametrize("separator,ending", itertools.product(SEPARATORS, ["\n", "\r\n"]))
def test_separators_are_found_and_said(tmp_path, caplog, separator, ending):
    caplog.set_level(logging.INFO)
    text = ending.join([f"a.mp4{separator}1", "", f"deep/b c.mp4{separator}0", ""])
    rows, names = read(tmp_path, text)
    assert rows == [{"video": "a.mp4", "label": 1}, {"video": "deep/b c.mp4", "label": 0}] and names is None
    assert f"separated by {SEPARATORS[separator]}" in caplog.text
    assert read(tmp_path, text, encoding="utf-8-sig") == read(tmp_path, text, encoding="utf-16") == (rows, names)
    assert read(tmp_path, text, name="list.txt") == read(tmp_path, text, csv_separator=separator) == (rows, names)


@pytest.mark.parametrize("separator", SEPARATORS)
def test_class_names_are_labels(tmp_path, separator):
    text = f"a.mp4{separator}run\nb.mp4{separator}jump\nc.mp4{separator}run\n"
    rows, names = read(tmp_path, text)
    assert [row["label"] for row in rows] == [1, 0, 1] and names == ["jump", "run"]
    rows, names = read(tmp_path, text, class_names=["run", "swim", "jump"])
    assert [row["label"] for row in rows] == [0, 2, 0] and names == ["run", "swim", "jump"]
    with pytest.raises(ValueError, match=r"list\.csv: the labels \['run'\] are not classes"):
        read(tmp_path, text, class_names=["jump"])


def test_names_with_spaces_quotes_and_accents(tmp_path):
    rows, names = read(tmp_path, '"a,1.mp4","play, loud"\nb.mp4,playing guitar\nc.mp4,e\u0301te\u0301\nd.mp4,été\n')
    assert names == ["play, loud", "playing guitar", "été"] and rows[0]["video"] == "a,1.mp4"
    assert [row["label"] for row in rows] == [0, 1, 2, 2]


@pytest.mark.parametrize("separator", [",", "\t", ";", " "])
def test_a_header_names_the_columns_in_any_order(tmp_path, separator):
    lines = ["label video fps", "1 a.mp4 25", "0 b.mp4 30"]
    rows, _ = read(tmp_path, "\n".join(lines).replace(" ", separator))
    assert rows == [
        {"video": "a.mp4", "label": 1, "fps": "25"},
        {"video": "b.mp4", "label": 0, "fps": "30"},
    ]


@pytest.mark.parametrize(
    "header", ["path,label", "Video,Class", "file_name,category", "clip_path,label_name", ",filename,target"]
)
def test_usual_headers_are_known(tmp_path, header):
    index = header.startswith(",")
    rows, names = read(tmp_path, f"{header}\n{'0,' * index}a.mp4,run\n{'1,' * index}b,jump\n")
    assert [(row["video"], row["label"]) for row in rows] == [("a.mp4", 1), ("b.mp4", 0)]
    assert names == ["jump", "run"]


def test_the_column_asked_for_comes_first(tmp_path):
    rows, _ = read(tmp_path, "name,film,label\nx,a.mp4,0\n", video_column="film")
    assert rows == [{"video": "a.mp4", "label": 0, "name": "x"}]


def test_exports_of_spreadsheets(tmp_path):
    text = "sep=;\r\nvideo;label;;\r\na.mp4;1.0;;\r\n;;;\r\n\r\nb.mp4;0.0;;\r\n"
    rows, _ = read(tmp_path, text, encoding="utf-8-sig")
    assert rows == [{"video": "a.mp4", "label": 1}, {"video": "b.mp4", "label": 0}]
    assert read(tmp_path, "a.mp4,1,,\n,,,\nb.mp4,0,,\n")[0] == rows


@pytest.mark.parametrize("separator", [",", "\t", " "])
def test_lists_of_frame_folders(tmp_path, separator):
    text = "deep/a 157 12\nmy b 12 0\n" if separator != "," else "deep/a,157,12\nmy b,12,0\n"
    text = text.replace(" ", "\t").replace("my\tb", "my b") if separator == "\t" else text
    assert read(tmp_path, text)[0] == [{"video": "deep/a", "label": 12}, {"video": "my b", "label": 0}]


def test_lists_of_videomae_have_no_labels(tmp_path):
    assert read(tmp_path, "a.mp4 0 -1\nmy b.mp4 0 -1\n")[0] == [{"video": "a.mp4"}, {"video": "my b.mp4"}]
    assert read(tmp_path, "a 0 157\nb 0 12\n")[0] == [{"video": "a"}, {"video": "b"}]
    assert read(tmp_path, "a.mp4 -1\nb.mp4 -1\n")[0] == [{"video": "a.mp4"}, {"video": "b.mp4"}]


def test_a_folder_of_frames_may_be_listed_without_its_count(tmp_path):
    (tmp_path / "clip").mkdir()
    for number in range(3):
        Image.new("RGB", (8, 8)).save(tmp_path / "clip" / f"{number}.jpg")
    assert read(tmp_path, "clip,1\nother,0\n")[0] == [
        {"video": "clip", "label": 1},
        {"video": "other.mp4", "label": 0},
    ]


def test_lists_of_paths_alone(tmp_path):
    for name in ("list.csv", "list.txt"):
        assert read(tmp_path, "a.mp4\nmy b, 1.mp4\n", name=name)[0] == [{"video": "a.mp4"}, {"video": "my b, 1.mp4"}]
    assert read(tmp_path, "a\nb\n")[0] == [{"video": "a.mp4"}, {"video": "b.mp4"}]


def test_urls_stay_as_they_are(tmp_path):
    addresses = ["https://host/a.mp4?sig=a%2Cb", "HTTP://host/watch", "s3://bucket/b.mp4", "file:///c.mp4"]
    rows, _ = read(tmp_path, "\n".join(f"{address},0" for address in addresses), data_root="/videos")
    assert [row["video"] for row in rows] == addresses
    assert read(tmp_path, "c:d.mp4,0\n")[0][0]["video"] == "c:d.mp4"  # a colon alone is a part of a name
    assert [row["video"] for row in read(tmp_path, "\n".join(addresses))[0]] == addresses


def test_hidden_files_that_a_list_names_are_meant(tmp_path):
    assert read(tmp_path, "._a.mp4,0\n.cache/b.mp4,1\n")[0][1]["video"] == ".cache/b.mp4"


@pytest.mark.parametrize(
    "text,line",
    [
        ("a.mp4,3,120\n", 1),
        ("a.mp4,3,train\n", 1),
        ("a.mp4,run,fast\n", 1),
        ("a.mp4 157 12\n", 1),
        ("a.mp4,1\nb.mp4\n", 2),
        ("a.mp4,1\nb.mp4,0\nc.mp4,run\n", 3),
        ("a.mp4,run\nb.mp4,jump\nc.mp4,3\n", 3),
        ("a.mp4,1\nb.mp4,-1\n", 2),
        ("Datei,Klasse\na.mp4,run\nb.mp4,jump\n", 1),
        ("Datei,Klasse\na.mp4,1\nb.mp4,0\n", 1),
        ("video,label\na.mp4,1\nb.mp4,\n", 3),
        ("video,label\na.mp4,1\n,1\n", 3),
        ("video,label\na.mp4,1\nb, c.mp4,1\n", 3),
        ('"a.mp4,1\nb.mp4,0\n', 1),
        ("label,youtube_id,start,end\nrun,abc,1,2\n", 1),
        ("a.mp4|1\nb.mp4|0\n", 1),
    ],
)
def test_other_forms_are_refused_by_file_and_line(tmp_path, text, line):
    with pytest.raises(ValueError, match=rf"list\.csv, line {line}[:,]"):
        read(tmp_path, text)


def test_other_encodings_are_refused_by_name(tmp_path):
    with pytest.raises(ValueError, match=r"list\.csv: is not UTF-8 text"):
        read(tmp_path, "ä.mp4,1\n", encoding="latin-1")
    with pytest.raises(ValueError, match="not one character"):
        read(tmp_path, "a.mp4,1\n", csv_separator="ab")


def test_doubtful_labels_are_warned_of(tmp_path, caplog):
    read(tmp_path, "a.mp4,0\nb.mp4,1\n")
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
    read(tmp_path, "a.mp4,run\nb.mp4,run\na.mp4,jump\n")
    assert "1 videos have several labels in different rows, such as" in caplog.text and "(jump, run)" in caplog.text
    read(tmp_path, "a.mp4,0\nb.mp4,3\n")
    assert "labels go up to 3, and 2 numbers have no video: ['1', '2']" in caplog.text
    caplog.clear()
    # A held-out list need not show every class, and stage 1 has no use for labels.
    read(tmp_path, "a.mp4,0\nb.mp4,3\n", class_names=["a", "b", "c", "d"])
    assert read(tmp_path, "a.mp4,0\na.mp4,3\n", needs_labels=False)[0] == [{"video": "a.mp4"}] * 2
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


@pytest.mark.parametrize("separator", [",", ";", "\t", " "])
@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("first", ["", "video{}\n", "sep={}\n", '"sep={}"\n', "sep={0}\nvideo{0}\n"])
def test_an_empty_last_column_of_paths_alone_is_passed_over(tmp_path, separator, count, first):
    """With and without a first line, quotes, a label in some line, or a blank one."""
    end = separator * count
    for names in (["a.mp4", "b c.mp4", "http://x.y/d"], ['"a.mp4"', '"b c.mp4"', "http://x.y/d"]):
        if separator == " " and first:  # it is stated
            names[1] = '"b c.mp4"' if "sep" in first else "b.mp4"
        text = first.format(separator if "sep" in first else end) + "".join(f"{n}{end}\n" for n in names)
        rows, _ = read(tmp_path, text, needs_labels=False)
        assert [row["video"] for row in rows] == [name.strip('"') for name in names]
        if "video" not in first and (separator != " " or first):
            rows, _ = read(tmp_path, f"{text}\ne.mp4{separator}3{separator}\n", needs_labels=False)
            assert [row["video"] for row in rows] == [name.strip('"') for name in [*names, "e.mp4"]]


@pytest.mark.parametrize("separator", ["\t", ",", ";"])
@pytest.mark.parametrize("line", [1, 2, 5])
def test_a_stray_quote_is_named_by_its_line(tmp_path, separator, line):
    """Whatever the separator is, and although it is looked for."""
    lines = [f"v{number}.mp4{separator}a red ring" for number in range(1, 7)]
    for bad in (f'v.mp4{separator}"a red" ring', f'v.mp4{separator}"a red ring'):
        (tmp_path / "list.tsv").write_text("\n".join([*lines[: line - 1], bad, *lines[line:]]) + "\n")
        with pytest.raises(ValueError, match=rf"list\.tsv, line {line}: .*[Cc]heck the quotes"):
            load_videos(str(tmp_path / "list.tsv"))
