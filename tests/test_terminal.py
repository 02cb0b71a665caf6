"""What people see: nothing in data acts on the terminal, and everything fits 80 columns."""

from __future__ import annotations

import pytest

from molora.terminal import console, print_table, progress, say, styled, visible, warn


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("\x1b[31mred\x1b[0m", "\\x1b[31mred\\x1b[0m"),
        ("\x1b]0;title\x07", "\\x1b]0;title\\x07"),
        ("\x9b2J", "\\x9b2J"),
        ("done\rlost", "done\\rlost"),
        ("txt.\u202egnp", "txt.\\u202egnp"),
        ("half \ud83d", "half \\ud83d"),
        ("two\nlines\tand é 红色 🙂", "two\nlines\tand é 红色 🙂"),
    ],
)
def test_control_characters_are_shown_as_escapes_and_other_text_stays(text: str, shown: str) -> None:
    assert visible(text) == shown


def test_markup_and_emoji_in_data_are_text(capsys: pytest.CaptureFixture[str]) -> None:
    say("[bold red]a[/] :smile: [link=http://b]c[/link]")
    print_table(("[u]d[/]",), [("[/]",)])
    with progress() as bars:
        bars.add_task("[i]e[/i]", total=1, note="[red]f[/]")
    shown = capsys.readouterr().out
    for text in ("[bold red]a[/] :smile: [link=http://b]c[/link]", "[u]d[/]", "[/]", "[i]e[/i]", "[red]f[/]"):
        assert text in shown


def test_nothing_that_is_printed_writes_a_control_character(capsys: pytest.CaptureFixture[str]) -> None:
    evil = "\x1b[2J\x9b1m\x08\x7f"
    say("said ", styled(evil, "red"))
    warn(evil)
    print_table((evil,), [(evil,), (styled(evil, "bold"),)])
    with progress() as bars:
        bars.add_task(evil, total=1, note=evil)
    said = capsys.readouterr()
    assert not {"\x1b", "\x9b", "\x08", "\x7f"} & set(said.out + said.err)
    assert said.out.count("\\x1b[2J\\x9b1m") == 6  # said, heading, two cells, a name, a note
    assert "warning: \\x1b[2J" in said.err


def test_paragraphs_and_tables_fit_80_columns_and_paths_stay_whole(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(console, "width", 200)
    say("a word or two " * 20)
    print_table(("a", "b"), [("short", "x" * 300), ("many words " * 30, "y")], wide="b")
    assert max(map(len, capsys.readouterr().out.splitlines())) <= 80
    path = "/a/folder" * 20
    say(f"done: {path}")
    assert path in capsys.readouterr().out
