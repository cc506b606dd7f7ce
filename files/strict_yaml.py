"""Reading YAML strictly: safe, with line numbers, and with errors a person can act on. Used by models and training.

Stricter than YAML 1.1: only `true` and `false` are booleans (`on` and `yes` are text), `1e-3` and `.5` are numbers,
`010` and `1:30` are text, and tags, aliases, merge keys, duplicate keys and keys that are not text are refused.
"""

import difflib
import json
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, TypeVar, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError

from files.errors import ConfigError, FieldError, nearest, one_line
from files.words import counted

MAX_BYTES = 2**20
MAX_DEPTH = 20
KeyPath = tuple[str | int, ...]
Model = TypeVar("Model", bound=BaseModel)


@dataclass
class Document:
    """A parsed mapping that remembers where each of its keys was given.

    Attributes:
        data: The top-level mapping.
        source: What errors call the document: its path, or what the caller named it.
        path: Its file, if it came from one.
        places: Key path -> its 1-based line, or, for a value set later, words such as "on the command line: a.b=3".
    """

    data: dict[str, Any]
    source: str = ""
    path: Path | None = None
    places: dict[KeyPath, int | str] = field(default_factory=dict)

    def line(self, key_path: KeyPath) -> int:
        """1-based line of a key, or of the nearest parent that stands in the text."""
        lines = (self.places.get(key_path[:n]) for n in range(len(key_path), -1, -1))
        return next((line for line in lines if isinstance(line, int)), 1)

    def where(self, key_path: KeyPath) -> str:
        """Opening of an error about a key: 'FILE:LINE: a.b: ', or for a value set later its own words and the key."""
        key = f"{dotted(key_path)}: " if key_path else ""
        for n in range(len(key_path), -1, -1):
            place = self.places.get(key_path[:n])
            if isinstance(place, str):
                return f"{place}: " if n == len(key_path) else f"{place}: {key}"
            if place is not None:
                return f"{self.source}:{place}: {key}"
        return f"{self.source}: {key}" if self.source else key

    def where_beside(self, key_path: KeyPath, other: KeyPath) -> str:
        """A line that says where another key was given; empty where that is where the first was: a file, a command line."""
        if not self.places:
            return ""
        value: Any = self.data
        for key in other:
            value = value.get(key) if isinstance(value, dict) else None
        if value is None:
            return f"\n{dotted(other)} is not given: that is its default"
        first, second = (
            place if isinstance(place, str) else f"{self.source}:{place}"
            for path in (key_path, other)
            for place in [next(self.places[path[:n]] for n in range(len(path), -1, -1) if path[:n] in self.places)]
        )
        if first.partition(":")[0] == second.partition(":")[0]:
            return ""
        return f"\nwhere {dotted(other)} is given: {second}"

    def set(self, key_path: tuple[str, ...], value: Any, *, place: str) -> None:
        """Sets one key, making the sections on the way; a section given as value replaces the old one as a whole."""
        section = self.data
        for n, key in enumerate(key_path[:-1], start=1):
            if section.get(key) is None:
                section[key] = {}
            section = section[key]
            if not isinstance(section, dict):
                raise ConfigError(f"{place}: {dotted(key_path[:n])!r} is not a section, it is {_show(section)}")
        section[key_path[-1]] = value
        self.places = {k: v for k, v in self.places.items() if k[: len(key_path)] != key_path}
        self.places[key_path] = place


def load_yaml(path: Path | str) -> Document:
    """Reads a YAML file whose top level is a mapping.

    Raises:
        ConfigError: No such file, not a text file, too large, or anything `parse_yaml` refuses.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)
    except IsADirectoryError:
        raise ConfigError(f"{path}: is a folder; expected a YAML file") from None
    except FileNotFoundError:
        if not path.parent.is_dir():
            raise ConfigError(f"{path}: no such file, nor a folder {path.parent}") from None
        raise ConfigError(
            f"{path}: no such file{nearest(path.name, [p.name for p in path.parent.iterdir()])}"
        ) from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None
    if len(content) > MAX_BYTES:
        raise ConfigError(f"{path}: larger than 1 MiB; expected a configuration")
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ConfigError(f"{path}:{line}: not UTF-8 text (byte 0x{content[error.start]:02x})") from None
    document = parse_yaml(text, source=str(path))
    document.path = path
    return document


def parse_yaml(text: str, *, source: str = "<string>") -> Document:
    """Parses a text whose top level is a mapping.

    Raises:
        ConfigError: Wrong syntax or anything the module docstring lists; the message starts with SOURCE:LINE.
    """
    places: dict[KeyPath, int | str] = {}
    data = _parse(text, source, places)
    if not isinstance(data, dict):
        what = "nothing" if data is None else _show(data)
        raise ConfigError(f"{source}:1: expected a mapping of keys to values at the top level, got {what}")
    return Document(data, source, places=places)


def parse_value(text: str) -> Any:
    """Parses one scalar, list or mapping as given on a command line: '1e-3', '[1, 2]', '{kind: early}'; '' is null.

    Raises:
        ConfigError: Not valid, or with a comment: nobody writes one there, so that a ` #` belongs to the value.
    """
    return _parse(text, None, {}, loader_cls=_ValueLoader)


def set_overrides(document: Document, words: Iterable[str], *, annotation: Callable[[str], Any], example: str) -> None:
    """Sets keys as given on a command line, KEY=VALUE with a dotted key, in their order: the last word on a key wins.

    What the schema types as text, such as a path or a name, is taken as it stands: `yes`, `1e3`, quotes, blanks and ` #`
    included. Where it may also be null, `null` and nothing at all are null (a file of that name is `./null`). Everything
    else is YAML, see `parse_value`.

    Args:
        document: Is changed.
        words: What the user gave.
        annotation: The type of a dotted key, `None` where only the value can tell, see `annotation_at`; raises
            ConfigError for a key that may not be given.
        example: Of KEY=VALUE, for the error where a word is none.

    Raises:
        ConfigError: Naming the word, and what is wrong with it.
    """
    for word in words:
        key, separator, text = word.partition("=")
        key, place = key.strip(), f"on the command line: {_cut(one_line(word))}"
        if not separator or not key:
            raise ConfigError(f"{place}: expected KEY=VALUE, for example {example}")
        try:
            nullable = _nullable_text(annotation(key))
            if nullable is None:
                value: Any = parse_value(text)
            elif nullable and text in ("", "null"):
                value = None
            else:
                value = text
        except ConfigError as error:
            raise ConfigError(f"{place}: {error}") from None
        document.set(tuple(key.split(".")), value, place=place)


def annotation_at(model_cls: type[BaseModel], key: str) -> Any:
    """The type of a dotted key of a schema; `None` where the schema does not name it."""
    section, _, rest = key.partition(".")
    field_info = model_cls.model_fields.get(section)
    if field_info is None or not rest:
        return None if field_info is None else field_info.annotation
    found = (annotation_at(inner, rest) for inner in _sections(field_info.annotation))
    return next((annotation for annotation in found if annotation is not None), None)


def _nullable_text(annotation: Any) -> bool | None:
    """Whether a type of text may also be null; `None` for every other type, choices between given words included."""
    if get_origin(annotation) is Annotated:
        return _nullable_text(get_args(annotation)[0])
    if get_origin(annotation) in (Union, UnionType):
        arms = set(get_args(annotation))
        return NoneType in arms if {_nullable_text(arm) for arm in arms - {NoneType}} == {False} else None
    return False if annotation is str else None


def dump_yaml(data: dict[str, Any]) -> str:
    """YAML text that `parse_yaml` reads back to equal data: sections as blocks, lists in one line."""
    return yaml.dump(data, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)


def validate(model_cls: type[Model], document: Document | dict[str, Any], *, source: str | None = None) -> Model:
    """An instance of a pydantic model from a document or plain data.

    Args:
        model_cls: The schema.
        document: What to check.
        source: What errors call plain data; a document knows its own.

    Raises:
        ConfigError: The first fault, "FILE:LINE: optim.lrr: unknown key; did you mean 'optim.lr'?", and how many more.
    """
    if not isinstance(document, Document):
        document = Document(document, source or "")
    try:
        return model_cls.model_validate(document.data)
    except ValidationError as error:
        raise ConfigError(_rephrase(model_cls, document, error)) from None
    except UnicodeEncodeError:  # pydantic holds no half of a character, such as a validator's message quotes
        key_path = next(_no_text(document.data, ()), ())
        raise ConfigError(f"{document.where(key_path)}holds bytes that are not UTF-8 text") from None


def _no_text(value: Any, key_path: KeyPath) -> Iterator[KeyPath]:
    """Where in plain data there is text that no encoding holds."""
    if isinstance(value, dict):
        for key, entry in value.items():
            yield from _no_text(key, (*key_path, key))
            yield from _no_text(entry, (*key_path, key))
    elif isinstance(value, list):
        for i, entry in enumerate(value):
            yield from _no_text(entry, (*key_path, i))
    elif isinstance(value, str) and any("\ud800" <= c <= "\udfff" for c in value):
        yield key_path


def dotted(key_path: KeyPath) -> str:
    """('profile', 1) -> 'profile[1]'; ('optim', 'lr') -> 'optim.lr'."""
    names = (f"[{k}]" if isinstance(k, int) else f".{_cut(one_line(k))}" for k in key_path)
    return "".join(names).removeprefix(".")


def _cut(text: str, length: int = 150) -> str:
    """The text, or its beginning where nobody would read to the end."""
    return text if len(text) <= length else f"{text[: length - 3]}..."


def known_keys(model_cls: type[BaseModel], prefix: str = "") -> list[str]:
    """Dotted names of all keys of a schema, sections before what they hold."""
    keys = []
    for name, info in model_cls.model_fields.items():
        keys.append(prefix + name)
        for section in _sections(info.annotation):
            keys += known_keys(section, f"{prefix}{name}.")
    return keys


def unknown_key(key: str, known: list[str]) -> str:
    """'unknown key' with the nearest known one: in the same section, else elsewhere, else the section's keys."""
    parent, _, name = key.rpartition(".")
    siblings = {k.rpartition(".")[2]: k for k in known if k.rpartition(".")[0] == parent}
    close = difflib.get_close_matches(name, siblings, n=1, cutoff=0.6)
    same_name = [k for k in known if k.rpartition(".")[2] == name]
    if close or same_name:
        return f"unknown key; did you mean {(siblings[close[0]] if close else same_name[0])!r}?"
    if not siblings and (hint := nearest(key, known)):
        return f"unknown key{hint}"
    return f"unknown key; known here: {', '.join(siblings or [k for k in known if '.' not in k])}"


class _Refused(yaml.MarkedYAMLError):
    """Valid YAML that is not accepted."""


# What a plain scalar may be besides text; these also decide which texts the dumper must quote.
_SCALARS = {
    "null": (r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    "bool": (r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    "int": (r"[-+]?(?:0|[1-9][0-9]*)", list("-+0123456789")),
    "float": (
        r"[-+]?(?:\.[0-9]+|[0-9]+\.[0-9]*|[0-9]+(?=[eE]))(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
        list("-+.0123456789"),
    ),
}


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers = {}  # noqa: RUF012 (PyYAML's own way: filled below, by class)
    depth = 0

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        event = self.peek_event()
        if isinstance(event, yaml.AliasEvent):
            raise _Refused(
                problem="aliases (*name) are not accepted; write the value out", problem_mark=event.start_mark
            )
        if getattr(event, "tag", None) is not None:
            raise _Refused(problem=f"tags ({event.tag}) are not accepted", problem_mark=event.start_mark)
        if self.depth >= MAX_DEPTH:
            raise _Refused(problem=f"nested deeper than {MAX_DEPTH} levels", problem_mark=event.start_mark)
        self.depth += 1
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def plain(self, node: yaml.Node, key_path: KeyPath, places: dict[KeyPath, int | str]) -> Any:
        """The node as dicts, lists and scalars; notes the line of every key and list entry in `places`."""
        places.setdefault(key_path, node.start_mark.line + 1)
        if isinstance(node, yaml.SequenceNode):
            return [self.plain(entry, (*key_path, i), places) for i, entry in enumerate(node.value)]
        if not isinstance(node, yaml.MappingNode):
            try:
                return self.construct_object(node)
            except ValueError as error:  # an integer of thousands of digits
                raise _Refused(problem=str(error).partition(";")[0], problem_mark=node.start_mark) from None
        data: dict[str, Any] = {}
        for key_node, value_node in node.value:
            key, mark = key_node.value, key_node.start_mark
            if key_node.tag != "tag:yaml.org,2002:str":
                what = f"the key {key!r} is not text; quote it" if isinstance(key, str) else "a key must be text"
                raise _Refused(problem=what, problem_mark=mark)
            here = (*key_path, key)
            if key in data:
                first = f", first given on line {places[here]}" if places[here] != mark.line + 1 else ""
                raise _Refused(problem=f"{dotted(here)}: duplicate key{first}", problem_mark=mark)
            places[here] = mark.line + 1
            data[key] = self.plain(value_node, here, places)
        return data


class _ValueLoader(_Loader):
    """Refuses comments."""

    def scan_to_next_token(self) -> None:
        start = self.pointer
        super().scan_to_next_token()
        if "#" in self.buffer[start : self.pointer]:
            raise _Refused(
                problem="' #' begins a comment, and what follows would be lost; quote the text that holds it"
            )


class _Dumper(yaml.SafeDumper):
    yaml_implicit_resolvers = {}  # noqa: RUF012

    def ignore_aliases(self, data: Any) -> bool:
        return True

    def represent_list(self, data: Any) -> yaml.SequenceNode:
        return self.represent_sequence("tag:yaml.org,2002:seq", data, flow_style=True)

    def represent_text(self, data: str) -> yaml.ScalarNode:
        """PyYAML would write these line breaks of Unicode as they are, and read them back as blanks."""
        breaks = any(c in data for c in "\x85\u2028\u2029")
        return self.represent_scalar("tag:yaml.org,2002:str", data, style='"' if breaks else None)


_Dumper.add_representer(list, _Dumper.represent_list)
_Dumper.add_representer(str, _Dumper.represent_text)
for _name, (_pattern, _first) in _SCALARS.items():
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(f"tag:yaml.org,2002:{_name}", re.compile(f"(?:{_pattern})\\Z"), _first)


def _parse(
    text: str, source: str | None, places: dict[KeyPath, int | str], *, loader_cls: type[_Loader] = _Loader
) -> Any:
    """Data of a text; `source` None leaves file and line out of errors."""
    try:
        loader = loader_cls(text)
        node = loader.get_single_node()
        return None if node is None else loader.plain(node, (), places)
    except yaml.reader.ReaderError as error:
        line, problem = text.count("\n", 0, error.position) + 1, "a control character, which YAML does not allow"
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = mark.line + 1 if mark else 1
        told = str(error.problem)
        if told.startswith("but ") and error.context:  # goes on with its sentence
            told = f"{error.context}, {told}"
        problem = told if isinstance(error, _Refused) else f"not valid YAML: {told}"
        if "'\\t'" in problem:
            problem += " (indent with spaces, not tabs)"
    raise ConfigError(f"{source}:{line}: {problem}" if source is not None else problem)


def _sections(annotation: Any) -> list[type[BaseModel]]:
    """The models an annotation names, through `X | None`, `list[X]` and the like."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [section for arg in get_args(annotation) for section in _sections(arg)]


def _show(value: Any) -> str:
    """A value as in YAML, cut to a readable length."""
    text = json.dumps(value, ensure_ascii=False, default=lambda other: f"{type(other).__name__} {other}")
    return text if len(text) <= 60 else f"{text[:57]}..."


# pydantic's error types in our words; what is in braces comes from the error's context.
_PHRASES = {
    "missing": "required key is missing",
    "int_type": "expected an integer",
    "float_type": "expected a number",
    "bool_type": "expected true or false",
    "string_type": "expected text",
    "list_type": "expected a list",
    "tuple_type": "expected a list",
    "dict_type": "expected a section of keys",
    "finite_number": "expected a finite number",
    "literal_error": "expected {expected}",
    "greater_than": "must be greater than {gt:.10g}",
    "greater_than_equal": "must be at least {ge:.10g}",
    "less_than": "must be less than {lt:.10g}",
    "less_than_equal": "must be at most {le:.10g}",
    "too_short": "needs at least {entries}",
    "too_long": "takes at most {entries}",
    "string_too_short": "needs at least {characters}",
}


def _rephrase(model_cls: type[BaseModel], document: Document, error: ValidationError) -> str:
    """The first error in one line. An unknown key goes first: it explains the required key that seems to be missing."""
    groups: dict[KeyPath, list[tuple[KeyPath, Any]]] = {}
    for item in error.errors(include_url=False):
        key_path, union = _key_path(item, document.data)
        groups.setdefault(union, []).append((key_path, item))
    items = sorted(groups.values(), key=lambda group: group[0][1]["type"] != "extra_forbidden")
    # Each arm of a union reports. The one that got deepest is the one meant; arms failing at one place join with "or".
    depth = max(len(key_path) for key_path, _ in items[0])
    arms = [arm for arm in items[0] if len(arm[0]) == depth]
    key_path, item = arms[0]
    phrases = list(dict.fromkeys(_phrase(i, key_path, model_cls) for _, i in arms))
    message = " or ".join([phrases[0], *(p.removeprefix("expected ") for p in phrases[1:])])
    if item["type"] not in ("missing", "extra_forbidden", "value_error", "assertion_error"):
        message += f", got {_show(item['input'])}"
    if isinstance(item["input"], str):
        choices = [c for _, i in arms for c in re.findall(r"'([^']+)'", i.get("ctx", {}).get("expected", ""))]
        message += nearest(item["input"], choices)
    more = f" (and {len(items) - 1} more)" if len(items) > 1 else ""
    found = item.get("ctx", {}).get("error")
    beside = ""
    if isinstance(found, FieldError) and found.beside is not None:
        beside = document.where_beside(key_path, (*key_path[: len(key_path) - len(found.key_path)], *found.beside))
    return f"{document.where(key_path)}{message}{more}{beside}"


def _phrase(item: Any, key_path: KeyPath, model_cls: type[BaseModel]) -> str:
    kind, context = item["type"], item.get("ctx", {})
    key = ".".join(k for k in key_path if isinstance(k, str))
    if kind == "extra_forbidden":
        return unknown_key(key, known_keys(model_cls))
    if kind == "model_type":
        names = [k.removeprefix(f"{key}.") for k in known_keys(model_cls) if k.startswith(f"{key}.")]
        return f"expected a section with keys of {', '.join(n for n in names if '.' not in n)}"
    if kind in ("value_error", "assertion_error"):
        told, given = str(context["error"]), item["input"]
        shown = _cut(one_line(given)) if isinstance(given, str) else ""
        return told.replace(given, shown) if given and shown else told
    length = context.get("max_length" if kind == "too_long" else "min_length", 0)
    lengths = {"entries": counted(length, "entry"), "characters": counted(length, "character")}
    return _PHRASES[kind].format(**context, **lengths) if kind in _PHRASES else item["msg"]


def _key_path(item: Any, data: Any) -> tuple[KeyPath, KeyPath]:
    """Key path of a pydantic error without the names of union arms it holds, and the path of that union (or itself)."""
    key_path: KeyPath = ()
    union: KeyPath | None = None
    for n, key in enumerate(item["loc"]):
        missing = item["type"] == "missing" and n == len(item["loc"]) - 1
        if missing or (isinstance(data, dict) and key in data) or (isinstance(data, list) and isinstance(key, int)):
            key_path = (*key_path, key)
            data = None if missing else data[key]
        elif union is None:
            union = key_path
    error = item.get("ctx", {}).get("error")
    if isinstance(error, FieldError):
        key_path = (*key_path, *error.key_path)
    return key_path, key_path if union is None else union
