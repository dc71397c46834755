"""The model `qformer` of lmms-eval, which finds it by its entry point; importable where lmms-eval is installed."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import torch
from accelerate import Accelerator
from lmms_eval.api.instance import GenerationResult, unwrap_generation_output
from lmms_eval.api.model import lmms
from lmms_eval.models.registry_v2 import ModelManifest
from loguru import logger
from tqdm import tqdm

from qformer import harness
from qformer.errors import ConfigError, did_you_mean
from qformer.harness import Answerer
from qformer.loading import load

MANIFEST = ModelManifest(model_id="qformer", simple_class_path="qformer.lmms.HarnessModel")
ARGUMENTS = (
    "pretrained", "vision", "language", "dtype", "device", "quantization", "instruction_tokenizer", "revision",
    "batch_size", "normalize", "end",
)  # fmt: skip


class HarnessModel(lmms):
    """Whatever `qformer.load` takes, asked by lmms-eval's simple tasks; a copy on every process, which share requests.

    `--model_args`: pretrained, and vision, language, dtype, device, quantization (JSON), instruction_tokenizer and
    revision as `qformer.load` takes them; of likelihoods, normalize (mean, sum or pmi) and end, as `VLM.rank` does.
    """

    is_simple = True

    def __init__(
        self,
        pretrained: str | None = None,
        vision: str | None = None,
        language: str | None = None,
        dtype: str | None = None,
        device: str | None = None,
        quantization: str | dict[str, Any] | None = None,
        instruction_tokenizer: str | None = None,
        revision: str | None = None,
        batch_size: int | str = 1,
        normalize: str = "mean",
        end: bool = True,
        **unknown: Any,
    ):
        super().__init__()
        for name in unknown:
            raise ConfigError(f"--model_args: unknown argument '{name}'.{did_you_mean(name, ARGUMENTS)}")
        if pretrained is None:
            raise ConfigError("--model_args: pretrained is missing; give whatever qformer.load takes, as pretrained=…")
        if normalize not in ("mean", "sum", "pmi"):
            raise ConfigError(f"--model_args: normalize is '{normalize}'; it takes 'mean', 'sum' or 'pmi'.")
        self.batch_size = _batch_size(batch_size)
        self.normalize, self.end = normalize, end
        self.accelerator = Accelerator()
        self._rank, self._world_size = self.accelerator.process_index, self.accelerator.num_processes
        alone = self._world_size == 1
        self.device = torch.device(device) if device is not None and alone else self.accelerator.device
        self.model = load(
            str(pretrained),
            vision=vision,
            language=language,
            device=self.device,
            dtype=dtype,
            quantization=_quantization(quantization),
            instruction_tokenizer=instruction_tokenizer,
            revision=revision,
            report=logger.info,
        )
        self._told: set[str] = set()

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """One answer per request."""
        with self._bar(requests) as bar:
            answers = self._answerer().generate(self._asked(requests), bar.update)
        for request, answer in zip(requests, answers, strict=True):
            self.cache_hook.add_partial("generate_until", request.args[:2], answer)
        return answers

    def loglikelihood(self, requests: Sequence[Any]) -> list[Any]:
        """Losses, which is what lmms-eval ranks by, and whether greedy decoding writes the continuation."""
        with self._bar(requests) as bar:
            losses = self._answerer().losses(self._asked(requests), self.normalize, self.end, bar.update)
        for request, loss in zip(requests, losses, strict=True):
            self.cache_hook.add_partial("loglikelihood", request.args[:2], loss)
        return [_unharmed(loss) for loss in losses]

    def generate_until_multi_round(self, requests: Sequence[Any]) -> list[str]:
        """Not to be had.

        Raises:
            ConfigError: always.
        """
        raise ConfigError("qformer answers in one round; leave tasks of output_type generate_until_multi_round out.")

    def _asked(self, requests: Sequence[Any]) -> list[harness.Asked]:
        return [harness.asked(request.args, self.task_dict) for request in requests]

    def _answerer(self) -> Answerer:
        return Answerer(self.model, self.batch_size, self._once)  # keeps no model alive that lmms-eval cleans away

    def _once(self, about: str, message: str) -> None:
        if about not in self._told:
            self._told.add(about)
            logger.warning(message)

    def _bar(self, requests: Sequence[Any]) -> Any:
        return tqdm(total=len(requests), disable=self.rank != 0, desc="qformer")


class Pair(tuple[float, bool]):
    """A loss and a flag that lmms-eval's cache may treat as a text, which it finds empty and does not store."""

    def strip(self) -> str:
        """Nothing."""
        return ""


def _unharmed(loss: tuple[float, bool]) -> Any:
    """What reaches lmms-eval's scorers as the pair that it is: release 0.7.3 makes a text of a plain pair."""
    return loss if unwrap_generation_output(loss)[0] == loss else GenerationResult(Pair(loss))


def _batch_size(given: int | str) -> int:
    if not str(given).isdecimal() or int(given) < 1:
        raise ConfigError(f"--batch_size is '{given}'; it takes a number of prompts, such as 16.")
    return int(given)


def _quantization(given: str | dict[str, Any] | None) -> dict[str, Any] | None:
    if not isinstance(given, str):
        return given
    try:
        return json.loads(given)
    except ValueError:
        raise ConfigError(
            f"--model_args: quantization is '{given}'; it takes JSON, such as {{\"load_in_8bit\": true}}."
        ) from None
