"""drop_path and DropPath: exact values, rates, gradients, and skip equal to mask for the same kept set."""

import copy
import functools
import json
import math
import operator
import pickle
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.utils.checkpoint
from torch import Tensor, nn

from layers.drop_path import BREAK_EVEN, MODES, DropPath, drop_path
from models import create_model
from stochastic_depth.setting import set_drop_path

EXAMPLE = Path(__file__).parents[1] / "data" / "drop_path_example.json"


class Recorder(nn.Module):
    """A linear branch that notes the inputs it was called with."""

    def __init__(self, dim: int = 3) -> None:
        super().__init__()
        self.fc = nn.Linear(dim, dim)
        self.calls: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        self.calls.append(x.detach().clone())
        return self.fc(x)


# ---- the function ---------------------------------------------------------------------------------------------------


def test_worked_example(monkeypatch: pytest.MonkeyPatch) -> None:
    example = json.loads(EXAMPLE.read_text())
    x, mask = torch.tensor(example["x"]), torch.tensor(example["mask"])
    # draws below keep_prob = 0.8 are kept
    monkeypatch.setattr(torch, "rand", lambda *_, **__: torch.where(mask > 0, 0.5, 0.9))
    out = drop_path(x, example["drop_prob"], training=True)
    torch.testing.assert_close(out, torch.tensor(example["output"]), atol=1e-4, rtol=0)


@pytest.mark.parametrize("drop_prob", [0.0, None, 0.3])
def test_identity_in_eval_and_at_zero(drop_prob: float | None) -> None:
    x = torch.randn(4, 3)
    assert drop_path(x, drop_prob, training=False) is x
    if not drop_prob:
        assert drop_path(x, drop_prob, training=True) is x


def test_all_zeros_at_one() -> None:
    x = torch.randn(8, 3, 2, 2)
    assert torch.equal(drop_path(x, 1.0, training=True), torch.zeros_like(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_each_sample_is_zero_or_scaled(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x = torch.ones(500, 2, 3, dtype=dtype)
    out = drop_path(x, 0.25, training=True)
    assert out.dtype == dtype
    kept = out[:, 0, 0] != 0
    assert 0 < kept.sum() < 500
    expected = kept[:, None, None].to(dtype) * torch.tensor(1 / 0.75, dtype=dtype)
    assert torch.equal(out, expected.expand_as(out))
    unscaled = drop_path(x, 0.25, training=True, scale_by_keep=False)
    assert set(unscaled.unique().tolist()) == {0.0, 1.0}


@pytest.mark.parametrize(
    "value",
    [-0.1, 1.1, math.nan, "0.1", True, np.float32(1.1), np.bool_(True), torch.tensor([0.1]), torch.tensor(math.nan)],
)
def test_refuses_what_is_no_probability(value: float) -> None:
    with pytest.raises(ValueError, match=r"drop_prob must be a number in \[0, 1\], got"):
        drop_path(torch.ones(2), value, training=True)
    with pytest.raises(ValueError, match=r"drop_prob must be a number in \[0, 1\], got"):
        DropPath(value)
    module = DropPath(0.1)
    with pytest.raises(ValueError, match=r"\[0, 1\]"):
        module.drop_prob = value
    assert module.drop_prob == 0.1


@pytest.mark.parametrize("number", [np.float16, np.float32, np.float64, np.array, torch.tensor])
def test_numbers_of_numpy_and_torch_are_probabilities(number: Callable[[float], float]) -> None:
    module = DropPath(number(0.25))
    assert (type(module.drop_prob), module.drop_prob) == (float, 0.25)
    module.drop_prob, module.multiplier, module.break_even = number(0.5), number(0.5), number(0.75)
    assert (module.rate, module.break_even, str(module)) == (0.25, 0.75, "DropPath(drop_prob=0.5, mode=mask)")
    assert not drop_path(torch.ones(4, 2), number(1.0), training=True).any()


def test_refuses_an_unknown_mode() -> None:
    with pytest.raises(ValueError, match="mode must be one of mask, skip, batch, got 'skp'"):
        DropPath(0.1, mode="skp")  # type: ignore[arg-type]


# ---- the module -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
def test_eval_is_identity_and_rate_one_drops_all(mode: str) -> None:
    module, branch = DropPath(1.0, mode=mode), Recorder()  # type: ignore[arg-type]
    x = torch.randn(5, 3)
    assert torch.equal(module.residual(x, branch), x)
    assert torch.equal(module(x), torch.zeros_like(x))
    module.eval()
    torch.testing.assert_close(module.residual(x, branch), x + branch.fc(x))
    assert module(x) is x


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kept_by", ["residual", "forward"])
def test_rate_zero_is_exact(mode: str, kept_by: str) -> None:
    module, branch = DropPath(0.0, mode=mode), Recorder()  # type: ignore[arg-type]
    x = torch.randn(5, 3)
    out = module.residual(x, branch) if kept_by == "residual" else x + module(branch.fc(x))
    assert torch.equal(out, x + branch.fc(x))


@pytest.mark.parametrize("scale_by_keep", [True, False])
@pytest.mark.parametrize("batch", [1, 2, 7, 16])
def test_skip_equals_mask_for_the_same_kept_set(batch: int, scale_by_keep: bool) -> None:
    torch.manual_seed(batch)
    module, branch = DropPath(0.4, scale_by_keep, mode="skip"), Recorder()
    for _ in range(10):
        x = torch.randn(batch, 4, 3, requires_grad=True)
        shortcut = torch.randn(batch, 4, 3, requires_grad=True)
        branch.calls.clear()
        out = module.residual(x, branch, shortcut)
        kept = (out != shortcut).flatten(1).any(dim=1)
        gradients = torch.autograd.grad(out.square().sum(), [x, shortcut, *branch.parameters()])

        assert len(branch.calls) == 1, "the branch is called once"
        seen = branch.calls[0]
        assert len(seen) == kept.sum(), "and with as many samples as were kept"
        assert {tuple(s.flatten().tolist()) for s in seen} == {tuple(s.flatten().tolist()) for s in x[kept].detach()}

        scale = kept.float() / (0.6 if scale_by_keep else 1.0)
        masked = shortcut + branch.fc(x) * scale[:, None, None]
        torch.testing.assert_close(out, masked, atol=1e-6, rtol=1e-6)
        expected = torch.autograd.grad(masked.square().sum(), [x, shortcut, *branch.parameters()])
        for a, b in zip(gradients, expected, strict=True):
            torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-6)


def test_skip_below_break_even_masks_the_same_draw() -> None:
    x = torch.randn(16, 3)
    branch = Recorder()
    skipping, masking = DropPath(0.3, mode="skip"), DropPath(0.3, mode="skip")
    masking.break_even = 0.31
    assert skipping.skips and not masking.skips
    for seed in range(5):
        outputs = []
        for module in (skipping, masking):
            torch.manual_seed(seed)
            outputs.append(module.residual(x, branch))
            after = torch.rand(3)  # the random stream goes on alike
            outputs.append(after)
        torch.testing.assert_close(outputs[0], outputs[2])
        assert torch.equal(outputs[1], outputs[3])
    assert len(branch.calls[-1]) == 16


def test_forward_in_skip_mode_has_the_fixed_count() -> None:
    torch.manual_seed(0)
    module = DropPath(0.25, mode="skip")
    counts = {int((module(torch.ones(8, 2))[:, 0] > 0).sum()) for _ in range(50)}
    assert counts == {6}


LAWS = [pytest.param(m, d, marks=[] if (m, d) == ("skip", torch.float32) else pytest.mark.slow)
        for m in MODES for d in (torch.float32, torch.bfloat16)]  # fmt: skip


@pytest.mark.parametrize("drop_prob", [0.05, 0.1, 0.2, 0.4])
@pytest.mark.parametrize("batch", [1, 2, 4, 8])
@pytest.mark.parametrize(("mode", "dtype"), LAWS)
def test_realised_rate_is_exact(mode: str, batch: int, drop_prob: float, dtype: torch.dtype) -> None:
    """Over 20,000 samples the rate is within 3.5 sigma, with the mode's own sigma, as seen in the output."""
    torch.manual_seed(1234)
    module = DropPath(drop_prob, mode=mode)  # type: ignore[arg-type]
    x = torch.zeros(batch, 1, dtype=dtype)
    draws = 20_000 // batch
    dropped = sum(int((module.residual(x, torch.ones_like) == 0).sum()) for _ in range(draws))
    kept_mean = batch * (1 - drop_prob)
    variance = {
        "mask": batch * drop_prob * (1 - drop_prob),
        "skip": (kept_mean - math.floor(kept_mean)) * (math.ceil(kept_mean) - kept_mean),
        "batch": batch**2 * drop_prob * (1 - drop_prob),
    }[mode]
    sigma = math.sqrt(draws * variance)
    assert abs(dropped - draws * batch * drop_prob) <= 3.5 * sigma + 1e-6
    assert module.samples_seen == draws * batch
    assert module.samples_dropped == dropped


def test_each_sample_has_the_same_chance() -> None:
    torch.manual_seed(0)
    module = DropPath(0.3, mode="skip")
    draws = 8_000
    dropped = torch.stack([module.residual(torch.zeros(5, 1), torch.ones_like)[:, 0] == 0 for _ in range(draws)]).sum(0)
    sigma = math.sqrt(draws * 0.3 * 0.7)
    assert ((dropped - draws * 0.3).abs() < 4 * sigma).all()


def test_batch_mode_drops_all_or_nothing() -> None:
    torch.manual_seed(0)
    module = DropPath(0.5, mode="batch")
    counts = {int((module.residual(torch.zeros(6, 1), torch.ones_like) == 0).sum()) for _ in range(40)}
    assert counts == {0, 6}


@pytest.mark.parametrize("mode", ["skip", "batch"])
def test_nothing_kept_gives_every_parameter_a_zero_gradient(mode: str) -> None:
    module, branch = DropPath(1.0, mode=mode), Recorder()  # type: ignore[arg-type]
    x = torch.randn(1, 3, requires_grad=True)
    module.residual(x, branch).sum().backward()
    assert len(branch.calls[0]) == 0
    assert x.grad is not None and torch.equal(x.grad, torch.ones_like(x))
    for parameter in branch.parameters():
        assert parameter.grad is not None and torch.equal(parameter.grad, torch.zeros_like(parameter))


def test_one_module_may_serve_two_branches() -> None:
    torch.manual_seed(0)
    module, branch = DropPath(0.5, mode="skip"), Recorder()
    x = module.residual(torch.zeros(4, 3), branch)
    assert module.residual(x, branch).shape == (4, 3)
    assert module.samples_seen == 8


# ---- one draw -------------------------------------------------------------------------------------------------------


def drawn_by_hand(module: DropPath, batch: int) -> tuple[Tensor, float]:
    """The kept samples (B,) and their factor, from torch's generator as every form of every mode must draw them."""
    keep_prob = 1.0 - module.rate
    if module.mode == "mask":
        kept = torch.rand(batch) < keep_prob
    else:
        chance = torch.rand((), dtype=torch.float64)
        if module.mode == "batch":
            count = batch if chance < keep_prob else 0
        else:
            count = min(int(torch.floor(batch * keep_prob + chance)), batch)
        kept = torch.zeros(batch, dtype=torch.bool)
        kept[torch.rand(batch).argsort()[:count]] = True
    return kept, 1.0 / keep_prob if keep_prob > 0.0 and module.scale_by_keep else 1.0


FORMS: dict[str, Callable[[DropPath, nn.Module], Callable[[Tensor], Tensor]]] = {
    "residual": lambda module, fc: lambda x: module.residual(x, fc),
    "called": lambda module, fc: lambda x: x + module(fc(x)),
    "masks all": lambda module, fc: lambda x: module.residual(x, fc),
    "compiled": lambda module, fc: torch.compile(lambda x: module.residual(x, fc), backend="eager"),
    "compiled call": lambda module, fc: torch.compile(lambda x: x + module(fc(x)), backend="eager"),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("mode", MODES)
def test_every_form_makes_the_same_draw(compilations: Callable[[], tuple[int, int]], mode: str, form: str) -> None:
    """Kept sets, outputs, gradients and what is left of the random stream, against the draw written by hand."""
    fc = nn.Linear(3, 3)
    module = DropPath(0.0, mode=mode)  # type: ignore[arg-type]
    module.masks_all = form == "masks all"
    run = FORMS[form](module, fc)
    for rate in (0.0, 0.3, 0.5, 1.0):
        module.drop_prob = rate
        for batch in (1, 2, 7):
            x = torch.randn(batch, 3, requires_grad=True)
            torch.manual_seed(batch)
            kept, factor = drawn_by_hand(module, batch)
            following = torch.rand(4)
            expected = x + fc(x) * (kept * factor)[:, None]
            torch.manual_seed(batch)
            out = run(x)
            assert torch.equal(torch.rand(4), following), "the random stream goes on alike"
            assert torch.equal((out != x).any(1), kept)
            torch.testing.assert_close(out, expected)
            inputs = [x, *fc.parameters()]
            gradients = torch.autograd.grad(out.square().sum(), inputs)
            for a, b in zip(gradients, torch.autograd.grad(expected.square().sum(), inputs), strict=True):
                torch.testing.assert_close(a, b)
    assert compilations()[1] == 0


def test_kept_samples_stay_in_the_order_of_the_batch() -> None:
    """So that neighbours are copied together."""
    module, branch = DropPath(0.4, mode="skip"), Recorder(1)
    for _ in range(20):
        module.residual(torch.arange(8.0)[:, None], branch)
    assert all(torch.equal(x, x.sort(0).values) for x in branch.calls)


# ---- settings and state ---------------------------------------------------------------------------------------------


def test_holds_no_state() -> None:
    module = DropPath(0.3, mode="skip")
    assert not module.state_dict() and not list(module.parameters()) and not list(module.buffers())


def test_rate_and_mode_may_change_at_any_time() -> None:
    torch.manual_seed(0)
    module = DropPath(0.0)
    x = torch.zeros(64, 1)
    assert (module.residual(x, torch.ones_like) == 1).all()
    module.drop_prob = 1.0
    assert (module.residual(x, torch.ones_like) == 0).all()
    module.drop_prob, module.multiplier = 0.5, 0.5
    assert module.rate == 0.25
    module.mode = "skip"
    assert int((module.residual(x, torch.ones_like) == 0).sum()) == 16


def test_draws_at_every_rate_so_that_streams_agree() -> None:
    states = []
    for rate in (0.0, 0.3):
        torch.manual_seed(0)
        DropPath(rate, mode="mask").residual(torch.zeros(4, 1), torch.ones_like)
        states.append(torch.get_rng_state())
    assert torch.equal(*states)


def test_uses_torchs_default_generators() -> None:
    module = DropPath(0.5, mode="skip")
    outputs = []
    for _ in range(2):
        with torch.random.fork_rng():
            torch.manual_seed(7)
            outputs.append(torch.stack([module.residual(torch.zeros(9, 1), torch.ones_like) for _ in range(5)]))
    assert torch.equal(*outputs)


def test_result_is_cast_to_the_shortcuts_dtype() -> None:
    torch.manual_seed(0)
    branch = Recorder()
    for mode in MODES:
        module = DropPath(0.5, mode=mode)  # type: ignore[arg-type]
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert branch.fc(torch.zeros(1, 3)).dtype == torch.bfloat16
            assert module.residual(torch.zeros(8, 3), branch).dtype == torch.float32


def test_copies_keep_their_settings_and_are_independent() -> None:
    module = DropPath(0.3, mode="skip", kind="pooling")
    module.multiplier = 0.5
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert (other.drop_prob, other.rate, other.mode, other.kind) == (0.3, 0.15, "skip", "pooling")
        other.drop_prob = 0.9
        assert module.rate == 0.15 and float(module._rate) == pytest.approx(0.15)


def test_built_on_the_meta_device_the_rate_is_real() -> None:
    with torch.device("meta"):
        module = DropPath(0.3, mode="skip")
    assert float(module._rate) == pytest.approx(0.3)
    module.to_empty(device="cpu")
    module.half()
    assert float(module._rate) == pytest.approx(0.3) and module._rate.dtype == torch.float64


def test_break_even_comes_from_the_kind() -> None:
    for kind, rate in BREAK_EVEN.items():
        assert DropPath(kind=kind).break_even == rate
    assert DropPath(0.01, mode="skip").skips, "a branch of unknown kind always skips"


def test_batch_norm_in_a_branch_is_warned_about_once_and_masked_where_too_few_remain() -> None:
    branch = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    module = DropPath(0.9, mode="skip")
    with pytest.warns(UserWarning, match="batch norm inside this residual branch"):
        out = module.residual(torch.randn(4, 3), branch)
    assert torch.isfinite(out).all()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(10):  # 0 or 1 of 4 samples kept: a batch norm of one sample would raise
            module.residual(torch.randn(4, 3), branch)
    assert all(torch.isfinite(b.float()).all() for b in branch.buffers())


class TwoBranches(nn.Module):
    """Two branches as methods of a block, the second with a batch norm; notes the rows that each is given."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2, self.norm = nn.Linear(3, 3), nn.Linear(3, 3), nn.BatchNorm1d(3)
        self.normed = nn.Sequential(self.fc2, self.norm)
        self.rows: list[int] = []
        for part in (self.fc1, self.fc2):
            part.register_forward_hook(lambda _m, args, _o: self.rows.append(len(args[0])))

    def branch1(self, x: Tensor) -> Tensor:
        return self.fc1(x)

    def branch2(self, x: Tensor) -> Tensor:
        return self.norm(self.fc2(x))


BRANCHES: dict[str, Callable[[TwoBranches], Callable[[Tensor], Tensor]]] = {
    "method": lambda block: block.branch2,
    "sequential": lambda block: block.normed,
    "lambda": lambda block: lambda x: block.branch2(x),
    "lambda of modules": lambda block: lambda x: block.norm(block.fc2(x)),
    "partial": lambda block: functools.partial(block.branch2),
    "partial of a function": lambda block: functools.partial(lambda part, x: part(x), block.normed),
    "default": lambda block: lambda x, part=block.normed: part(x),
    "forward": lambda block: block.normed.forward,
}


@pytest.mark.parametrize("kind", BRANCHES)
def test_a_batch_norm_is_found_in_any_callable(kind: str) -> None:
    """One of two samples is kept, which a batch norm does not take."""
    block = TwoBranches()
    module, branch = DropPath(0.5, mode="skip"), BRANCHES[kind](block)
    with pytest.warns(UserWarning, match="batch norm inside this residual branch"):
        module.residual(torch.randn(2, 3), branch)
    assert block.rows == [2] and (module.samples_dropped, module.samples_computed) == (1, 2)


@pytest.mark.parametrize("kind", BRANCHES)
@pytest.mark.parametrize("mode", ["skip", "batch"])
def test_with_no_sample_kept_batch_norms_are_left_as_they_are(kind: str, mode: str) -> None:
    torch.manual_seed(0)
    block = TwoBranches()
    module, branch = DropPath(1.0, mode=mode), BRANCHES[kind](block)  # type: ignore[arg-type]
    before = {key: value.clone() for key, value in block.state_dict().items()}
    x = torch.randn(4, 3, requires_grad=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error" if mode == "batch" else "ignore")
        out = module.residual(x, branch)
    out.sum().backward()
    assert torch.equal(out, x) and block.rows == [0] and module.samples_computed == 0
    assert all(torch.equal(value, before[key]) for key, value in block.state_dict().items())
    for parameter in (*block.fc2.parameters(), *block.norm.parameters()):
        assert parameter.grad is not None and not parameter.grad.any()
    assert block.norm.training
    module.drop_prob = 0.0
    module.residual(x, branch)
    assert block.norm.num_batches_tracked == 1


@pytest.mark.parametrize("branch", ["branch1", "lambda"])
def test_a_norm_of_the_other_branch_does_not_count(branch: str) -> None:
    block = TwoBranches()
    module = DropPath(0.5, mode="skip")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        module.residual(torch.randn(2, 3), block.branch1 if branch == "branch1" else lambda x: block.fc1(x))
    assert block.rows == [1] and module.samples_computed == 1


def test_a_module_shared_by_two_branches_knows_both() -> None:
    block, module = TwoBranches(), DropPath(0.5, mode="skip")
    x = torch.randn(2, 3)
    module.residual(x, block.branch1)
    with pytest.warns(UserWarning, match="batch norm"):
        module.residual(x, block.branch2)
    module.residual(x, block.branch1)
    assert block.rows == [1, 2, 1]


def test_a_branch_that_cannot_be_looked_into_is_masked_where_one_sample_is_kept() -> None:
    block = TwoBranches()
    branch = operator.methodcaller("apply", block)  # calls its argument's method, whatever that is

    class Asked(Tensor):
        def apply(self, block: TwoBranches) -> Tensor:
            return block.branch2(self.as_subclass(Tensor))

    module = DropPath(0.5, mode="skip")
    out = module.residual(torch.randn(2, 3).as_subclass(Asked), branch)
    assert torch.isfinite(out).all() and block.rows == [2] and module.samples_computed == 2


def test_a_frozen_batch_norm_takes_one_sample() -> None:
    block, module = TwoBranches(), DropPath(0.5, mode="skip")
    block.norm.eval()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        module.residual(torch.randn(2, 3), block.branch2)
    assert block.rows == [1]


@pytest.mark.parametrize("mode", MODES)
def test_counts_what_was_computed(mode: str) -> None:
    torch.manual_seed(0)
    module, branch = DropPath(0.6, mode=mode), Recorder()  # type: ignore[arg-type]
    for batch in (1, 2, 5, 8, 8):
        module.residual(torch.randn(batch, 3), branch)
    assert module.samples_computed == sum(map(len, branch.calls))
    assert module.samples_computed == (24 if mode == "mask" else 24 - module.samples_dropped)
    module.reset_counts()
    assert module.samples_computed == 0
    module(torch.randn(7, 3))
    assert module.samples_computed == 7, "a branch that was handed over is computed"
    module.reset_counts()
    module.mode, module.break_even = "skip", 0.7
    module.residual(torch.randn(8, 3), branch)
    assert module.samples_computed == 8, "below the break-even rate"


@pytest.mark.parametrize("mode", MODES)
def test_counts_go_on_in_another_module(mode: str) -> None:
    torch.manual_seed(0)
    module, other = DropPath(0.6, mode=mode), DropPath(0.6, mode=mode)  # type: ignore[arg-type]
    other(torch.randn(3, 3))  # replaced
    for _ in range(2):
        module.residual(torch.randn(8, 3), Recorder())
        counts = module.samples_seen, module.samples_dropped, module.samples_computed
        other.set_counts(*counts)
        assert (other.samples_seen, other.samples_dropped, other.samples_computed) == counts
    assert counts[0] == 16 and counts[1] > 0
    state = torch.get_rng_state()
    for each in (module, other):
        torch.set_rng_state(state)
        each.residual(torch.randn(8, 3), Recorder())
    assert (other.samples_seen, other.samples_dropped) == (module.samples_seen, module.samples_dropped) != counts[:2]


def test_checkpointing_leaves_batch_norms_of_dropped_batches_alone() -> None:
    block, module = TwoBranches(), DropPath(1.0, mode="batch")
    before = {key: value.clone() for key, value in block.state_dict().items()}
    x = torch.randn(4, 3, requires_grad=True)
    out = torch.utils.checkpoint.checkpoint(module.residual, x, block.branch2, use_reentrant=False)
    out.sum().backward()
    assert all(torch.equal(value, before[key]) for key, value in block.state_dict().items())
    assert block.norm.training


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("mode", MODES)
def test_on_cuda_counts_and_values_agree(mode: str) -> None:
    torch.manual_seed(0)
    module = DropPath(0.25, mode=mode).cuda()  # type: ignore[arg-type]
    x = torch.zeros(8, 2, device="cuda")
    dropped = sum(int((module.residual(x, torch.ones_like)[:, 0] == 0).sum()) for _ in range(50))
    assert module.samples_dropped == dropped


# ---- composed with the rest of torch --------------------------------------------------------------------------------


class Residual(nn.Module):
    """Two residual branches, the first of which is never dropped."""

    def __init__(self, mode: str) -> None:
        super().__init__()
        self.first, self.second = Recorder(), Recorder()
        self.drop_path1 = DropPath(0.0, mode=mode)  # type: ignore[arg-type]
        self.drop_path2 = DropPath(0.4, mode=mode)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        x = self.drop_path1.residual(x, self.first.fc)
        return self.drop_path2.residual(x, self.second.fc)


def test_two_hundred_rate_changes_compile_once(compilations: Callable[[], tuple[int, int]]) -> None:
    model = Residual("mask")
    compiled = torch.compile(model, backend="eager")
    for step in range(200):
        model.drop_path2.drop_prob = step / 400
        model.drop_path2.multiplier = 1.0 - step / 400
        compiled(torch.randn(4, 3)).sum().backward()
    assert compilations() == (1, 0)


@pytest.mark.parametrize("mode", ["skip", "batch"])
def test_skipping_compiles_to_few_graphs_equal_to_eager(compilations: Callable[[], tuple[int, int]], mode: str) -> None:
    model = Residual(mode)
    compiled = torch.compile(model, backend="eager")
    for step in range(60):
        model.drop_path2.drop_prob = 0.1 + step / 100
        x = torch.randn((2, 3, 16)[step % 3], 3)
        torch.manual_seed(step)
        out = compiled(x)
        out.sum().backward()
        torch.manual_seed(step)
        torch.testing.assert_close(out, model(x))
    graphs, breaks = compilations()
    assert graphs <= 4 and breaks == 0


@pytest.mark.parametrize("form", ["eager", "compiled"])
def test_a_gpu_is_given_the_same_number_at_every_step(
    form: str, monkeypatch: pytest.MonkeyPatch, compilations: Callable[[], tuple[int, int]]
) -> None:
    """As on a GPU: the last sample may count for nothing, and results are those of the mask."""
    assert [DropPath(mode=mode).rounds_up(64, torch.device("cuda")) for mode in ("mask", "skip", "batch")] == [
        False,
        True,
        False,
    ]
    assert not DropPath(mode="skip").rounds_up(63, torch.device("cuda"))
    assert not DropPath(mode="skip").rounds_up(64, torch.device("cpu"))
    monkeypatch.setattr(DropPath, "rounds_up", lambda self, batch, device: True)
    torch.manual_seed(0)
    module, fc = DropPath(0.4, mode="skip"), nn.Linear(3, 3)

    def skipped(x: Tensor) -> Tensor:
        return module.residual(x, fc)

    form_of = torch.compile(skipped, backend="eager") if form == "compiled" else skipped
    computed, dropped = set(), 0
    for step in range(20):
        x, results = torch.randn(8, 3), []
        for run, masks in ((form_of, False), (skipped, True)):
            module.masks_all = masks
            fc.zero_grad()
            module.reset_counts()
            torch.manual_seed(step)
            out = run(x)
            out.square().sum().backward()
            assert fc.weight.grad is not None
            results.append((out.detach(), fc.weight.grad.clone()))
            if not masks:
                computed.add(module.samples_computed)
                dropped += module.samples_dropped
        for got, want in zip(*results, strict=True):
            torch.testing.assert_close(got, want)
    assert computed == {5} and 60 <= dropped <= 68, "4.8 of 8 are kept on average"
    if form == "compiled":
        assert compilations() == (1, 0)


def test_batch_norms_do_not_see_what_counts_for_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(DropPath, "rounds_up", lambda self, batch, device: True)
    module, norm = DropPath(0.4, mode="skip"), nn.BatchNorm1d(3)
    computed = set()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in range(20):
            module.reset_counts()
            module.residual(torch.randn(8, 3), norm)
            assert module.samples_computed == 8 - module.samples_dropped
            computed.add(module.samples_computed)
    assert computed == {4, 5}


@pytest.mark.parametrize("name", ["poolformer_n4", "caformer_n4"])
def test_rates_that_cross_the_break_even_recompile_nothing(
    compilations: Callable[[], tuple[int, int]], name: str
) -> None:
    model = create_model(name, num_classes=5, image_size=16, drop_path_mode="skip")
    compiled = torch.compile(model, backend="eager")
    for step in range(30):
        set_drop_path(compiled, step / 30)  # type: ignore[arg-type]
        x = torch.randn((2, 3, 16)[step % 3], *model.pretrained_cfg["input_size"])
        torch.manual_seed(step)
        out = compiled(x)
        torch.manual_seed(step)
        torch.testing.assert_close(out, model(x), rtol=1e-4, atol=1e-5)
    graphs, breaks = compilations()
    assert graphs <= 4 and breaks == 0


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
def test_inductor_agrees_with_eager(compilations: Callable[[], tuple[int, int]], mode: str) -> None:
    """Random streams differ under inductor, so the rate is 0 or 1 here, and in between the kept samples are read off."""
    model = Residual(mode)
    compiled = torch.compile(model)
    x = torch.randn(8, 3)
    for rate in (0.0, 1.0):
        model.drop_path2.drop_prob = rate
        torch.testing.assert_close(compiled(x), model(x))
    model.drop_path2.drop_prob = 0.5
    after_first = x + model.first.fc(x)
    for _ in range(5):
        out = compiled(x)
        kept = (out - after_first).abs().amax(dim=1) > 1e-6
        expected = after_first + kept[:, None] * 2.0 * model.second.fc(after_first)
        torch.testing.assert_close(out, expected)


@pytest.mark.slow
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("name", ["poolformer_n4", "convformer_n4", "caformer_n4"])
def test_models_of_the_zoo_skip_under_inductor(
    compilations: Callable[[], tuple[int, int]], name: str, channels_last: bool
) -> None:
    """inductor predicts the memory layout of a convolution over an unknown number of samples wrongly."""
    model = create_model(name, num_classes=5, drop_path_mode="skip")
    if channels_last:
        model = model.to(memory_format=torch.channels_last)
    compiled = torch.compile(model)
    images = torch.randn(4, *model.pretrained_cfg["input_size"])
    for rate in (0.5, 0.0, 1.0):
        set_drop_path(model, rate, profile="constant", break_even=0.0)
        model.zero_grad()
        out = compiled(images)
        out.square().sum().backward()
        if rate == 0.5:  # the random stream is another one under inductor
            assert out.isfinite().all()
            continue
        gradients = [p.grad for p in model.parameters()]
        model.zero_grad()
        expected = model(images)
        expected.square().sum().backward()
        torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
        for got, parameter in zip(gradients, model.parameters(), strict=True):
            torch.testing.assert_close(got, parameter.grad, rtol=1e-3, atol=1e-4)
    graphs, breaks = compilations()
    assert graphs <= 4 and breaks == 0


@pytest.mark.parametrize("part", [nn.BatchNorm1d(3), nn.Conv1d(1, 1, 3, padding=1)])
def test_what_compiled_code_cannot_skip_is_masked(compilations: Callable[[], tuple[int, int]], part: nn.Module) -> None:
    class Branch(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.part, self.drop_path = part, DropPath(0.5, mode="skip")
            self.rows: list[int] = []

        def branch(self, x: Tensor) -> Tensor:
            return self.part(x) if x.shape[1] == 3 else self.part(x[:, None])[:, 0]

        def forward(self, x: Tensor) -> Tensor:
            return self.drop_path.residual(x, self.branch)

    model, x = Branch(), torch.randn(8, 3 if isinstance(part, nn.BatchNorm1d) else 4)
    part.eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        compiled = torch.compile(model, backend="eager")
        model(x)
    for seed in range(5):
        torch.manual_seed(seed)
        out = compiled(x)
        torch.manual_seed(seed)
        torch.testing.assert_close(out, model(x))
    assert compilations() == (1, 0)
    symbols = torch._dynamo.explain(model)(x).graphs[0].code
    assert "index_select" not in symbols


def test_compiled_code_masks_callables_that_it_cannot_look_into(compilations: Callable[[], tuple[int, int]]) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.drop_path = nn.BatchNorm1d(3), DropPath(0.5, mode="skip")

        def forward(self, x: Tensor) -> Tensor:
            return self.drop_path.residual(x, lambda y: self.norm(y))

    model = Model()
    compiled = torch.compile(model, backend="eager")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(5):
            assert compiled(torch.randn(2, 3)).isfinite().all()
    assert model.drop_path.samples_computed == 10 and model.drop_path.samples_dropped == 5
    assert compilations() == (1, 0)


def test_checkpointing_drops_the_same_samples_again() -> None:
    model = Residual("skip")
    x = torch.randn(8, 3, requires_grad=True)
    gradients = []
    for recompute in (False, True):
        model.zero_grad()
        torch.manual_seed(3)
        out = torch.utils.checkpoint.checkpoint(model, x, use_reentrant=False) if recompute else model(x)
        out.square().sum().backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    for a, b in zip(*gradients, strict=True):
        assert torch.equal(a, b)


def test_torch_func_goes_through() -> None:
    model = Residual("mask")
    x = torch.randn(5, 3)
    parameters: dict[str, Tensor] = dict(model.named_parameters())

    def loss(p: dict[str, Tensor], images: Tensor) -> Tensor:
        return torch.func.functional_call(model, p, (images,)).square().sum()

    torch.manual_seed(0)
    gradients = torch.func.grad(loss)(parameters, x)
    torch.manual_seed(0)
    loss(parameters, x).backward()
    for name, parameter in parameters.items():
        torch.testing.assert_close(gradients[name], parameter.grad)
    per_sample = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0), randomness="different")(
        parameters, x[:, None]
    )
    assert per_sample["first.fc.weight"].shape == (5, 3, 3)


def test_export_leaves_no_trace_in_eval() -> None:
    model = Residual("skip").eval()
    graph = torch.export.export(model, (torch.randn(2, 3),)).graph
    names = " ".join(str(node.target) for node in graph.nodes)
    assert "rand" not in names and "index" not in names and "mul" not in names


def test_gradient_accumulation_draws_anew() -> None:
    torch.manual_seed(0)
    module = DropPath(0.5, mode="skip")
    kept = {tuple((module.residual(torch.zeros(6, 1), torch.ones_like)[:, 0] > 0).tolist()) for _ in range(10)}
    assert len(kept) > 3


def _ranks_do_not_wait(rank: int, store: str) -> None:
    dist = torch.distributed
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    torch.manual_seed(rank)
    model = nn.parallel.DistributedDataParallel(Residual("skip"))
    model.module.drop_path2.drop_prob = 0.5
    for _ in range(500):
        model.zero_grad()
        model(torch.randn(2, 3)).sum().backward()
    seen = torch.tensor([float(model.module.drop_path2.samples_dropped)])
    assert 300 < seen < 700
    gradient = model.module.second.fc.weight.grad
    assert gradient is not None
    others = [torch.empty_like(gradient) for _ in range(2)]
    dist.all_gather(others, gradient)
    assert torch.equal(*others)
    dist.barrier()  # or the first to leave takes the connection away from the other
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_ranks_run_500_steps(tmp_path: Path) -> None:
    """At B = 2 and rate 0.5 a rank often has nothing to compute; plain DDP must not wait for it."""
    torch.multiprocessing.spawn(_ranks_do_not_wait, (str(tmp_path / "store"),), nprocs=2)


# ---- torch.fx and TorchScript ---------------------------------------------------------------------------------------


class EveryUse(nn.Module):
    """`residual` and the module."""

    def __init__(self, mode: str) -> None:
        super().__init__()
        self.fc = nn.Linear(3, 3)
        self.drop_path = DropPath(0.4, mode=mode)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        x = self.drop_path.residual(x, self.fc)
        return x + self.drop_path(self.fc(x))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("make", [EveryUse, lambda mode: DropPath(0.4, mode=mode)], ids=["in a model", "alone"])
def test_a_graph_traced_in_training_draws_as_eager_code_does(make: Callable[[str], nn.Module], mode: str) -> None:
    model = make(mode)
    graph = torch.fx.symbolic_trace(model)
    assert list(graph.state_dict()) == list(model.state_dict())
    x = torch.randn(16, 3)
    for twin in (graph, copy.deepcopy(graph), pickle.loads(pickle.dumps(graph))):
        torch.manual_seed(5)
        out = twin(x)
        torch.manual_seed(5)
        torch.testing.assert_close(out, model(x))
    assert torch.equal(graph.eval()(x), model.eval()(x))


def test_the_function_in_a_graph_draws_as_in_eager_code() -> None:
    def branch(x: Tensor) -> Tensor:
        return x + drop_path(2 * x, 0.4, True)

    graph, x = torch.fx.symbolic_trace(branch), torch.randn(16, 3)
    torch.manual_seed(5)
    out = graph(x)
    torch.manual_seed(5)
    assert torch.equal(out, branch(x)) and not torch.equal(out, 3 * x)


def test_rates_and_counts_of_a_graph_are_the_modules() -> None:
    module = DropPath(0.5, mode="skip")
    graph = torch.fx.symbolic_trace(module)
    x = torch.ones(8, 3)
    assert int((graph(x) == 0).all(dim=1).sum()) == 4 == module.samples_dropped
    module.multiplier = 0.5
    assert int((graph(x) == 0).all(dim=1).sum()) == 2
    module.drop_prob = 0.0
    assert torch.equal(graph(x), x)


def test_a_graph_of_evaluation_holds_no_trace() -> None:
    model = EveryUse("skip").eval()
    graph = torch.fx.symbolic_trace(model)
    x = torch.randn(4, 3)
    assert torch.equal(graph(x), model(x)) and "drop" not in graph.code


@pytest.mark.parametrize("mode", MODES)
def test_torchscript_is_the_identity_in_evaluation_and_refuses_training(mode: str, tmp_path: Path) -> None:
    torch.jit.script(DropPath(0.4, mode=mode).eval()).save(tmp_path / "module.pt")  # type: ignore[arg-type]
    loaded = torch.jit.load(tmp_path / "module.pt")
    x = torch.randn(4, 3)
    assert torch.equal(loaded(x), x) and not loaded.state_dict()
    with pytest.raises(torch.jit.Error, match="stochastic depth in evaluation only"):
        loaded.train()(x)
