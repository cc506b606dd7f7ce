"""Optimizer groups, loss and weight average."""

import pytest
import torch
from timm.optim import create_optimizer_v2
from torch import Tensor, nn

from files.errors import ConfigError
from models import create_model
from models.metaformer import MetaFormer
from training import optim as tested
from training.config import EmaSection, OptimSection
from training.lr_schedule import build_scheduler
from training.optim import build_ema, build_optimizer

CPU = torch.device("cpu")
STEPS = 10  # per epoch


def small_model() -> MetaFormer:
    """Norms, biases, layer scales and residual scales in one model."""
    torch.manual_seed(0)
    return create_model("caformer_n4", depths=[2, 1], dims=[16, 32], image_size=8, in_chans=1, num_classes=10,
                        layer_scale=0.1, res_scale=[1.0, 1.0], mlp_bias=True)  # fmt: skip


def section(**settings) -> OptimSection:
    return OptimSection.model_validate({"epochs": 6, "warmup_epochs": 2, "lr": 0.1, "warmup_lr": 0.01, "min_lr": 0.001,
                                        **settings})  # fmt: skip


# ---- optimizer ------------------------------------------------------------------------------------------------------


def test_weight_decay_leaves_out_biases_norms_and_scales() -> None:
    model = small_model()
    names = {id(p): name for name, p in model.named_parameters()}
    optimizer = build_optimizer(model, section(weight_decay=0.3), CPU)
    decay = {names[id(p)]: group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert decay.keys() == set(names.values())
    for name, p in model.named_parameters():
        is_weight = name.endswith("weight") and "norm" not in name
        assert decay[name] == (0.3 if is_weight else 0.0), name
        assert is_weight == (p.ndim > 1), name
    for part in ("norm1.weight", "mlp.fc1.bias", "layer_scale1", "res_scale1", "act.scale"):
        assert any(part in name for name in names.values()), f"the model has no {part} to look at"


def test_layer_decay_lowers_the_rate_from_the_head_down() -> None:
    model = small_model()
    optim = section(layer_decay=0.5, schedule="constant", warmup_epochs=0)
    optimizer = build_optimizer(model, optim, CPU)
    build_scheduler(optimizer, optim, STEPS).step_update(3)
    rate = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    lr = {name: rate[id(p)] for name, p in model.named_parameters()}
    layers = ["stem.conv.weight", "stages.0.blocks.0.mlp.fc1.weight", "stages.0.blocks.1.mlp.fc1.weight",
              "stages.1.blocks.0.mlp.fc1.weight", "head.fc.weight"]  # fmt: skip
    assert [lr[name] for name in layers] == pytest.approx([0.1 * 0.5**depth for depth in (4, 3, 2, 1, 0)])
    decays = {group["weight_decay"] for group in optimizer.param_groups}
    assert decays == {0.0, 0.05}, "weight decay still tells weights from biases"


def test_settings_reach_the_optimizer() -> None:
    optimizer = build_optimizer(small_model(), section(betas=[0.5, 0.6], eps=1e-3), CPU)
    assert isinstance(optimizer, torch.optim.AdamW)
    assert optimizer.defaults["betas"] == (0.5, 0.6) and optimizer.defaults["eps"] == 1e-3
    optimizer = build_optimizer(small_model(), section(name="sgd", momentum=0.7), CPU)
    assert isinstance(optimizer, torch.optim.SGD)
    assert optimizer.defaults["momentum"] == 0.7 and optimizer.defaults["lr"] == 0.1


@pytest.mark.parametrize(
    ("settings", "key"),
    [
        ({"name": "sgd", "betas": [0.9, 0.9]}, "optim.betas"),
        ({"name": "adan", "betas": [0.9, 0.9]}, "optim.betas"),
        ({"name": "lion", "eps": 1e-3}, "optim.eps"),
        ({"name": "adahessian"}, "second derivatives"),
        ({"name": "sgd", "momentum": 0.0}, "Nesterov momentum"),
    ],
)
def test_what_has_no_effect_or_cannot_work_is_refused(settings: dict, key: str) -> None:
    with pytest.raises(ConfigError, match=key) as caught:
        build_optimizer(small_model(), section(**settings), CPU)
    assert settings["name"] in str(caught.value)


@pytest.mark.parametrize("error", [TypeError("no keyword 'eps'"), ValueError("bad"), ImportError("needs APEX")])
def test_the_factory_s_own_refusals_become_config_errors(monkeypatch, error: Exception) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(tested, "create_optimizer_v2", refuse)
    with pytest.raises(ConfigError, match="adamw.*" + str(error)):
        build_optimizer(small_model(), section(), CPU)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_an_optimizer_for_cuda_is_refused_without_it() -> None:
    with pytest.raises(ConfigError, match=r"fusedadam cannot be used here: CUDA required"):
        build_optimizer(small_model(), section(name="fusedadam"), CPU)


@pytest.mark.parametrize(
    ("name", "device", "fused"),
    [
        ("adamw", "cuda", True),
        ("adamw", "cpu", True),
        ("sgd", "cpu", True),
        ("adamw", "mps", False),
        ("lamb", "cuda", False),
    ],
)
def test_fused_where_torch_offers_it(monkeypatch, name: str, device: str, fused: bool) -> None:
    asked = []

    def spy(model: nn.Module, **options: object) -> torch.optim.Optimizer:
        asked.append(options.pop("fused", False))
        return create_optimizer_v2(model, **options)  # pyright: ignore[reportArgumentType]

    monkeypatch.setattr(tested, "create_optimizer_v2", spy)
    build_optimizer(small_model(), section(name=name), torch.device(device))
    assert asked == [fused]


@pytest.mark.parametrize("name", ["adam", "adamw", "sgd"])
def test_the_fused_form_on_a_cpu_is_the_plain_one(name: str) -> None:
    models = [small_model(), small_model()]
    models[1].load_state_dict(models[0].state_dict())
    fused = build_optimizer(models[0], section(name=name), CPU)
    assert all(group["fused"] for group in fused.param_groups)
    plain = create_optimizer_v2(
        models[1], opt=name, lr=fused.param_groups[0]["lr"], weight_decay=section(name=name).weight_decay
    )
    before = [p.detach().clone() for p in models[0].parameters()]
    for step in range(3):
        for model, optimizer in zip(models, (fused, plain), strict=True):
            torch.manual_seed(step)
            for p in model.parameters():
                p.grad = torch.randn_like(p)
            optimizer.step()
    assert not all(torch.equal(p, q) for p, q in zip(models[0].parameters(), before, strict=True))
    for p, q in zip(*(model.parameters() for model in models), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-7)


# ---- average --------------------------------------------------------------------------------------------------------


def test_the_average_follows_the_weights() -> None:
    model = nn.Linear(1, 1, bias=False)
    assert build_ema(model, EmaSection()) is None
    ema = build_ema(model, EmaSection(enabled=True, decay=0.75))
    assert ema is not None

    def average(value: float, step: int) -> Tensor:
        nn.init.constant_(model.weight, value)
        ema.update(model, step=step)
        return ema.module.state_dict()["weight"].squeeze()

    assert average(4.0, step=0) == 4.0, "the average starts at the weights"
    assert average(8.0, step=10) == 0.75 * 4 + 0.25 * 8


def test_the_average_may_warm_up() -> None:
    model = nn.Linear(1, 1, bias=False)
    decays = []
    for warmup in (False, True):
        ema = build_ema(model, EmaSection(enabled=True, decay=0.999, warmup=warmup))
        assert ema is not None
        decays.append([ema.get_decay(step) for step in (5, 50, 10**6)])
    assert decays[0] == [0.999] * 3
    assert decays[1][0] < decays[1][1] < decays[1][2] == 0.999
