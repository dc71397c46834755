"""`train.compile`: the blocks of towers and Q-Former in training steps as torch.compile makes them.

A block is compiled where it stands (`nn.Module.compile`), so that every tensor keeps its name, and for any shape, since
no two steps have the same.  What is not a training step (validation, monitors, a search for the module that gave NaN)
runs as it is written: it may hang hooks into blocks, which compiled code does not see, and asks for shapes, caches and
modes for each of which there would be something more to compile.
"""

from __future__ import annotations

import warnings
from contextlib import AbstractContextManager, nullcontext
from itertools import chain
from typing import Any

import torch
from torch import nn

from qformer.backbones.stacks import blocks_of
from qformer.backbones.vision import FrozenTower
from qformer.errors import ConfigError, reason
from qformer.vlm import VLM

BACKEND = "inductor"
VARIANTS = 64
"""How often torch may compile the call of a module anew before it gives up and says so: all blocks share that call, and
those of unlike kind, mode, or with a single row or picture, are compiled apart; its own limit is 8."""


def check(device: str) -> None:
    """Refuse, before any weight is read, to compile where there is no compiler: something small is compiled.

    Raises:
        ConfigError: torch cannot compile here; says why.
    """
    compiler: Any = torch._inductor.config  # slow to import
    try:
        # What was compiled before proves nothing about today; that it is not looked for is nothing to warn of.
        with warnings.catch_warnings(action="ignore"), compiler.patch(force_disable_caches=True):
            torch.compile(lambda x: x.sin() + 1, backend=BACKEND)(torch.ones(8, device=device))
    except Exception as error:  # compilers fail in many ways
        why = reason(getattr(error, "inner_exception", error))
        raise ConfigError(
            f"train.compile is true, and torch.compile makes nothing here ({why}); install a C++ compiler (g++) and, "
            f"on a GPU, Triton, or set it to false."
        ) from None


def compile_blocks(model: VLM) -> str:
    """Have the blocks of encoder, Q-Former and LLM compiled when they are first used; what is compiled, in a sentence.

    What a feature cache keeps stays as it is written, since others read it too.
    """
    if model.language is not None:
        model.language.know_itself()  # asks for equality to the bit, of code that is the same in every run
    cached = model.settings.vision.cache is not None
    parts: dict[str, list[nn.Module]] = {
        "the encoder": _deep(model.vision.model) if isinstance(model.vision, FrozenTower) and not cached else [],
        "the Q-Former": list(model.connector.qformer.blocks),
        "the LLM": [] if model.language is None else _deep(model.language.model),
    }
    tracer: Any = torch._dynamo.config
    compiler: Any = torch._inductor.config
    tracer.recompile_limit = max(tracer.recompile_limit, VARIANTS)
    compiler.fallback_random = True  # dropout draws what it draws in blocks as they are written
    for block in chain.from_iterable(parts.values()):
        block.compile(dynamic=True, backend=BACKEND)
    told = ", ".join(f"{len(blocks)} of {part}" for part, blocks in parts.items())
    return f"train.compile: blocks are compiled when they are first used, which takes a while: {told}"


def as_written(model: VLM) -> AbstractContextManager[Any]:
    """A while without compiled code; nothing for a model that has none, since torch's compiler is slow to import."""
    compiled = any(each._compiled_call_impl is not None for each in model.modules())
    return torch.compiler.set_stance("force_eager") if compiled else nullcontext()


def _deep(model: nn.Module) -> list[nn.Module]:
    """The blocks that make a model deep."""
    return [block for _, blocks in blocks_of(model) for block in blocks]
