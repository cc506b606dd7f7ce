"""Whatever a person gives as a config or an override: a config, or one to three lines that say what is wrong with it.

The examples are the same on every machine (`derandomize`); the slow test takes many more of them.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

import train
from configs import CONFIGS
from files.errors import ConfigError
from files.strict_yaml import dump_yaml, known_keys
from models import create_model
from models.config import MetaFormerConfig, load_model_config, override_config
from training.config import DEFAULT_CONFIG, TrainConfig, dump_config, load_config

MODEL = CONFIGS / "models" / "convformer_n4.yaml"
CHECKS = [HealthCheck.too_slow, HealthCheck.function_scoped_fixture, HealthCheck.filter_too_much]
FEW = settings(max_examples=60, derandomize=True, deadline=None, suppress_health_check=CHECKS, database=None)
MANY = settings(FEW, max_examples=1500, phases=[Phase.explicit, Phase.generate, Phase.shrink])

# Values as somebody might write them by mistake, or to see what happens.
WILD_TEXT = [
    "", " ", "null", "~", "true", "yes", "0", "-1", "1e-3", "1e400", "-1e400", ".nan", ".inf", "-.inf", "9" * 5000, "-" * 90,
    "0x1f", "1_000", "[", "]", "[1, 2", "{", "{a: 1", "{kind: early}", "[[0, 0], [9, 1]]", "[" * 30 + "]" * 30,
    "{a: " * 25 + "1" + "}" * 25, "&a 1", "*a", "&a [*a]", "<<: {a: 1}", "!!python/object/apply:os.system [ls]", "!x y",
    "a: b: c", "? a", "| x", "- 1\n- 2", "a\nb\nc\nd\ne", "#", "x #y", "'", '"',
    "\t", "\\", "\x00", "\x85", "\u2028", "\ufeff",
    "\U0001f600", "\ud800", "\udcff", "\u202eabc", "2001-01-01", "1:30", "%", "@", "`", "=", "==", "a=b", "a" * 2000,
]  # fmt: skip
wild_texts = st.one_of(st.sampled_from(WILD_TEXT), st.text(max_size=30))
scalars = st.one_of(
    st.none(), st.booleans(), st.integers(), st.integers(-2, 40), st.floats(), st.floats(0, 1), wild_texts,
    st.sampled_from([10**400, -(10**400), 2**63, 1e308, 5e-324, "linear", "skip", "adamw", "folder", "digits", "cosine"]),
)  # fmt: skip
values = st.recursive(
    scalars,
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(st.text(max_size=8), inner, max_size=3)),
    max_leaves=8,
)
KEYS = sorted(known_keys(TrainConfig))
MODEL_KEYS = sorted(known_keys(MetaFormerConfig))
keys = st.one_of(
    st.sampled_from(KEYS),
    st.sampled_from([f"model.{key}" for key in MODEL_KEYS]),
    st.sampled_from(["", ".", "..", "optim.", ".lr", "optim.lrr", "optim.lr.x", "model", "model.x.y", "seed.a"]),
    st.text(max_size=12),
)
signs = st.sampled_from(["=", "=", "=", "", " = "])
texts = st.one_of(wild_texts, values.map(lambda value: json.dumps(value, ensure_ascii=False)), values.map(str))
overrides = st.builds(lambda key, sign, text: f"{key}{sign}{text}", keys, signs, texts)


def in_words(make: Callable[[], Any]) -> Any:
    """What was made; None where it was refused in words a person can read."""
    try:
        return make()
    except ConfigError as error:
        lines = str(error).split("\n")
        assert 1 <= len(lines) <= 3, str(error)
        for line in lines:
            assert 0 < len(line) <= 1000, line  # some name all keys there are
            assert line.isprintable(), repr(line)
        return None


def is_kept(config: TrainConfig | None, path: Path) -> None:
    """A config that was accepted is written and read back as the same."""
    if config is not None:
        path.write_text(dump_config(config), encoding="utf-8", errors="surrogatepass")
        try:
            dump_config(config).encode()
        except UnicodeEncodeError:
            return  # such a name is refused where it is used: no YAML holds it
        assert load_config(path) == config


def check_overrides(words: list[str], path: Path) -> None:
    is_kept(in_words(lambda: load_config(None, words)), path)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "run.yaml"


@FEW
@given(words=st.lists(overrides, min_size=1, max_size=3))
def test_any_override(words: list[str], path: Path) -> None:
    check_overrides(words, path)


@pytest.mark.slow
@MANY
@given(words=st.lists(overrides, min_size=1, max_size=3))
def test_any_override_exhaustively(words: list[str], path: Path) -> None:
    check_overrides(words, path)


@pytest.mark.parametrize("key", KEYS)
@pytest.mark.slow
def test_every_key_with_every_wild_value(key: str, path: Path) -> None:
    for text in WILD_TEXT:
        check_overrides([f"{key}={text}"], path)


# Numbers at which a product overflows, a quotient too, or a loop has no end.
EXTREMES = [1e308, 2.8e306, 5e-324, 10**400, 2**63, 2**31, 10**15]


@pytest.mark.parametrize("key", [key for key in MODEL_KEYS if not key.startswith("published")])
def test_a_number_beyond_all_models_is_refused_or_can_be_built(key: str) -> None:
    base = load_model_config(MODEL)
    for number in EXTREMES:
        for value in (number, [number], [number] * len(base.depths)):
            given = changed({}, key, value)
            config = in_words(lambda given=given: override_config(base, given, "create_model"))
            if config is not None:
                with torch.device("meta"):
                    create_model(config)


@pytest.mark.slow
@pytest.mark.parametrize(
    "words",
    [
        *(["augment.mixup=%s"], ["augment.cutmix=%s"], ["augment.color_jitter=%s"], ["augment.rotate=%s"]),
        *(
            ["augment.crop_ratio=[%s, %s]"],
            ["augment.random_erasing=%s"],
            ["augment.translate=%s"],
            ["augment.zoom=%s"],
        ),
        *(["data.batch_size=%s"], ["data.eval_batch_size=%s"], ["data.workers=%s"], ["data.train_samples=%s"]),
        *(["optim.lr=%s"], ["optim.eps=%s"], ["optim.clip_grad=%s"], ["optim.accumulate=%s"], ["optim.k_decay=%s"]),
        *(["optim.warmup_epochs=%s"], ["optim.warmup_lr=%s"], ["optim.cooldown_epochs=%s"], ["optim.layer_decay=%s"]),
        *(["optim.cycle_limit=%s", "optim.cycle_mul=2"], ["optim.cycle_limit=3", "optim.cycle_mul=%s"]),
        ["optim.schedule=tanh", "optim.cycle_limit=3", "optim.cycle_mul=%s"],
        ["optim.schedule=poly", "optim.decay_rate=%s"],
        ["optim.schedule=step", "optim.decay_epochs=%s"],
        ["optim.schedule=step", "optim.decay_epochs=0.5", "optim.decay_rate=%s"],
        ["optim.schedule=multistep", "optim.decay_milestones=[%s]"],
        ["drop_path.rate=0.1", "drop_path.schedule={kind: early, cutoff_epochs: %s}"],
        ["drop_path.rate=0.1", "drop_path.schedule={kind: piecewise, points: [[0, 0], [%s, 1]]}"],
        *(["ema.enabled=true", "ema.decay=%s"], ["early_stopping.patience=%s"], ["checkpoint.keep=%s"]),
        *(["model.layer_scale=%s"], ["model.res_scale=%s"], ["model.crop_pct=%s"], ["model.std=[%s]"]),
    ],
    ids=" ".join,
)
def test_a_run_with_a_number_beyond_all_sense_ends_in_words(words: list[str], tmp_path: Path) -> None:
    """Refused, or run: by itself to the end, or until its loss is no number any more."""
    few = ["data.train_samples=64", "optim.epochs=1", "optim.warmup_epochs=0"]
    for number in ("1e308", "5e-324", "1" + "0" * 15, "1" + "0" * 30):
        given = [word.replace("%s", number) for word in words]
        rest = [word for word in few if word.partition("=")[0] not in {w.partition("=")[0] for w in given}]
        assert train.main([*rest, *given, "--output", str(tmp_path / number)]) in (0, 1, 2)


def changed(base: Any, key: str, value: Any) -> Any:
    """The data with one dotted key set, sections made on the way."""
    data = json.loads(json.dumps(base))
    section = data
    *parents, last = key.split(".")
    for parent in parents:
        if not isinstance(section.get(parent), dict):
            section[parent] = {}
        section = section[parent]
    section[last] = value
    return data


DEFAULT = yaml.safe_load(DEFAULT_CONFIG.read_text())
DEFAULT_MODEL = yaml.safe_load(MODEL.read_text())


def as_text(data: Any, dump: Callable[[Any], str]) -> str:
    try:
        return dump(data)
    except (yaml.YAMLError, ValueError):
        return json.dumps(data)


dumps = st.sampled_from([dump_yaml, yaml.safe_dump, lambda data: json.dumps(data, indent=1)])
documents = st.builds(lambda k, v, d: as_text(changed(DEFAULT, k, v), d), keys, values, dumps)
model_documents = st.builds(
    lambda k, v, d: as_text(changed(DEFAULT_MODEL, k, v), d),
    st.one_of(st.sampled_from(MODEL_KEYS), keys),
    values,
    dumps,
)


def cut(text: str, start: int, length: int, put: str) -> str:
    start %= len(text) + 1
    return text[:start] + put + text[start + length :]


def damaged(text: str) -> st.SearchStrategy[str]:
    return st.builds(cut, st.just(text), st.integers(0, 10_000), st.integers(0, 40), wild_texts)


anything = st.one_of(documents, damaged(DEFAULT_CONFIG.read_text()), values.map(str), wild_texts)
any_model = st.one_of(model_documents, damaged(MODEL.read_text()), values.map(str), wild_texts)


def write(path: Path, text: str) -> None:
    path.write_bytes(text.encode("utf-8", "surrogatepass"))


def check_file(text: str, path: Path) -> None:
    write(path, text)
    is_kept(in_words(lambda: load_config(path)), path.with_name("again.yaml"))


@FEW
@given(text=anything)
def test_any_file(text: str, path: Path) -> None:
    check_file(text, path)


@pytest.mark.slow
@MANY
@given(text=anything)
def test_any_file_exhaustively(text: str, path: Path) -> None:
    check_file(text, path)


@FEW
@given(data=st.binary(max_size=60))
def test_any_bytes(data: bytes, path: Path) -> None:
    path.write_bytes(data)
    assert in_words(lambda: load_config(path)) is None


def check_model(text: str, path: Path) -> None:
    write(path, text)
    config = in_words(lambda: load_model_config(path))
    if config is not None:
        assert override_config(config, {}, "again") == config


@FEW
@given(text=any_model)
def test_any_model_file(text: str, path: Path) -> None:
    check_model(text, path)


@pytest.mark.slow
@MANY
@given(text=any_model)
def test_any_model_file_exhaustively(text: str, path: Path) -> None:
    check_model(text, path)


model_overrides = st.dictionaries(st.one_of(st.sampled_from([k for k in MODEL_KEYS if "." not in k]), st.text(max_size=8)),
                                  values, min_size=1, max_size=3)  # fmt: skip


@FEW
@given(given_keys=model_overrides)
def test_any_override_of_a_model(given_keys: dict[str, Any]) -> None:
    in_words(lambda: override_config(load_model_config(MODEL), given_keys, "create_model"))


@pytest.mark.slow
@MANY
@given(given_keys=model_overrides)
def test_any_override_of_a_model_exhaustively(given_keys: dict[str, Any]) -> None:
    in_words(lambda: override_config(load_model_config(MODEL), given_keys, "create_model"))


def test_what_is_accepted_and_what_is_refused(path: Path) -> None:
    """So that the properties above are of both."""
    assert in_words(lambda: load_config(None, ["optim.lr=1e-2"])) is not None
    assert in_words(lambda: load_config(None, ["optim.lr=x"])) is None
    with pytest.raises(AssertionError):
        in_words(lambda: (_ for _ in ()).throw(ConfigError("a\nb\nc\nd")))
