"""Tiny published models: transformers' InstructBLIP and BLIP-2 with every parameter redrawn, with their processors."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoTokenizer,
    Blip2Config,
    Blip2ForConditionalGeneration,
    BlipImageProcessorPil,
    InstructBlipConfig,
    InstructBlipForConditionalGeneration,
    InstructBlipProcessor,
    PreTrainedModel,
)

from tests.tiny import redraw, tiny_bert, tiny_llm

VISION = {
    "hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 32,
    "patch_size": 8, "initializer_range": 0.02,
}  # fmt: skip
QFORMER = {
    "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 64,
    "max_position_embeddings": 40, "encoder_hidden_size": 24,
}  # fmt: skip
QUERIES = 4


def tiny_published(folder: Path, family: str, *, kind: str = "instructblip", seed: int = 0, **text: Any) -> Path:
    """A random InstructBLIP or BLIP-2 around the tiny LLM of a family, saved as transformers does; the directory.

    `text` changes the LLM's config; `untied=True` gives T5 an output layer of its own.
    """
    untied = text.pop("untied", False)
    directory = folder / f"{kind}-{family}{'-untied' * untied}{'-'.join(map(str, text.values()))}"
    if directory.exists():
        return directory
    llm, bert = tiny_llm(folder / f"llm-{family}", family), tiny_bert(folder / "bert")
    tokenizer, reader = AutoTokenizer.from_pretrained(llm), AutoTokenizer.from_pretrained(bert)
    tokenizer.add_tokens(["<image>"], special_tokens=True)
    config = AutoConfig.from_pretrained(llm, **text)
    config.vocab_size = len(tokenizer)
    parts = {"vision_config": VISION, "text_config": config, "num_query_tokens": QUERIES}
    parts["image_token_index"] = tokenizer.convert_tokens_to_ids("<image>")
    if kind == "instructblip":
        whole = InstructBlipConfig(qformer_config={**QFORMER, "vocab_size": len(reader)}, **parts)
        model: PreTrainedModel = InstructBlipForConditionalGeneration(whole)
    else:
        model = Blip2ForConditionalGeneration(Blip2Config(qformer_config=QFORMER, **parts))
    redraw(model, seed)
    if untied:
        head = torch.nn.Linear(config.d_model, config.vocab_size, bias=False)
        redraw(head, seed + 1)
        model.language_model.lm_head = head
        model.language_model.config.tie_word_embeddings = model.config.text_config.tie_word_embeddings = False
    model.save_pretrained(directory)
    pictures = BlipImageProcessorPil(size={"height": 32, "width": 32})
    if kind == "instructblip":
        InstructBlipProcessor(pictures, tokenizer, reader, num_query_tokens=QUERIES).save_pretrained(directory)
    else:
        tokenizer.save_pretrained(directory)
        pictures.save_pretrained(directory)
    return directory


def put_in_cache(hub: Path, directory: Path, name: str) -> str:
    """A copy of a directory in a hub cache, laid out as the hub's client does; its id."""
    home = hub / f"models--{name.replace('/', '--')}"
    (home / "refs").mkdir(parents=True)
    (home / "refs" / "main").write_text("a" * 40)
    shutil.copytree(directory, home / "snapshots" / ("a" * 40))
    return name
