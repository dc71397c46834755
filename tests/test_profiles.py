"""How each LLM was published to be spoken to, and the rows that its shipped profile makes, mark for mark."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import transformers

from qformer import config, resources, text
from qformer.backbones import language_loading
from qformer.config import ProfileConfig
from qformer.errors import ConfigError
from qformer.sample import Row, Slot, Turn
from qformer.text import Joiner, Profile, Rendered
from tests.families import TOKENIZERS, blank_marked, byte_level, parts_of

ASKED = Rendered("what colour is it", "it is red")
TALKED = Rendered("what colour is it", "it is red", history=(Turn("how many?", "three"),))


def bytes_with(*marks: str) -> Any:
    """A byte-level tokenizer that knows marks; blanks belong to the words behind them."""
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=byte_level(["<|endoftext|>", *marks]), eos_token="<|endoftext|>"
    )


def llama_with(*marks: str) -> Any:
    """Llama's tokenizer with more marks; a word brings its own blank."""
    parts = parts_of(blank_marked(["<unk>", "<s>", "</s>", *marks]))
    made = transformers.LlamaTokenizer(**parts)
    made.add_special_tokens({"extra_special_tokens": list(marks)})
    return made


def gemma() -> Any:
    marks = ["<start_of_turn>", "<end_of_turn>"]
    parts = parts_of(blank_marked(["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", *marks]))
    made = transformers.GemmaTokenizer(**parts)
    made.add_special_tokens({"extra_special_tokens": marks})
    return made


SPEAKERS: dict[str, Callable[[], Any]] = {
    "plain": bytes_with,
    "flan_t5": TOKENIZERS["t5"],
    "vicuna_v1.1": llama_with,
    "llama3": lambda: bytes_with("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    "qwen2.5": lambda: bytes_with("<|im_start|>", "<|im_end|>"),
    "qwen3": lambda: bytes_with("<|im_start|>", "<|im_end|>", "<think>", "</think>"),
    "gemma": gemma,
    "mistral": lambda: llama_with("[INST]", "[/INST]"),
    "phi3": lambda: bytes_with("<|user|>", "<|assistant|>", "<|system|>", "<|end|>"),
    "smollm2": lambda: bytes_with("<|im_start|>", "<|im_end|>"),
}
"""A tokenizer of each profile's kind, with its marks."""

VICUNA = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, "
    "and polite answers to the user's questions."
)
QWEN = "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."
SMOLLM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"

ROWS = {
    "plain": "<image>how many? three<|endoftext|>what colour is it{ it is red<|endoftext|>}",
    "flan_t5": "<image> how many? three</s> what colour is it{ it is red</s>}",
    # Llama's words bring a blank; behind a mark there is none.
    "vicuna_v1.1": (
        f"<s> {VICUNA} USER:<image> how many? ASSISTANT: three</s>USER: what colour is it ASSISTANT:{{ it is red</s>}}"
    ),
    "llama3": (
        "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\n<image>how many?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\nthree<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nwhat colour is it<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n{it is red<|eot_id|>}"
    ),
    "qwen2.5": (
        f"<|im_start|>system\n{QWEN}<|im_end|>\n<|im_start|>user\n<image>how many?<|im_end|>\n"
        "<|im_start|>assistant\nthree<|im_end|>\n<|im_start|>user\nwhat colour is it<|im_end|>\n"
        "<|im_start|>assistant\n{it is red<|im_end|>}"
    ),
    "qwen3": (
        "<|im_start|>user\n<image>how many?<|im_end|>\n<|im_start|>assistant\nthree<|im_end|>\n"
        "<|im_start|>user\nwhat colour is it<|im_end|>\n"
        "<|im_start|>assistant\n<think>\n\n</think>\n\n{it is red<|im_end|>}"
    ),
    "gemma": (
        "<bos><start_of_turn>user\n<image>how many?<end_of_turn>\n<start_of_turn>model\nthree<end_of_turn>\n"
        "<start_of_turn>user\nwhat colour is it<end_of_turn>\n<start_of_turn>model\n{it is red<end_of_turn>}"
    ),
    "mistral": "<s>[INST]<image> how many?[/INST] three</s>[INST] what colour is it[/INST]{ it is red</s>}",
    "phi3": (
        "<|user|>\n<image>how many?<|end|>\n<|assistant|>\nthree<|end|>\n"
        "<|user|>\nwhat colour is it<|end|>\n<|assistant|>\n{it is red<|end|>}"
    ),
    "smollm2": (
        f"<|im_start|>system\n{SMOLLM}<|im_end|>\n<|im_start|>user\n<image>how many?<|im_end|>\n"
        "<|im_start|>assistant\nthree<|im_end|>\n<|im_start|>user\nwhat colour is it<|im_end|>\n"
        "<|im_start|>assistant\n{it is red<|im_end|>}"
    ),
}
"""A picture, an earlier turn and the last one, as published; what is trained on stands in braces."""


def speak(name: str, tokenizer: Any | None = None, **more: Any) -> tuple[Any, Profile]:
    tokenizer = tokenizer or SPEAKERS[name]()
    kind = {"encoder_decoder": name == "flan_t5"}
    return tokenizer, text.profile_from_tokenizer(tokenizer, ProfileConfig(name=name, **more), **kind)


def row_of(tokenizer: Any, profile: Profile, rendered: Rendered, answered: bool = True) -> Row:
    return Joiner(tokenizer, profile, None).row(rendered, [0], answered=answered)


def shown(tokenizer: Any, row: Row) -> str:
    """A row in words: `<image>` for slots, braces around what is trained on."""
    told = ""
    for piece in row:
        if isinstance(piece, Slot):
            told += "<image>"
            continue
        tokens = tokenizer.convert_ids_to_tokens(list(piece.ids))
        if any("▁" in token for token in tokens):
            words = re.sub(r"<0x(..)>", lambda byte: chr(int(byte[1], 16)), "".join(tokens).replace("▁", " "))
        else:
            words = tokenizer.decode(piece.ids, skip_special_tokens=False)
        told += f"{{{words}}}" if piece.trained else words
    return told


def test_every_shipped_profile_is_tried_here() -> None:
    assert set(resources.names("profiles")) == set(ROWS) == set(SPEAKERS)


@pytest.mark.parametrize("name", ROWS)
def test_the_row_is_the_published_one(name: str) -> None:
    tokenizer, profile = speak(name)
    assert shown(tokenizer, row_of(tokenizer, profile, TALKED)) == ROWS[name]
    asked = row_of(tokenizer, profile, TALKED, answered=False)
    assert shown(tokenizer, asked) == ROWS[name].partition("{")[0]
    assert profile.closing == ((tokenizer.eos_token_id,) if name == "flan_t5" else ())


@pytest.mark.parametrize("name", ["vicuna_v1.1", "llama3", "qwen2.5", "qwen3", "gemma", "phi3", "smollm2"])
def test_a_system_text_stands_where_the_llm_was_taught_to_read_it(name: str) -> None:
    tokenizer, profile = speak(name, system="say it please")
    start = {
        "vicuna_v1.1": "<s> say it please USER:<image> what",
        "llama3": "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nsay it please<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\n<image>what",
        "gemma": "<bos><start_of_turn>user\nsay it please\n\n<image>what",
        "phi3": "<|system|>\nsay it please<|end|>\n<|user|>\n<image>what",
    }.get(name, "<|im_start|>system\nsay it please<|im_end|>\n<|im_start|>user\n<image>what")
    assert shown(tokenizer, row_of(tokenizer, profile, ASKED)).startswith(start)
    assert profile.system == "say it please"


def test_an_empty_system_text_leaves_the_turn_out() -> None:
    tokenizer, profile = speak("smollm2", system="")
    assert shown(tokenizer, row_of(tokenizer, profile, ASKED)).startswith("<|im_start|>user\n<image>what")


CHATML = (
    "{% for m in messages %}{% if loop.first and m.role != 'system' %}<|im_start|>system\n" + SMOLLM + "<|im_end|>\n"
    "{% endif %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TEMPLATES = {
    "smollm2": CHATML,
    "qwen2.5": CHATML.replace(SMOLLM, QWEN),
    "llama3": (
        "{{ '<|begin_of_text|>' }}{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>{{ '\n\n' }}"
        "{{ m.content }}<|eot_id|>{% endfor %}{% if add_generation_prompt %}<|start_header_id|>assistant"
        "<|end_header_id|>{{ '\n\n' }}{% endif %}"
    ),
    "phi3": (
        "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
    ),
}
"""Chat templates of published tokenizers, without their branches for tools."""


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_named_profile_and_the_tokenizers_own_template_make_the_same_ids(name: str) -> None:
    tokenizer, named = speak(name)
    tokenizer.chat_template = TEMPLATES[name]
    read = text.profile_from_tokenizer(tokenizer, ProfileConfig(system=named.system))
    assert read.layout == "chat"
    assert row_of(tokenizer, read, TALKED) == row_of(tokenizer, named, TALKED)


def test_a_base_model_without_a_chat_template_takes_plain() -> None:
    tokenizer = bytes_with()
    assert text.profile_from_tokenizer(tokenizer) == speak("plain", tokenizer)[1]
    tokenizer.chat_template = CHATML
    assert text.profile_from_tokenizer(tokenizer).layout == "chat"
    assert speak("plain", tokenizer)[1].layout == "plain"  # naming it keeps a template out


def test_overrides_go_on_top_of_a_named_profile() -> None:
    tokenizer, profile = speak("smollm2", stop=["Question:"], end=[3], opening=[5])
    assert (profile.stop, profile.end, profile.opening) == (("Question:",), (3,), (5,))
    assert speak("smollm2", tokenizer, layout="plain")[1].layout == "plain"


def test_a_profile_of_ones_own_is_a_file(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(
        "name: mine\nversion: 1\nsource: mine\nlayout: chat\nhead: 'Q: '\nmiddle: ' A:'\nbetween: ' Q: '\nstop: ['Q:']"
    )
    tokenizer = bytes_with()
    profile = text.profile_from_tokenizer(tokenizer, ProfileConfig(name=str(file)))
    assert shown(tokenizer, row_of(tokenizer, profile, ASKED)) == (
        "Q: <image>what colour is it A:{it is red<|endoftext|>}"
    )
    assert profile.stop == ("Q:",)


def test_a_config_names_a_profile_and_changes_it(tmp_path: Path) -> None:
    SPEAKERS["smollm2"]().save_pretrained(tmp_path / "llm")
    transformers.LlamaConfig().save_pretrained(tmp_path / "llm")
    file = tmp_path / "run.yaml"
    file.write_text(
        f"vision: {{name: vit}}\nlanguage: {{name: '{tmp_path / 'llm'}', profile: {{name: smollm2, stop: ['Q:']}}}}"
    )
    tokenizer, profile = language_loading.load_profile(config.load(file).language)
    assert profile == speak("smollm2", tokenizer, stop=["Q:"])[1]
    changed = config.load(file, ["language.profile.name=plain"]).language
    assert language_loading.load_profile(changed)[1].layout == "plain"


def test_a_profile_that_cannot_be_is_refused_with_what_would_work() -> None:
    with pytest.raises(ConfigError, match=r"unknown profile 'smolm2'\. Did you mean 'smollm2'\?"):
        speak("smolm2", bytes_with())
    with pytest.raises(ConfigError, match=r"name is 'llama3'.* does not know its mark '<\|begin_of_text\|>'; name the"):
        speak("llama3", bytes_with())
    with pytest.raises(ConfigError, match="the profile 'mistral' has no place for a system text; leave it out"):
        speak("mistral", system="be brief")
    with pytest.raises(ConfigError, match="asks for a chat layout, and the LLM is an encoder–decoder; use 'plain'"):
        text.profile_from_tokenizer(SPEAKERS["smollm2"](), ProfileConfig(name="smollm2"), encoder_decoder=True)


def test_a_named_profile_survives_a_trip_through_plain_values() -> None:
    _, profile = speak("qwen3")
    assert Profile.from_dict(profile.as_dict()) == profile
    older = {name: value for name, value in profile.as_dict().items() if name not in ("answer", "decoder_opening")}
    assert Profile.from_dict(older).answer == ""
