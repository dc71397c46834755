"""Adapters written in the forms of others: a whole model of transformers, a .pth file of LAVIS."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from qformer import weights
from qformer.checkpoints import BERT_WORDS, PROJECTIONS, Form, renamed_for
from qformer.errors import ConfigError
from qformer.nn.qformer import QFormerSize
from qformer.untokenized import MissingTokenizer

if TYPE_CHECKING:
    from qformer.vlm import VLM

IMAGE_TOKEN = "<image>"
LAVIS_FILE = "adapter.pth"
LAVIS_EPS = 1e-5
FRAMES = "qformer.frame_embedding"
"""The tensor of a connector that tells frames apart."""
SHARD = "5GB"

VISION_FIELDS = (
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "image_size", "patch_size",
    "hidden_act", "layer_norm_eps", "attention_dropout", "qkv_bias",
)  # fmt: skip
"""What transformers' config says of an InstructBLIP's encoder."""

EVA_TO_TRANSFORMERS = (
    ("cls_token", "embeddings.class_embedding"),
    ("pos_embed", "embeddings.position_embedding"),
    ("patch_embed.proj.", "embeddings.patch_embedding."),
    ("blocks.", "encoder.layers."),
    (".norm1.", ".layer_norm1."),
    (".norm2.", ".layer_norm2."),
    (".attn.proj.", ".self_attn.projection."),
    (".attn.qkv.", ".self_attn.qkv."),
)
"""What timm and LAVIS call the parts of EVA-CLIP-g, and what transformers does."""


def to_lavis(
    tensors: Mapping[str, Tensor], size: QFormerSize, projection: str, eps: float, file: Path
) -> tuple[str, ...]:
    """Write an adapter as LAVIS' trimmed files are: `{"model": …}`, without towers.

    Args:
        tensors: of the connector, by its names.
        size: of its Q-Former.
        projection: LAVIS' name of the projection: t5_proj, llm_proj or opt_proj.
        eps: of the norm behind the encoder.
        file: what is written; it appears whole or not at all.

    Returns:
        What LAVIS will do otherwise, in sentences.

    Raises:
        ConfigError: LAVIS has no such projection, or cannot have as many heads; or the file is there already.
    """
    if projection not in PROJECTIONS:
        raise ConfigError(f"export: '{projection}' is no projection of LAVIS; it has {', '.join(PROJECTIONS)}.")
    if file.exists():
        raise ConfigError(f"export: {file} is there already; give another directory, or remove it.")
    notes = []
    tensors = _without_frames(tensors, "LAVIS")
    renamed = renamed_for(tensors, "lavis", projection)
    words = "Qformer.bert.embeddings.word_embeddings.weight"
    if size.instruction and size.vocabulary == BERT_WORDS:
        renamed[words] = torch.cat([renamed[words], renamed[words].new_zeros(1, size.hidden)])
        notes.append(f"LAVIS' table of words has a row more, for [DEC]; it was added to {words} as zeros.")
    if eps != LAVIS_EPS:
        notes.append(f"LAVIS norms image tokens with epsilon {LAVIS_EPS:g}, and the adapter was trained with {eps:g}.")
    file.parent.mkdir(parents=True, exist_ok=True)
    with weights.whole_file(file) as work:
        torch.save({"model": {name: tensor.contiguous().clone() for name, tensor in renamed.items()}}, work)
    return tuple(notes)


def to_transformers(model: VLM, directory: Path) -> tuple[str, ...]:
    """Write a whole model's files: `InstructBlipForConditionalGeneration`, or `Blip2…` where no instruction is read.

    Returns:
        What transformers will do otherwise, in sentences.

    Raises:
        ConfigError: transformers cannot express the model; says why.
    """
    import transformers
    from huggingface_hub import save_torch_state_dict

    notes: list[str] = []
    form: Form = "instructblip" if model.connector.size.instruction else "blip-2"
    names = "InstructBlip" if form == "instructblip" else "Blip2"
    _refuse_rows(model)
    adapter = _without_frames(model.connector.state_dict(), "transformers' InstructBLIP")
    vision_config, vision = _vision(model)
    tokenizer, image = _tokenizer(model)
    text_config, language = _language(model, image)
    eps = model.connector.norm.eps
    more: dict[str, Any] = {}
    if eps != vision_config["layer_norm_eps"]:
        more["qformer_norm_eps"] = eps
        notes.append(
            f"transformers norms image tokens with epsilon {vision_config['layer_norm_eps']:g}, as its encoder, and "
            f"the adapter was trained with {eps:g}."
        )
    size = model.connector.size
    config = getattr(transformers, f"{names}Config")(
        vision_config=vision_config,
        qformer_config=_qformer_config(size),
        text_config=text_config,
        num_query_tokens=size.queries,
        image_token_index=image,
    )
    state = {
        **{f"vision_model.{name}": tensor for name, tensor in vision.items()},
        **renamed_for(adapter, form),
        **{f"language_model.{name}": tensor for name, tensor in language.items()},
    }
    _refuse_strangers(getattr(transformers, f"{names}ForConditionalGeneration"), config, state)
    held = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    save_torch_state_dict(held, directory, max_shard_size=SHARD, metadata={"format": "pt"})
    config.architectures = [f"{names}ForConditionalGeneration"]
    config.save_pretrained(directory)
    if more:
        file = directory / "config.json"
        file.write_text(
            json.dumps({**json.loads(file.read_text(encoding="utf-8")), **more}, indent=2), encoding="utf-8"
        )
    pictures = _image_processor(model)
    if tokenizer is None:
        pictures.save_pretrained(directory)
        notes.append("there is no processor, since the LLM's or the Q-Former's tokenizer is missing.")
    elif form == "instructblip":
        processor = transformers.InstructBlipProcessor(
            pictures, tokenizer, model.instruction_tokenizer, num_query_tokens=size.queries
        )
        processor.save_pretrained(directory)
    else:
        transformers.Blip2Processor(pictures, tokenizer, num_query_tokens=size.queries).save_pretrained(directory)
    if model.language.profile.stop:
        notes.append(f"transformers knows nothing of the stop strings {list(model.language.profile.stop)}.")
    return tuple(notes)


def _without_frames(tensors: Mapping[str, Tensor], other: str) -> dict[str, Tensor]:
    """Tensors without a frame embedding, which may be left out as long as it is what it started as: zero."""
    if FRAMES in tensors and bool(tensors[FRAMES].any()):
        raise ConfigError(
            f"{other} cannot express this model: it has no embedding of frames, and one of {len(tensors[FRAMES]) + 1} "
            f"was trained here (qformer.frames); export an adapter that was trained without."
        )
    return {name: tensor for name, tensor in tensors.items() if name != FRAMES}


def _refuse(reason: str) -> None:
    raise ConfigError(f"transformers' InstructBLIP cannot express this model: {reason}.")


def _refuse_rows(model: VLM) -> None:
    profile, transform = model.language.profile, model.settings.vision.eval_transform
    if profile.layout != "plain" or not profile.slots_first:
        _refuse("its processor puts soft tokens before everything, and here they stand inside the user's turn")
    if profile.decoder_opening:
        _refuse(f"it starts a decoder with one id, and the profile's decoder_opening is {profile.decoder_opening}")
    if transform.mode != "squash":
        _refuse(f"its processor squashes pictures, and vision.eval_transform.mode is '{transform.mode}'")


def _qformer_config(size: QFormerSize) -> dict[str, Any]:
    described = {
        "hidden_size": size.hidden,
        "num_hidden_layers": size.layers,
        "num_attention_heads": size.heads,
        "intermediate_size": size.intermediate,
        "cross_attention_frequency": size.cross_attention_every,
        "encoder_hidden_size": size.vision_width,
        "hidden_dropout_prob": size.dropout,
        "attention_probs_dropout_prob": size.dropout,
    }
    words = {"vocab_size": size.vocabulary, "max_position_embeddings": size.positions}
    return {**described, **words} if size.instruction else described


def _vision(model: VLM) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Config and tensors of transformers' own encoder, without the last norm."""
    tower: Any = getattr(model.vision, "model", model.vision)
    settings = model.settings.vision
    kind = type(tower).__name__
    if kind not in ("InstructBlipVisionModel", "Blip2VisionModel", "Eva"):
        _refuse(f"its encoder is an EVA-CLIP of its own, and '{settings.name}' is a {kind}")
    if settings.norm or not settings.class_token:
        _refuse("it reads every token, class token first, without the encoder's own norm (vision.norm: false)")
    size = model.vision.settings.size
    if kind != "Eva":
        if settings.block not in (None, -1, tower.config.num_hidden_layers - 1):
            _refuse(f"it reads the encoder's last block, and vision.block is {settings.block}")
        if tower.config.image_size != size:
            _refuse(f"its encoder takes {tower.config.image_size} pixels a side, and vision.image_size is {size}")
        described = {name: getattr(tower.config, name) for name in VISION_FIELDS}
        return described, {name: tensor for name, tensor in tower.state_dict().items() if "post_layernorm" not in name}
    return _eva(tower, size)


def _eva(tower: Any, size: int) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Timm's EVA-CLIP under transformers' names; the key's bias, which it has none of, is zero there."""
    state = {name: tensor for name, tensor in tower.state_dict().items() if not name.startswith(("norm.", "fc_norm."))}
    first = tower.blocks[0]
    plain = {"cls_token", "pos_embed", "patch_embed.proj.weight", "blocks.0.attn.q_bias", "blocks.0.mlp.fc1.weight"}
    if not plain <= state.keys() or getattr(first, "gamma_1", None) is not None or tower.rope is not None:
        _refuse("its encoder is EVA-CLIP-g (absolute positions, no layer scale), and this EVA is another one")
    renamed: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if name.endswith(("q_bias", "v_bias", "k_bias")):
            continue
        for theirs, ours in EVA_TO_TRANSFORMERS:
            name = name.replace(theirs, ours) if not theirs.startswith("blocks") or name.startswith(theirs) else name
        renamed[name] = tensor
    for number, block in enumerate(tower.blocks):
        bias = torch.cat([block.attn.q_bias, torch.zeros_like(block.attn.q_bias), block.attn.v_bias])
        renamed[f"encoder.layers.{number}.self_attn.qkv.bias"] = bias
    described = {
        "hidden_size": tower.num_features,
        "intermediate_size": first.mlp.fc1.out_features,
        "num_hidden_layers": len(tower.blocks),
        "num_attention_heads": first.attn.num_heads,
        "image_size": size,
        "patch_size": tower.patch_embed.patch_size[0],
        "hidden_act": "gelu",
        "layer_norm_eps": first.norm1.eps,
        "qkv_bias": True,
    }
    return described, renamed


def _tokenizer(model: VLM) -> tuple[Any | None, int]:
    """A copy of the LLM's tokenizer that makes the adapter's rows and knows the image mark, and that mark's id."""
    language, reader = model.language, model.instruction_tokenizer
    if isinstance(language.tokenizer, MissingTokenizer) or isinstance(reader, MissingTokenizer):
        return None, int(language.model.get_input_embeddings().weight.shape[0])
    tokenizer, profile = copy.deepcopy(language.tokenizer), language.profile
    words = tuple(tokenizer("a", add_special_tokens=False).input_ids)
    wanted = (*profile.opening, *words, *profile.closing)
    if tuple(tokenizer("a").input_ids) != wanted:
        from tokenizers.processors import TemplateProcessing

        opening, closing = ([_token(tokenizer, each) for each in ids] for ids in (profile.opening, profile.closing))
        marks = dict(zip([*opening, *closing], [*profile.opening, *profile.closing], strict=True))
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single=" ".join([*opening, "$A", *closing]), special_tokens=list(marks.items())
        )
        if len(profile.opening) == 1:
            tokenizer.bos_token = _token(tokenizer, profile.opening[0])
    if tuple(tokenizer("a").input_ids) != wanted:
        _refuse(f"its tokenizer makes {tokenizer('a').input_ids} of a word, and the adapter's rows are {list(wanted)}")
    if IMAGE_TOKEN not in tokenizer.get_vocab():
        tokenizer.add_tokens([IMAGE_TOKEN], special_tokens=True)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = _token(tokenizer, profile.pad)
    return tokenizer, int(tokenizer.get_vocab()[IMAGE_TOKEN])


def _token(tokenizer: Any, number: int) -> str:
    return str(tokenizer.convert_ids_to_tokens(number))


def _language(model: VLM, image: int) -> tuple[Any, dict[str, Tensor]]:
    """The LLM's config and tensors, with a row for the image mark where there is none.

    A new row repeats that of the padding, so that it is never the likeliest word.
    """
    language = model.language
    config = copy.deepcopy(language.model.config)
    if config.hidden_size != language.width:
        _refuse(
            f"it projects to the LLM's hidden size {config.hidden_size}, and its embeddings are {language.width} wide"
        )
    state: dict[str, Tensor] = {}
    held: set[tuple[int, torch.Size]] = set()
    for name, tensor in language.model.state_dict().items():  # tables under several names are stored once
        if (tensor.data_ptr(), tensor.shape) not in held:
            state[name] = tensor
        held.add((tensor.data_ptr(), tensor.shape))
    table, head = language.model.get_input_embeddings().weight, language.model.get_output_embeddings()
    rows, tied = table.shape[0], head is not None and head.weight is table
    if image >= rows:
        for name, tensor in state.items():
            if tensor.data_ptr() in _tables(language.model):
                repeated = tensor[language.profile.pad % rows][None].expand(image + 1 - rows, *tensor.shape[1:])
                state[name] = torch.cat([tensor, repeated])
        config.vocab_size = image + 1
    config.tie_word_embeddings = tied
    ends = language._ends
    config.eos_token_id = ends[0] if len(ends) == 1 else ends
    config.pad_token_id = language.profile.pad
    return config, state


def _tables(model: Any) -> set[int]:
    """Where the tensors with a row per word are held."""
    head = model.get_output_embeddings()
    held = [model.get_input_embeddings().weight, getattr(head, "weight", None), getattr(head, "bias", None)]
    return {tensor.data_ptr() for tensor in held if tensor is not None}


def _refuse_strangers(kind: Any, config: Any, state: Mapping[str, Tensor]) -> None:
    with torch.device("meta"):
        expected = kind(config).state_dict()
    # Tables that are tied are stored once; all others must be there in the right shape.
    strange = [name for name, tensor in state.items() if name not in expected or expected[name].shape != tensor.shape]
    if strange:
        _refuse(f"it has no place for {weights.shortened(strange)} (a quantised LLM cannot be exported)")


def _image_processor(model: VLM) -> Any:
    from transformers import BlipImageProcessorPil

    settings = model.vision.settings
    return BlipImageProcessorPil(
        size={"height": settings.size, "width": settings.size},
        image_mean=list(settings.mean),
        image_std=list(settings.std),
        resample={"nearest": 0, "bilinear": 2, "bicubic": 3}[settings.interpolation],
    )
