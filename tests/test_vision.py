"""The vision tower: any timm or transformers encoder as (B, P, V) tokens, frozen, or refused with a sentence."""

import json

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    BertConfig,
    CLIPVisionConfig,
    CLIPVisionModel,
    Dinov2Config,
    Dinov2Model,
    MobileViTConfig,
    MobileViTModel,
    ResNetConfig,
    ResNetModel,
    Siglip2VisionConfig,
    Siglip2VisionModel,
    SiglipVisionConfig,
    SiglipVisionModel,
    ViTMAEConfig,
    ViTMAEModel,
)

from qformer.backbones.vision import check_vision, load_vision, vision_settings
from qformer.config import VisionConfig
from qformer.errors import ConfigError
from tests.tiny import redraw, tiny_vision

NETWORKS = {
    "vit_tiny_patch16_224": (197, 192),
    "resnet10t": (36, 512),
    "tf_efficientnet_lite0": (49, 1280),
    "swin_s3_tiny_224": (49, 768),
}


def tower(name, **settings):
    return load_vision(VisionConfig(name=str(name), pretrained=settings.pop("pretrained", False), **settings))


@pytest.mark.parametrize("name", NETWORKS)
def test_every_kind_of_timm_network_gives_tokens(name):
    frozen = tower(name)
    with torch.no_grad():
        values, mask, grid, pictures = frozen(torch.randn(2, 3, frozen.settings.size, frozen.settings.size))
    places, width = NETWORKS[name]
    assert values.shape == (2, places, width) and frozen.width == width and mask is None and pictures is None
    assert grid[0] * grid[1] in (places, places - 1)


def test_a_tower_is_frozen_in_weights_and_in_mode():
    frozen = tower("resnet10t")
    frozen.train()
    assert not any(parameter.requires_grad for parameter in frozen.parameters())
    assert not any(module.training for module in frozen.modules())


def test_class_token_is_kept_or_dropped():
    torch.manual_seed(0)
    with_class = tower("vit_tiny_patch16_224", class_token=True)
    without = tower("vit_tiny_patch16_224", class_token=False)
    without.model.load_state_dict(with_class.model.state_dict())
    pixels = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        assert torch.equal(with_class(pixels).values[:, 1:], without(pixels).values)


def test_a_block_without_the_final_norm_is_that_blocks_output():
    frozen = tower("vit_tiny_patch16_224", block=-2, norm=False)
    whole = timm.create_model("vit_tiny_patch16_224", num_classes=0).eval()
    whole.load_state_dict(frozen.model.state_dict(), strict=False)  # the last block stays random: it must not count
    seen = []
    whole.blocks[-2].register_forward_hook(lambda module, given, output: seen.append(output))
    with torch.no_grad():
        pixels = torch.randn(1, 3, 224, 224)
        values = frozen(pixels).values
        whole(pixels)
    assert torch.allclose(values, seen[0], atol=1e-5)


def test_an_earlier_stage_of_a_feature_map_network():
    frozen = tower("resnet10t", block=-2)
    with torch.no_grad():
        values = frozen(torch.randn(1, 3, 224, 224)).values
    assert values.shape == (1, 196, frozen.width) and frozen.width == 256


def test_the_models_own_pictures_unless_the_settings_say_otherwise():
    own = vision_settings(VisionConfig(name="eva_giant_patch14_clip_224"))
    assert own.size == 224 and own.interpolation == "bicubic"
    assert own.mean == pytest.approx((0.48145466, 0.4578275, 0.40821073))
    changed = vision_settings(VisionConfig(name="eva_giant_patch14_clip_224", image_size=364, std=[1, 1, 1]))
    assert changed.size == 364 and changed.std == (1, 1, 1) and changed.mean == own.mean


def test_another_size_is_taken():
    frozen = tower("vit_tiny_patch16_224", image_size=96)
    with torch.no_grad():
        assert frozen(torch.randn(1, 3, 96, 96)).values.shape == (1, 37, 192)


def test_local_weights_of_a_timm_network(tmp_path):
    source = timm.create_model("resnet10t", num_classes=7)
    save_file({name: value.contiguous() for name, value in source.state_dict().items()}, tmp_path / "model.safetensors")
    torch.save({"state_dict": source.state_dict()}, tmp_path / "model.pth")
    for checkpoint in (tmp_path, tmp_path / "model.safetensors", tmp_path / "model.pth"):
        frozen = tower("resnet10t", checkpoint=str(checkpoint), pretrained=True)
        assert torch.equal(frozen.model.conv1[0].weight, source.conv1[0].weight)


def make(kind, folder):
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}
    models = {
        "clip": lambda: CLIPVisionModel(CLIPVisionConfig(**sizes, image_size=32, patch_size=8)),
        "siglip": lambda: SiglipVisionModel(SiglipVisionConfig(**sizes, image_size=32, patch_size=8)),
        "dinov2": lambda: Dinov2Model(Dinov2Config(**sizes, image_size=32, patch_size=8)),
        "resnet": lambda: ResNetModel(
            ResNetConfig(embedding_size=8, hidden_sizes=[8, 32], depths=[1, 1], layer_type="basic")
        ),
    }
    torch.manual_seed(0)
    model = models[kind]()
    redraw(model, 0)
    model.save_pretrained(folder)
    return model.eval()


@pytest.mark.parametrize(("kind", "tokens"), [("clip", 17), ("siglip", 16), ("dinov2", 17), ("resnet", 16)])
def test_transformers_encoders_give_their_last_hidden_state(tmp_path, kind, tokens):
    model = make(kind, tmp_path)
    frozen = tower(tmp_path, pretrained=True)
    pixels = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        values = frozen(pixels).values
        own = model(pixel_values=pixels).last_hidden_state
    own = own.flatten(2).transpose(1, 2) if own.ndim == 4 else own
    assert values.shape == (2, tokens, 32) == (2, tokens, frozen.width)
    assert torch.allclose(values, own, atol=1e-5)


def test_a_block_of_a_transformers_encoder_and_its_class_token(tmp_path):
    model = make("clip", tmp_path)
    frozen = tower(tmp_path, pretrained=True, block=-2, norm=False, class_token=False)
    pixels = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        states = model(pixel_values=pixels, output_hidden_states=True).hidden_states
        assert torch.allclose(frozen(pixels).values, states[-2][:, 1:], atol=1e-5)


def test_precision_is_a_setting(tmp_path):
    tiny_vision(tmp_path)
    frozen = tower(tmp_path, pretrained=True, dtype="float64")
    assert frozen(torch.randn(1, 3, 32, 32)).values.dtype == torch.float64


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"name": "vit_tiny_patch16_225"}, r"no timm model and no hub id\. Did you mean 'vit_tiny_patch16_224'\?"),
        ({"name": "resnet10t", "dtype": "float8"}, "vision.dtype is 'float8'; it takes float32"),
        ({"name": "resnet10t", "checkpoint": "/nowhere.safetensors"}, "there is no file /nowhere.safetensors"),
        ({"name": "some/hub-id"}, "no model can be read from there"),
        ({"name": "resnet10t.nobody"}, "timm makes no model of it"),
        ({"name": "resnet10t", "mean": [0.5]}, "vision.mean is .* three numbers"),
        ({"name": "resnet10t", "std": [1.0, 0.0, 1.0]}, "vision.std is .* above 0"),
        ({"name": "resnet10t", "image_size": 0}, "vision.image_size is 0"),
        ({"name": "some/hub-id", "checkpoint": "w.pth"}, "leave vision.checkpoint out"),
    ],
)
def test_what_cannot_work_is_refused_before_weights_are_read(settings, sentence):
    with pytest.raises(ConfigError, match=sentence):
        load_vision(VisionConfig(**settings))


@pytest.mark.parametrize(("size", "near"), [(60, "take 56 or 64"), (5, "take 8")])
def test_a_size_that_patches_do_not_fill_is_refused(tmp_path, size, near):
    with pytest.raises(ConfigError, match=near):
        vision_settings(VisionConfig(name=str(tiny_vision(tmp_path)), image_size=size))


def test_a_size_that_timms_patches_do_not_fill_is_refused():
    with pytest.raises(ConfigError, match=r"16 pixels wide.*take 224 or 240"):
        tower("vit_tiny_patch16_224", image_size=230)


def test_a_revision_of_a_timm_name_goes_with_a_hub_id():
    with pytest.raises(ConfigError, match=r"vision\.revision goes with a hub id"):
        tower("resnet10t", revision="main")
    check_vision(VisionConfig(name="timm/resnet10t.c3_in1k", revision="main"))


def test_directories_that_hold_no_model_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="names no model"):
        check_vision(VisionConfig(name=str(tmp_path)))
    with pytest.raises(ConfigError, match=r"no \.safetensors or .pth file"):
        check_vision(VisionConfig(name="resnet10t", checkpoint=str(tmp_path)))
    (tmp_path / "config.json").write_text(json.dumps({"architecture": "resnet10t", "num_classes": 3}))
    check_vision(VisionConfig(name=str(tmp_path)))


def test_weights_of_another_model_are_listed(tmp_path):
    tensors = timm.create_model("resnet10t").state_dict()
    tensors["stray.weight"] = torch.zeros(1)
    save_file(dict(tensors), tmp_path / "a.safetensors")
    with pytest.raises(ConfigError, match=r"has unknown stray\.weight"):
        tower("resnet10t", checkpoint=str(tmp_path / "a.safetensors"))
    tensors.pop("stray.weight")
    tensors.pop("conv1.0.weight")
    save_file(dict(tensors), tmp_path / "b.safetensors")
    with pytest.raises(ConfigError, match=r"lacks conv1\.0\.weight"):
        tower("resnet10t", checkpoint=str(tmp_path / "b.safetensors"))
    tensors["conv1.0.weight"] = torch.zeros(2, 2)
    save_file(dict(tensors), tmp_path / "c.safetensors")
    with pytest.raises(ConfigError, match=r"other shapes for conv1\.0\.weight"):
        tower("resnet10t", checkpoint=str(tmp_path / "c.safetensors"))


@pytest.mark.parametrize("block", [12, -13])
def test_a_block_that_is_not_there_is_refused(block):
    with pytest.raises(ConfigError, match=rf"vision\.block is {block}; .* has 12 blocks: it takes -12 to 11"):
        tower("vit_tiny_patch16_224", block=block)


def test_what_lies_behind_the_block_is_not_kept():
    frozen = tower("vit_tiny_patch16_224", block=3, norm=False)
    assert len(frozen.model.blocks) == 4 and isinstance(frozen.model.norm, torch.nn.Identity)


def test_a_text_model_is_refused(tmp_path):
    BertConfig(num_hidden_layers=1).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="a model of type 'bert', which takes no pictures"):
        load_vision(VisionConfig(name=str(tmp_path)))


def test_a_config_that_is_no_json_is_refused(tmp_path):
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ConfigError, match="not valid JSON"):
        check_vision(VisionConfig(name=str(tmp_path)))


def test_transformers_weights_that_lack_a_part_are_refused(tmp_path):
    make("clip", tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    name = next(key for key in tensors if key.endswith("layers.1.mlp.fc1.weight"))
    save_file({key: value for key, value in tensors.items() if key != name}, tmp_path / "model.safetensors")
    with pytest.raises(ConfigError, match=r"its weights lack .*layers\.1\.mlp\.fc1\.weight"):
        tower(tmp_path, pretrained=True)


def test_a_stage_of_a_transformers_feature_map_network(tmp_path):
    model = make("resnet", tmp_path)
    pixels = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        states = model(pixel_values=pixels, output_hidden_states=True).hidden_states
        values = tower(tmp_path, pretrained=True, block=0)(pixels).values
    assert torch.allclose(values, states[1].flatten(2).transpose(1, 2), atol=1e-5)


def test_encoders_that_cannot_be_read_are_refused_with_the_reason(tmp_path):
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    many = Siglip2VisionModel(Siglip2VisionConfig(**sizes, patch_size=8, num_patches=16))
    hiding = ViTMAEModel(ViTMAEConfig(**sizes, image_size=32, patch_size=8))
    for name, model, sentence in (
        ("many", many, r"a Siglip2VisionModel gives no tokens of pictures alone \(.*pixel_attention_mask"),
        ("hiding", hiding, "a ViTMAEModel hides parts of a picture at random, so that its tokens are never the same"),
    ):
        model.save_pretrained(tmp_path / name)
        with pytest.raises(ConfigError, match=sentence):
            tower(tmp_path / name, pretrained=True)
    network = MobileViTModel(
        MobileViTConfig(
            hidden_sizes=[16, 24, 32],
            neck_hidden_sizes=[8, 8, 16, 16, 24, 24, 32],
            image_size=64,
            num_attention_heads=4,
        )
    )
    network.save_pretrained(tmp_path / "network")
    assert tower(tmp_path / "network", pretrained=True)(torch.randn(1, 3, 64, 64)).values.shape == (1, 4, 32)
    with pytest.raises(ConfigError, match=r"vision\.block is -2, and '.*' does not say how many blocks it has"):
        tower(tmp_path / "network", pretrained=True, block=-2)


def test_a_timm_network_of_several_maps_is_read_by_a_block():
    pixels = torch.randn(1, 3, 240, 240)
    with pytest.raises(ConfigError, match=r"which gives 2 maps of features and not one; set vision\.block"):
        tower("crossvit_tiny_240")(pixels)
    if hasattr(timm.create_model("crossvit_tiny_240"), "forward_intermediates"):  # not in the oldest release
        assert tower("crossvit_tiny_240", block=-1, norm=False)(pixels).values.ndim == 3


def test_blocks_that_timm_does_not_give_are_refused(monkeypatch):
    name = "vit_tiny_patch16_224"
    monkeypatch.delattr(type(timm.create_model(name)), "forward_intermediates")
    with pytest.raises(ConfigError, match=rf"'{name}', whose blocks this release of timm does not give one"):
        tower(name, block=-2)
