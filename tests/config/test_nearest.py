"""The hint of an error: the nearest of the names that there are."""

from __future__ import annotations

from molora.config import did_you_mean


def test_a_typo_is_asked_about_and_a_stranger_is_not() -> None:
    names = ["learning_rate", "warmup_steps", "steps"]
    assert did_you_mean("lerning_rate", names) == "did you mean 'learning_rate'? "
    assert did_you_mean("colour", names) == "" and did_you_mean("steps", []) == ""


def test_several_names_may_be_near() -> None:
    assert did_you_mean("vit_bas", ["vit_base", "vit_case", "resnet18"], at_most=3) == (
        "did you mean 'vit_base' or 'vit_case'? "
    )


def test_what_is_no_text_has_a_nearest_name_too() -> None:
    assert did_you_mean(160, ["1600", "a"]) == "did you mean '1600'? "
