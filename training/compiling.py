"""torch.compile for training: the whole model, or its residual blocks one by one, which share what is compiled."""

from collections.abc import Sequence

import torch
from torch import nn

from files.errors import ConfigError
from stochastic_depth.blocks import Block, find_blocks, unwrap
from training.config import Compile

GRAPHS_OF_A_BLOCK = 64
"""Graphs that may be compiled of one block's code: one for each width, shape and mode of training. torch's limit is 8, beyond
which blocks run as eager code."""


def configure(how: Compile) -> None:
    """torch's settings for a compiled run, of this process."""
    if how:
        # lets compiled code hold the number of kept samples as a number, in one graph
        torch._dynamo.config.capture_scalar_outputs = True
    if how == "blocks":
        limit = torch._dynamo.config.recompile_limit
        torch._dynamo.config.recompile_limit = max(limit, GRAPHS_OF_A_BLOCK)


def check_blocks(how: Compile, blocks: Sequence[Block]) -> None:
    """Refuses to compile blocks one by one where there are none.

    Raises:
        ConfigError: Naming the key.
    """
    if how == "blocks" and not blocks:
        raise ConfigError(
            "runtime.compile: 'blocks' has no effect on a model without residual blocks; true compiles it as a whole"
        )


def compile_in_place(model: nn.Module, how: Compile, *, backend: str = "inductor") -> None:
    """Compiles a model at its first calls. Modules, state-dict keys and draws of the rates stay as they are.

    Args:
        model: Ours or another library's, after `set_drop_path`.
        how: false: nothing. true: the model is one graph. `blocks`: each residual block is compiled by itself, for the shapes
            that it is given, and what stands between blocks is eager code. Blocks of one structure and one shape share a
            graph, whatever their weights and rates, so that the time to compile does not grow with depth.
        backend: Of torch.compile.

    Raises:
        NoBlocksError: `blocks`, and the model has none.
    """
    if how == "blocks":
        inner = unwrap(model)
        for block in find_blocks(inner):
            # dynamic=False: the second stage is not taken for the first one with other sizes, which would be slower code
            inner.get_submodule(block.name).compile(dynamic=False, backend=backend)
    elif how:
        model.compile(backend=backend)
