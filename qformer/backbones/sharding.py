"""A frozen LLM whose blocks are held in parts by the processes of one machine, by torch's own FSDP2.

A block is gathered when it computes and let go behind it, so that processes pass through the LLM in step.  In training
they make the same number of passes by themselves; wherever else the LLM is asked, `Shards.together` keeps them in step.
Nothing is ever summed over processes here, since nothing of the LLM is trained.  Embeddings, output layer and what else
stands outside the blocks are whole in every process: they are read on their own, by one process alone too.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import nn

from qformer.errors import ConfigError

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

    from qformer.backbones.language import LanguageTower

ENTRIES = ("log_likelihood", "generate", "rank", "know_itself")
"""Methods of a tower that lead through its blocks: FSDP2 takes each for a forward pass."""


class Shards:
    """The blocks that passes lead through, and the processes that hold them together."""

    def __init__(self, tower: LanguageTower, blocks: Sequence[Sequence[Any]], mesh: DeviceMesh):
        """`blocks`: of the one stack, or of encoder and decoder, in their order; sharded over the mesh already."""
        self.blocks, self.mesh, self.group, self.device = blocks, mesh, mesh.get_group(), tower.device
        self._tower = tower
        self._apart = False
        self._wanted: list[bool] = []
        for number, stack in enumerate(blocks):
            # Before FSDP2's own hook, which gathers the first block, and behind that which lets go of the last.
            stack[0].register_forward_pre_hook(lambda *_, number=number: self._before(number), prepend=True)
            stack[-1].register_forward_hook(lambda *_, number=number: self._behind(number))

    @contextmanager
    def together(self) -> Iterator[None]:
        """Inside, each process passes through the LLM as often as it needs, and outside all have done so.

        A process tells the others what it passes through; those that pass elsewhere gather its blocks with it, and one
        that is done goes on doing so until all are.
        """
        if self._apart:
            yield
            return
        self._apart = True
        try:
            yield
        except Exception:
            self._see_off()
            raise
        else:
            self._see_off()
        finally:
            self._apart = False

    def _see_off(self) -> None:
        while any(self._ask(None)):
            for number in range(len(self.blocks)):
                self._accompany(number)

    def _before(self, number: int) -> None:
        if self._apart:
            self._ask(number)
            for earlier in range(number):
                self._accompany(earlier)

    def _behind(self, number: int) -> None:
        if not torch.is_grad_enabled():
            self._forget_order()
        if self._apart:
            for later in range(number + 1, len(self.blocks)):
                self._accompany(later)

    def _ask(self, own: int | None) -> list[bool]:
        """Which stacks any process passes through next."""
        wanted = torch.zeros(len(self.blocks), dtype=torch.int32, device=self.device)
        if own is not None:
            wanted[own] = 1
        dist.all_reduce(wanted, op=dist.ReduceOp.MAX, group=self.group)
        self._wanted = wanted.bool().tolist()
        return self._wanted

    def _accompany(self, number: int) -> None:
        """Gather a stack's blocks as a pass of another process does, and compute nothing."""
        if self._wanted[number]:
            for block in self.blocks[number]:
                block.unshard()
                block.reshard()

    def _forget_order(self) -> None:
        """FSDP2 notes the order of blocks for a backward pass, which behind answers never comes to clear it."""
        from torch.distributed.fsdp import fully_shard

        known: Any = fully_shard
        with suppress(AttributeError):  # its own affair, and only a matter of bytes
            for block in [self._tower, *chain.from_iterable(self.blocks)]:
                state = known.state(block)
                state._comm_ctx.post_forward_order.clear()
                if state._fsdp_param_group is not None:
                    state._fsdp_param_group._post_forward_indices.clear()


def shard(tower: LanguageTower, device: torch.device) -> None:
    """Put a tower on a device, of each block only this process's part; all processes have to call this.

    Raises:
        ConfigError: a quantised LLM, or one that does not say which of its modules are blocks.
    """
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    model = tower.model
    names = set(getattr(model, "_no_split_modules", None) or ())
    blocks = [module for module in model.modules() if type(module).__name__ in names]
    if not blocks:
        raise ConfigError(
            f"language.shard is true, and {type(model).__name__} does not say which of its modules are its blocks; set "
            f"it to false."
        )
    if getattr(model, "quantization_method", None) is not None:
        raise ConfigError(
            "language.shard is true, and the LLM is quantised, which cannot be cut into parts; set it to false, or "
            "take the LLM in bfloat16."
        )
    mesh = _mesh(device.type)
    held = {module for block in blocks for module in block.modules()}
    for module in tower.modules():
        if module not in held:
            _move(module, device)
    for block in blocks:
        fully_shard(block, mesh=mesh)
    whole = {parameter for module in tower.modules() if module not in held for parameter in module.parameters(False)}
    fully_shard(tower, mesh=mesh, ignored_params=whole)
    for name in ENTRIES:
        register_fsdp_forward_method(tower, name)
    first = set(model.get_encoder().modules()) if tower.is_encoder_decoder else ()
    stacks = [[block for block in blocks if block in first], [block for block in blocks if block not in first]]
    tower.shards = Shards(tower, [stack for stack in stacks if stack], mesh)
    tower.know_itself()


def _mesh(kind: str) -> DeviceMesh:
    """The processes of this machine where it has several, since between machines blocks would travel slowly; else all.

    How many a machine has is told by torchrun and accelerate.
    """
    from torch.distributed.device_mesh import init_device_mesh

    world, here = dist.get_world_size(), int(os.environ.get("LOCAL_WORLD_SIZE", "0"))
    if 1 < here < world and world % here == 0:
        return init_device_mesh(kind, (world // here, here), mesh_dim_names=("machine", "process"))["process"]
    return init_device_mesh(kind, (world,))


def _move(module: nn.Module, device: torch.device) -> None:
    """A module's own tensors to a device; `nn.Module.to` would not leave the blocks alone."""
    for parameter in module.parameters(recurse=False):
        parameter.data = parameter.data.to(device)
    for name, buffer in module.named_buffers(recurse=False):
        setattr(module, name, buffer.to(device))
