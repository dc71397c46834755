"""Tiny towers from random configs with real tokenizer classes, saved as ordinary checkpoints."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertModel,
    BertTokenizer,
    GPT2Config,
    LlamaConfig,
    OPTConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTImageProcessor,
    ViTModel,
)

WORDS = [
    "what colour is it please", "it is red indeed", "it is green", "it is blue indeed indeed", "it is white",
    "a photo of a small dog and two cats near the big tree", "question: how many? short answer: three",
    "is there a bird in the picture yes no true false", "say the colour of the thing left of the cube.",
]  # fmt: skip
FAMILIES = ("llama", "gpt2", "qwen2", "opt", "t5")


def tiny_llm(directory: Path, family: str, seed: int = 0) -> Path:
    """A random two-layer LLM of a family, 32 wide, with a tokenizer of the family's kind; the directory."""
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer = _sentencepiece_like(family) if family in ("llama", "t5") else _byte_level(family)
    tokenizer.save_pretrained(directory)
    size = len(tokenizer)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": size}
    marks = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id}
    marks["bos_token_id"] = tokenizer.bos_token_id
    configs = {
        "llama": lambda: LlamaConfig(**sizes, **marks, intermediate_size=64, num_key_value_heads=2),
        "qwen2": lambda: Qwen2Config(**sizes, **marks, intermediate_size=64, num_key_value_heads=2),
        "gpt2": lambda: GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=size, n_positions=256, **marks),
        "opt": lambda: OPTConfig(**sizes, **marks, ffn_dim=64, max_position_embeddings=256, word_embed_proj_dim=32),
        "t5": lambda: T5Config(
            d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, vocab_size=size, decoder_start_token_id=0,
            feed_forward_proj="gated-gelu", pad_token_id=0, eos_token_id=1,
        ),
    }  # fmt: skip
    torch.manual_seed(seed)
    config = configs[family]()
    model = T5ForConditionalGeneration(config) if family == "t5" else AutoModelForCausalLM.from_config(config)
    redraw(model, seed)
    model.save_pretrained(directory)
    return directory


def tiny_bert(directory: Path, seed: int = 0) -> Path:
    """A random BERT of two layers, 32 wide, with a WordPiece vocabulary of the words above; the directory."""
    directory.mkdir(parents=True, exist_ok=True)
    words = sorted({word for line in WORDS for word in pre_words(line)})
    vocabulary = [
        "[PAD]",
        "[UNK]",
        "[CLS]",
        "[SEP]",
        "[MASK]",
        *words,
        *(f"##{letter}" for letter in "abcdefghijklmnopqrstuvwxyz"),
    ]
    (directory / "vocab.txt").write_text("\n".join(vocabulary) + "\n")
    BertTokenizer(vocab=str(directory / "vocab.txt")).save_pretrained(directory)
    torch.manual_seed(seed)
    model = BertModel(
        BertConfig(
            vocab_size=len(vocabulary), hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
            intermediate_size=64, max_position_embeddings=160,
        )
    )  # fmt: skip
    redraw(model, seed)
    model.save_pretrained(directory)
    return directory


def tiny_vision(directory: Path, seed: int = 0, width: int = 24) -> Path:
    """A random ViT of two layers on 32-pixel pictures, with its image processor; the directory."""
    directory.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(seed)
    model = ViTModel(
        ViTConfig(
            hidden_size=width,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=48,
            image_size=32,
            patch_size=8,
        ),
        add_pooling_layer=False,
    )
    redraw(model, seed)
    model.save_pretrained(directory)
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(directory)
    return directory


def redraw(model: torch.nn.Module, seed: int) -> None:
    """Every weight N(0, 0.2) from a seed: large enough that all parts of the network matter."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim >= 2:
                parameter.normal_(0.0, 0.2, generator=generator)
            elif "norm" in name.lower() and name.endswith("weight"):
                parameter.normal_(1.0, 0.1, generator=generator)
            else:
                parameter.normal_(0.0, 0.1, generator=generator)


def pre_words(line: str) -> list[str]:
    """Words and marks of a line, as BERT's basic tokenizer splits them."""
    return [word for word, _ in pre_tokenizers.BertPreTokenizer().pre_tokenize_str(line)]


def _byte_level(family: str) -> PreTrainedTokenizerFast:
    """Byte-level BPE: a word's blank belongs to the word; only OPT opens with a mark."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    specials = {"gpt2": ["<|endoftext|>"], "qwen2": ["<|endoftext|>", "<|im_end|>"], "opt": ["<pad>", "</s>"]}[family]
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=specials,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(WORDS * 4, trainer)
    if family == "opt":
        from tokenizers.processors import TemplateProcessing

        tokenizer.post_processor = TemplateProcessing(single="</s> $A", special_tokens=[("</s>", 1)])
        return PreTrainedTokenizerFast(
            tokenizer_object=tokenizer, bos_token="</s>", eos_token="</s>", pad_token="<pad>"
        )
    if family == "gpt2":
        return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<|endoftext|>", eos_token="<|endoftext|>")
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>")


def _sentencepiece_like(family: str) -> PreTrainedTokenizerFast:
    """Unigram with "▁": the tokenizer brings its own blank; Llama opens with a mark, T5 closes with one."""
    from tokenizers.processors import TemplateProcessing

    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    specials = ["<unk>", "<s>", "</s>", "<pad>"] if family == "llama" else ["<pad>", "</s>", "<unk>"]
    letters = list("abcdefghijklmnopqrstuvwxyz?:.,")
    trainer = trainers.UnigramTrainer(
        vocab_size=260, special_tokens=specials, unk_token="<unk>", initial_alphabet=letters, show_progress=False
    )
    tokenizer.train_from_iterator(WORDS * 4, trainer)
    if family == "llama":
        tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
        return PreTrainedTokenizerFast(
            tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="<pad>"
        )
    tokenizer.post_processor = TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", unk_token="<unk>", pad_token="<pad>")
