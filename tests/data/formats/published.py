"""Small datasets as their projects publish them, the recipe lines that read each, and a way to break a row."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import soundfile
from PIL import Image

RATE_HZ = 16_000


class Published(NamedTuple):
    """`write` makes the dataset in a folder. `source` are the lines of a recipe below `data`, and `medium` what they
    read. `answers` are those that are learned. `spoil` makes one row wrong, and `says` is a pattern of the error."""

    name: str
    medium: str
    write: Callable[[Path], None]
    source: str
    answers: list[str]
    spoil: Callable[[Path], None]
    says: str


def picture(path: Path | io.BytesIO, shade: int = 90) -> None:
    if isinstance(path, Path):
        path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (40, 30), (shade, 120, 30)).save(path, format="JPEG")


def picture_bytes(shade: int = 90) -> bytes:
    data = io.BytesIO()
    picture(data, shade)
    return data.getvalue()


def clip(path: Path, seconds: float = 0.6) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    wave = 0.3 * np.sin(np.arange(round(seconds * RATE_HZ)) * 2 * np.pi * 330 / RATE_HZ)
    soundfile.write(path, wave, RATE_HZ)


def write(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")


def replace(name: str, old: str, new: str) -> Callable[[Path], None]:
    """Changes one text in a file."""

    def spoil(folder: Path) -> None:
        text = (folder / name).read_text(encoding="utf-8")
        assert text.count(old) == 1, f"{old!r} stands {text.count(old)} times in {name}"
        (folder / name).write_text(text.replace(old, new), encoding="utf-8")

    return spoil


def parquet(folder: Path, name: str, rows: list[dict[str, Any]], **features: Any) -> None:
    import datasets

    table = datasets.Dataset.from_list(rows)
    for column, feature in features.items():
        table = table.cast_column(column, feature)
    table.to_parquet(folder / name)


def respoil(name: str, row: int, **changes: Any) -> Callable[[Path], None]:
    """Changes columns of a row in a parquet file."""

    def spoil(folder: Path) -> None:
        from pyarrow import parquet as files

        table = files.read_table(folder / name)
        rows = table.to_pylist()
        rows[row] |= changes
        import pyarrow

        files.write_table(pyarrow.Table.from_pylist(rows, table.schema), folder / name)

    return spoil


def esc50(folder: Path) -> None:
    rows = ["1-100032-A-0.wav,1,0,dog,True,100032,A", "1-100038-A-14.wav,1,14,chirping_birds,False,100038,A"]
    write(
        folder / "meta/esc50.csv",
        "\n".join(["filename,fold,target,category,esc10,src_file,take", *rows]) + "\n",
    )
    for row in rows:
        clip(folder / "audio" / row.partition(",")[0])


def common_voice(folder: Path) -> None:
    names = [
        "client_id",
        "path",
        "sentence",
        "up_votes",
        "down_votes",
        "age",
        "gender",
        "accents",
        "variant",
        "locale",
        "segment",
    ]
    rows = [
        ["a1", "common_voice_en_1.mp3", 'He said "no".', "2", "0", "", "", "", "", "en", ""],
        ["b2", "common_voice_en_2.mp3", "It's raining.", "2", "1", "twenties", "male", "", "", "en", ""],
    ]
    write(folder / "train.tsv", "\n".join("\t".join(row) for row in [names, *rows]) + "\n")
    for row in rows:
        clip(folder / "clips" / row[1])


def llava(folder: Path) -> None:
    asked = [
        {"from": "human", "value": "Provide a brief description of the given image.\n<image>"},
        {"from": "gpt", "value": "Olive oil is a healthy ingredient used liberally."},
    ]
    rows = [
        {"id": "004539375", "image": "00453/004539375.jpg", "conversations": asked},
        {
            "id": "000000033471",
            "image": "coco/train2017/000000033471.jpg",
            "conversations": [
                {"from": "human", "value": "<image>\nWhat are the colors of the bus in the image?"},
                {"from": "gpt", "value": "The bus in the image is white and red."},
                {"from": "human", "value": "What feature can be seen on the back of the bus?"},
                {"from": "gpt", "value": "The back of the bus features an advertisement."},
            ],
        },
    ]
    write(folder / "chat.json", rows)
    for row in rows:
        picture(folder / row["image"])


def several_pictures(folder: Path) -> None:
    """Parts as OpenAI has them, two pictures in a turn, then a turn that is not learned."""
    data = base64.b64encode(picture_bytes()).decode()
    part = {"type": "image_url", "image_url": {"url": f"data:image/jpeg;base64,{data}"}}
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "What differs?"}, part, part]},
        {"role": "assistant", "content": "Nothing.", "weight": 0},
        {"role": "user", "content": "Sure?"},
        {"role": "assistant", "content": "Yes.", "weight": 1},
    ]
    write(folder / "rows.jsonl", "\n".join(json.dumps({"messages": messages}) for _ in range(2)))


SCIENCE_QA = [
    {
        "image": {"bytes": picture_bytes(), "path": None},
        "question": "Which of these states is farthest north?",
        "choices": ["West Virginia", "Louisiana", "Arizona", "Oklahoma"],
        "answer": 0,
        "hint": "",
        "task": "closed choice",
        "grade": "grade2",
        "subject": "social science",
    },
    {
        "image": None,
        "question": "Is a hat a solid?",
        "choices": ["no", "yes"],
        "answer": 1,
        "hint": "Think.",
        "task": "closed choice",
        "grade": "grade3",
        "subject": "natural science",
    },
]
MMMU = [
    {
        "id": f"validation_Accounting_{number}",
        "question": "<image 1> Baxter Company has a relevant range of production. What is <image 2>?",
        "options": options,
        "explanation": "",
        "image_1": {"bytes": picture_bytes(number), "path": "1.png"},
        "image_2": {"bytes": picture_bytes(number), "path": "2.png"},
        "image_3": None,
        "answer": letter,
        "question_type": "multiple-choice" if options != "[]" else "open",
        "subfield": "Managerial Accounting",
    }
    for number, options, letter in (
        (1, "['$6', '$7', \"$8 (not $7's)\", '$9']", "B"),
        (2, "['0', '1', '2']", "C"),
        (3, "[]", "12.5"),
    )
]
AI2D = [
    {
        "question": "which is mature",
        "options": ["a", "b", "c", "d"],
        "answer": "2",
        "image": {"bytes": picture_bytes()},
    },
    {"question": "What is fed on?", "options": ["0", "1"], "answer": "0", "image": {"bytes": picture_bytes()}},
]
TRANSLATED = [
    {
        "translation": {"en": "A dog.", "de": "Ein Hund."},
        "messages": [{"role": "user", "image": {"bytes": picture_bytes(), "path": "a.jpg"}}],
        "views": [{"file": {"bytes": picture_bytes()}}, {"file": {"bytes": picture_bytes(20)}}],
    }
] * 2


def mmbench(folder: Path) -> None:
    data = base64.b64encode(picture_bytes()).decode()
    names = ["index", "question", "hint", "A", "B", "C", "D", "answer", "category", "image", "l2-category"]
    rows = [
        ["241", "Identify the question.", "Read it.", "two", "three", "four", "five", "A", "reasoning", data, "logic"],
        ["252", "Is it big?", "", "yes", "no", "", "", "B", "attribute", data, "coarse"],
    ]
    write(folder / "dev.tsv", "\n".join("\t".join(row) for row in [names, *rows]) + "\n")


def textvqa(folder: Path) -> None:
    answers = ["nous les gosses", "nous les gosses", "dakota", "dakota digital", *["nous les gosses"] * 6]
    rows = [
        {
            "question": question,
            "image_id": f"003a8ae2ef43b90{number}",
            "image_classes": ["Cassette deck"],
            "flickr_original_url": "https://farm1.staticflickr.com/1.jpg",
            "image_width": 1024,
            "answers": answers,
            "question_tokens": question.split(),
            "question_id": 34600 + number,
            "set_name": "train",
        }
        for number, question in enumerate(["what is this?", "what does it say?"])
    ]
    write(
        folder / "TextVQA_0.5.1_train.json",
        {"dataset_type": "train", "dataset_name": "textvqa", "dataset_version": "0.5.1", "data": rows},
    )
    for row in rows:
        picture(folder / f"train_images/{row['image_id']}.jpg")


def vizwiz(folder: Path) -> None:
    answers = [{"answer": "soda", "answer_confidence": "yes"}, {"answer": "can", "answer_confidence": "maybe"}]
    rows = [
        {"image": f"VizWiz_train_0000000{n}.jpg", "question": "What is it?", "answers": answers, "answerable": 1}
        for n in range(2)
    ]
    write(folder / "train.json", rows)
    for row in rows:
        picture(folder / "images" / row["image"])


def coco(folder: Path) -> None:
    images = [
        {
            "license": 4,
            "file_name": f"{number:012d}.jpg",
            "coco_url": f"http://images.cocodataset.org/val2017/{number:012d}.jpg",
            "height": 427,
            "width": 640,
            "date_captured": "2013-11-14 17:02:52",
            "id": number,
        }
        for number in (397133, 37777)
    ]
    annotations = [
        {"image_id": 37777, "id": 13037, "caption": "The dining table near the kitchen has a bowl of fruit on it."},
        {"image_id": 397133, "id": 370509, "caption": "A café: a man “cooks”."},
        {"image_id": 397133, "id": 370512, "caption": "A man prepares food."},
    ]
    about = {"info": {"description": "COCO 2017 Dataset"}, "licenses": [{"id": 4, "name": "Attribution License"}]}
    text = json.dumps({**about, "images": images, "annotations": annotations}, ensure_ascii=False)
    write(folder / "annotations/captions_val2017.json", text)
    for image in images:
        picture(folder / "val2017" / image["file_name"])


def vqa(folder: Path) -> None:
    said = ["down", "down", "at table", "skateboard", "down", "table", "down", "down", "down", "down"]
    questions = [
        {"image_id": 262148, "question": "Where is he looking?", "question_id": 262148000},
        {"image_id": 262148, "question": "What are the people doing?", "question_id": 262148001},
    ]
    annotations = [
        {
            "question_type": "none of the above",
            "multiple_choice_answer": answer,
            "answers": [
                {"answer": text, "answer_confidence": "yes", "answer_id": number + 1}
                for number, text in enumerate([answer if text == "down" else text for text in said])
            ],
            "image_id": 262148,
            "answer_type": "other",
            "question_id": question["question_id"],
        }
        for question, answer in zip(reversed(questions), ("watching", "down"), strict=True)
    ]
    about = {
        "info": {"version": "2.0"},
        "data_type": "mscoco",
        "license": {"name": "CC BY 4.0"},
        "data_subtype": "val2014",
    }
    write(
        folder / "v2_OpenEnded_mscoco_val2014_questions.json",
        {**about, "task_type": "Open-Ended", "questions": questions},
    )
    write(folder / "v2_mscoco_val2014_annotations.json", {**about, "annotations": annotations})
    picture(folder / "val2014/COCO_val2014_000000262148.jpg")


def kaldi(folder: Path) -> None:
    """As lhotse and Kaldi write it, two utterances of one recording."""
    write(folder / "text", "sw02001-A_000098 HI UM YEAH\nsw02001-A_001980 OKAY\n")
    write(folder / "segments", "sw02001-A_000098 sw02001-A 0.00 0.50\nsw02001-A_001980 sw02001-A 0.50 -1\n")
    write(folder / "wav.scp", "sw02001-A  my clips/sw02001.wav\n")
    write(folder / "utt2spk", "sw02001-A_000098 2001-A\nsw02001-A_001980 2001-A\n")
    clip(folder / "my clips/sw02001.wav", 1.2)


def nemo(folder: Path) -> None:
    rows = [
        {"audio_filepath": "audio1.wav", "duration": 0.7, "text": "this is a nemo tutorial"},
        {"audio_filepath": "audio1.wav", "offset": 0.7, "duration": 0.4, "text": "same audio file but using offset"},
        {"audio_filepath": "audio2.wav", "text": "third transcript in this example"},
    ]
    write(folder / "manifest.json", "\n".join(map(json.dumps, rows)) + "\n")
    clip(folder / "audio1.wav", 1.1)
    clip(folder / "audio2.wav")


def lhotse(folder: Path) -> None:
    """Cuts of lhotse, after its own `trim_to_supervisions`."""
    rows = [
        {
            "id": f"lbi-2412-153948-0000-{number}",
            "start": 0.4 * number,
            "duration": 0.4,
            "channel": 0,
            "supervisions": [
                {"id": "s", "recording_id": "recording-1", "start": 0.0, "duration": 0.4, "channel": 0, "text": text}
            ],
            "recording": {
                "id": "recording-1",
                "sources": [{"type": "file", "channels": [0], "source": "storage/2412-153948-0000.flac"}],
                "sampling_rate": 16000,
                "num_samples": 14400,
                "duration": 0.9,
                "channel_ids": [0],
            },
            "type": "MonoCut",
        }
        for number, text in enumerate(["IF THE READER", "WILL EXCUSE ME"])
    ]
    write(folder / "cuts.jsonl", "\n".join(map(json.dumps, rows)) + "\n")
    clip(folder / "storage/2412-153948-0000.flac", 0.9)


def librispeech(folder: Path) -> None:
    chapters = {"103/1240": ["CHAPTER ONE MISSUS RACHEL LYNDE IS SURPRISED"], "84/121123": ["GO DO YOU HEAR", "BUT IN"]}
    for chapter, texts in chapters.items():
        name = chapter.replace("/", "-")
        lines = [f"{name}-{number:04d} {text}\n" for number, text in enumerate(texts)]
        write(folder / "LibriSpeech/dev-clean" / chapter / f"{name}.trans.txt", "".join(lines))
        for number in range(len(texts)):
            clip(folder / "LibriSpeech/dev-clean" / chapter / f"{name}-{number:04d}.flac")


def ljspeech(folder: Path) -> None:
    lines = [
        'LJ001-0001|Printing, "in the only sense" of 1450|Printing, "in the only sense" of fourteen fifty',
        "LJ001-0002|in being comparatively modern.|in being comparatively modern.",
    ]
    write(folder / "LJSpeech-1.1/metadata.csv", "\n".join(lines) + "\n")
    for line in lines:
        clip(folder / f"LJSpeech-1.1/wavs/{line[:10]}.wav")


def image_classes(folder: Path) -> None:
    for name in ("n01440764/n01440764_10026.JPEG", "n01443537/n01443537_10007.JPEG"):
        picture(folder / "train" / name)


def captions_beside(folder: Path, count: int = 2) -> None:
    for number in range(count):
        picture(folder / f"pictures/{number}.jpg")
        write(folder / f"pictures/{number}.txt", f"picture {number}\n")


def sound_classes(folder: Path) -> None:
    """As Speech Commands is published."""
    for name in ("bed/00176480_nohash_0.wav", "bird/00970ce1_nohash_0.wav"):
        clip(folder / "speech_commands" / name)


def table(path: str, media: str, prompt: str, answer: str = "", *more: str) -> str:
    about = [f"prompt: {prompt}", *([f"answer: {answer}"] if answer else [])]
    lines = [f"path: {path}, media: {media}", ", ".join(about), ", ".join(more)]
    return "kind: table\noptions: {" + ",\n  ".join(filter(None, lines)) + "}"


SAID = "Transcribe the audio clip into text."
ALL = [
    Published(
        *("esc50", "audio", esc50),
        table("meta/esc50.csv", "{audio: filename}", '"Which sound?"', '"{category}"', "media_root: audio"),
        ["dog", "chirping_birds"],
        *(replace("meta/esc50.csv", "chirping_birds", ""), r"esc50.csv, row 2: answer: empty"),
    ),
    Published(
        *("common_voice", "audio", common_voice),
        table("train.tsv", "{audio: path}", SAID, '"{sentence}"', "media_root: clips"),
        ['He said "no".', "It's raining."],
        *(
            replace("train.tsv", "common_voice_en_2.mp3", "../../x.mp3"),
            r"train.tsv, row 2: .* leads out of media_root",
        ),
    ),
    Published(
        *("llava", "vision", llava),
        "kind: messages\noptions: {path: chat.json}",
        ["Olive oil is a healthy ingredient used liberally.", "The back of the bus features an advertisement."],
        *(
            replace("chat.json", "<image>\\nWhat are", "What are"),
            r"chat.json, row 2: 0 places for media of type image",
        ),
    ),
    Published(
        *("several_pictures", "vision", several_pictures),
        "kind: messages\noptions: {path: rows.jsonl}",
        ["Yes.", "Yes."],
        lambda folder: write(folder / "rows.jsonl", (folder / "rows.jsonl").read_text() + '\n{"messages": "hi"}'),
        r"rows.jsonl, row 3: messages: expected a list",
    ),
    Published(
        *("science_qa", "vision", lambda folder: parquet(folder, "train.parquet", SCIENCE_QA)),
        table(
            *("train.parquet", "{image: image}", '"{hint} {question}\\n{choices}"', ""),
            *("choices: choices", "choice: {number: answer}", "tags: [subject]"),
        ),
        ["A", "B"],
        *(
            respoil("train.parquet", 1, answer=2),
            r"train.parquet, row 2: choice: {answer} is '2', and the number .* 0, 1;",
        ),
    ),
    Published(
        *("mmmu", "vision", lambda folder: parquet(folder, "validation.parquet", MMMU)),
        table(
            *("validation.parquet", "{image: [image_1, image_2, image_3]}", '"{question}\\n{choices}"', ""),
            *("choices: options", "choice: {letter: answer}", 'choice_line: "({letter}) {choice}"'),
        ),
        ["B", "C", "12.5"],
        *(
            respoil("validation.parquet", 1, options="['$6']"),
            r"validation.parquet, row 2: choices: \['\$6'\]; a question has from 2",
        ),
    ),
    Published(
        *("ai2d", "vision", lambda folder: parquet(folder, "test.parquet", AI2D)),
        table(
            *("test.parquet", "{image: image}", '"{question}\\n{choices}"', '"{choice}"'),
            *("choices: options", "choice: {number: answer}"),
        ),
        ["c", "0"],
        *(respoil("test.parquet", 1, answer="b"), r"test.parquet, row 2: choice: {answer} is 'b', and the number"),
    ),
    Published(
        *("mmbench", "vision", mmbench),
        table(
            *("dev.tsv", "{image: image}", '"{question}\\n{choices}"', ""),
            *("choices: [A, B, C, D]", "choice: {letter: answer}"),
        ),
        ["A", "B"],
        *(replace("dev.tsv", "\tyes\tno\t\t\t", "\tyes\t\tmaybe\t\t"), r"dev.tsv, row 2: choices: .* none empty"),
    ),
    Published(
        *("textvqa", "vision", textvqa),
        table(
            *("TextVQA_0.5.1_train.json", '{image: "train_images/{image_id}.jpg"}', '"{question}"', ""),
            *("answers: answers", "rows_under: data"),
        ),
        ["nous les gosses"] * 2,
        lambda folder: write(
            folder / "TextVQA_0.5.1_train.json",
            (folder / "TextVQA_0.5.1_train.json").read_text()[:-2] + ', {"question": "q", "image_id": "x"}]}',
        ),
        r"TextVQA_0.5.1_train.json, data, row 3: answers: {answers} is empty, not a list of texts",
    ),
    Published(
        *("vizwiz", "vision", vizwiz),
        table(
            *("train.json", "{image: image}", '"{question}"', ""),
            *('answers: "answers[*][answer]"', "media_root: images"),
        ),
        ["soda", "soda"],
        lambda folder: write(
            folder / "train.json", [{"image": "a.jpg", "question": "q", "answers": [{"answer": 0.5}, {}]}]
        ),
        r"train.json, row 1: answers: {answers\[\*\]\[answer\]}: no item 'answer'",
    ),
    Published(
        *("nested", "vision", lambda folder: parquet(folder, "train.parquet", TRANSLATED)),
        table(
            *("train.parquet", '{image: ["messages[0][image]", "views[*][file]"]}', '"{translation[en]}"'),
            '"{translation[de]}"',
        ),
        ["Ein Hund."] * 2,
        *(
            respoil("train.parquet", 1, messages=[]),
            r"train.parquet, row 2: media.image: {messages\[0\]\[image\]}: no item '0'",
        ),
    ),
    Published(
        *("coco_captions", "vision", coco),
        "kind: coco_captions\noptions:\n  path: annotations/captions_val2017.json\n  prompt: Describe it.\n"
        "  media_root: val2017",
        [
            "The dining table near the kitchen has a bowl of fruit on it.",
            "A café: a man “cooks”.",
            "A man prepares food.",
        ],
        replace("annotations/captions_val2017.json", '"caption": "A man prepares food."', '"caption": ""'),
        r"captions_val2017.json, annotations, row 3: answer: empty",
    ),
    Published(
        *("coco_pictures", "vision", coco),
        "kind: coco_captions\noptions:\n  path: annotations/captions_val2017.json\n  prompt: Describe it.\n"
        "  row: image\n  media_root: val2017",
        ["A café: a man “cooks”.", "The dining table near the kitchen has a bowl of fruit on it."],
        replace("annotations/captions_val2017.json", '"image_id": 37777', '"image_id": 5'),
        r"captions_val2017.json, annotations, row 1: 5 is no id among the images of",
    ),
    Published(
        *("vqa", "vision", vqa),
        "kind: vqa\noptions:\n  questions: v2_OpenEnded_mscoco_val2014_questions.json\n"
        "  annotations: v2_mscoco_val2014_annotations.json\n  media_root: val2014",
        ["down", "watching"],
        replace("v2_mscoco_val2014_annotations.json", '"question_id": 262148001', '"question_id": 1'),
        r"val2014_questions.json, questions, row 2: 262148001 is no question_id among the annotations of",
    ),
    Published(
        *("kaldi", "audio", kaldi, "kind: kaldi\noptions: {path: .}"),
        ["HI UM YEAH", "OKAY"],
        *(replace("segments", "0.50 -1", "soon -1"), r"segments, row 2: .* a segment is the ids"),
    ),
    Published(
        *("nemo", "audio", nemo, "kind: nemo\noptions: {path: manifest.json}"),
        ["this is a nemo tutorial", "same audio file but using offset", "third transcript in this example"],
        *(
            replace("manifest.json", '"offset": 0.7', '"offset": "soon"'),
            r"manifest.json, row 2: segment.start: 'soon'",
        ),
    ),
    Published(
        *("lhotse", "audio", lhotse),
        table(
            *("cuts.jsonl", '{audio: "recording[sources][0][source]"}', SAID, '"{supervisions[0][text]}"'),
            "segment: {start: start, duration: duration}",
        ),
        ["IF THE READER", "WILL EXCUSE ME"],
        replace("cuts.jsonl", ', "text": "WILL EXCUSE ME"', ""),
        r"cuts.jsonl, row 2: answer: {supervisions\[0\]\[text\]}: no item 'text'",
    ),
    Published(
        *("librispeech", "audio", librispeech, "kind: transcripts\noptions: {path: LibriSpeech/dev-clean}"),
        ["CHAPTER ONE MISSUS RACHEL LYNDE IS SURPRISED", "GO DO YOU HEAR", "BUT IN"],
        replace("LibriSpeech/dev-clean/84/121123/84-121123.trans.txt", "-0001 BUT IN", "-0001"),
        r"84-121123.trans.txt, row 2: has 1 cells with ' ' between them, but there are 2 names: id, text",
    ),
    Published(
        *("ljspeech", "audio", ljspeech),
        'kind: transcripts\noptions:\n  path: LJSpeech-1.1/metadata.csv\n  separator: "|"\n'
        '  names: [id, written, text]\n  medium: "wavs/{id}.wav"',
        ['Printing, "in the only sense" of fourteen fifty', "in being comparatively modern."],
        replace("LJSpeech-1.1/metadata.csv", "LJ001-0002|", "LJ001-0002|a|"),
        r"metadata.csv, row 2: has 4 cells with '|' between them, but there are 3 names",
    ),
    Published(
        *("image_classes", "vision", image_classes),
        'kind: folder\noptions: {path: train, part: image, prompt: "Which class?", answer: "{class}"}',
        ["n01440764", "n01443537"],
        *(lambda folder: picture(folder / "train/stray.png"), r"train/stray.png: answer: {class} is empty"),
    ),
    Published(
        *("captions_beside", "vision", captions_beside),
        'kind: folder\noptions: {path: pictures, part: image, prompt: "Describe it.", answer: "{text}"}',
        ["picture 0", "picture 1"],
        *(lambda folder: (folder / "pictures/1.txt").unlink(), r"pictures/1.jpg: its text 1.txt: No such file"),
    ),
    Published(
        *("sound_classes", "audio", sound_classes),
        'kind: folder\noptions: {path: speech_commands, part: audio, prompt: "Which word?", answer: "{class}"}',
        ["bed", "bird"],
        *(
            lambda folder: clip(folder / "speech_commands/stray.wav"),
            r"speech_commands/stray.wav: answer: {class} is empty",
        ),
    ),
]
