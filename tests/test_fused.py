"""Norms and activations of a frozen LLM by one operation each: the same numbers, in fewer operations."""

from __future__ import annotations

import copy
import pickle
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM
from transformers.activations import FastGELUActivation, GELUActivation, NewGELUActivation, QuickGELUActivation

from qformer.backbones import fused
from qformer.backbones.language_loading import load_language
from qformer.config import LanguageConfig
from tests.families import CAUSAL, SEQ2SEQ, family_llm

WIDTH = 32
NORMS = {
    "llama": 5, "mistral": 5, "qwen2": 5, "qwen3": 9, "phi3": 5, "olmo2": 9, "t5": 12, "flan_t5": 12, "mt5": 12,
}  # fmt: skip
GELUS = {"gpt2": 2, "flan_t5": 4, "mt5": 4}
"""How many of each in two layers, of an encoder–decoder two and two; the other families have others."""


def read(path: Path, family: str, dtype: torch.dtype = torch.float32) -> Any:
    auto = AutoModelForSeq2SeqLM if family in SEQ2SEQ else AutoModelForCausalLM
    return auto.from_pretrained(path, dtype=dtype).requires_grad_(False).eval()


def answer(model: Any) -> tuple[Tensor, Tensor]:
    """Logits of seven embeddings, and what their squares send back, in float64."""
    dtype = model.get_input_embeddings().weight.dtype
    width = model.get_input_embeddings().weight.shape[1]
    given = torch.randn(1, 7, width, generator=torch.Generator().manual_seed(1)).to(dtype).requires_grad_()
    more = {"decoder_input_ids": torch.tensor([[1, 2, 3]])} if model.config.is_encoder_decoder else {}
    logits = model(inputs_embeds=given, **more).logits.double()
    logits.square().sum().backward()
    assert given.grad is not None
    return logits.detach(), given.grad.double()


def away(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())


def changed(model: nn.Module) -> Counter[type]:
    """What computes in the place of how many modules."""
    return Counter(type(each).__mro__[1] for each in model.modules() if isinstance(each, fused.Fused))


@pytest.mark.parametrize("family", [*CAUSAL, *SEQ2SEQ])
def test_every_family_gives_the_same_numbers_and_those_with_such_parts_have_them_fused(
    tmp_path: Path, family: str
) -> None:
    model = read(family_llm(tmp_path, family), family)
    before, names = answer(model), [name for name, _ in model.named_parameters()]
    fused.fuse(model)
    kinds = +Counter({fused.FusedRMSNorm: NORMS.get(family, 0), fused.FusedGELU: GELUS.get(family, 0)})
    assert changed(model) == kinds
    assert names == [name for name, _ in model.named_parameters()]
    for found, wanted in zip(answer(model), before, strict=True):
        assert away(found, wanted) < 1e-5
    with fused.as_written(model):
        assert not changed(model)
        assert all(map(torch.equal, answer(model), before))
    fused.fuse(model)  # nothing is left to be done
    again = copy.deepcopy(model)
    assert changed(again) == changed(model) == kinds and all(map(torch.equal, answer(again), answer(model)))


@pytest.mark.parametrize("family", NORMS)
def test_in_bfloat16_each_norm_is_nearer_to_the_truth(tmp_path: Path, family: str) -> None:
    """One operation rounds once, where those written out round twice.  Of norms alone: whole random models, whose T5s
    do not scale their attention, make of any rounding what luck wants.
    """
    model, dice = read(family_llm(tmp_path, family), family, torch.bfloat16), torch.Generator().manual_seed(0)
    fused.fuse(model)
    norms = [module for module in model.modules() if isinstance(module, fused.FusedRMSNorm)]
    assert len(norms) == NORMS[family]
    for norm in norms:
        weight = torch.randn(norm.weight.shape, generator=dice).bfloat16()
        norm.weight.copy_(weight)
        rows = torch.randn(512, len(weight), generator=dice).bfloat16()
        truth = fused.rms_norm(rows.double(), weight.double(), getattr(norm, norm.epsilon))
        found = norm(rows).double()
        with fused.as_written(norm):
            written = norm(rows).double()
        once = family == "olmo2"  # whose norm as it is written, too, rounds once
        assert torch.equal(found, written) if once else away(found, truth) < 0.75 * away(written, truth)


class Scaled(nn.Module):
    """Has the parts of an RMS norm; what it computes is given."""

    def __init__(self, compute: Any, eps: float = 1e-6):
        super().__init__()
        self.weight, self.eps, self.compute = nn.Parameter(torch.ones(8)), eps, compute

    def forward(self, x: Tensor) -> Tensor:
        return self.compute(self, x)


class Gated(Scaled):
    """May be given a gate, which no plain norm has."""

    def forward(self, x: Tensor, gate: Tensor | None = None) -> Tensor:
        made: Tensor = self.compute(self, x)
        return made if gate is None else made * gate


def plain(module: Any, x: Tensor) -> Tensor:
    return x * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + module.eps).to(x.dtype) * module.weight


@pytest.mark.parametrize(
    ("compute", "is_one"),
    [
        (plain, True),
        (lambda m, x: plain(m, x - x.mean(-1, keepdim=True)), False),
        (lambda m, x: plain(m, x) + plain(m, x).detach() * 0.05, False),
        (lambda m, x: plain(m, x).float(), False),
        (lambda m, x: x / (x.square().mean(-1, keepdim=True).sqrt() + m.eps) * m.weight, False),
        (lambda m, x: (1 + m.weight) * plain(m, x), False),
        (lambda m, x: m.nothing(x), False),
        (lambda m, x: (plain(m, x), x), False),
        (lambda m, x: None, False),
        (lambda m, x: nn.functional.rms_norm(x.unflatten(-1, (2, 4)), (4,), eps=m.eps).flatten(-2) * m.weight, False),
        (lambda m, x: x[:, :4], False),
    ],
)
def test_a_class_is_taken_by_what_it_computes(compute: Any, is_one: bool) -> None:
    model = nn.Sequential(Scaled(compute))
    fused.fuse(model)
    assert isinstance(model[0], fused.Fused) == is_one


def test_what_has_more_than_a_weight_is_left_alone() -> None:
    model = nn.Sequential(nn.LayerNorm(8), nn.LayerNorm(8, bias=False), nn.Linear(8, 8), nn.Embedding(8, 8))
    model.append(Scaled(plain))
    model[-1].register_parameter("bias", nn.Parameter(torch.ones(8)))
    fused.fuse(model)
    assert not changed(model)


@pytest.mark.parametrize(("kind", "is_one"), [
    (NewGELUActivation, True), (FastGELUActivation, True), (GELUActivation, False), (QuickGELUActivation, False),
])  # fmt: skip
def test_tanh_gelus_are_taken_and_others_are_not(kind: type[nn.Module], is_one: bool) -> None:
    model, x = nn.Sequential(kind()), torch.linspace(-6, 6, 101)
    wanted = model(x)
    fused.fuse(model)
    assert isinstance(model[0], fused.Fused) == is_one and type(model[0]).__name__ == kind.__name__
    torch.testing.assert_close(model(x), wanted, rtol=1e-5, atol=1e-6)


def test_another_type_of_number_than_the_weights_is_computed_as_it_is_written() -> None:
    model = nn.Sequential(Scaled(plain)).to(torch.bfloat16)
    x = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))
    wanted = model(x)
    fused.fuse(model)
    assert isinstance(model[0], fused.Fused) and torch.equal(model(x), wanted)


def test_a_gate_is_left_to_what_is_written() -> None:
    model = nn.Sequential(Gated(plain))
    x, gate = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(0))
    wanted = model[0](x, gate), model[0](x, gate=gate), model[0](x)
    fused.fuse(model)
    assert isinstance(model[0], fused.Fused)
    for found, each in zip((model[0](x, gate), model[0](x, gate=gate), model[0](x)), wanted, strict=True):
        torch.testing.assert_close(found, each)


def test_a_fused_model_can_be_pickled(tmp_path: Path) -> None:
    model = read(family_llm(tmp_path, "flan_t5"), "flan_t5")
    fused.fuse(model)
    again = pickle.loads(pickle.dumps(model))
    assert changed(again) == changed(model) and all(map(torch.equal, answer(again), answer(model)))


class Operations(TorchDispatchMode):
    """Counts what is computed, views left out."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += not func.is_view
        return func(*args, **(kwargs or {}))


def test_a_towers_llm_is_fused(tmp_path: Path) -> None:
    tower = load_language(LanguageConfig(name=str(family_llm(tmp_path, "flan_t5"))))
    assert changed(tower.model) == {fused.FusedRMSNorm: NORMS["flan_t5"], fused.FusedGELU: GELUS["flan_t5"]}
    with Operations() as few:
        answer(tower.model)
    with fused.as_written(tower.model), Operations() as many:
        answer(tower.model)
    assert few.count < many.count
