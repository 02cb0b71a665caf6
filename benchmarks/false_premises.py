"""Questions about what a picture does not show, for a model that answers them as if it did:
`python -m benchmarks.false_premises FOLDER`.

Writes pairs to learn from and questions to test by, on pictures of easy-VQA's own two splits. Of each, half ask for the
colour of a shape, or the shape of a colour, that is not there. `configs/smollm2_false_premises.yaml` has the commands.
"""

import argparse
import json
import random
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from molora.data.easy_vqa import COLOURS, SHAPES, descriptions, read_split

_OF_A_SHAPE = ("what color is the {}?", "what is the color of the {}?")
_OF_A_COLOUR = ("what is the {} shape?",)


def asked(split: Literal["train", "test"], draw: random.Random) -> Iterator[tuple[bool, str, str, str, str]]:
    """Without end: whether a picture shows what its question names, the picture, the question, the answer to it, and a
    wrong one, which takes what is there for what is not, or the other way round."""
    questions, paths = read_split(split)
    told = sorted(descriptions(questions).items())
    while True:
        image, (colour, shape) = draw.choice(told)
        there = draw.random() < 0.5
        template = draw.choice(_OF_A_SHAPE + _OF_A_COLOUR)
        shown, other, kinds, noun = (
            (colour, shape, SHAPES, "{}") if template in _OF_A_SHAPE else (shape, colour, COLOURS, "{} shape")
        )
        named = other if there else draw.choice([kind for kind in kinds if kind != other])
        absent = f"there is no {noun.format(named)}"
        yield there, paths[image], template.format(named), *((shown, absent) if there else (absent, shown))


def prompt(picture: str, question: str) -> list[dict[str, Any]]:
    content = [{"type": "image", "path": picture}, {"type": "text", "text": question}]
    return [{"role": "system", "content": ""}, {"role": "user", "content": content}]


def main() -> None:
    """Writes FOLDER/pairs.jsonl, FOLDER/there.jsonl and FOLDER/not_there.jsonl."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--pairs", type=int, default=960)
    parser.add_argument("--test", type=int, default=300, help="questions of each kind (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    draw = random.Random(given.seed)
    rows: dict[str, list[dict[str, Any]]] = {"pairs": [], "there": [], "not_there": []}
    for _, picture, question, right, wrong in islice(asked("train", draw), given.pairs):
        rows["pairs"].append({"prompt": prompt(picture, question), "chosen": right, "rejected": wrong})
    for there, picture, question, right, _ in asked("test", draw):
        test = rows["there" if there else "not_there"]
        if len(test) < given.test:
            test.append({"messages": [*prompt(picture, question), {"role": "assistant", "content": right}]})
        elif all(len(rows[name]) == given.test for name in ("there", "not_there")):
            break
    given.folder.mkdir(parents=True, exist_ok=True)
    for name, some in rows.items():
        lines = "".join(f"{json.dumps(row)}\n" for row in some)
        (given.folder / f"{name}.jsonl").write_text(lines, encoding="utf-8")


if __name__ == "__main__":
    main()
