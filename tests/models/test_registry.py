"""models/registry.py: names, patterns, tags, and models of one's own."""

import re

import pytest
import timm
import torch

from configs import CONFIGS
from files.errors import ConfigError
from models.config import load_model_config
from models.factory import create_model
from models.registry import (
    is_model,
    is_path,
    list_models,
    model_config,
    published_config,
    register_model,
    unregister_model,
)
from tests.models.parts import IN_TIMM, ISOTROPIC

S12 = CONFIGS / "models" / "poolformer_s12.yaml"


@pytest.fixture
def mine(tmp_path):
    """A YAML of one's own; what a test registers is forgotten afterwards."""
    path = tmp_path / "mine.yaml"
    path.write_text((CONFIGS / "models" / "poolformer_n4.yaml").read_text().replace("[48, 96]", "[8, 16]"))
    before = set(list_models())
    yield path
    for name in set(list_models()) - before:
        unregister_model(name)


def test_every_file_is_a_model():
    assert list_models() == sorted(path.stem for path in (CONFIGS / "models").glob("*.yaml"))
    assert all(is_model(name) for name in list_models()) and not is_model("poolformer")


def test_patterns():
    assert list_models("pool*_s12") == ["poolformer_s12", "poolformerv2_s12"]
    assert list_models("caformer_?18") == ["caformer_s18"] and list_models("resnet*") == []


def test_register_and_forget(mine):
    assert register_model(mine) == "mine"
    assert is_model("mine") and "mine" in list_models("mi*") and model_config("mine").dims == [8, 16]
    with torch.device("meta"):
        assert create_model("mine").pretrained_cfg["architecture"] == "mine"
    assert register_model(load_model_config(mine), "another") == "another"
    assert model_config("another").name == "another" and model_config("mine").name == "mine"
    unregister_model("mine")
    unregister_model("mine")
    assert not is_model("mine") and is_model("another")


def test_a_registered_name_may_hold_a_dot(mine):
    register_model(mine, "mine.v2")
    assert model_config("mine.v2").dims == [8, 16]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("poolformer_s12", "'poolformer_s12' is taken"),
        ("mine", "'mine' is taken"),
        ("../mine", "must be a plain name, not a path"),
        ("a/b", "must be a plain name, not a path"),
        ("mine.yaml", "looks like the path of a YAML"),
    ],
)
def test_names_that_are_refused(mine, name, message):
    register_model(mine)
    with pytest.raises(ConfigError, match=re.escape(message)):
        register_model(mine, name)
    assert len(list_models("*mine*")) == 1


def test_a_config_without_a_name(mine):
    nameless = load_model_config(mine).model_copy(update={"name": ""})
    with pytest.raises(ConfigError, match="needs name="):
        register_model(nameless)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("poolfromer_s12", "unknown model 'poolfromer_s12'; did you mean 'poolformer_s12'?"),
        ("zzz", "unknown model 'zzz'; `python -m models` lists them"),
        ("../poolformer_s12", "unknown model '../poolformer_s12'"),
        ("..", "unknown model '..'"),
        ("", "unknown model ''"),
        ("configs/models/poolformer_s12", "unknown model 'configs/models/poolformer_s12'"),
    ],
)
def test_unknown_names(name, message):
    with pytest.raises(ConfigError, match=re.escape(message)) as error:
        model_config(name)
    assert "\n" not in str(error.value)


def test_a_path_and_a_config_are_models_too(mine):
    assert model_config(mine) == model_config(str(mine)) == load_model_config(mine)
    assert create_model(mine, num_classes=3).config.dims == [8, 16]
    config = load_model_config(mine)
    assert model_config(config) is config
    assert create_model(config, num_classes=3).config == create_model(mine, num_classes=3).config
    with pytest.raises(ConfigError, match=r"^model mine: depth: unknown key"):
        create_model(config, depth=[1, 1])


def test_paths():
    assert is_path("a/b.yaml") and is_path("b.yml") and not is_path("poolformer_s12")
    assert model_config(str(S12)) == model_config("poolformer_s12")
    with pytest.raises(ConfigError, match=r"no such file; did you mean 'poolformer_s12.yaml'"):
        model_config(str(S12.with_name("poolfromer_s12.yaml")))


@pytest.mark.parametrize(
    ("tag", "classes", "size"),
    [("sail_in1k", 1000, 224), ("sail_in22k_ft_in1k_384", 1000, 384), ("sail_in22k", 21841, 224)],
)
def test_a_tag_sets_classes_and_image_size(tag, classes, size):
    with torch.device("meta"):
        model = create_model(f"convformer_s18.{tag}")
        other = create_model(f"convformer_s18.{tag}", num_classes=3, image_size=[96, 160])
    assert model.num_classes == classes and model.pretrained_cfg["input_size"] == (3, size, size)
    assert model.pretrained_cfg["tag"] == tag
    assert other.num_classes == 3 and other.pretrained_cfg["input_size"] == (3, 96, 160)


def test_every_tag_is_known_to_timm():
    tags = {f"{n}.{tag}" for n in list_models() for tag in model_config(n).pretrained}
    published = {t for n in (*IN_TIMM, *ISOTROPIC) for t in timm.list_models(f"{n}.*", pretrained=True)}
    assert tags == published >= set(timm.list_models(module="metaformer", pretrained=True))
    for module, left_out in (("mlp_mixer", ("gm",)), ("deit", ("_distilled_", "_384"))):
        names = [n for n in timm.list_models(module=module) if not any(part in n for part in left_out)]
        assert names and set(names) <= set(ISOTROPIC)
    for name in tags:
        base, _, tag = name.partition(".")
        config, theirs = model_config(name), timm.models.get_pretrained_cfg(name)
        assert theirs is not None and config.pretrained[0] == tag
        assert (3, *config.height_width) == theirs.input_size and config.num_classes == theirs.num_classes
        assert config.crop_pct == theirs.crop_pct and config.interpolation == theirs.interpolation
        assert tuple(config.mean) == theirs.mean and tuple(config.std) == theirs.std
        assert published_config(model_config(base), tag) == config


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("caformer_s18.sail_in1k_348", "did you mean 'sail_in1k_384'"),
        ("randformer_s12.sail_in1k", "has no published weights 'sail_in1k'; it has: none"),
        ("caformer_s81.sail_in1k", "unknown model 'caformer_s81.sail_in1k'; did you mean 'caformer_s18'"),
    ],
)
def test_unknown_tags(name, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        create_model(name)
