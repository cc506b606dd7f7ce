"""files/strict_yaml.py: what is read, what is refused, and that each refusal says where."""

from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Literal

import pytest
from pydantic import BaseModel, ConfigDict, Field, model_validator

from files.errors import ConfigError, FieldError
from files.strict_yaml import (
    Document,
    annotation_at,
    dump_yaml,
    load_yaml,
    parse_value,
    parse_yaml,
    set_overrides,
    validate,
)


class Inner(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)
    lr: float = Field(default=0.1, gt=0)
    epochs: int = 1
    on: bool = False
    shape: Literal["linear", "cosine"] | list[float] = "linear"

    @model_validator(mode="after")
    def _check(self) -> "Inner":
        if self.epochs > 100:
            raise FieldError("epochs", f"too many: {self.epochs}")
        if self.epochs == 100 and not self.on:
            raise FieldError("epochs", "needs on", beside="on")
        return self


class Outer(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)
    name: str
    optim: Inner = Field(default_factory=Inner)


def refusal(text: str, source: str = "f.yaml") -> str:
    with pytest.raises(ConfigError) as caught:
        parse_yaml(text, source=source)
    return str(caught.value)


def fault(text: str) -> str:
    """The error of a text of valid YAML that does not fit Outer."""
    with pytest.raises(ConfigError) as caught:
        validate(Outer, parse_yaml(text, source="f.yaml"))
    return str(caught.value)


@pytest.mark.parametrize(
    ("text", "words", "line"),
    [
        ("{epochs: 100, on: false}", [], ""),
        ("{on: false}", ["optim.epochs=100"], "where optim.on is given: f.yaml:2"),
        ("{epochs: 100}", ["optim.on=false"], "where optim.on is given: on the command line: optim.on=false"),
        ("{}", ["optim.on=false", "optim.epochs=100"], ""),
        ("{}", ["optim={epochs: 100, on: false}"], ""),
        ("{}", ["optim.epochs=100"], "optim.on is not given: that is its default"),
        ("{epochs: 100}", [], "optim.on is not given: that is its default"),
    ],
)
def test_a_fault_of_two_keys_says_where_the_other_stands(text: str, words: list[str], line: str) -> None:
    document = parse_yaml(f"name: a\noptim: {text}\n", source="f.yaml")
    set_overrides(document, words, annotation=lambda key: annotation_at(Outer, key), example="a=1")
    with pytest.raises(ConfigError) as caught:
        validate(Outer, document)
    told = str(caught.value).splitlines()
    assert told[0].endswith(": needs on") and told[1:] == ([line] if line else [])


def test_plain_data_have_no_places() -> None:
    with pytest.raises(ConfigError) as caught:
        validate(Outer, {"name": "a", "optim": {"epochs": 100}})
    assert str(caught.value) == "optim.epochs: needs on"


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-3", 0.001), ("1E5", 1e5), (".5", 0.5), ("-2.", -2.0), ("+3", 3), ("0", 0), ("12", 12),
        ("-.inf", float("-inf")),
        ("true", True), ("False", False), ("null", None), ("~", None), ("", None),
        ("on", "on"), ("yes", "yes"), ("off", "off"), ("n", "n"), ("010", "010"), ("0x1f", "0x1f"), ("1_000", "1_000"),
        ("1:30", "1:30"), ("2024-01-02", "2024-01-02"), ("<<", "<<"), ("1e", "1e"), ("1.2.3", "1.2.3"), ("'3'", "3"),
        ("[1, 2.5, a]", [1, 2.5, "a"]), ("{kind: early, n: {m: 3}}", {"kind": "early", "n": {"m": 3}}),
    ],
)  # fmt: skip
def test_value(text: str, value: object) -> None:
    parsed = parse_value(text)
    assert parsed == value
    assert type(parsed) is type(value)


def test_lines() -> None:
    document = parse_yaml("# header\na: 1\nb:\n  c: 2\n  d:\n    - 3\n    - 4\n")
    assert document.data == {"a": 1, "b": {"c": 2, "d": [3, 4]}}
    assert [document.line(p) for p in [("a",), ("b",), ("b", "c"), ("b", "d", 1)]] == [2, 3, 4, 7]
    assert document.line(("b", "missing", "deeper")) == 3
    assert document.line(("missing",)) == 2


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\nb: 2\n\na: 3\n", "f.yaml:4: a: duplicate key, first given on line 1"),
        ("a:\n  b: 1\n  b: 1\n", "f.yaml:3: a.b: duplicate key, first given on line 2"),
        ("a: {b: 1, b: 1}\n", "f.yaml:1: a.b: duplicate key"),
        ("a: 1\n3: 2\n", "f.yaml:2: the key '3' is not text; quote it"),
        ("a: 1\ntrue: 2\n", "f.yaml:2: the key 'true' is not text; quote it"),
        ("? [1, 2]\n: 3\n", "f.yaml:1: a key must be text"),
        ("a: &x 1\nb: *x\n", "f.yaml:2: aliases (*name) are not accepted; write the value out"),
        ("a: 1\nb: !!python/object/apply:os.getcwd []\n", "f.yaml:2: tags (tag:yaml.org,2002:python/"),
        ("a: !!int '3'\n", "f.yaml:1: tags"),
        ("- 1\n", "f.yaml:1: expected a mapping of keys to values at the top level, got [1]"),
        ("3\n", "f.yaml:1: expected a mapping of keys to values at the top level, got 3"),
        ("# nothing\n", "f.yaml:1: expected a mapping of keys to values at the top level, got nothing"),
        ("a:\n\tb: 1\n", "f.yaml:2: not valid YAML: found character '\\t' that cannot start any token (indent"),
        ("a: 1\nb: [1\n", "f.yaml:3: not valid YAML"),
        ("a: b: c\n", "f.yaml:1: not valid YAML: mapping values are not allowed here"),
        ("a: 1\n---\nb: 2\n", "f.yaml:2: not valid YAML: expected a single document in the stream, but found another"),
        ("a: 1\nb: \x00\n", "f.yaml:2: a control character"),
        ("a: " + "1" * 5000, "f.yaml:1: Exceeds the limit"),
        ("a: " + "[" * 20 + "]" * 20, "f.yaml:1: nested deeper than 20 levels"),
        ("a: " + "[" * 100_000, "f.yaml:1: nested deeper than 20 levels"),
    ],
)  # fmt: skip
def test_refused(text: str, message: str) -> None:
    assert refusal(text).startswith(message)


def test_depth_just_allowed() -> None:
    assert parse_yaml("a: " + "[" * 19 + "]" * 19).data["a"] is not None


def test_billion_laughs_is_refused_at_its_first_alias() -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 12)]
    assert refusal("\n".join(lines)).startswith("f.yaml:2: aliases")


def test_a_bad_value_has_no_line() -> None:
    with pytest.raises(ConfigError, match=r"^not valid YAML: expected ',' or"):
        parse_value("[1")


class Deep(BaseModel):
    root: str | None = None
    title: Annotated[str, Field(min_length=1)] = "x"
    either: int | str = 0
    names: list[str] | None = None
    kind: Literal["a", "b"] = "a"
    count: int | None = None


class Wide(BaseModel):
    deep: Deep | None = None
    name: str = ""


def override(*words: str) -> dict[str, Any]:
    document = Document({}, "")
    set_overrides(document, words, annotation=lambda key: annotation_at(Wide, key), example="name=x")
    return document.data


AS_IT_STANDS = [
    "/x/run #2", "#2", "yes", "true", "1e3", "010", "~", "~/x", "Null", "'quoted'", '"quoted"', "[1", "{a: 1}", "ä",
    " blank at both ends ", "a: b", "a=b", "- a", "*alias", "!tag", "&x", "%x", "@x", "`x`", "tab\there", "x\ny",
]  # fmt: skip


@pytest.mark.parametrize("text", AS_IT_STANDS)
def test_text_is_taken_as_it_stands(text: str) -> None:
    assert override(f"name={text}") == {"name": text}
    assert override(f"deep.root={text}", f"deep.title={text}") == {"deep": {"root": text, "title": text}}
    if "\n" not in text:  # and what was taken is saved and read back
        assert parse_yaml(dump_yaml({"root": text})).data == {"root": text}


@pytest.mark.parametrize("text", ["null", ""])
def test_text_that_may_be_null(text: str) -> None:
    assert override(f"deep.root={text}") == {"deep": {"root": None}}
    assert override(f"deep.title={text}", f"name={text}") == {"deep": {"title": text}, "name": text}, "may not be null"


@pytest.mark.parametrize(
    ("word", "value"),
    [("deep.count=1", 1), ("deep.count=", None), ("deep.either=1", 1), ("deep.names=[a, 'b #1']", ["a", "b #1"]),
     ("deep.kind= b ", "b"), ("deep.kind='b'", "b"), ("deep.further='x #1'", "x #1"), ("deep.further=x#1", "x#1")],
)  # fmt: skip
def test_all_else_is_yaml(word: str, value: object) -> None:
    key = word.partition("=")[0].removeprefix("deep.")
    assert override(word) == {"deep": {key: value}}


@pytest.mark.parametrize(
    "word", ["deep.count=1 # x", "deep.count=#1", "deep.names=[a, b] # c", "deep.names=[a, b #1]", "deep.further=x #1",
             "deep={root: /x/run #2}", "deep=root: x #1", "deep.further= #", "deep.kind=b #", "deep.further=x\n# y"]
)  # fmt: skip
def test_a_comment_in_a_value_is_refused(word: str) -> None:
    with pytest.raises(ConfigError, match=r"^on the command line: .*: ' #' begins a comment, .* quote") as caught:
        override(word)
    assert "\n" not in str(caught.value)


def test_annotation_at() -> None:
    assert annotation_at(Wide, "deep.count") == int | None
    assert annotation_at(Wide, "name") is str and annotation_at(Wide, "deep") == Deep | None
    assert [annotation_at(Wide, key) for key in ("deep.nothing", "nothing", "name.x", "")] == [None] * 4


def test_load(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_bytes("\ufeffname: Ä\r\noptim: {lr: 1e-3}\r\n".encode())
    document = load_yaml(path)
    assert document.data == {"name": "Ä", "optim": {"lr": 0.001}}
    assert (document.path, document.line(("optim", "lr"))) == (path, 2)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "digits.yaml").write_text("a: 1")
    (tmp_path / "latin.yaml").write_bytes(b"a: 1\nb: \xe4\n")
    (tmp_path / "large.yaml").write_bytes(b"#" * (2**20 + 1))
    for name, message in {
        "digts.yaml": "no such file; did you mean 'digits.yaml'?",
        "nowhere/a.yaml": f"no such file, nor a folder {tmp_path / 'nowhere'}",
        "digits.yaml/a.yaml": "cannot be read: Not a directory",
        "": "is a folder; expected a YAML file",
        "large.yaml": "larger than 1 MiB",
    }.items():
        with pytest.raises(ConfigError) as caught:
            load_yaml(tmp_path / name)
        assert str(caught.value).startswith(f"{tmp_path / name}: {message}")
    with pytest.raises(ConfigError, match=r"latin\.yaml:2: not UTF-8 text \(byte 0xe4\)"):
        load_yaml(tmp_path / "latin.yaml")
    (tmp_path / "large.yaml").write_bytes(b"a: 1 #" + b"#" * (2**20 - 6))
    assert load_yaml(tmp_path / "large.yaml").data == {"a": 1}


def test_validate() -> None:
    model = validate(Outer, parse_yaml("name: x\noptim: {lr: 1, shape: [0, .5]}"))
    assert model.optim.lr == 1.0
    assert model.optim.shape == [0.0, 0.5]
    assert validate(Outer, {"name": "x"}).optim == Inner()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name: x\noptim:\n  lrr: 1\n", "f.yaml:3: optim.lrr: unknown key; did you mean 'optim.lr'?"),
        ("name: x\nlr: 1\n", "f.yaml:2: lr: unknown key; did you mean 'optim.lr'?"),
        ("name: x\noptim:\n  zz: 1\n", "f.yaml:3: optim.zz: unknown key; known here: lr, epochs, on, shape"),
        ("nmae: x\n", "f.yaml:1: nmae: unknown key; did you mean 'name'? (and 1 more)"),
        ("optim: {}\n", "f.yaml:1: name: required key is missing"),
        ("name: 3\n", "f.yaml:1: name: expected text, got 3"),
        ("name: x\noptim: 3\n", "f.yaml:2: optim: expected a section with keys of lr, epochs, on, shape, got 3"),
        ("name: x\noptim:\n  lr: -1\n", "f.yaml:3: optim.lr: must be greater than 0, got -1"),
        ("name: x\noptim:\n  lr: .nan\n", "f.yaml:3: optim.lr: expected a finite number, got NaN"),
        ("name: x\noptim:\n  lr: true\n", "f.yaml:3: optim.lr: expected a number, got true"),
        ("name: x\noptim:\n  lr: '3'\n", 'f.yaml:3: optim.lr: expected a number, got "3"'),
        ("name: x\noptim:\n  epochs: 2.0\n", "f.yaml:3: optim.epochs: expected an integer, got 2.0"),
        ("name: x\noptim:\n  on: yes\n", 'f.yaml:3: optim.on: expected true or false, got "yes"'),
        ("name: x\noptim:\n  epochs: 101\n", "f.yaml:3: optim.epochs: too many: 101"),
        ("name: x\noptim:\n  shape: cosin\n",
         "f.yaml:3: optim.shape: expected 'linear' or 'cosine' or a list, got \"cosin\"; did you mean 'cosine'?"),
        ("name: x\noptim:\n  shape:\n  - 1\n  - b\n", 'f.yaml:5: optim.shape[1]: expected a number, got "b"'),
        ("name: 3\noptim: {lr: x, epochs: y}\n", "f.yaml:1: name: expected text, got 3 (and 2 more)"),
    ],
)  # fmt: skip
def test_faults(text: str, message: str) -> None:
    assert fault(text) == message


def test_faults_of_plain_data() -> None:
    with pytest.raises(ConfigError, match=r"^optim\.lr: must be greater than 0, got 0$"):
        validate(Outer, {"name": "x", "optim": {"lr": 0}})
    with pytest.raises(ConfigError, match=r"^trial 3: optim\.lr: must be greater than 0, got 0$"):
        validate(Outer, {"name": "x", "optim": {"lr": 0}}, source="trial 3")


def test_values_that_yaml_cannot_hold_are_told_with_their_type() -> None:
    with pytest.raises(ConfigError, match=r'^optim\.epochs: expected an integer, got "PurePosixPath a/b"$'):
        validate(Outer, {"name": "x", "optim": {"epochs": PurePosixPath("a/b")}})


def test_long_values_are_cut() -> None:
    assert len(fault(f"name: [{'1, ' * 500}1]\n")) < 120


def test_set_replaces_sections_and_remembers_the_place() -> None:
    document = parse_yaml("name: x\noptim:\n  lr: 1\n  epochs: 3\n", source="f.yaml")
    document.set(("optim", "lr"), -1, place="here")
    assert document.data["optim"] == {"lr": -1, "epochs": 3}
    assert document.where(("optim", "lr")) == "here: "
    assert document.where(("optim", "epochs")) == "f.yaml:4: optim.epochs: "
    document.set(("optim",), {"epochs": "x"}, place="there")
    assert document.data["optim"] == {"epochs": "x"}
    assert document.where(("optim", "epochs")) == "there: optim.epochs: "
    with pytest.raises(ConfigError, match=r"^there: 'name' is not a section, it is .x.$"):
        document.set(("name", "y"), 1, place="there")


def test_dump_reads_back() -> None:
    texts = [
        "yes",
        "1e-3",
        "1E5",
        ".5",
        "null",
        "",
        "true",
        "010",
        "a: b",
        "#x",
        "- a",
        "*a",
        "1.0",
        "é\n",
        "=",
        "<<",
        "~",
        "0x1",
    ]
    data = {
        "texts": texts,
        "numbers": [1e-6, 1e22, 0.1, 3, -0.0, 1.0],
        "section": {"on": True, "none": None, "empty": {}, "lists": [[0, 1.5], []]},
    }
    text = dump_yaml(data)
    back = parse_yaml(text).data
    assert back == data
    assert [type(n) for n in back["numbers"]] == [type(n) for n in data["numbers"]]
    shared = [1, 2]
    assert parse_yaml(dump_yaml({"a": shared, "b": shared})).data == {"a": shared, "b": shared}


@pytest.mark.parametrize("text", ["a\x85b", "\x85", "\u2028x", "x\u2029"])
def test_line_breaks_of_unicode_are_written_and_read_back(text: str) -> None:
    assert parse_yaml(dump_yaml({"a": text})).data == {"a": text}
