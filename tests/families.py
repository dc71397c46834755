"""Tiny random LLMs of every family that is promised, each with its own tokenizer class, saved as ordinary checkpoints.

Sizes are chosen so that what is special in a family matters: windows shorter than the rows, caps that bite, grouped
heads, learned positions, ALiBi.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, PreTrainedTokenizerBase

from tests.tiny import WORDS, redraw

WIDTH = 32
WINDOW = 12
"""Positions that a sliding window shows: fewer than the longest row has; two blocks still pass on what is behind."""

MANY_HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 64}
CAUSAL: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", "llama", {**MANY_HEADS}),
    "mistral": ("MistralConfig", "llama", {**MANY_HEADS, "sliding_window": WINDOW}),
    "qwen2": ("Qwen2Config", "qwen2", {**MANY_HEADS}),
    "qwen3": ("Qwen3Config", "qwen2", {**MANY_HEADS, "head_dim": 16}),
    "gemma2": (
        "Gemma2Config",
        "gemma",
        {
            **MANY_HEADS, "head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": WINDOW,
            "attn_logit_softcapping": 2.0, "final_logit_softcapping": 2.0,
        },
    ),
    "gemma3": (
        "Gemma3TextConfig",
        "gemma",
        {**MANY_HEADS, "head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": WINDOW},
    ),
    "phi3": ("Phi3Config", "llama", {**MANY_HEADS, "sliding_window": WINDOW}),
    "opt": ("OPTConfig", "opt", {"num_attention_heads": 4, "ffn_dim": 64, "word_embed_proj_dim": 16}),
    "gpt2": ("GPT2Config", "gpt2", {"num_attention_heads": 4}),
    "gpt_neox": ("GPTNeoXConfig", "gpt_neox", {"num_attention_heads": 4, "intermediate_size": 64, "rotary_pct": 0.5}),
    "falcon": ("FalconConfig", "plain", {"num_attention_heads": 4, "multi_query": True, "alibi": False}),
    "bloom": ("BloomConfig", "plain", {"num_attention_heads": 4}),
    "mpt": ("MptConfig", "gpt_neox", {"num_attention_heads": 4}),
    "olmo2": ("Olmo2Config", "plain", {**MANY_HEADS}),
}  # fmt: skip
"""Configuration class, kind of tokenizer, and sizes beside the common ones."""

SEQ2SEQ = ("t5", "flan_t5", "mt5", "bart")
"""T5 ties its output layer to the embeddings; Flan-T5 and mT5 have one of their own."""


def family_llm(directory: Path, family: str, seed: int = 0) -> Path:
    """A random two-layer LLM of a family, 32 wide, with the family's tokenizer; the directory."""
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer = TOKENIZERS[CAUSAL[family][1] if family in CAUSAL else ("bart" if family == "bart" else "t5")]()
    tokenizer.save_pretrained(directory)
    ends, opens, pads = tokenizer.eos_token_id, tokenizer.bos_token_id, tokenizer.pad_token_id
    marks = {"eos_token_id": ends, "pad_token_id": ends if pads is None else pads}
    if opens is not None:
        marks["bos_token_id"] = opens
    vocabulary = len(tokenizer)
    torch.manual_seed(seed)
    if family in CAUSAL:
        kind, _, more = CAUSAL[family]
        sizes = {"vocab_size": vocabulary, "hidden_size": WIDTH, "num_hidden_layers": 2}
        config = getattr(transformers, kind)(**sizes, **marks, **more)
        model = AutoModelForCausalLM.from_config(config)
    elif family == "bart":
        config = transformers.BartConfig(
            vocab_size=vocabulary, d_model=WIDTH, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4,
            decoder_attention_heads=4, encoder_ffn_dim=64, decoder_ffn_dim=64, decoder_start_token_id=2, **marks,
        )  # fmt: skip
        model = AutoModelForSeq2SeqLM.from_config(config)
    else:
        kind = transformers.MT5Config if family == "mt5" else transformers.T5Config
        config = kind(
            vocab_size=vocabulary, d_model=WIDTH, d_kv=8, d_ff=64, num_layers=2, num_heads=4, decoder_start_token_id=0,
            feed_forward_proj="relu" if family == "t5" else "gated-gelu", **marks,
        )  # fmt: skip
        model = AutoModelForSeq2SeqLM.from_config(config)
    redraw(model, seed)
    if family == "bart":
        model.final_logits_bias.normal_(0.0, 0.5)
    model.save_pretrained(directory)
    if family in ("flan_t5", "mt5"):
        _untie(directory)
    return directory


def _untie(directory: Path) -> None:
    """An output layer of its own, as published Flan-T5 and mT5 files have it, and the setting that goes with it."""
    file = directory / "model.safetensors"
    tensors = load_file(file)
    tensors["lm_head.weight"] = torch.randn(tensors["shared.weight"].shape, generator=torch.Generator().manual_seed(9))
    save_file(tensors, file, {"format": "pt"})
    described = json.loads((directory / "config.json").read_text())
    described["tie_word_embeddings"] = False
    described.pop("scale_decoder_outputs", None)  # newer releases note it; published files lack it, and nothing scales
    (directory / "config.json").write_text(json.dumps(described))


# -- tokenizers -------------------------------------------------------------------------------------------------------


def byte_level(specials: list[str], blank: bool = False) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=blank)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=330, special_tokens=specials, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )  # fmt: skip
    tokenizer.train_from_iterator(WORDS * 4, trainer)
    return tokenizer


def blank_marked(specials: list[str]) -> Tokenizer:
    """SentencePiece's kind of BPE: blanks are "▁", one before the first word, unknown letters fall back to bytes."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.BpeTrainer(
        vocab_size=420, special_tokens=[*specials, *(f"<0x{byte:02X}>" for byte in range(256))], show_progress=False
    )
    tokenizer.train_from_iterator(WORDS * 4, trainer)
    return tokenizer


def parts_of(tokenizer: Tokenizer) -> dict[str, Any]:
    """Vocabulary and merges, as tokenizer classes take them."""
    model = json.loads(tokenizer.to_str())["model"]
    return {"vocab": model["vocab"], "merges": [tuple(pair) for pair in model["merges"]]}


def _opening(tokenizer: PreTrainedTokenizerBase, mark: str) -> PreTrainedTokenizerBase:
    """As published: the files say that a text opens with a mark (the classes alone do not)."""
    number = tokenizer.convert_tokens_to_ids(mark)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{mark} $A", special_tokens=[(mark, number)]
    )
    return tokenizer


def _llama() -> PreTrainedTokenizerBase:
    made = transformers.LlamaTokenizer(**parts_of(blank_marked(["<unk>", "<s>", "</s>"])), add_bos_token=True)
    return _opening(made, "<s>")


def _gemma() -> PreTrainedTokenizerBase:
    parts = parts_of(blank_marked(["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"]))
    return _opening(transformers.GemmaTokenizer(**parts), "<bos>")


def _opt() -> PreTrainedTokenizerBase:
    parts = parts_of(byte_level(["<s>", "<pad>", "</s>"]))
    marks = {"bos_token": "</s>", "eos_token": "</s>", "unk_token": "</s>", "pad_token": "<pad>"}
    return _opening(transformers.GPT2Tokenizer(**parts, **marks), "</s>")


def _t5() -> PreTrainedTokenizerBase:
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=200, special_tokens=["<pad>", "</s>", "<unk>"], unk_token="<unk>", show_progress=False,
        initial_alphabet=list("abcdefghijklmnopqrstuvwxyz?:.,"),
    )  # fmt: skip
    tokenizer.train_from_iterator(WORDS * 4, trainer)
    pieces = [tuple(pair) for pair in json.loads(tokenizer.to_str())["model"]["vocab"]]
    return transformers.T5Tokenizer(vocab=pieces, extra_ids=4)


TOKENIZERS: dict[str, Callable[[], PreTrainedTokenizerBase]] = {
    "llama": _llama,
    "gemma": _gemma,
    "opt": _opt,
    "t5": _t5,
    "qwen2": lambda: transformers.Qwen2Tokenizer(
        **parts_of(byte_level(["<|endoftext|>", "<|im_end|>"])), eos_token="<|im_end|>"
    ),
    "gpt2": lambda: transformers.GPT2Tokenizer(**parts_of(byte_level(["<|endoftext|>"]))),
    "gpt_neox": lambda: transformers.GPTNeoXTokenizer(**parts_of(byte_level(["<|endoftext|>", "<|padding|>"]))),
    "plain": lambda: transformers.PreTrainedTokenizerFast(
        tokenizer_object=byte_level(["<|endoftext|>", "<pad>"]), eos_token="<|endoftext|>", pad_token="<pad>"
    ),
    "bart": lambda: transformers.BartTokenizer(**parts_of(byte_level(["<s>", "<pad>", "</s>", "<unk>", "<mask>"]))),
}
