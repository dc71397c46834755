"""A frozen LLM in 8 or 4 bit: the adapter in front of it is trained, saved and loaded as in front of the whole one."""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from qformer import loading, weights
from qformer.backbones.language import same_language
from qformer.backbones.language_loading import load_language, quantization_values
from qformer.config import LanguageConfig, RunConfig
from qformer.errors import ConfigError
from qformer.sample import Slot, Text
from qformer.text import Rendered
from qformer.vlm import VLM
from tests import world
from tests.families import family_llm
from tests.published import tiny_published

EXAMPLES = [("what colour is it", "it is red indeed"), ("how many?", "three"), ("is there a bird in the picture", "no")]
EIGHT: dict[str, dict[str, Any]] = {
    "optimum.quanto": {"quant_method": "quanto", "weights": "int8"},
    "bitsandbytes": {"load_in_8bit": True},
    "torchao": {
        "quant_method": "torchao",
        "quant_type": {"default": {"_type": "Int8WeightOnlyConfig", "_version": 2, "_data": {}}},
    },
}
FOUR: dict[str, dict[str, Any]] = {"bitsandbytes": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}}
GPU_ONLY: dict[str, dict[str, Any]] = {"eetq": {"quant_method": "eetq"}, "hqq": {"quant_method": "hqq", "nbits": 4}}
"""What transformers calls each method's values, by the module it needs."""


def needs(module: str) -> None:
    """Skip where an optional backend is not installed."""
    if importlib.util.find_spec(module.partition(".")[0]) is None or importlib.util.find_spec(module) is None:
        pytest.skip(f"{module} is not installed")


@pytest.fixture(scope="module")
def towers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("towers")


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return family_llm(tmp_path_factory.mktemp("quantised") / "llama", "llama")


def settings_of(towers: Path, folder: Path, llm: Path, values: dict[str, Any] | None) -> RunConfig:
    settings = world.settings(towers, folder, folder / "run", f"language.name={llm}")
    return replace(settings, language=replace(settings.language, quantization=values))


def adapter_gradient(vlm: VLM) -> Tensor:
    """The gradient of the loss on three rows, all adapter parameters in one."""
    vlm.train()
    joiner = vlm.joiner()
    longest = max(len(joiner.read_ids(instruction)) for instruction, _ in EXAMPLES)
    ids, mask = torch.zeros(3, longest, dtype=torch.long), torch.zeros(3, longest, dtype=torch.bool)
    rows = []
    for number, (instruction, target) in enumerate(EXAMPLES):
        read = joiner.read_ids(instruction)
        ids[number, : len(read)], mask[number, : len(read)] = torch.tensor(read), True
        rows.append(joiner.row(Rendered(instruction, target), [number], answered=True))
    pixels = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(2))
    sums, counts = vlm.language.log_likelihood(vlm.soft_prompts(pixels, ids, mask), rows)
    (-sums.sum() / counts.sum()).backward()
    return torch.cat([parameter.grad.flatten() for parameter in vlm.trainable().values() if parameter.grad is not None])


def cosine(towers: Path, folder: Path, llm: Path, values: dict[str, Any]) -> tuple[float, VLM, VLM]:
    """Of the adapter's gradients in front of the whole and the quantised LLM; both models."""
    whole = loading.build(settings_of(towers, folder, llm, None), report=str)
    packed = loading.build(settings_of(towers, folder, llm, values), report=str)
    assert packed.language.fingerprint().shape == whole.language.fingerprint().shape
    assert same_language(packed.language.fingerprint(), whole.language.fingerprint())
    pairs = zip(whole.connector.parameters(), packed.connector.parameters(), strict=True)
    assert all(torch.equal(one, other) and other.dtype == torch.float32 for one, other in pairs)
    found = torch.cosine_similarity(adapter_gradient(whole), adapter_gradient(packed), dim=0)
    return float(found), whole, packed


@pytest.mark.filterwarnings("default")  # backends warn of types that they cast to
@pytest.mark.parametrize(("bits", "module"), [*((8, module) for module in EIGHT), *((4, module) for module in FOUR)])
def test_the_adapter_learns_in_front_of_a_quantised_llm_as_in_front_of_the_whole(
    towers: Path, tmp_path: Path, llm: Path, bits: int, module: str, record_property: Any
) -> None:
    needs(module)
    values = (EIGHT if bits == 8 else FOUR)[module]
    found, whole, packed = cosine(towers, tmp_path, llm, values)
    record_property(f"cosine_{bits}_bit_{module}", found)
    plain, kept = (each.language.model.model.layers[0].mlp.up_proj for each in (whole, packed))
    assert (type(kept), type(kept.weight)) != (type(plain), type(plain.weight))  # it is quantised indeed
    assert not any(name.startswith(("language", "vision")) for name in packed.trainable())
    assert found >= (0.95 if bits == 8 else 0.5)


def test_four_bits_give_a_gradient_after_they_have_answered(llm: Path) -> None:
    """Where a CPU has bfloat16 products of its own, bitsandbytes packs weights anew for them, and would give none."""
    needs("bitsandbytes")
    language = load_language(LanguageConfig(name=str(llm), quantization=FOUR["bitsandbytes"]))
    packed = [module for module in language.model.modules() if hasattr(module, "support_avx512bf16_for_cpu")]
    assert not any(module.support_avx512bf16_for_cpu for module in packed)
    rows = [(Slot(0), Text((5, 6)), Text((7, 2), trained=True))]
    soft = torch.randn(1, 4, language.width, generator=torch.Generator().manual_seed(1))
    language.rank(soft, [rows[0][:2]], [["yes", "no"]])
    gradients = []
    for _ in range(2):
        given = soft.clone().requires_grad_()
        language.log_likelihood(given, rows)[0].sum().backward()
        assert given.grad is not None
        gradients.append(given.grad)
        language.generate(soft, [rows[0][:2]], max_new_tokens=2)
    assert torch.equal(*gradients) and gradients[0].norm() > 0


@pytest.mark.parametrize(("given", "computed"), [({}, "bfloat16"), ({"bnb_4bit_compute_dtype": "float16"}, "float16")])
def test_four_bits_are_computed_in_the_llms_type_where_no_other_is_named(
    llm: Path, given: dict[str, str], computed: str
) -> None:
    needs("bitsandbytes")
    settings = LanguageConfig(name=str(llm), dtype="bfloat16", quantization={**FOUR["bitsandbytes"], **given})
    made = load_language(settings).model.config.quantization_config
    assert made.bnb_4bit_compute_dtype == getattr(torch, computed)
    assert settings.quantization == {**FOUR["bitsandbytes"], **given}


@pytest.mark.gpu
@pytest.mark.parametrize("module", GPU_ONLY)
def test_the_adapter_learns_in_front_of_a_quantised_llm_on_a_gpu(
    towers: Path, tmp_path: Path, llm: Path, module: str
) -> None:
    needs(module)
    assert cosine(towers, tmp_path, llm, GPU_ONLY[module])[0] >= 0.5


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("module", EIGHT)
def test_what_is_saved_does_not_depend_on_the_llms_precision(
    towers: Path, tmp_path: Path, llm: Path, module: str
) -> None:
    needs(module)
    packed = loading.build(settings_of(towers, tmp_path, llm, EIGHT[module]), report=str).eval()
    packed.save(tmp_path / "adapter")
    tensors = weights.load_tensors(tmp_path / "adapter" / "adapter.safetensors")
    whole = loading.load(tmp_path / "adapter", quantization={})
    assert whole.settings.language.quantization is None
    kept = whole.connector.state_dict()
    assert set(tensors) == {*kept, "language.fingerprint"}
    assert all(torch.equal(kept[name], packed.connector.state_dict()[name]) for name in kept)
    again = loading.load(tmp_path / "adapter")  # as it was trained
    assert again.settings.language.quantization == EIGHT[module]
    joiner = packed.joiner()
    prompts = [joiner.row(Rendered(asked), [read], answered=False) for read, (asked, _) in enumerate(EXAMPLES)]
    soft = torch.randn(3, 4, packed.language.width, generator=torch.Generator().manual_seed(1))
    answers = packed.language.generate(soft, prompts, max_new_tokens=5)
    assert answers == again.language.generate(soft, prompts, max_new_tokens=5)
    ranked = torch.tensor(packed.language.rank(soft, prompts, [["it is red", "no", "three"]] * 3))
    torch.testing.assert_close(
        torch.tensor(again.language.rank(soft, prompts, [["it is red", "no", "three"]] * 3)), ranked
    )


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize(("bits", "module"), [*((8, module) for module in EIGHT), *((4, module) for module in FOUR)])
def test_the_llm_inside_a_published_model_is_quantised(tmp_path: Path, bits: int, module: str) -> None:
    needs(module)
    values = (EIGHT if bits == 8 else FOUR)[module]
    source = tiny_published(tmp_path, "llama")
    whole, packed = loading.load(source, report=str), loading.load(source, quantization=values, report=str)
    plain, kept = (each.language.model.model.layers[0].mlp.up_proj for each in (whole, packed))
    assert (type(kept), type(kept.weight)) != (type(plain), type(plain.weight))
    rows = [(Slot(0), Text((5, 6)), Text((7, 2), trained=True))]
    soft = torch.randn(1, 4, whole.language.width, generator=torch.Generator().manual_seed(1))
    gradients = []
    for model in (whole, packed):
        given = soft.clone().requires_grad_()
        model.language.log_likelihood(given, rows)[0].sum().backward()
        gradients.append(given.grad.flatten())
    assert torch.cosine_similarity(*gradients, dim=0) >= (0.95 if bits == 8 else 0.5)
    with pytest.raises(ConfigError, match=r"no place for .* \(a quantised LLM cannot be exported\)"):
        packed.export_transformers(tmp_path / "out")


def test_a_backend_that_is_not_installed_is_named_with_what_to_install(
    llm: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers.quantizers import quantizer_quanto

    monkeypatch.setattr(quantizer_quanto, "is_optimum_quanto_available", lambda: False)
    with pytest.raises(
        ConfigError, match=r"which cannot be had here \(.*pip install optimum-quanto.*; install what is"
    ):
        load_language(LanguageConfig(name=str(llm), quantization=EIGHT["optimum.quanto"]))


def test_a_quantisation_that_cannot_be_is_refused(llm: Path, tmp_path: Path) -> None:
    for values, said in (
        ({"quant_method": "tiny"}, "Unknown quantization type, got tiny"),
        ({"weights": "int8"}, "no `quant_method`"),
        ({"quant_method": "quanto", "weights": "int3"}, "Only support weights in"),
    ):
        with pytest.raises(ConfigError, match=rf"language\.quantization: .* cannot be had here .*{said}"):
            load_language(LanguageConfig(name=str(llm), quantization=values))
    with pytest.raises(ConfigError, match=r"language\.pretrained is false; quantise weights that are read"):
        load_language(LanguageConfig(name=str(llm), pretrained=False, quantization=EIGHT["bitsandbytes"]))
    with pytest.raises(ConfigError, match="quantization is 'int8'; it takes one of transformers' quantisation configs"):
        loading.load(tmp_path, quantization="int8")


def test_a_config_of_transformers_is_taken_as_its_values() -> None:
    from transformers import QuantoConfig

    values = quantization_values(QuantoConfig(weights="int4"))
    assert values is not None
    assert (values["quant_method"], values["weights"]) == ("quanto", "int4")
    assert quantization_values({}) is None


def test_a_type_of_products_that_nobody_named_is_not_among_a_configs_values() -> None:
    from transformers import BitsAndBytesConfig

    plain = quantization_values(BitsAndBytesConfig(load_in_4bit=True))
    named = quantization_values(BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float16))
    assert plain is not None and plain["load_in_4bit"] and "bnb_4bit_compute_dtype" not in plain
    assert named is not None and named["bnb_4bit_compute_dtype"] == "float16"
