"""Models of timm and torchvision with grafted drop path, and with the rest of torch around them."""

# pyright: reportAttributeAccessIssue=false, reportArgumentType=false, reportCallIssue=false, reportIndexIssue=false

import copy
import pickle
import warnings
from collections.abc import Callable
from pathlib import Path

import onnxruntime
import pytest
import timm
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from layers.drop_path import Mode
from stochastic_depth.graft import grafted
from stochastic_depth.proof import verify_skip
from stochastic_depth.report import drop_path_report
from stochastic_depth.setting import set_drop_path
from tests.stochastic_depth.parts import (
    COMPUTED,
    SIZE,
    SMALL,
    Net,
    Stack,
    build,
    output_and_gradients,
    quiet_norms,
    size_of,
)


@pytest.mark.parametrize("name", SMALL)
def test_conversion_changes_neither_keys_nor_evaluation(name: str) -> None:
    model = build(name).eval()
    images = torch.randn(2, *size_of(name))
    keys, state = list(model.state_dict()), torch.get_rng_state()
    with torch.no_grad():
        before = model(images)
    for rate, mode in ((0.4, "skip"), (0.2, "mask"), (0.0, "skip"), (0.3, "batch")):
        set_drop_path(model, rate, mode=mode, input_size=size_of(name))  # type: ignore[arg-type]
        assert list(model.state_dict()) == keys and not model.training
        with torch.no_grad():
            assert torch.equal(model(images), before)
    assert torch.equal(torch.get_rng_state(), state), "trials leave the random stream alone"


def test_a_second_call_replaces_the_first_and_zero_restores() -> None:
    name = "vit_tiny_patch16_224"
    model = build(name).train()
    hooks = lambda: sum(len(m._forward_pre_hooks) for m in model.modules())  # noqa: E731
    set_drop_path(model, 0.5, mode="skip", input_size=size_of(name))
    count = hooks()
    result = set_drop_path(model, 0.2, profile="constant", mode="skip", input_size=size_of(name))
    assert hooks() == count, "hooks are installed once"
    assert result.rates == [0.2] * 3 and all(m.drop_prob == 0.2 for m in grafted(model))
    set_drop_path(model, 0.0)
    images = torch.randn(4, *size_of(name))
    torch.testing.assert_close(model(images), model.eval()(images))


def test_cheap_branches_mask_below_their_break_even_rate() -> None:
    name = "poolformer_s12"
    model = build(name).train()
    kinds = ["pooling", ""] * 5  # token mixer and MLP of each block
    result = set_drop_path(model, 0.2, profile="constant", mode="skip", input_size=size_of(name))
    assert [m.kind for m in grafted(model)] == kinds
    assert [m.skips for m in grafted(model)] == [kind != "pooling" for kind in kinds]
    assert "5 drop-path modules: masks, below the break-even rate of such a branch" in result.notes
    set_drop_path(model, 0.4, profile="constant", mode="skip", input_size=size_of(name))
    assert all(m.skips for m in grafted(model))
    other = build(name)
    given = {"pooling": 0.1}
    set_drop_path(other, 0.2, profile="constant", mode="skip", break_even=given, input_size=size_of(name))
    assert all(m.skips for m in grafted(other)), "kinds are known at the first call"


def test_with_nothing_kept_every_parameter_gets_a_zero_gradient() -> None:
    name = "swin_tiny_patch4_window7_224"
    model = build(name).train()
    set_drop_path(model, 1.0, profile="constant", mode="skip", input_size=size_of(name))
    model(torch.randn(1, *size_of(name))).sum().backward()
    for key, parameter in model.named_parameters():
        assert parameter.grad is not None, key
        if "blocks" in key:
            assert torch.equal(parameter.grad, torch.zeros_like(parameter)), key


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_are_whole_and_independent(clone: Callable[[nn.Module], nn.Module]) -> None:
    for name in ("vit_tiny_patch16_224", "swinv2_tiny_window8_256"):
        model = build(name).train()
        set_drop_path(model, 0.5, mode="skip", input_size=size_of(name))
        other = clone(model)
        images = torch.randn(4, *size_of(name))
        for a, b in zip(output_and_gradients(model, images, 1), output_and_gradients(other, images, 1), strict=True):
            assert torch.equal(a, b)
        set_drop_path(other, 0.0, input_size=size_of(name))
        assert max(m.drop_prob for m in grafted(model)) == 0.5


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "swin_tiny_patch4_window7_224", "davit_tiny"])
def test_checkpointing_drops_the_same_samples_again(name: str) -> None:
    model = build(name).train()
    set_drop_path(model, 0.5, profile="constant", mode="skip", input_size=size_of(name))
    images = torch.randn(6, *size_of(name))
    expected = output_and_gradients(model, images, 3)
    model.set_grad_checkpointing()
    for a, b in zip(output_and_gradients(model, images, 3), expected, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "convnext_atto", "davit_tiny"])
def test_autocast(name: str) -> None:
    model = build(name).train()
    images = torch.randn(4, *size_of(name))
    for rate in (0.0, 0.5, 1.0):
        set_drop_path(model, rate, profile="constant", mode="skip", input_size=size_of(name))
        masked = copy.deepcopy(model)
        for module in grafted(masked):
            module.masks_all = True
        outs = []
        for other in (model, masked):
            torch.manual_seed(1)
            with torch.autocast("cpu", torch.bfloat16):
                outs.append(other(images).float())
        outs[0].sum().backward()
        torch.testing.assert_close(*outs, rtol=0.05, atol=0.05 * float(outs[1].detach().abs().max()))


def test_torch_func_goes_through() -> None:
    name = "vit_tiny_patch16_224"
    model = build(name).train()
    set_drop_path(model, 0.5, profile="constant", mode="skip", input_size=size_of(name))
    images = torch.randn(4, *size_of(name))
    parameters = dict(model.named_parameters())

    def loss(weights: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(model, weights, (images,)).square().sum()

    torch.manual_seed(2)
    got = torch.func.grad(loss)(parameters)
    expected = output_and_gradients(model, images, 2)[1:]
    for a, b in zip(got.values(), expected, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("name", ["timm resnet18", "torchvision resnet18"])
@pytest.mark.parametrize("mode", ["batch", "skip"])
def test_a_block_that_is_dropped_whole_is_left_as_it_is(name: str, mode: str) -> None:
    model = COMPUTED[name][0]().train()
    settings: dict = {"profile": "constant", "mode": mode, "input_size": SIZE}
    set_drop_path(model, 1.0, **settings)
    branches = [f"layer{i}.{j}.{part}" for i in range(1, 5) for j in range(2) for part in ("conv", "bn")]
    inside = lambda key: key.startswith(tuple(branches))  # noqa: E731
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with warnings.catch_warnings():
        warnings.simplefilter("error" if mode == "batch" else "ignore")
        model(torch.randn(4, *SIZE)).square().sum().backward()
    after = model.state_dict()
    assert all(torch.equal(after[key], before[key]) for key in after if inside(key))
    assert not torch.equal(after["bn1.running_mean"], before["bn1.running_mean"])
    assert not torch.equal(after["layer2.0.downsample.1.running_mean"], before["layer2.0.downsample.1.running_mean"])
    for key, parameter in model.named_parameters():
        assert parameter.grad is not None, key
        assert not inside(key) or not parameter.grad.any(), key
    assert all(m.training for m in model.modules())
    set_drop_path(model, 0.0, **settings)
    model(torch.randn(4, *SIZE))
    assert all(int(model.state_dict()[key]) == 1 for key in after if inside(key) and key.endswith("tracked"))


class TwoNorms(nn.Module):
    """Two branches, of which the second has a batch norm; and a norm on the shortcut, which is no part of either."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2, self.norm, self.side = (
            nn.Linear(8, 8),
            nn.Linear(8, 8),
            nn.BatchNorm1d(8),
            nn.BatchNorm1d(8),
        )
        self.drop_path1, self.drop_path2 = nn.Identity(), nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = self.side(x) + self.drop_path1(self.fc1(x).relu())
        return x + self.drop_path2(self.norm(self.fc2(x)))


def test_a_norm_of_another_branch_does_not_count() -> None:
    model = Stack(TwoNorms(), TwoNorms()).train()
    set_drop_path(model, 0.5, profile="constant", mode="skip", input_size=(3, 4, 4))
    with pytest.warns(UserWarning, match="batch norm"):
        model(torch.randn(2, 3, 4, 4))
    assert [m.samples_computed for m in grafted(model)] == [1, 2, 1, 2]
    assert [m.has_batch_norm for m in grafted(model)] == [False, True, False, True]


def test_code_that_takes_no_empty_batch_is_given_one_sample_that_counts_for_nothing() -> None:
    class Reshaping(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.norm, self.drop_path = nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Identity()

        def forward(self, x: Tensor) -> Tensor:
            y = self.fc(x)
            return x + self.drop_path(self.norm(y.reshape(len(y), -1)))

    model = Stack(Reshaping()).train()
    set_drop_path(model, 1.0, mode="batch", input_size=(3, 4, 4))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    model(images := torch.randn(4, 3, 4, 4)).sum().backward()
    (module,) = grafted(model)
    assert module.samples_computed == 1 and not module.takes_nothing
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())
    report = drop_path_report(model, input_size=(3, 4, 4))
    assert report.compute_saved == pytest.approx(0.75)
    assert torch.equal(model(images), images.flatten(1)[:, :8])


@pytest.mark.parametrize("name", ["timm resnet18", "timm vit"])
def test_checkpointing_in_mode_batch(name: str) -> None:
    model = COMPUTED[name][0]().train()
    set_drop_path(model, 0.5, profile="constant", mode="batch", input_size=SIZE)
    images = torch.randn(4, *SIZE)
    expected = output_and_gradients(model, images, 3)
    model.set_grad_checkpointing()
    for a, b in zip(output_and_gradients(model, images, 3), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5 * max(1.0, float(b.abs().max())))
    assert all(m.training for m in model.modules())


def test_autocast_in_mode_batch() -> None:
    model = COMPUTED["timm resnet18"][0]().train()
    set_drop_path(model, 1.0, profile="constant", mode="batch", input_size=SIZE)
    with torch.autocast("cpu", torch.bfloat16):
        out = model(torch.randn(4, *SIZE))
    out.float().sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    assert sum(m.samples_computed for m in grafted(model)) == 0


def test_a_batch_norm_that_is_replaced_later_is_seen() -> None:
    model = Stack(TwoNorms()).train()
    set_drop_path(model, 0.5, mode="skip", profile="constant", input_size=(3, 4, 4))
    model.blocks[0].norm.eval()
    model(torch.randn(2, 3, 4, 4))
    model.blocks[0].norm = nn.BatchNorm1d(8)
    with pytest.warns(UserWarning, match="batch norm"):
        model(torch.randn(2, 3, 4, 4))
    assert [m.samples_computed for m in grafted(model)] == [2, 3]


def test_compiled_code_counts_what_it_computes(compilations: Callable[[], tuple[int, int]]) -> None:
    for name, computed in (("vit_tiny_patch16_224", 0), ("convnext_atto", 4)):
        model = build(name).train()
        set_drop_path(model, 1.0, profile="constant", mode="batch", input_size=SIZE)
        compiled = torch.compile(model, backend="eager")
        compiled(torch.randn(4, *SIZE)).sum().backward()
        assert {m.samples_computed for m in grafted(model)} == {computed}, "a convolution wants to know its batch"
        assert all(p.grad is not None for p in model.parameters())
    assert compilations()[1] == 0


def _ranks_of_a_resnet(rank: int, store: str) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    model = build("resnet18").train()
    set_drop_path(model, 0.5, profile="constant", mode="batch", input_size=SIZE)
    parallel = nn.parallel.DistributedDataParallel(model)
    torch.manual_seed(rank)
    for _ in range(20):
        parallel.zero_grad()
        parallel(torch.randn(2, *SIZE)).sum().backward()
    counts = [m.samples_computed for m in grafted(model)]
    assert counts == [40 - m.samples_dropped for m in grafted(model)] and 0 < sum(counts) < 40 * len(counts)
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_two_ranks_drop_whole_batches_of_their_own(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(_ranks_of_a_resnet, (str(tmp_path / "store"),), nprocs=2)


# others take long to trace at three batch sizes
FIRST_TO_TRACE = {"convnext_atto", "resnet18", "vit_tiny_patch16_224"}


@pytest.mark.parametrize(
    ("name", "mode"),
    [
        pytest.param(name, mode, marks=[pytest.mark.slow] * (name not in FIRST_TO_TRACE))
        for mode in ("mask", "skip")
        for name in SMALL
    ],
)
def test_changing_rates_recompiles_nothing(name: str, mode: str, compilations: Callable[[], tuple[int, int]]) -> None:
    """At most four graphs for three batch sizes (one in mask mode at one size), equal to eager."""
    model = quiet_norms(build(name).train())
    settings: dict = {"profile": "constant", "mode": mode, "input_size": size_of(name)}
    set_drop_path(model, 0.3, **settings)
    compiled = torch.compile(model, backend="eager")
    batches = [4] if mode == "mask" else [2, 3, 16]
    images = [torch.randn(batch, *size_of(name)) for batch in batches]
    for step in range(3 * len(batches)):
        x = images[step % len(batches)]
        set_drop_path(compiled, 0.1 + 0.08 * step, **settings)  # type: ignore[arg-type]
        torch.manual_seed(step)
        out = compiled(x)
        out.sum().backward()
        torch.manual_seed(step)
        torch.testing.assert_close(out, model(x), rtol=1e-4, atol=1e-4)
    graphs, breaks = compilations()
    assert graphs <= (1 if mode == "mask" else 4) and breaks == 0


def test_two_hundred_rate_changes_of_timms_vit_compile_once(compilations: Callable[[], tuple[int, int]]) -> None:
    name = "vit_tiny_patch16_224"
    model = build(name).train()
    depth = set_drop_path(model, 0.0, input_size=size_of(name))
    compiled = torch.compile(model, backend="eager")
    images = torch.randn(2, *size_of(name))
    for step in range(200):
        set_drop_path(compiled, step / 200, input_size=size_of(name))  # type: ignore[arg-type]
        depth.set_step(step)
        compiled(images)
    assert compilations() == (1, 0)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "swin_tiny_patch4_window7_224", "convnext_atto"])
def test_skipping_compiles_with_inductor(name: str, compilations: Callable[[], tuple[int, int]]) -> None:
    model = build(name).train()
    for rate in (0.0, 1.0):  # random streams differ under inductor; at these rates the draw is known
        set_drop_path(model, rate, profile="constant", mode="skip", input_size=size_of(name))
        compiled = torch.compile(model)
        images = torch.randn(3, *size_of(name))
        out = compiled(images)
        out.sum().backward()
        torch.testing.assert_close(out, model(images), rtol=1e-4, atol=1e-4)
    assert compilations()[1] == 0


@pytest.mark.parametrize(
    "name",
    [
        "convnext_atto",
        *(
            pytest.param(name, marks=pytest.mark.slow)
            for name in ("vit_tiny_patch16_224", "swin_tiny_patch4_window7_224", "davit_tiny")
        ),
    ],
)
def test_export_in_evaluation_leaves_no_trace(name: str, tmp_path: Path) -> None:
    plain, model = build(name).eval(), build(name).eval()
    set_drop_path(model, 0.3, mode="skip", input_size=size_of(name))
    images = torch.randn(2, *size_of(name))
    graphs = [torch.export.export(m, (images,)) for m in (plain, model)]
    operations = [[str(node.target) for node in g.graph.nodes if node.op == "call_function"] for g in graphs]
    assert operations[0] == operations[1]
    torch.onnx.export(model, (images,), str(tmp_path / "model.onnx"), dynamo=True, verbose=False)
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    (out,) = session.run(None, {session.get_inputs()[0].name: images.numpy()})
    with torch.no_grad():
        torch.testing.assert_close(torch.from_numpy(out), model(images), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "resnet18"])
@pytest.mark.parametrize("mode", ["mask", "skip"])
def test_grafted_models_are_traced_by_fx(name: str, mode: str) -> None:
    model = build(name)
    set_drop_path(model, 0.5, mode=mode, input_size=size_of(name))
    x = torch.randn(4, *size_of(name))
    graph = torch.fx.symbolic_trace(model)
    graph(x).sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    dropped = sum(m.samples_dropped for m in grafted(model))
    assert dropped > 0
    model.eval()
    assert torch.equal(torch.fx.symbolic_trace(model)(x), model(x))


@pytest.mark.parametrize("mode", ["mask", "skip", "batch"])
@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "resnet18"])
def test_grafted_models_are_scripted_in_evaluation(name: str, mode: Mode) -> None:
    model = build(name)
    set_drop_path(model, 0.5, mode=mode, input_size=size_of(name))
    x = torch.randn(2, *size_of(name))
    torch.testing.assert_close(torch.jit.script(model.eval())(x), model(x))


@pytest.mark.parametrize("mode", ["mask", "skip", "batch"])
@pytest.mark.parametrize("name", ["convnext_atto", "resnet18"])
def test_a_model_at_rate_0_draws_as_at_any_rate_and_computes_as_untouched(name: str, mode: Mode) -> None:
    torch.manual_seed(0)
    untouched = timm.create_model(name, num_classes=3).train()
    model, images = copy.deepcopy(untouched), torch.randn(3, 3, 64, 64)
    depth = set_drop_path(model, 0.0, mode=mode, input_size=(3, 64, 64))
    states = []
    for rate in (0.0, 0.3):
        set_drop_path(model, rate, profile="constant", mode=mode)
        torch.manual_seed(1)
        if rate == 0.0:
            out, expected = model(images), untouched(images)
            torch.manual_seed(1)
            assert torch.equal(out, expected)
        model(images)
        states.append(torch.get_rng_state())
        for module in (m for block in depth.blocks for m in block.drop_paths.values()):
            assert module.samples_seen == (6 if rate == 0.0 else 3)
            assert rate or (module.samples_dropped, module.samples_computed) == (0, 6)
    assert torch.equal(*states)


class Normed(nn.Module):
    """A branch that begins with a norm, which may be another block's as well."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm, self.mlp, self.drop_path = norm, nn.Linear(8, 8), nn.Identity()
        self.checkpoints = False

    def branch(self, x: Tensor) -> Tensor:
        return self.mlp(self.norm(x))

    def forward(self, x: Tensor) -> Tensor:
        if self.checkpoints:
            return x + self.drop_path(checkpoint(self.branch, x, use_reentrant=False))
        return x + self.drop_path(self.branch(x))


class EndsWithABlocksNorm(Net):
    """The last block's norm is the model's final one."""

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks[-1].norm(super().forward(x))


def two_normed(net: type[Net] = Net, *, shared: bool = False) -> Net:
    torch.manual_seed(0)
    norm = nn.LayerNorm(8)
    model = net(*(Normed(norm if shared else nn.LayerNorm(8)) for _ in range(2))).train()
    result = set_drop_path(model, 0.5, profile="constant", mode="skip", input_size=Net.size)
    assert result.notes == ["2 drop-path modules: skips per branch"]
    return model


@pytest.mark.parametrize(("net", "shared"), [(Net, True), (EndsWithABlocksNorm, False), (EndsWithABlocksNorm, True)])
@pytest.mark.parametrize("batch", [2, 6])
def test_the_first_module_of_a_branch_may_be_used_elsewhere(net: type[Net], shared: bool, batch: int) -> None:
    model, images = two_normed(net, shared=shared), torch.randn(batch, *Net.size)
    assert max(verify_skip(model, images, seed=seed) for seed in range(4)) < 1e-5
    assert len(model(images)) == batch
    assert [m.samples_computed for m in grafted(model)] == [batch // 2] * 2
    expected = output_and_gradients(model, images, 1)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    for got, wanted in zip(output_and_gradients(compiled, images, 1), expected, strict=True):  # type: ignore[arg-type]
        torch.testing.assert_close(got, wanted)


def test_a_module_of_a_branch_called_by_itself_gets_all_back() -> None:
    model = two_normed()
    block, x = model.blocks[0], torch.randn(6, 8)
    assert block.norm(x).shape == (6, 8)
    handle = block.mlp.register_forward_hook(raise_key_error)
    with pytest.raises(KeyError):
        model(torch.randn(6, *Net.size))
    handle.remove()
    assert block.norm(x).shape == (6, 8), "an exception ends the block as well"
    assert verify_skip(model, torch.randn(6, *Net.size)) < 1e-5


def test_a_checkpoint_inside_a_block_runs_the_kept_samples_again() -> None:
    model, images = two_normed(), torch.randn(6, *Net.size)
    expected = output_and_gradients(model, images, 1)
    for block in model.blocks:
        block.checkpoints = True
    for got, wanted in zip(output_and_gradients(model, images, 1), expected, strict=True):
        torch.testing.assert_close(got, wanted)


def raise_key_error(*_: object) -> None:
    raise KeyError
