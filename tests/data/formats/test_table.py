"""Tables as conversations: cells as they stand, media of every kind, templates that read columns and nothing else."""

from __future__ import annotations

import base64
import datetime
import decimal
import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from PIL import Image
from pyarrow import parquet

from molora.config import ConfigError
from molora.data.sources import Source, SourceConfig, open_source
from molora.modality import MediaError


def table(path: Path, prompt: str = "{question}", answer: str = "{answer}", **options: Any) -> Source:
    options = {"path": str(path), "prompt": prompt, "answer": answer, **options}
    return open_source(SourceConfig(kind="table", options=options), "data")


def answers(source: Source) -> list[str]:
    return [source[row]["messages"][1]["content"] for row in range(len(source))]


SAID = ["007", "0.50", "+5", "-0", "2024-01-02", "9" * 30, "C:\\temp\\", "\\frac{1}{2}", "two\nlines", "NA", "1e5", "é"]


@pytest.mark.parametrize(
    "name", ["t.csv", "t.CSV", "[v2] t.csv", "t.csv.gz", "t.tsv", "t.TAB", "t.json", "t.jsonl", "t.jsonl.GZ"]
)
def test_a_cell_is_what_stands_in_the_file(tmp_path: Path, name: str) -> None:
    kind = name.lower().removesuffix(".gz").rpartition(".")[2]
    if kind in ("csv", "tab", "tsv"):
        border = "," if kind == "csv" else "\t"
        text = f"question{border}answer\n" + "".join(f'q{border}"{said}"\n' for said in SAID)
        text = text.replace("question", '"question"')
    else:
        numbers = {"0.50", "-0", "9" * 30, "1e5"}
        lines = [f'{{"question": "q", "answer": {said if said in numbers else json.dumps(said)}}}' for said in SAID]
        text = "[" + ",\n".join(lines) + "]" if kind == "json" else "\n".join(lines)
    data = text.encode()
    (tmp_path / name).write_bytes(gzip.compress(data) if name.lower().endswith("gz") else data)
    assert answers(table(tmp_path / name)) == SAID


def test_a_column_that_turns_from_numbers_to_words_late_is_read_to_its_end(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("question,answer\n" + "".join(f"q,{i}\n" for i in range(10_005)) + "q,many\n")
    source = table(tmp_path / "t.csv")
    assert len(source) == 10_006
    assert [source[row]["messages"][1]["content"] for row in (0, 10_004, 10_005)] == ["0", "10004", "many"]


@pytest.mark.parametrize(
    "value, says",
    [
        (None, "t.jsonl, row 1: answer: {answer} is empty, not text"),
        ("", "t.jsonl, row 1: answer: empty, from '{answer}'"),
        (["cat", "kitten"], r"row 1: answer: {answer} is a list of 2, not text; write {answer\[0\]} for the first"),
        ([], r"row 1: answer: {answer} is a list of 0"),
        ({"en": "cat"}, r"row 1: answer: {answer} is a group of en, not text; write {answer\[en\]}"),
    ],
)
def test_an_answer_that_is_no_text_is_refused_with_row_and_column(tmp_path: Path, value: Any, says: str) -> None:
    (tmp_path / "t.jsonl").write_text(json.dumps({"question": "q", "answer": value}))
    with pytest.raises(ValueError, match=says):
        table(tmp_path / "t.jsonl")[0]
    with pytest.raises(ValueError, match=says.replace(": answer:", ": prompt:")):
        table(tmp_path / "t.jsonl", prompt="{answer}", answer="x")[0]


def test_a_prompt_without_words_needs_a_medium(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("question,answer,image\n,a,x.png\n,b,\n")
    rows = table(tmp_path / "t.csv", media={"image": "image"})
    assert [part["type"] for part in rows[0]["messages"][0]["content"]] == ["image", "text"]
    with pytest.raises(ValueError, match="t.csv, row 2: prompt: empty, from '{question}' and no medium in image;"):
        rows[1]


def test_a_row_without_the_column_is_as_one_with_null(tmp_path: Path) -> None:
    (tmp_path / "t.jsonl").write_text(
        '{"question": "q"}\n{"question": "q", "answer": true}\n{"question": "q", "answer": 7}'
    )
    source = table(tmp_path / "t.jsonl")
    with pytest.raises(ValueError, match="row 1: answer: {answer} is empty"):
        source[0]
    assert [source[row]["messages"][1]["content"] for row in (1, 2)] == ["true", "7"]


ROW = {
    "q": "Q",
    "n": ["a", ["b"]],
    "t": {"en": "E", "a.b": "F"},
    "x.y": "dot",
    "a:b": "colon",
    "a!r": "bang",
    "é ü": "words",
}


@pytest.mark.parametrize(
    "template, text",
    [
        ("{q}", "Q"),
        ("{{{q}}} {q}", "{Q} Q"),
        ("{n[0]} {n[1][0]}", "a b"),
        ("{t[en]} {t[a.b]}", "E F"),
        ("{x.y} {a:b} {a!r} {é ü}", "dot colon bang words"),
        ("no column", "no column"),
        ("", ""),
    ],
)
def test_templates_read_columns_and_their_items(tmp_path: Path, template: str, text: str) -> None:
    (tmp_path / "t.jsonl").write_text(json.dumps(ROW))
    (user, _) = table(tmp_path / "t.jsonl", prompt=template, answer="x")[0]["messages"]
    assert user["content"][-1]["text"] == text


@pytest.mark.parametrize(
    "template, says",
    [
        ("{}", r"prompt: {} names no column; columns are \['q'"),
        ("{0}", "prompt: no column '0'"),
        ("{Q}", "prompt: no column 'Q'; did you mean|prompt: no column 'Q'; columns are"),
        ("{questoin}", "prompt: no column 'questoin'"),
        ("{q.upper}", "prompt: {q.upper} is no column, nor an item of one"),
        ("{q.__class__.__mro__}", "is no column, nor an item of one"),
        ("{q!r}", "prompt: {q!r} is no column"),
        ("{q:>100000000000}", "prompt: {q:>100000000000} is no column"),
        ("{q:{q}}", "is no column"),
        ("{n[0].__class__}", "is no column"),
        ("{n[]}", "is no column"),
        ("{n[0]", "prompt: '{n.0.': expected '}' before end of string; write a brace that is text twice"),
        ("{", "prompt: '{': Single '{' encountered"),
        ("}", "Single '}' encountered"),
        ("{ q}", "prompt: no column ' q'; did you mean 'q'"),
    ],
)
def test_what_is_no_column_is_refused_when_the_source_is_opened(tmp_path: Path, template: str, says: str) -> None:
    (tmp_path / "t.jsonl").write_text(json.dumps(ROW))
    with pytest.raises(ConfigError, match=says):
        table(tmp_path / "t.jsonl", prompt=template, answer="x")


@pytest.mark.parametrize(
    "template", ["{n[2]}", "{n[-1]}", "{n[x]}", "{q[0]}", "{t[de]}", "{n[0][0]}", "{t[en][__class__]}"]
)
def test_an_item_that_is_not_there_is_refused_with_its_row(tmp_path: Path, template: str) -> None:
    (tmp_path / "t.jsonl").write_text(json.dumps(ROW))
    with pytest.raises(ValueError, match="t.jsonl, row 1: prompt: {.*}: no item"):
        table(tmp_path / "t.jsonl", prompt=template, answer="x")[0]


def test_columns_are_checked_when_the_source_is_opened(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("question,answer,answer,\nq,a,b,\n")
    assert table(tmp_path / "t.csv", answer="x")[0]["id"] == "0"
    with pytest.raises(ConfigError, match="answer: 2 columns are called 'answer'"):
        table(tmp_path / "t.csv")
    with pytest.raises(ConfigError, match="no column 'qestion'; did you mean 'question'?"):
        table(tmp_path / "t.csv", prompt="{qestion}", answer="x")
    with pytest.raises(ConfigError, match="no column 'img'; columns are"):
        table(tmp_path / "t.csv", answer="x", media={"image": "img"})


PNG = b"\x89PNG\r\n\x1a\n" + bytes(range(100))
PNG64 = base64.b64encode(PNG).decode()


@pytest.mark.parametrize(
    "cell, parts",
    [
        ("a.png", [("path", "a.png")]),
        (f"data:image/png;base64,{PNG64}", [("base64", PNG64)]),
        (PNG64, [("base64", PNG64)]),
        ("https://x/a.png", [("url", "https://x/a.png")]),
        ("file:///e/a%20b.png", [("path", "/e/a b.png")]),
        ("", []),
    ],
)
@pytest.mark.parametrize("name", ["t.csv", "t.tsv", "t.jsonl", "t.parquet"])
def test_media_cells_of_text_are_told_apart(tmp_path: Path, cell: str, parts: list[tuple[str, str]], name: str) -> None:
    if name == "t.jsonl":
        (tmp_path / name).write_text(json.dumps({"q": "q", "a": "a", "image": cell}))
    elif name == "t.parquet":
        datasets = pytest.importorskip("datasets")
        datasets.Dataset.from_dict({"q": ["q"], "a": ["a"], "image": [cell]}).to_parquet(tmp_path / name)
    else:
        border = "," if name == "t.csv" else "\t"
        cell = f'"{cell}"' if "," in cell and border == "," else cell
        (tmp_path / name).write_text(f"q{border}a{border}image\nq{border}a{border}{cell}\n")
    (user, _) = table(tmp_path / name, "{q}", "{a}", media={"image": "image"})[0]["messages"]
    found = [(key, value) for part in user["content"][:-1] for key, value in part.items() if key != "type"]
    assert found == [(key, str(tmp_path / value) if key == "path" else value) for key, value in parts]


def test_several_media_none_and_decoded_sound_in_parquet(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    rows = datasets.Dataset.from_dict(
        {
            "q": ["q"] * 3,
            "images": [[{"bytes": PNG, "path": "1.png"}, {"bytes": PNG, "path": None}], None, []],
            "sound": [{"path": "gone.wav", "array": [0.0, 0.5], "sampling_rate": 16000}, None, None],
        }
    )
    rows.to_parquet(tmp_path / "t [1]*.parquet")
    source = table(tmp_path / "t [1]*.parquet", "{q}", "x", media={"image": "images", "audio": "sound"})
    sound = {"type": "audio", "array": [0.0, 0.5], "sampling_rate": 16000}
    content = source[0]["messages"][0]["content"]
    assert content == [*[{"type": "image", "bytes": PNG}] * 2, sound, {"type": "text", "text": "q"}]
    assert source[1]["messages"][0]["content"] == source[2]["messages"][0]["content"] == [{"type": "text", "text": "q"}]


def test_stored_types_are_read_as_the_text_they_mean(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    values: dict[str, tuple[Any, Any, str]] = {
        "class": (datasets.ClassLabel(names=["cat", "dog"]), 1, "dog"),
        "decimal": (datasets.Value("decimal128(10,2)"), decimal.Decimal("0.50"), "0.50"),
        "date": (datasets.Value("date32"), datetime.date(2024, 1, 2), "2024-01-02"),
        "time": (datasets.Value("timestamp[us]"), datetime.datetime(2024, 1, 2, 3, 4, 5), "2024-01-02 03:04:05"),
        "single": (datasets.Value("float32"), 0.1, "0.1"),
        "half": (datasets.Value("float16"), 0.1, "0.1"),
        "double": (datasets.Value("float64"), 0.1, "0.1"),
        "long": (datasets.Value("int64"), 2**60 + 1, str(2**60 + 1)),
        "yes": (datasets.Value("bool"), True, "true"),
    }
    features = datasets.Features({name: feature for name, (feature, _, _) in values.items()})
    features["classes"] = datasets.Sequence(datasets.ClassLabel(names=["cat", "dog"]))
    features["odd"], features["raw"], features["no"] = features["class"], datasets.Value("binary"), features["class"]
    row = {name: [value] for name, (_, value, _) in values.items()}
    row |= {"classes": [[1, 0]], "odd": [None], "raw": [b"x"], "no": [-1]}
    datasets.Dataset.from_dict(row, features=features).to_parquet(tmp_path / "t.parquet")
    for name, (_, _, text) in values.items():
        assert answers(table(tmp_path / "t.parquet", "", f"{{{name}}}")) == [text]
    assert answers(table(tmp_path / "t.parquet", "", "{classes[0]} {classes[1]}")) == ["dog cat"]
    for name, says in (("odd", "is empty"), ("no", "is empty"), ("raw", "of type bytes"), ("classes", "a list of 2")):
        with pytest.raises(ValueError, match=f"t.parquet, row 1: answer: {{{name}}} .*{says}"):
            table(tmp_path / "t.parquet", "", f"{{{name}}}")[0]


def test_columns_that_nobody_asked_for_are_not_read(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    broken = [{"bytes": b"no picture", "path": None}]
    rows = datasets.Dataset.from_dict({"q": ["q"], "a": ["a"], "image": broken, "scan": broken})
    rows = rows.cast_column("image", datasets.Image()).cast_column("scan", datasets.Image())
    rows.to_parquet(tmp_path / "t.parquet")
    rows.save_to_disk(tmp_path / "saved")
    for path in (tmp_path / "t.parquet", tmp_path / "saved"):
        source: Any = table(path, "{q}", "{a}", media={"image": "image"})
        assert source.rows.rows.column_names == ["q", "a", "image"]
        assert source[0]["messages"][0]["content"][0] == {"type": "image", "bytes": b"no picture"}


def test_what_datasets_saved_opens_by_its_folder(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    rows = datasets.Dataset.from_dict({"question": ["q"] * 4, "answer": list("abcd"), "image": ["x.png"] * 4})
    rows.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": rows, "test": rows.select([3])}).save_to_disk(tmp_path / "several")
    assert answers(table(tmp_path / "one", split="train[1:3]")) == ["b", "c"]
    assert answers(table(tmp_path / "several", split="test")) == ["d"]
    part = table(tmp_path / "one", media={"image": "image"})[0]["messages"][0]["content"][0]
    assert part["path"] == str(tmp_path / "one/x.png")
    with pytest.raises(ConfigError, match="no split 'dev'"):
        table(tmp_path / "several", split="dev")
    with pytest.raises(ConfigError, match=r"saved as one split \(None\), and test is another"):
        table(tmp_path / "one", split="test")
    for key in ("subset", "revision"):
        with pytest.raises(ConfigError, match=f"{key} is for datasets of the hub"):
            table(tmp_path / "several", **{key: "main"})


def test_a_folder_of_text_files_is_read_without_guessing(tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    for name, said in (("train-1", "007"), ("train-2", "0.50"), ("test", "+5")):
        (tmp_path / f"{name}.csv").write_text(f"question,answer,image\nq,{said},x.png\n")
    assert answers(table(tmp_path)) == ["007", "0.50"]
    assert answers(table(tmp_path, split="test")) == ["+5"]
    assert answers(table(tmp_path, split="train[1:]")) == ["0.50"]
    part = table(tmp_path, media={"image": "image"})[1]["messages"][0]["content"][0]
    assert part["path"] == str(tmp_path / "x.png")


def test_files_of_a_folder_share_the_columns_that_are_asked_for(tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    (tmp_path / "train-1.csv").write_text("question,answer,note\nq,a,n\n")
    (tmp_path / "train-2.csv").write_text("answer,question\nb,q\n")
    assert answers(table(tmp_path)) == ["a", "b"]
    with pytest.raises(ConfigError, match="train-2.csv: no column 'note'; columns are"):
        table(tmp_path, answer="{note}")
    (tmp_path / "train-2.csv").write_text("answer,question,answer\nb,q,c\n")
    with pytest.raises(ConfigError, match="train-2.csv: 2 columns are called 'answer'"):
        table(tmp_path)


@pytest.mark.parametrize(
    "split, expected",
    [
        ("train", "abcdefghij"),
        ("train[:1]", "a"),
        ("train[8:]", "ij"),
        ("train[:10%]", "a"),
        ("train[90%:]", "j"),
        ("train[-2:]", "ij"),
        ("train[:-20%]", "abcdefgh"),
        ("train[2:4]", "cd"),
        ("train[:999]", "abcdefghij"),
    ],
)
def test_a_slice_of_a_file_is_its_rows_as_python_counts(tmp_path: Path, split: str, expected: str) -> None:
    (tmp_path / "t.csv").write_text("question,answer\n" + "".join(f"q,{letter}\n" for letter in "abcdefghij"))
    assert "".join(answers(table(tmp_path / "t.csv", split=split))) == expected


@pytest.mark.parametrize(
    "options, says",
    [
        ({"split": "test"}, "t.csv: split is for datasets, and this is one file"),
        ({"subset": "en"}, "subset is for datasets"),
        ({"revision": "main"}, "revision is for datasets"),
        ({"split": "train[5:5]"}, "leaves none of its 1 rows"),
        ({"split": "train[::2]"}, "write a name, or a slice such as"),
        ({"split": "train+test"}, "write a name, or a slice such as"),
        ({"split": "train[:1.5%]"}, "write a name, or a slice such as"),
        ({"split": ""}, "write a name, or a slice such as"),
    ],
)
def test_what_a_file_cannot_honour_is_refused(tmp_path: Path, options: dict[str, str], says: str) -> None:
    (tmp_path / "t.csv").write_text("question,answer\nq,a\n")
    with pytest.raises(ConfigError, match=says):
        table(tmp_path / "t.csv", **options)


def test_files_of_no_known_format_are_refused(tmp_path: Path) -> None:
    (tmp_path / "t.xlsx").write_bytes(b"PK")
    (tmp_path / "t.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(ConfigError, match="t.xlsx: its name does not say its format, which is one of .csv"):
        table(tmp_path / "t.xlsx")
    with pytest.raises(ConfigError, match="t.parquet: cannot be read as parquet"):
        table(tmp_path / "t.parquet")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match="empty: cannot be opened by datasets"):
        table(tmp_path / "empty")
    for name in ("gone.csv", "gone.parquet", "gone.csv.gz"):
        with pytest.raises(ConfigError, match=f"{name}: no such file"):
            table(tmp_path / name)


def test_media_of_a_table_stay_in_media_root(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("question,answer,image\nq,a,x.png\nq,a,../t.csv\n")
    source = table(tmp_path / "t.csv", media={"image": "image"}, media_root=str(tmp_path / "media"))
    assert source[0]["messages"][0]["content"][0]["path"] == str((tmp_path / "media").resolve() / "x.png")
    with pytest.raises(MediaError, match="t.csv, row 2: .*'../t.csv' leads out of media_root"):
        source[1]


def test_a_table_of_encoded_pictures_becomes_conversations(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    Image.new("RGB", (3, 2)).save(tmp_path / "x.png")
    picture = (tmp_path / "x.png").read_bytes()
    table = datasets.Dataset.from_dict({"image": [picture], "question": ["what?"], "answer": ["that"]})
    table.to_parquet(tmp_path / "t.parquet")
    options = {
        "path": str(tmp_path / "t.parquet"),
        "media": {"image": "image"},
        "prompt": "{question}",
        "answer": "{answer}",
    }
    row = open_source(SourceConfig(kind="table", options=options), "data")[0]
    content = row["messages"][0]["content"]
    assert content[0] == {"type": "image", "bytes": picture} and content[1]["text"] == "what?"
    assert row["messages"][1] == {"role": "assistant", "content": "that"}
    with pytest.raises(ConfigError, match="no column 'picture'"):
        open_source(SourceConfig(kind="table", options={**options, "media": {"image": "picture"}}), "data")


@pytest.mark.parametrize("key", ["prompt", "answer"])
def test_a_template_that_is_a_column_without_braces_is_refused(tmp_path: Path, key: str) -> None:
    pytest.importorskip("datasets")
    (tmp_path / "t.csv").write_text("tide,question,answer\na.txt,up or down?,up\n")
    options = {"path": str(tmp_path / "t.csv"), "media": {"tide": "tide"}, "prompt": "{question}", "answer": "{answer}"}
    (user, reply) = open_source(SourceConfig(kind="table", options=options), "data")[0]["messages"]
    assert user["content"][0] == {"type": "tide", "path": str(tmp_path / "a.txt")} and reply["content"] == "up"
    for constant in ("", "say it", "answers"):
        open_source(SourceConfig(kind="table", options={**options, key: constant}), "data")
    with pytest.raises(ConfigError, match=rf"t.csv: {key} is the text 'tide' in every row.* did you mean '{{tide}}'\?"):
        open_source(SourceConfig(kind="table", options={**options, key: "tide"}), "data")


def test_text_tables_are_taken_at_their_word(tmp_path: Path) -> None:
    """Quotes, missing values and other things that mean something elsewhere are what somebody said or chose."""
    pytest.importorskip("datasets")
    said = ['"Yes."', "null", "NA", "", "it's 5\\\ttabs", "007"]
    (tmp_path / "t.tsv").write_text("path\tsaid\n" + "".join(f"{i}.mp3\t{text}\n" for i, text in enumerate(said)))
    rows = ("0.jpg,who?, A: none ", '1.jpg,"Which, and ""why""?",NA', "2.jpg,when?,")
    (tmp_path / "t.csv").write_text("Figure_path,Question,Choice A\n" + "\n".join(rows))
    texts = {
        name: [row["messages"][0]["content"][-1]["text"] for row in map(table.__getitem__, range(len(table)))]
        for name, table in (
            (name, open_source(SourceConfig(kind="table", options=options), "data"))
            for name, options in {
                "t.tsv": {"path": str(tmp_path / "t.tsv"), "prompt": "={said}", "answer": ""},
                "t.csv": {"path": str(tmp_path / "t.csv"), "prompt": "{Question}|{Choice A}", "answer": ""},
            }.items()
        )
    }
    assert texts["t.tsv"] == [f"={text}" for text in (*said[:4], "it's 5\ttabs", "007")]
    assert texts["t.csv"] == ["who?| A: none ", 'Which, and "why"?|NA', "when?|"]


def test_a_dataset_of_several_subsets_is_read_by_the_one_that_is_named(tmp_path: Path) -> None:
    """As the hub stores them: a folder of parquet files for each, listed in the card."""
    datasets = pytest.importorskip("datasets")
    card = "---\nconfigs:\n"
    for name in ("en_sl", "en_de"):
        clip = {"bytes": name.encode(), "path": "common_voice_en_1.mp3"}
        table = datasets.Dataset.from_dict({"audio": [clip], "translation": [f"to {name}"]})
        table.cast_column("audio", datasets.Audio()).to_parquet(tmp_path / name / "test-00000-of-00001.parquet")
        card += f"- config_name: {name}\n  data_files:\n  - {{split: test, path: {name}/test-*}}\n"
    (tmp_path / "README.md").write_text(f"{card}---\n")
    options = {
        "path": str(tmp_path),
        "split": "test",
        "media": {"audio": "audio"},
        "prompt": "",
        "answer": "{translation}",
    }
    for name in ("en_sl", "en_de"):
        row = open_source(SourceConfig(kind="table", options={**options, "subset": name}), "data")[0]
        assert row["messages"][0]["content"][0] == {"type": "audio", "bytes": name.encode()}
        assert row["messages"][1]["content"] == f"to {name}"


@pytest.mark.parametrize("text", ['{\n "question": "x"\n}\n', "{'question': 'x'}\n"])
def test_a_file_of_which_no_row_can_be_read_says_why(tmp_path: Path, text: str) -> None:
    (tmp_path / "d.jsonl").write_text(text)
    with pytest.raises(ConfigError, match="no row can be read: .*d.jsonl, row 1"):
        table(tmp_path / "d.jsonl")


def test_a_table_of_nothing_is_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "empty.parquet"
    parquet.write_table(pyarrow.table({"question": pyarrow.array([], pyarrow.string())}), path)
    with pytest.raises(ConfigError, match=r"empty.parquet: no rows"):
        table(path)
    with pytest.raises(ConfigError, match="path is empty"):
        open_source(SourceConfig(kind="table", options={"path": "", "prompt": "{a}", "answer": "{b}"}), "data")


def test_an_id_that_stands_twice_and_a_folder_that_is_not_there_are_named(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("id,q,id,a\n1,x,2,y\n")
    options = {"path": str(tmp_path / "t.csv"), "prompt": "{q}", "answer": "{a}"}
    with pytest.raises(ConfigError, match="2 columns are called 'id'"):
        open_source(SourceConfig(kind="table", options=options), "data")
    for path in ("sub/", "~nobody-of-that-name/"):
        with pytest.raises(ConfigError, match=f"data source {path}: no such file or folder"):
            open_source(SourceConfig(kind="table", options={**options, "path": path}), "data")
