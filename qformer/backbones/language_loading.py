"""An LLM from a directory or a hub id: its tokenizer, its profile, its weights, frozen and quantised where asked."""

from __future__ import annotations

import json
from contextlib import nullcontext
from typing import Any

import torch

from qformer.backbones import inside
from qformer.backbones.decoder_only import DecoderOnly
from qformer.backbones.encoder_decoder import EncoderDecoder
from qformer.backbones.language import LanguageTower
from qformer.config import LanguageConfig
from qformer.errors import ConfigError, reason
from qformer.text import Profile, profile_from_tokenizer
from qformer.untokenized import MissingTokenizer

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}
COMPUTE = "bnb_4bit_compute_dtype"
"""What bitsandbytes computes products with weights of 4 bits in."""
LEAST_SHARE = 0.9
"""Of a table of embeddings, what the ids of its own tokenizer fill; tables are padded, by a few hundred rows."""


def load_profile(settings: LanguageConfig) -> tuple[Any, Profile]:
    """Tokenizer and profile of an LLM, without its weights.

    Raises:
        ConfigError: no such model, a profile that its tokenizer cannot give, or one with ids that the model lacks.
    """
    config = _read(settings, "AutoConfig")
    if (tower := inside.language(config)) is not None:
        config = tower.config
        if not _has_tokenizer(settings):
            return _untokenized(settings, config)
    tokenizer = _read(settings, "AutoTokenizer")
    words = getattr(config.get_text_config(), "vocab_size", None) or len(tokenizer)
    for name in ("opening", "end"):
        for number in getattr(settings.profile, name) or ():
            if not 0 <= number < words:
                raise ConfigError(
                    f"language.profile.{name} holds the id {number}, and '{settings.name}' has the ids 0 to "
                    f"{words - 1}; give ids of its own tokenizer."
                )
    profile = profile_from_tokenizer(
        tokenizer,
        settings.profile,
        encoder_decoder=bool(config.is_encoder_decoder),
        instruction_limit=settings.instruction_limit,
        target_limit=settings.target_limit,
    )
    return tokenizer, profile


def load_language(settings: LanguageConfig) -> LanguageTower:
    """The LLM that the settings name, frozen.

    Raises:
        ConfigError: no such model, weights that are not all there, a tokenizer of another model, an unknown dtype, T5
            in float16 (it overflows), or a quantisation that cannot be had here.
    """
    import transformers

    if settings.dtype not in DTYPES:
        raise ConfigError(f"language.dtype is '{settings.dtype}'; it takes {', '.join(DTYPES)}.")
    config = _read(settings, "AutoConfig")
    tower = inside.language(config)
    config = config if tower is None else tower.config
    rebuild(config, settings)
    if settings.dtype == "float16" and _overflows_in_half(config):
        raise ConfigError(
            "language.dtype is float16, and T5 overflows in it (it was trained in bfloat16); use bfloat16 or float32."
        )
    tokenizer, profile = load_profile(settings)
    auto = transformers.AutoModelForSeq2SeqLM if config.is_encoder_decoder else transformers.AutoModelForCausalLM
    if settings.quantization and not settings.pretrained:
        raise ConfigError(
            "language.quantization is set and language.pretrained is false; quantise weights that are read."
        )
    if settings.pretrained:
        dtype, more = DTYPES[settings.dtype], {"config": config} if tower is None else tower.arguments
        more = {**more, **_quantized(settings)}
        try:
            with nullcontext() if tower is None else inside.unreported():
                model, loaded = _read(settings, auto.__name__, dtype=dtype, output_loading_info=True, **more)
        except ImportError as error:
            raise _no_quantization(settings, error) from None
        if loaded["missing_keys"]:
            raise ConfigError(
                f"language.name is '{settings.name}', and its weights lack {len(loaded['missing_keys'])} of "
                f"{type(model).__name__}'s tensors ('{sorted(loaded['missing_keys'])[0]}' …); give a whole LLM with "
                f"its output layer, or set language.pretrained: false for random weights."
            )
    else:
        model = auto.from_config(config, dtype=DTYPES[settings.dtype])
    words, rows = tokenizer.vocab_size, model.get_input_embeddings().weight.shape[0]
    if words > rows:
        raise ConfigError(
            f"language.name is '{settings.name}': its tokenizer has {words} words and the model {rows} embeddings; "
            f"give a directory whose tokenizer belongs to the model."
        )
    if not isinstance(tokenizer, MissingTokenizer) and len(tokenizer) < LEAST_SHARE * rows:
        raise ConfigError(
            f"language.name is '{settings.name}': its tokenizer has {len(tokenizer)} words and the model {rows} "
            f"embeddings, so it is another model's; give a directory whose tokenizer belongs to the model."
        )
    kind = EncoderDecoder if config.is_encoder_decoder else DecoderOnly
    return kind(
        model,
        tokenizer,
        profile,
        gradient_checkpointing=settings.gradient_checkpointing,
        packing=settings.packing,
    )


def read_architecture(settings: LanguageConfig) -> Any:
    """An LLM's config.json, or that of the whole model which it stands in.

    Raises:
        ConfigError: it is neither there nor to be had.
    """
    return _read(settings, "AutoConfig")


def rebuild(config: Any, settings: LanguageConfig) -> None:
    """Put the values of `language.architecture` in the place of those in the model's config."""
    for name, value in settings.architecture.items():
        if not hasattr(config, name):
            raise ConfigError(
                f"language.architecture: '{settings.name}' has no '{name}' in its config.json; leave it out, or name "
                f"one that is there."
            )
        setattr(config, name, value)


def quantization_values(given: Any) -> dict[str, Any] | None:
    """What `language.quantization` holds of a dict or one of transformers' quantisation configs; None for an empty one.

    Raises:
        ConfigError: it is neither.
    """
    values = given.to_dict() if hasattr(given, "to_dict") else given
    if hasattr(given, "to_diff_dict") and COMPUTE not in given.to_diff_dict():
        values.pop(COMPUTE, None)  # as nobody named it; of who names float32, which is the same to transformers, too
    try:
        plain = json.loads(json.dumps(values))
    except (TypeError, ValueError):
        plain = None
    if not isinstance(plain, dict):
        raise ConfigError(
            f"quantization is {given!r}; it takes one of transformers' quantisation configs, or its values, such as "
            f"{{'load_in_4bit': True}} or {{'quant_method': 'quanto', 'weights': 'int8'}}."
        )
    return plain or None


def _quantized(settings: LanguageConfig) -> dict[str, Any]:
    """The argument that has transformers quantise weights as it reads them."""
    from transformers.quantizers.auto import AutoQuantizationConfig

    if not settings.quantization:
        return {}
    values = dict(settings.quantization)
    if values.get("load_in_4bit"):  # which transformers else has computed in float32
        values.setdefault(COMPUTE, settings.dtype)
    try:
        return {"quantization_config": AutoQuantizationConfig.from_dict(values)}
    except (ImportError, ValueError, TypeError, AttributeError) as error:
        raise _no_quantization(settings, error) from None


def _no_quantization(settings: LanguageConfig, error: Exception) -> ConfigError:
    asked = "has weights quantised already" if settings.quantization is None else f"asks for {settings.quantization}"
    return ConfigError(
        f"language.quantization: '{settings.name}' {asked}, which cannot be had here "
        f"({reason(error)}); install what is named there, or take another quantisation or none."
    )


def _overflows_in_half(config: Any) -> bool:
    """Whether transformers itself keeps the feed-forwards' outputs of such a model out of float16, as T5's, which were
    trained in bfloat16 and grow beyond it.
    """
    from transformers import MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING

    kind = MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING.get(type(config), None)
    return "wo" in (getattr(kind, "_keep_in_fp32_modules", None) or ())


def _has_tokenizer(settings: LanguageConfig) -> bool:
    """Whether a published model's directory or hub id holds one; asked before transformers makes up an empty one."""
    from transformers.utils import cached_file

    for name in ("tokenizer.json", "tokenizer.model", "spiece.model", "vocab.json", "vocab.txt"):
        try:
            if cached_file(
                settings.name, name, revision=settings.revision, _raise_exceptions_for_missing_entries=False
            ):
                return True
        except OSError:
            return False  # no network and nothing in the cache
    return False


def _untokenized(settings: LanguageConfig, config: Any) -> tuple[MissingTokenizer, Profile]:
    """A stand-in for the tokenizer, and the profile that the LLM's config alone tells."""
    end = config.eos_token_id[0] if isinstance(config.eos_token_id, list) else config.eos_token_id
    if end is None:
        raise ConfigError(
            f"language.name is '{settings.name}', which has no tokenizer, and its config.json names no eos_token_id; "
            f"add one of them."
        )
    opening = config.bos_token_id if not config.is_encoder_decoder else None
    pad = config.pad_token_id if config.pad_token_id is not None else end
    tokenizer = MissingTokenizer(
        f"'{settings.name}' has no tokenizer of its LLM", bos=config.bos_token_id, eos=end, pad=pad
    )
    profile = Profile(
        layout="plain",
        opening=() if opening is None else (opening,),
        end=(end,),
        pad=pad,
        closing=(end,) if config.is_encoder_decoder else (),
        encoder_decoder=bool(config.is_encoder_decoder),
        instruction_limit=settings.instruction_limit,
        target_limit=settings.target_limit,
    )
    return tokenizer, profile


def _read(settings: LanguageConfig, auto: str, **more: Any) -> Any:
    import transformers

    try:
        return getattr(transformers, auto).from_pretrained(settings.name, revision=settings.revision, **more)
    except ImportError:
        raise  # what a quantisation needs, which is told apart
    except Exception as error:  # files that are broken raise all kinds
        raise ConfigError(
            f"language.name is '{settings.name}', and no LLM can be read from there "
            f"({reason(error)}); give a directory with config.json, tokenizer and weights, or a hub id."
        ) from None
