"""Rows of small sums told in words, for a model that half knows them: `python -m benchmarks.arithmetic FOLDER`.

Writes questions to learn from and others to test by, none in both. `configs/smollm2_arithmetic.yaml` has the commands.
"""

import argparse
import json
import random
from pathlib import Path

_NAMES = ("Ana", "Ben", "Chen", "Dana", "Emil", "Fay", "Gus", "Hana")
_THINGS = ("apples", "books", "coins", "marbles", "shells", "stamps")
_TEMPLATES = (
    ("{name} has {a} {things} and gets {b} more. How many {things} does {name} have?", lambda a, b: a + b),
    ("{name} had {sum} {things} and gave {b} away. How many {things} are left?", lambda a, b: a),
    ("{name} has {a} boxes of {b} {things}. How many {things} is that?", lambda a, b: a * b),
)


def question(draw: random.Random) -> tuple[str, int]:
    """A question and its answer."""
    template, answer = draw.choice(_TEMPLATES)
    a, b = draw.randint(2, 12), draw.randint(2, 12)
    text = template.format(name=draw.choice(_NAMES), things=draw.choice(_THINGS), a=a, b=b, sum=a + b)
    return text, answer(a, b)


def main() -> None:
    """Writes FOLDER/train.jsonl and FOLDER/test.jsonl."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--train", type=int, default=600)
    parser.add_argument("--test", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    draw = random.Random(given.seed)
    questions: dict[str, int] = {}
    while len(questions) < given.train + given.test:
        questions.setdefault(*question(draw))
    given.folder.mkdir(parents=True, exist_ok=True)
    lines = [
        json.dumps({"messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": str(answer)}]})
        for asked, answer in questions.items()
    ]
    for name, some in (("train", lines[: given.train]), ("test", lines[given.train :])):
        (given.folder / f"{name}.jsonl").write_text("".join(f"{line}\n" for line in some))


if __name__ == "__main__":
    main()
