"""Published drop-path rates are read strictly, agree with the models they are of, and stand in the docs once."""

from pathlib import Path

import pytest
import timm
import torch

from configs import CONFIGS
from files.errors import ConfigError
from models.counting import count_parameters
from models.factory import create_model
from models.registry import model_config
from stochastic_depth.places import block_names, find_owners
from tuning.published import PUBLISHED, Row, load_published, markdown_table, matches, series

ROOT = Path(__file__).resolve().parents[2]
OURS = sorted(path.stem for path in (CONFIGS / "models").glob("*.yaml"))


def built_by() -> list[tuple[str, str, str]]:
    """Family, size and a model of it that can be built here."""
    found = []
    for name, family in load_published().families.items():
        for size, facts in family.sizes.items():
            for model in facts.models:
                if model in OURS or timm.is_model(model):
                    found.append((name, size, model if model in OURS else f"timm/{model}"))
    return found


def rates(family: str, **wanted: object) -> dict[str, float]:
    rows = [r for r in load_published().rates if r.family == family]
    return {r.size: r.rate for r in rows if all(getattr(r, key) == value for key, value in wanted.items())}


def test_what_is_known_of_data_size() -> None:
    """DeiT-III, Swin and ConvNeXt: the same model takes lower rates on more data, or equal ones."""
    deit3, deit3_more = rates("deit3", purpose="train", data="imagenet-1k"), rates("deit3", data="imagenet-21k")
    assert deit3 == {"small": 0.05, "base": 0.2, "large": 0.45, "huge": 0.6}
    assert deit3_more == {"small": 0.05, "base": 0.1, "large": 0.3, "huge": 0.5}
    assert {r.profile for r in load_published().rates if r.family == "deit3"} == {"constant"}
    assert rates("swin", purpose="train", data="imagenet-1k") == {"tiny": 0.2, "small": 0.3, "base": 0.5}
    assert rates("swin", data="imagenet-21k") == {"tiny": 0.1, "small": 0.2, "base": 0.2, "large": 0.2}
    assert rates("convnext", data="imagenet-21k") == {"base": 0.1, "large": 0.1, "xlarge": 0.2}
    assert rates("convnext", pretraining="imagenet-1k") == {"base": 0.8, "large": 0.95}


@pytest.mark.parametrize("name", OURS)
def test_rates_are_those_of_the_models_own_files(name: str) -> None:
    """A figure stands in two files: they say the same, and a rate in a model's file is in this one."""
    known, facts = load_published(), model_config(name).published
    rows = [r for r in known.rates if known.is_size(r, name) and r.schedule == "constant"]
    scratch = {r.rate for r in rows if (r.purpose, r.data) == ("train", "imagenet-1k")}
    tuned = {r.rate for r in rows if r.purpose == "finetune" and (r.image_size, r.pretraining) == (384, "imagenet-1k")}
    assert scratch == ({facts.drop_path_rate} if facts and facts.drop_path_rate is not None else set())
    if facts and facts.finetune_384:
        assert tuned == {facts.finetune_384.drop_path_rate}


@pytest.mark.parametrize(
    ("family", "size", "model"), [e for e in built_by() if e[2] in ("poolformer_s12", "timm/convnext_tiny")]
)
def test_blocks_and_parameters(family: str, size: str, model: str) -> None:
    check_size(family, size, model)


@pytest.mark.slow
def test_blocks_and_parameters_of_all() -> None:
    assert len(built_by()) > 50
    for entry in built_by():
        check_size(*entry)


def check_size(family: str, size: str, model: str) -> None:
    known = load_published()
    assert matches(model, known.families[family].models), f"{model} is not of {family}"
    with torch.device("meta"):
        net = create_model(model, num_classes=1000)
    facts = known.families[family].sizes[size]
    assert len(set(block_names(find_owners(net)))) == facts.blocks, model
    assert sum(count_parameters(net)) / 1e6 == pytest.approx(facts.params, rel=0.005, abs=0.05), model


@pytest.mark.parametrize(
    ("model", "own", "kin"),
    [
        ("poolformer_s12", ["poolformer"], []),
        ("poolformerv2_s12", ["poolformerv2"], []),
        ("runs/mine/convformer_x9.yaml", ["convformer"], []),
        ("timm/swin_tiny_patch4_window7_224.ms_in1k", ["swin"], ["simmim"]),
        ("torchvision/swin_t", ["swin"], ["simmim"]),
        ("timm/vit_base_patch16_224.mae", ["mae"], ["deit", "deit3", "beit", "mocov3"]),
        ("timm/vit_base_patch16_224", [], ["deit", "deit3", "mae", "beit", "mocov3"]),
        ("timm/efficientnet_lite0", [], ["efficientnet"]),
        ("torchvision/resnet18", [], ["resnet"]),
        ("timm/nfnet_f0", [], []),
    ],
)
def test_families_by_name(model: str, own: list[str], kin: list[str]) -> None:
    found_own, found_kin = load_published().families_of(model)
    assert [n for n in found_own if n != "underfitting"] == own
    assert [n for n in found_kin if n != "underfitting"] == kin


def test_series_hold_every_row_once() -> None:
    known = load_published()
    found = [row for rows in series(known) for row in rows]
    assert len(found) == len(known.rates) and all(row in found for row in known.rates)
    assert all(len({row.size for row in rows}) == len(rows) for rows in series(known)), "no size twice in a series"


def test_the_docs_show_the_table() -> None:
    table = markdown_table(load_published())
    page = (ROOT / "docs" / "stochastic-depth.md").read_text()
    assert table in page, "python -m tuning.published prints it"
    assert "| DeiT-III small / base / large / huge | 0.05 / 0.2 / 0.45 / 0.6 | constant |" in table


def test_conditions_in_words() -> None:
    row = Row(
        family="a", size="b", rate=0.1, purpose="finetune", pretraining="imagenet-21k", data="imagenet-1k",
        image_size=384, epochs=30, mixing=False, source="c",
    )  # fmt: skip
    assert row.conditions == "fine-tuning after imagenet-21k, imagenet-1k, 384 px, 30 epochs, mixup and cutmix off"


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (
            "family: poolformer, size: s12",
            "family: poolfomer, size: s12",
            "unknown family 'poolfomer'; did you mean 'poolformer'?",
        ),
        ("family: poolformer, size: s12", "family: poolformer, size: s13", "unknown size 's13'"),
        ("rate: 0.1,", "rate: 1.1,", "must be at most 1, got 1.1"),
        ("rate: 0.1,", "rat: 0.1,", "unknown key"),
        (', source: "sail-sg/poolformer, README and training scripts"}', "}", "source: required key is missing"),
        ("purpose: train,", "purpose: train, pretraining: imagenet-1k,", "has no meaning with purpose 'train'"),
        (
            "data: imagenet-1k, image",
            "data: imagenet-2k, image",
            "unknown data 'imagenet-2k'; did you mean 'imagenet-21k'?",
        ),
        (
            "      s12: {models: [poolformer_s12]",
            "      s6: {models: [poolformer_s6], blocks: 6, params: 5}\n      s12: {models: [poolformer_s12]",
            "no rate of its size 's6'",
        ),
    ],
)
def test_a_mistake_in_the_file_is_named(old: str, new: str, message: str, tmp_path: Path) -> None:
    text = PUBLISHED.read_text()
    assert old in text
    path = tmp_path / "rates.yaml"
    path.write_text(text.replace(old, new, 1))
    with pytest.raises(ConfigError, match=r"rates\.yaml:\d+: ") as caught:
        load_published(path)
    assert message in str(caught.value)
