"""Rows of small sums told in words, for a model that half knows them: `python -m benchmarks.arithmetic FOLDER`.

Writes questions to learn from and others to test by, none in both. `configs/smollm2_arithmetic.yaml` has the commands.
With `--shown` three solved sums stand before each question; a model that follows them answers in a dozen tokens, of
which `molora pivot` finds the pivotal ones.
"""

import argparse
import json
import random
from pathlib import Path
from typing import Any

_NAMES = ("Ana", "Ben", "Chen", "Dana", "Emil", "Fay", "Gus", "Hana")
_THINGS = ("apples", "books", "coins", "marbles", "shells", "stamps")
_TEMPLATES = (
    ("{name} has {a} {things} and gets {b} more. How many {things} does {name} have?", lambda a, b: a + b),
    ("{name} had {sum} {things} and gave {b} away. How many {things} are left?", lambda a, b: a),
    ("{name} has {a} boxes of {b} {things}. How many {things} is that?", lambda a, b: a * b),
)
_SHOWN = (
    ("Ida has 3 pens and gets 4 more. How many pens does Ida have?", "3 + 4 = 7. Ida has 7 pens."),
    ("Ida had 9 pens and gave 5 away. How many pens are left?", "9 - 5 = 4. 4 pens are left."),
    ("Ida has 3 boxes of 5 pens. How many pens is that?", "3 * 5 = 15. That is 15 pens."),
)


def question(draw: random.Random) -> tuple[str, int]:
    """A question and its answer."""
    template, answer = draw.choice(_TEMPLATES)
    a, b = draw.randint(2, 12), draw.randint(2, 12)
    text = template.format(name=draw.choice(_NAMES), things=draw.choice(_THINGS), a=a, b=b, sum=a + b)
    return text, answer(a, b)


def turns(asked: str, answer: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]


def main() -> None:
    """Writes FOLDER/train.jsonl and FOLDER/test.jsonl."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--train", type=int, default=600)
    parser.add_argument("--test", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--shown", action="store_true", help="with three solved sums before each question")
    given = parser.parse_args()
    draw = random.Random(given.seed)
    questions: dict[str, int] = {}
    while len(questions) < given.train + given.test:
        questions.setdefault(*question(draw))
    given.folder.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = [{"messages": turns(asked, str(answer))} for asked, answer in questions.items()]
    if given.shown:
        shown = [turn for solved in _SHOWN for turn in turns(*solved)]
        rows = [{"id": f"sum {number}", "messages": shown + row["messages"]} for number, row in enumerate(rows)]
    for name, some in (("train", rows[: given.train]), ("test", rows[given.train :])):
        (given.folder / f"{name}.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in some))


if __name__ == "__main__":
    main()
