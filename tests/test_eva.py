"""EVA-CLIP-g from timm and from LAVIS' file: what transformers computes with the same weights, shrunken."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor
from transformers import Blip2ForConditionalGeneration, InstructBlipVisionConfig, InstructBlipVisionModel

import qformer
from qformer import checkpoints, exporting
from qformer.backbones import vision
from qformer.config import VisionConfig
from qformer.errors import ConfigError
from qformer.nn.qformer import QFormer, QFormerConnector, QFormerSize
from qformer.nn.tokens import Tokens
from qformer.sample import Slot, Text
from tests.tiny import redraw, tiny_llm

NAME = "eva_giant_patch14_clip_224"
SMALL = {"embed_dim": 32, "depth": 4, "num_heads": 4, "img_size": 56}
READ = VisionConfig(name=NAME, pretrained=False, block=-2, norm=False, image_size=56)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """timm makes a network of 4 blocks, 32 wide, on 56 pixels, whatever size of EVA is asked for."""
    make = timm.create_model

    def smaller(name: str, **settings: Any) -> Any:
        return make(name, **{**SMALL, **settings})

    monkeypatch.setattr(timm, "create_model", smaller)


def eva(**settings: Any) -> Any:
    model = timm.create_model(NAME, pretrained=False, num_classes=0, **settings)
    redraw(model, 3)
    return model.eval()


def lavis_file(path: Path, model: Any) -> Path:
    """The same weights as eva_vit_g.pth holds them: flat, all blocks, final norm and head."""
    tensors = {name: tensor for name, tensor in model.state_dict().items() if "k_bias" not in name}
    torch.save(tensors | {"head.weight": torch.ones(3, 32), "head.bias": torch.ones(3)}, path)
    return path


def transformers_model(tensors: dict[str, Tensor], image_size: int = 56) -> InstructBlipVisionModel:
    config = InstructBlipVisionConfig(
        hidden_size=32, intermediate_size=139, num_hidden_layers=3, num_attention_heads=4, image_size=image_size,
        patch_size=14,
    )  # fmt: skip
    model = InstructBlipVisionModel(config)
    model.post_layernorm = torch.nn.Identity()
    model.load_state_dict(tensors)
    return model.eval()


@torch.no_grad()
def test_all_blocks_but_the_last_without_a_norm_are_transformers_encoder(small: None, tmp_path: Path) -> None:
    whole = eva()
    tower = vision.load_vision(dataclasses.replace(READ, checkpoint=str(lavis_file(tmp_path / "eva_vit_g.pth", whole))))
    pixels = torch.randn(2, 3, 56, 56)
    tokens = tower(pixels)
    assert tokens.values.shape == (2, 17, 32) and tokens.grid == (4, 4)
    described, tensors = exporting._eva(tower.model, 56)
    assert described["num_hidden_layers"] == 3 and described["intermediate_size"] == 139
    theirs = transformers_model(tensors)(pixels).last_hidden_state
    torch.testing.assert_close(tokens.values, theirs, rtol=1e-4, atol=1e-4)
    # As LAVIS states it: the class token first, and what goes into the fourth block.
    seen: list[Tensor] = []
    whole.blocks[3].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    whole.forward_features(pixels)
    torch.testing.assert_close(tokens.values, seen[0], rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_a_file_without_what_is_not_read_loads_the_same(small: None, tmp_path: Path) -> None:
    file = lavis_file(tmp_path / "whole.pth", eva())
    whole = torch.load(file, weights_only=True)
    cut = {name: tensor for name, tensor in whole.items() if not name.startswith(("blocks.3.", "norm.", "head."))}
    torch.save(cut, tmp_path / "cut.pth")
    pixels = torch.randn(1, 3, 56, 56)
    towers = [
        vision.load_vision(dataclasses.replace(READ, checkpoint=str(tmp_path / n))) for n in ("whole.pth", "cut.pth")
    ]
    assert torch.equal(towers[0](pixels).values, towers[1](pixels).values)
    with pytest.raises(ConfigError, match=r"cut\.pth lacks blocks\.3"):
        vision.load_vision(dataclasses.replace(READ, block=None, norm=True, checkpoint=str(tmp_path / "cut.pth")))
    torch.save({name: tensor for name, tensor in cut.items() if "q_bias" not in name}, tmp_path / "bad.pth")
    with pytest.raises(ConfigError, match=r"bad\.pth lacks blocks\.0\.attn\.q_bias"):
        vision.load_vision(dataclasses.replace(READ, checkpoint=str(tmp_path / "bad.pth")))


@torch.no_grad()
def test_positions_of_a_file_are_interpolated_to_another_size(small: None, tmp_path: Path) -> None:
    file = str(lavis_file(tmp_path / "eva_vit_g.pth", eva()))
    tower = vision.load_vision(dataclasses.replace(READ, checkpoint=file))
    larger = vision.load_vision(dataclasses.replace(READ, checkpoint=file, image_size=84))
    pixels = torch.randn(1, 3, 84, 84)
    theirs = transformers_model(exporting._eva(tower.model, 56)[1])(pixels, interpolate_pos_encoding=True)
    torch.testing.assert_close(larger(pixels).values, theirs.last_hidden_state, rtol=1e-4, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("where", ["eva_vit_g.pth", "inside"])
def test_an_adapter_of_lavis_reads_what_its_encoder_file_holds(
    small: None, tmp_path: Path, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The two files that LAVIS' users have, an LLM's directory, and nothing else: `load` makes a model of them."""
    whole = eva(img_size=224)
    encoder = {name: tensor for name, tensor in whole.state_dict().items() if "k_bias" not in name}
    size = QFormerSize(vision_width=32, hidden=64, layers=2, heads=1, intermediate=48, queries=4, instruction=False)
    made = QFormerConnector(QFormer(size), 32)
    redraw(made, 7)
    tensors = checkpoints.renamed_for(made.state_dict(), "lavis", "t5_proj")
    if where == "inside":  # files of tuned encoders hold it beside the adapter, without the block that is not used
        held = {n: t for n, t in encoder.items() if not n.startswith(("blocks.3.", "norm.", "fc_norm.", "head."))}
        tensors |= {f"visual_encoder.{name}": tensor for name, tensor in held.items()}
    else:
        torch.save(encoder, tmp_path / where)
    torch.save({"model": tensors}, tmp_path / "blip2.pth")
    file = str(tmp_path / ("blip2.pth" if where == "inside" else where))
    monkeypatch.setitem(SMALL, "img_size", 224)
    told: list[str] = []
    model = qformer.load(
        tmp_path / "blip2.pth", vision=file, language=str(tiny_llm(tmp_path / "t5", "t5")), report=told.append
    )
    assert "unused: nothing" in told[0]
    pixels = torch.randn(1, 3, 224, 224)
    seen: list[Tensor] = []
    whole.blocks[3].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    whole.forward_features(pixels)
    torch.testing.assert_close(model.soft_prompts(pixels), made.eval()(Tokens(seen[0])), rtol=1e-4, atol=1e-4)
    model.save(tmp_path / "adapter")
    again = qformer.load(tmp_path / "adapter", report=str)
    assert torch.equal(again.soft_prompts(pixels), model.soft_prompts(pixels))
    # Both files and the LLM become one model of transformers, which writes the same ids.
    assert ["epsilon 1e-06" in note for note in model.export_transformers(tmp_path / "whole")] == [True]
    theirs = Blip2ForConditionalGeneration.from_pretrained(tmp_path / "whole").eval()
    words = [theirs.config.image_token_id] * 4 + [5, 6, *model.language.profile.closing]
    given = {"pixel_values": pixels, "input_ids": torch.tensor([words]), "max_new_tokens": 6, "do_sample": False}
    written = model.language.write(model.soft_prompts(pixels), [(Slot(0), Text((5, 6)))], max_new_tokens=6)
    assert theirs.generate(**given)[:, 1:].tolist() == written.tolist()
    assert torch.equal(qformer.load(tmp_path / "whole", report=str).soft_prompts(pixels), model.soft_prompts(pixels))
