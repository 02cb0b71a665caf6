"""Metrics that look for a value in an answer: a number with its unit, or what a regular expression describes."""

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any, Literal

from molora.config import ConfigError
from molora.evaluate.metrics import Judged, Mean

# What each unit is in the first one of its line. Lines are quantities.
_UNITS = (
    {"m": 1, "nm": 1e-9, "µm": 1e-6, "mm": 1e-3, "cm": 0.01, "dm": 0.1, "km": 1000, "in": 0.0254, "ft": 0.3048}
    | {"yd": 0.9144, "mi": 1609.344},
    {"g": 1, "µg": 1e-6, "mg": 1e-3, "kg": 1000, "t": 1e6, "oz": 28.349523125, "lb": 453.59237},
    {"s": 1, "µs": 1e-6, "ms": 1e-3, "min": 60, "h": 3600, "day": 86400, "week": 604800},
    {"l": 1, "ml": 1e-3, "cl": 0.01, "dl": 0.1, "m3": 1000, "cm3": 1e-3},
    {"m2": 1, "mm2": 1e-6, "cm2": 1e-4, "km2": 1e6, "ha": 1e4},
    {"j": 1, "kj": 1000, "kwh": 3.6e6, "wh": 3600, "cal": 4.184, "kcal": 4184},
    {"w": 1, "kw": 1000},
    {"n": 1, "kn": 1000},
    {"pa": 1, "hpa": 100, "kpa": 1000, "bar": 1e5},
    {"$": 1, "cent": 0.01},
)
_NAMES = {
    **{"metre": "m", "meter": "m", "millimetre": "mm", "millimeter": "mm", "centimetre": "cm", "centimeter": "cm"},
    **{"kilometre": "km", "kilometer": "km", "inch": "in", "inche": "in", "foot": "ft", "feet": "ft", "yard": "yd"},
    **{"mile": "mi", "gram": "g", "milligram": "mg", "kilogram": "kg", "kilo": "kg", "tonne": "t", "ounce": "oz"},
    **{"pound": "lb", "second": "s", "sec": "s", "millisecond": "ms", "minute": "min", "hour": "h", "hr": "h"},
    **{"litre": "l", "liter": "l", "millilitre": "ml", "milliliter": "ml", "hectare": "ha", "joule": "j", "watt": "w"},
    **{"newton": "n", "pascal": "pa", "dollar": "$", "usd": "$", "euro": "€", "eur": "€", "percent": "%"},
}
_SIGNS = {"²": "2", "³": "3", "^": "", "μ": "µ", "·": "*"}
_NUMBER = re.compile(
    r"(?P<before>[$€£¥]\s?)?(?<![\w.])(?P<sign>[-+−]\s?)?(?:(?P<whole>\d{1,3}(?:,\d{3})+|\d+)(?P<part>\.\d+)?|(?P<point>\.\d+))"
    r"(?P<power>[eE][-+]?\d{1,3})?(?:\s*/\s*(?P<below>\d+)(?![\d.]))?\s?(?P<unit>%|°\s?[CFK]\b|[$€£¥]|"
    r"(?:per cent|[^\W\d_]+)(?:[²³]|\^?[23](?!\d))?(?:\s?(?:/|per)\s?[^\W\d_]+(?:[²³]|\^?[23](?!\d))?)?)?"
)


@dataclass(kw_only=True)
class NumberConfig:
    """An answer may be off by `tolerance` times the expected number. `read` says which number of the answer counts: the
    `last` one, the last after "answer is" or "answer:" (`final`; else the last), or the `only` one, so that an answer
    with others is wrong. Without `units` what follows a number is not looked at."""

    tolerance: float = 1e-6
    read: Literal["last", "final", "only"] = "last"
    units: bool = True

    def __post_init__(self) -> None:
        if not 0 <= self.tolerance < 1:
            raise ConfigError(f"tolerance is {self.tolerance}; give a share from 0 to below 1")


class Number(Mean):
    """The share of answers whose number is the expected one, in its unit or in another of the same quantity: 3 km is
    3,000 metres. Where a number is expected without a unit the answer may have any; a word that is no unit is none."""

    config_type = NumberConfig
    rates_each = True
    name = share = "number"

    def __init__(self, config: NumberConfig) -> None:
        self.config = config

    def values(self, judged: Sequence[Judged]) -> list[float]:
        return [float(any(self.is_right(item, expected) for expected in item.answers)) for item in judged]

    def check_questions(self, judged: Sequence[Judged]) -> None:
        for item in judged:
            for expected in item.answers:
                self._wanted(item, expected)

    def _wanted(self, item: Judged, expected: str) -> tuple[float, str]:
        wanted = list(numbers_in(expected))
        if len(wanted) != 1:
            raise ValueError(f"question {item.id}: expects {expected!r:.60}; number needs one number there")
        return wanted[0]

    def is_right(self, item: Judged, expected: str) -> bool:
        right, right_unit = self._wanted(item, expected)
        given = list(numbers_in(self._part(item.answer)))
        if not given or (self.config.read == "only" and len(given) > 1):
            return False
        value, unit = given[-1]
        factor = _factor(unit, right_unit) if self.config.units else 1.0
        return factor is not None and math.isclose(
            value * factor, right, rel_tol=self.config.tolerance, abs_tol=1e-12 if right == 0 else 0.0
        )

    def _part(self, answer: str) -> str:
        if self.config.read != "final":
            return answer
        return re.split(r"answer(?:\s+is|:)", answer, flags=re.IGNORECASE)[-1]


def numbers_in(text: str) -> Iterator[tuple[float, str]]:
    """The numbers of a text, each with its unit: one of the table above, a currency, per cent, degrees, or none."""
    return ((float(value), unit) for value, unit in decimals_in(text))


def decimals_in(text: str) -> Iterator[tuple[Decimal, str]]:
    """The same with every digit that is written. What is divided by zero is NaN."""
    for found in _NUMBER.finditer(text):
        whole, part = (found["whole"] or "0").replace(",", ""), found["part"] or found["point"] or ""
        value = Decimal(f"{whole}{part}{found['power'] or ''}")
        if found["below"]:
            below = Decimal(found["below"])
            value = value / below if below else Decimal("NaN")
        if (found["sign"] or "+").strip() != "+":
            value = value.copy_negate()
        yield value, _unit((found["before"] or found["unit"] or "").strip())


def _unit(text: str) -> str:
    """A unit by its sign, such as km/h; empty for what is none."""
    for sign, plain in _SIGNS.items():
        text = text.replace(sign, plain)
    pieces = [_one(piece) for piece in re.split(r"\s?/\s?|\s+per\s+", text.lower().replace("per cent", "percent"))]
    return "/".join(pieces) if all(pieces) else ""


def _one(text: str) -> str:
    known = {unit for quantity in _UNITS for unit in quantity} | {"€", "£", "¥", "%"}
    text = text.replace(" ", "")
    for name in (text, text.removesuffix("s")):
        name = _NAMES.get(name, name)
        if name in known or name.startswith("°"):
            return name
    return ""


def _factor(unit: str, wanted: str) -> float | None:
    """What a number in `unit` is multiplied by to be in the unit that is wanted; None where it cannot be."""
    if unit == wanted or not wanted:
        return 1.0
    ours, theirs = unit.split("/"), wanted.split("/")
    if len(ours) != len(theirs):
        return None
    factors = []
    for one, other in zip(ours, theirs, strict=True):
        table = next((table for table in _UNITS if one in table and other in table), None)
        if table is None and one != other:
            return None
        factors.append(1.0 if table is None else table[one] / table[other])
    return factors[0] if len(factors) == 1 else factors[0] / factors[1]


@dataclass(kw_only=True)
class RegularExpressionConfig:
    """The `pattern` that an answer has to have; without one the expected answer of each row is its pattern. The `whole`
    answer has to be it, or a part of it somewhere. A search that takes `timeout_seconds` finds nothing."""

    pattern: str | None = None
    whole: bool = False
    ignore_case: bool = False
    timeout_seconds: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.timeout_seconds <= 60:
            raise ConfigError(f"timeout_seconds is {self.timeout_seconds:g}; give a number above 0, and 60 at most")


class RegularExpression(Mean):
    """The share of answers in which a regular expression is found, as the library `regex` reads it, within a time."""

    config_type = RegularExpressionConfig
    rates_each = True
    name = share = "regular_expression"

    def __init__(self, config: RegularExpressionConfig) -> None:
        try:
            import regex
        except ImportError as error:
            raise ImportError("regular_expression needs regex: pip install 'molora[metrics]'") from error
        self.config, self.regex = config, regex
        if config.pattern is not None:
            self.compiled(config.pattern, "pattern")

    def compiled(self, pattern: str, where: str) -> re.Pattern[str]:
        flags = self.regex.IGNORECASE if self.config.ignore_case else 0
        try:
            return self.regex.compile(pattern, flags)
        except self.regex.error as error:
            raise ValueError(f"{where}: {pattern!r:.80} is no regular expression: {error}") from error

    def check_questions(self, judged: Sequence[Judged]) -> None:
        for item in judged:
            for pattern in self._patterns(item):
                self.compiled(pattern, f"question {item.id}")

    def values(self, judged: Sequence[Judged]) -> list[float]:
        return [float(any(self.is_found(item, pattern) for pattern in self._patterns(item))) for item in judged]

    def _patterns(self, item: Judged) -> list[str]:
        return item.answers if self.config.pattern is None else [self.config.pattern]

    def is_found(self, item: Judged, pattern: str) -> bool:
        compiled: Any = self.compiled(pattern, f"question {item.id}")
        search = compiled.fullmatch if self.config.whole else compiled.search
        try:
            return search(item.answer, timeout=self.config.timeout_seconds) is not None
        except TimeoutError:
            return False
