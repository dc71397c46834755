"""Instruction-aware Q-Formers: trained, measured and shipped between any frozen image encoder and any frozen LLM."""

from __future__ import annotations

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_HOMES = {
    "VLM": "qformer.vlm",
    "build": "qformer.loading",
    "export": "qformer.run",
    "load": "qformer.loading",
    "fit": "qformer.run",
    "plug": "qformer.plugging",
    "score": "qformer.run",
}
__all__ = ["VLM", "build", "export", "fit", "load", "plug", "score"]


def __getattr__(name: str) -> Any:
    """Names are imported when first asked for, so that `import qformer` pulls in no torch."""
    if name not in _HOMES:
        raise AttributeError(f"module 'qformer' has no attribute '{name}'")
    return getattr(import_module(_HOMES[name]), name)
