"""The frozen language model: any causal or sequence-to-sequence LLM of transformers behind a few members.

R rows, N reads, Q soft tokens a read, L LLM width, S positions of the longest row.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qformer.config import LanguageConfig
from qformer.errors import ConfigError, DataError
from qformer.sample import Row, Slot, Text
from qformer.text import Joiner, Profile, profile_from_tokenizer

FINGERPRINT_ROWS = 64
SCORED_POSITIONS = 8192
"""Positions scored at once when candidates are ranked: bounds memory, changes no number."""
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}


class LanguageTower(nn.Module):
    """What decoder-only and encoder–decoder LLMs share: a frozen model, its tokenizer and its profile."""

    is_encoder_decoder: bool

    def __init__(self, model: Any, tokenizer: Any, profile: Profile, *, gradient_checkpointing: bool = False):
        super().__init__()
        self.model: Any = model
        self.tokenizer, self.profile = tokenizer, profile
        self.checkpointing = gradient_checkpointing
        model.requires_grad_(False)
        _forget_generation_defaults(model)
        if gradient_checkpointing:
            if not getattr(model, "supports_gradient_checkpointing", False):
                raise ConfigError(
                    f"language.gradient_checkpointing: {type(model).__name__} does not support it; set it to false."
                )
            _silence_dropout(model)
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        self.train(False)

    def train(self, mode: bool = True) -> LanguageTower:
        """Evaluation mode always; with gradient checkpointing training mode, where its dropouts are 0 (in evaluation
        mode transformers would silently recompute nothing).
        """
        super().train(False)
        self.training = mode
        self.model.train(mode and self.checkpointing)
        return self

    @property
    def width(self) -> int:
        """L: the width of the input embeddings."""
        return int(self.model.get_input_embeddings().weight.shape[1])

    @property
    def dtype(self) -> torch.dtype:
        """What the embeddings are held in."""
        return self.model.get_input_embeddings().weight.dtype

    @property
    def device(self) -> torch.device:
        """Where the embeddings are."""
        return self.model.get_input_embeddings().weight.device

    def embed(self, ids: Sequence[int]) -> Tensor:
        """(T,) ids -> (T, L), through the model's own module, whose scaling counts (Gemma)."""
        return self.model.get_input_embeddings()(torch.tensor(ids, dtype=torch.long, device=self.device))

    def embedding_norm(self) -> float:
        """Mean length of an embedding as the LLM reads it."""
        return float(self.embed(range(self._vocabulary())).float().norm(dim=-1).mean())

    @torch.no_grad()
    def fingerprint(self) -> Tensor:
        """64 fixed embedding rows (64, L) in float32: rows 3, 6, 12 … spread evenly below id 1,000 of any vocabulary
        (rows added at its end change nothing).
        """
        span = min(1000, self._vocabulary())
        ids = [number * span // FINGERPRINT_ROWS for number in range(FINGERPRINT_ROWS)]
        return self.model.get_input_embeddings().weight[ids].float().clone()

    def _vocabulary(self) -> int:
        return min(len(self.tokenizer), self.model.get_input_embeddings().weight.shape[0])

    def _row(self, soft: Tensor, row: Row) -> Tensor:
        """(S, L) of one row."""
        return torch.cat(
            [soft[piece.read].to(self.dtype) if isinstance(piece, Slot) else self.embed(piece.ids) for piece in row]
        )

    def log_likelihood(self, soft: Tensor, rows: Sequence[Row]) -> tuple[Tensor, Tensor]:
        """Soft tokens (N, Q, L) -> sums of log p over each row's trained tokens (R,), and their numbers (R,)."""
        raise NotImplementedError

    def generate(self, soft: Tensor, rows: Sequence[Row], **decoding: Any) -> list[str]:
        """One text per row; `decoding`: the fields of `qformer.cards.Decoding`."""
        raise NotImplementedError

    def rank(
        self,
        soft: Tensor,
        rows: Sequence[Row],
        candidates: Sequence[Sequence[str]],
        normalize: str = "sum",
        end: bool = True,
    ) -> list[list[float]]:
        """Log-likelihoods of each row's candidates behind it, in their order.

        normalize: "sum", "mean" (over scored tokens), "pmi" (the sum minus the sum without slots); `end`: whether the
        end mark is scored.

        Raises:
            ConfigError: an unknown `normalize`, a row without candidates, or a candidate with nothing to score.
        """
        if normalize not in ("sum", "mean", "pmi"):
            raise ConfigError(f"normalize is '{normalize}'; it takes 'sum', 'mean' or 'pmi'.")
        joiner = Joiner(self.tokenizer, self.profile, None)
        expanded: list[Row] = []
        for row, choices in zip(rows, candidates, strict=True):
            if not choices:
                raise ConfigError("rank: a prompt has no candidates; give at least one.")
            for choice in choices:
                ids = joiner.target_ids(choice) if end else joiner.answer_ids(choice)
                if not ids:
                    raise ConfigError(
                        "rank: a candidate is empty and has no token to score; give it words, or end=True."
                    )
                expanded.append((*row, Text(ids, trained=True)))
        scores, counts = self._in_parts(soft, expanded)
        if normalize == "mean":
            scores = scores / counts
        elif normalize == "pmi":
            blind = [tuple(piece for piece in row if isinstance(piece, Text)) for row in expanded]
            scores = scores - self._in_parts(soft, blind)[0]
        values, ranked = scores.tolist(), []
        for choices in candidates:
            ranked.append(values[: len(choices)])
            values = values[len(choices) :]
        return ranked

    def _in_parts(self, soft: Tensor, rows: Sequence[Row]) -> tuple[Tensor, Tensor]:
        """`log_likelihood` over rows of like length, a bounded number of positions at once."""
        lengths = [sum(soft.shape[1] if isinstance(piece, Slot) else len(piece.ids) for piece in row) for row in rows]
        order = sorted(range(len(rows)), key=lambda number: -lengths[number])
        sums, counts = torch.empty(len(rows)), torch.empty(len(rows))
        while order:
            part = order[: max(1, SCORED_POSITIONS // lengths[order[0]])]
            order = order[len(part) :]
            found = self.log_likelihood(soft, [rows[number] for number in part])
            sums[part], counts[part] = found[0].float().cpu(), found[1].float().cpu()
        return sums, counts

    def _answers(self, generated: Tensor) -> list[str]:
        """New ids (R, T) as texts, cut at the first stop string."""
        answers = []
        for text in self.tokenizer.batch_decode(generated, skip_special_tokens=True):
            for stop in self.profile.stop:
                text = text.split(stop)[0]
            answers.append(text.strip())
        return answers

    def _decoding(self, decoding: dict[str, Any]) -> dict[str, Any]:
        """Every value explicit, so that no file in the model's folder decides."""
        values = {"do_sample": False, "num_beams": 1, "max_new_tokens": 30, "min_new_tokens": 1, **decoding}
        if not values["do_sample"]:
            values.pop("temperature", None)
            values.pop("top_p", None)
        if values["num_beams"] == 1:
            values.pop("length_penalty", None)
        return {**values, "pad_token_id": self.profile.pad, "eos_token_id": list(self.profile.end[-1:])}


class DecoderOnly(LanguageTower):
    """A causal LLM: rows padded on the right to be scored, on the left to be continued; mask and positions given."""

    is_encoder_decoder = False

    def __init__(self, *arguments: Any, **settings: Any):
        super().__init__(*arguments, **settings)
        self.keeps_positions = "logits_to_keep" in inspect.signature(self.model.forward).parameters
        self.split_head = self._head_is_split_exactly()

    def log_likelihood(self, soft: Tensor, rows: Sequence[Row]) -> tuple[Tensor, Tensor]:
        """Soft tokens (N, Q, L) -> (R,) sums and (R,) counts; the head runs on predicting positions alone."""
        embeds = [self._row(soft, row) for row in rows]
        wanted = [_labels(row, soft.shape[1]) for row in rows]
        inputs = nn.utils.rnn.pad_sequence(embeds, batch_first=True)  # (R S L)
        labels = nn.utils.rnn.pad_sequence(wanted, batch_first=True, padding_value=-1).to(inputs.device)
        lengths = torch.tensor([len(each) for each in embeds], device=inputs.device)
        mask = (torch.arange(inputs.shape[1], device=inputs.device) < lengths[:, None]).long()
        predicting = labels[:, 1:] >= 0
        logits = self._logits(inputs, mask, predicting)
        log_p = -F.cross_entropy(logits.float(), labels[:, 1:][predicting], reduction="none")
        owner = torch.arange(len(rows), device=inputs.device)[:, None].expand_as(predicting)[predicting]
        sums = log_p.new_zeros(len(rows)).index_add(0, owner, log_p)
        return sums, predicting.sum(1)

    def _logits(self, inputs: Tensor, mask: Tensor, predicting: Tensor) -> Tensor:
        """(R, S, L), mask (R, S), which positions (R, S - 1) predict a trained token -> their logits (…, words)."""
        positions = torch.arange(inputs.shape[1], device=inputs.device).expand(len(inputs), -1)
        given = {"inputs_embeds": inputs, "attention_mask": mask, "position_ids": positions, "use_cache": False}
        if self.split_head:
            hidden = self.model.base_model(**given).last_hidden_state
            return self.model.get_output_embeddings()(hidden[:, :-1][predicting])
        return self.model(**given).logits[:, :-1][predicting]

    @torch.no_grad()
    def _head_is_split_exactly(self) -> bool:
        """Whether base model and output layer give the logits of the whole: asked of the model with four ids, since
        soft caps and scales live between or behind them in some families.
        """
        head = self.model.get_output_embeddings()
        if head is None:
            return False
        ids = torch.arange(4, device=self.device)[None] % self._vocabulary()
        try:
            apart = head(self.model.base_model(input_ids=ids, use_cache=False).last_hidden_state)
        except (TypeError, AttributeError, RuntimeError):
            return False
        whole = self.model(input_ids=ids, use_cache=False).logits
        return apart.shape == whole.shape and bool(torch.allclose(apart, whole, rtol=1e-4, atol=1e-5))

    @torch.no_grad()
    def generate(self, soft: Tensor, rows: Sequence[Row], **decoding: Any) -> list[str]:
        """One continuation per row."""
        embeds = [self._row(soft, row) for row in rows]
        longest = max(map(len, embeds))
        inputs = torch.stack([F.pad(each, (0, 0, longest - len(each), 0)) for each in embeds])
        lengths = torch.tensor([len(each) for each in embeds], device=inputs.device)
        mask = (torch.arange(longest, device=inputs.device) >= longest - lengths[:, None]).long()
        generated = self.model.generate(inputs_embeds=inputs, attention_mask=mask, **self._decoding(decoding))
        return self._answers(generated)


class EncoderDecoder(LanguageTower):
    """A sequence-to-sequence LLM: the encoder reads all but the trained span, the decoder writes it."""

    is_encoder_decoder = True

    def log_likelihood(self, soft: Tensor, rows: Sequence[Row]) -> tuple[Tensor, Tensor]:
        """Soft tokens (N, Q, L) -> (R,) sums and (R,) counts.

        Raises:
            DataError: a row with another number of trained spans than one, at its end.
        """
        for row in rows:
            trained = [isinstance(piece, Text) and piece.trained for piece in row]
            if trained.count(True) != 1 or not trained[-1]:
                raise DataError(
                    "an encoder–decoder takes one trained span a row, the last; set turns: each in the card."
                )
        inputs, mask = self._encoder_inputs(soft, [row[:-1] for row in rows])
        targets = [torch.tensor(row[-1].ids) for row in rows]  # type: ignore[union-attr]
        labels = nn.utils.rnn.pad_sequence(targets, batch_first=True, padding_value=-100).to(inputs.device)
        logits = self.model(inputs_embeds=inputs, attention_mask=mask, labels=labels, use_cache=False).logits
        log_p = -F.cross_entropy(logits.float().flatten(0, 1), labels.flatten(), ignore_index=-100, reduction="none")
        return log_p.view(labels.shape).sum(1), (labels >= 0).sum(1)

    @torch.no_grad()
    def generate(self, soft: Tensor, rows: Sequence[Row], **decoding: Any) -> list[str]:
        """One answer per row."""
        inputs, mask = self._encoder_inputs(soft, rows)
        generated = self.model.generate(inputs_embeds=inputs, attention_mask=mask, **self._decoding(decoding))
        return self._answers(generated[:, 1:])  # column 0 is the decoder's start

    def _encoder_inputs(self, soft: Tensor, rows: Sequence[Row]) -> tuple[Tensor, Tensor]:
        """Prompts with their closing ids, padded on the right: (R, S, L) and mask (R, S)."""
        embeds = [self._row(soft, (*row, Text(self.profile.closing))) for row in rows]
        inputs = nn.utils.rnn.pad_sequence(embeds, batch_first=True)
        lengths = torch.tensor([len(each) for each in embeds], device=inputs.device)
        return inputs, (torch.arange(inputs.shape[1], device=inputs.device) < lengths[:, None]).long()


def load_profile(settings: LanguageConfig) -> tuple[Any, Profile]:
    """Tokenizer and profile of an LLM, without its weights.

    Raises:
        ConfigError: no such model, or a profile that its tokenizer cannot give.
    """
    config = _read(settings, "AutoConfig")
    tokenizer = _read(settings, "AutoTokenizer")
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
        ConfigError: no such model, an unknown dtype, or T5 in float16 (it overflows).
    """
    import transformers

    if settings.dtype not in DTYPES:
        raise ConfigError(f"language.dtype is '{settings.dtype}'; it takes {', '.join(DTYPES)}.")
    config = _read(settings, "AutoConfig")
    if config.model_type in ("t5", "mt5", "umt5") and settings.dtype == "float16":
        raise ConfigError(
            "language.dtype is float16, and T5 overflows in it (it was trained in bfloat16); use bfloat16 or float32."
        )
    tokenizer, profile = load_profile(settings)
    auto = transformers.AutoModelForSeq2SeqLM if config.is_encoder_decoder else transformers.AutoModelForCausalLM
    if settings.pretrained:
        model = _read(settings, auto.__name__, dtype=DTYPES[settings.dtype])
    else:
        model = auto.from_config(config, dtype=DTYPES[settings.dtype])
    kind = EncoderDecoder if config.is_encoder_decoder else DecoderOnly
    return kind(model, tokenizer, profile, gradient_checkpointing=settings.gradient_checkpointing)


def same_language(first: Tensor, second: Tensor) -> bool:
    """Whether two fingerprints are of one LLM: rows equal within 2 % of their length, so that precision and
    quantisation do not matter.
    """
    if first.shape != second.shape:
        return False
    return bool((first.cpu() - second.cpu()).norm() <= 0.02 * second.norm())


def _read(settings: LanguageConfig, auto: str, **more: Any) -> Any:
    import transformers

    try:
        return getattr(transformers, auto).from_pretrained(settings.name, revision=settings.revision, **more)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"language.name is '{settings.name}', and no LLM can be read from there "
            f"({str(error).splitlines()[0]}); give a directory with config.json, tokenizer and weights, or a hub id."
        ) from None


def _forget_generation_defaults(model: Any) -> None:
    import transformers

    kept = {"decoder_start_token_id", "forced_bos_token_id", "forced_eos_token_id"}
    given = getattr(model, "generation_config", None)
    fresh = transformers.GenerationConfig()
    for name in kept:
        setattr(fresh, name, getattr(given, name, None))
    if fresh.decoder_start_token_id is None:
        fresh.decoder_start_token_id = getattr(model.config, "decoder_start_token_id", None)
    model.generation_config = fresh


def _silence_dropout(model: nn.Module) -> None:
    """Every dropout of a model to 0: modules, and the rates that attention code reads from its own attributes."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name in ("attention_dropout", "dropout", "attn_dropout", "resid_dropout", "layerdrop"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)


def _labels(row: Row, queries: int) -> Tensor:
    """(S,) the trained ids at their places, -1 elsewhere."""
    return torch.tensor(
        [
            number
            for piece in row
            for number in (
                [-1] * queries if isinstance(piece, Slot) else piece.ids if piece.trained else [-1] * len(piece.ids)
            )
        ]
    )
