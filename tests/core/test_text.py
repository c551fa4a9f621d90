"""The door for text: JSON and YAML by the letter, or the one error."""

import json

import pytest

from powersteer.core.config import StrictConfig, build_config, load_config
from powersteer.core.console import PlainConsole, printable
from powersteer.core.errors import PowersteerError
from powersteer.core.files import is_file, read_bytes, write_whole
from powersteer.core.text import decode_text, json_lines, parse_json, parse_object, parse_yaml, read_text, to_json


def test_a_byte_order_mark_is_no_part_of_a_text(tmp_path):
    (tmp_path / "caption.txt").write_bytes("\ufeffein Füchslein".encode())
    assert read_text(tmp_path / "caption.txt") == "ein Füchslein"
    assert parse_object(b'\xef\xbb\xbf{"text": "a fox"}', "x") == {"text": "a fox"}
    for encoding in ("utf-16", "utf-16-le", "utf-32", "latin-1"):
        with pytest.raises(PowersteerError, match=r"x is not UTF-8 text.*: save it as UTF-8"):
            decode_text("Füchslein".encode(encoding), "x")


def test_only_a_line_feed_ends_a_json_line():
    separators = "\u2028 \u2029 \x85 \x0b \x0c \x1c"
    text = json.dumps({"text": separators}, ensure_ascii=False) + '\r\n\n{"text": "b"}\n'
    lines = list(json_lines(text, "x"))
    assert [number for number, _ in lines] == [1, 3]
    # Vertical tab and form feed are written as escapes in JSON; the others stand as they are.
    assert parse_object(lines[0][1], "x")["text"] == separators
    with pytest.raises(PowersteerError, match="one JSON array: write one object a line"):
        json_lines('\n[{"a": 1}]', "x")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[" * 100_000, "nested deeper than 100 levels"),
        ("[" * 102 + "]" * 102, "nested deeper than 100 levels"),
        ('{"a": 1, "a": 2}', "'a' comes twice"),
        ('{"a": NaN}', "NaN is no number"),
        ('{"a": -Infinity}', "-Infinity is no number"),
        ('{"a": 1e999}', "1e999 is too large a number"),
        ('{"a": ' + "7" * 6000 + "}", "has 6000 digits"),
        (r'{"text": "a fox \ud83d"}', "half a character"),
        ('{"text": "a\n"}', "invalid control character at, column 12"),
        ('{"a": 1', "column 8"),
        ("", "column 1"),
    ],
)
def test_what_json_may_not_hold_is_refused(text, said):
    with pytest.raises(PowersteerError, match=f"^x is not JSON: .*{said}"):
        parse_json(text, "x")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[" * 100_000, "nested deeper"),
        ("a: &a [*a]", "nested deeper"),
        ("a: 1\nb: 2\na: 3", "'a' comes twice, line 3"),
        ("a: " + "7" * 6000, "4300 digits"),
        ("a: 2026-13-45", "month must be"),
        ("a: !!python/object/apply:os.system ['true']", "could not determine a constructor"),
        ("a: &a [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]\n" + "".join(
            f"{new}: &{new} [{', '.join([f'*{old}'] * 10)}]\n" for old, new in ["ab", "bc", "cd", "de"]
        ), "more than 100000 values"),
        ("? {a: 1}\n: 2", "unhashable"),
        ("a: 'x", "not valid YAML"),
    ],
)  # fmt: skip
def test_what_yaml_may_not_hold_is_refused(text, said):
    with pytest.raises(PowersteerError, match=f"^x is not valid YAML: .*{said}|^x is {said}"):
        parse_yaml(text, "x")


def test_a_merged_mapping_is_no_double():
    assert parse_yaml("base: &b {a: 1}\nmine: {<<: *b, a: 2}", "x")["mine"] == {"a": 2}


def test_figures_that_are_not_finite_are_null():
    assert json.loads(to_json({"a": (float("nan"), 1.5), "b": {"c": float("inf")}})) == {
        "a": [None, 1.5],
        "b": {"c": None},
    }


class Numbers(StrictConfig):
    rate: float = 1.0
    sizes: tuple[float, ...] = ()
    count: int = 1


@pytest.mark.parametrize("value", [".inf", "-.inf", ".nan", "1e999"])
def test_no_number_of_a_configuration_is_infinite(value, tmp_path):
    with pytest.raises(PowersteerError, match="'rate': Input should be a finite number"):
        build_config({}, Numbers, [f"rate={value}"])
    (tmp_path / "it.yaml").write_text(f"sizes: [1, {value}]\n")
    with pytest.raises(PowersteerError, match=r"'sizes\.1': Input should be a finite number"):
        load_config(tmp_path / "it.yaml", Numbers)
    for wrong in (f"count={value}", "count=" + "7" * 6000, "count=1.5", "count=[]"):
        with pytest.raises(PowersteerError):
            build_config({}, Numbers, [wrong])


def test_names_that_no_file_can_have(tmp_path):
    for name in ("a\0b", "x" * 5000):
        assert not is_file(tmp_path / name)
        with pytest.raises(PowersteerError, match="cannot be read"):
            read_bytes(tmp_path / name)
        with pytest.raises(PowersteerError, match="cannot write"):
            write_whole(tmp_path / name, b"")
    assert not list(tmp_path.iterdir())


def test_what_is_printed_is_printed_as_it_is(capsys):
    name = "o/a[/b]c[red]d :smile: \x1b[31mred\x1b]0;title\x07 \u202egpj.exe \x9b2J"
    PlainConsole(width=200).print(name, soft_wrap=True)
    printed = capsys.readouterr().out
    assert printed == "o/a[/b]c[red]d :smile: \\x1b[31mred\\x1b]0;title\\x07 \\u202egpj.exe \\x9b2J\n"
    family = "👩\u200d👧 Füchse\tund\nHäuser"  # a joiner is part of the picture
    assert printable(family) == family and printable("\ud83d") == "\\ud83d"
