"""Our numbers beside those of LAVIS on one machine: `python benchmarks/against_lavis.py CHECKPOINT.pth --vision … `.

It needs `salesforce-lavis`, which wants an older transformers than this library.  So it works in two environments:
`--side lavis` and `--side qformer` each write what they compute to a file, and `--side compare` (the default) makes the
table in Markdown of what is there.  A side without its file is told as "not run".
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch

PROMPT = "Question: what is in the picture? Short answer:"
MODELS = {
    "t5_proj": ("blip2_t5_instruct", "flant5xl"),
    "llm_proj": ("blip2_vicuna_instruct", "vicuna7b"),
}
"""LAVIS' name and type of the model behind a projection."""
MEASURES = ("soft prompts", "loss", "greedy tokens")
TOLERANCES = {"soft prompts": 1e-4, "loss": 1e-5}
"""Largest difference (soft prompts) and relative difference (loss) that counts as equal, in float32."""


def pixels() -> torch.Tensor:
    """A picture that both sides are given, (1, 3, 224, 224)."""
    return torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(0))


def by_lavis(checkpoint: Path, projection: str) -> dict[str, Any]:
    """What LAVIS computes, in float32 on the CPU."""
    from lavis.models import load_model

    name, kind = MODELS[projection]
    model = load_model(name, kind, is_eval=True, device="cpu", checkpoint=str(checkpoint)).float()
    samples = {"image": pixels(), "text_input": [PROMPT], "text_output": ["a dog"]}
    seen: list[torch.Tensor] = []
    linear = model.t5_proj if projection == "t5_proj" else model.llm_proj
    hook = linear.register_forward_hook(lambda _, inputs, output: seen.append(output.detach()))
    with torch.no_grad():
        loss = model(samples)["loss"]
        hook.remove()
        answer = model.generate(
            {"image": pixels(), "prompt": PROMPT}, num_beams=1, max_length=10, repetition_penalty=1.0
        )
    return {"soft prompts": seen[0], "loss": loss, "greedy tokens": answer}


def by_qformer(checkpoint: Path, vision: str, language: str, words: str | None = None) -> dict[str, Any]:
    """What this library computes; `words`: the Q-Former's tokenizer, where the preset's is not at hand."""
    import qformer
    from qformer import checkpoints, presets
    from qformer.sample import Text
    from qformer.text import Rendered

    published = checkpoints.read_lavis(checkpoint)
    model = qformer.load(checkpoint, vision=vision, language=language, instruction_tokenizer=words)
    joiner = model.joiner()
    ids = torch.tensor([joiner.read_ids(PROMPT)])
    with torch.no_grad():
        soft = model.soft_prompts(pixels(), ids)
        row = joiner.row(Rendered(PROMPT, "a dog"), [0], answered=True)
        sums, counts = model.language.log_likelihood(soft, [row])
        prompt = tuple(piece for piece in row if not (isinstance(piece, Text) and piece.trained))
        most = presets.load(published.preset).decoding["answer"].max_new_tokens
        answer = model.language.generate(soft, [prompt], max_new_tokens=most)
    return {"soft prompts": soft, "loss": -sums / counts, "greedy tokens": answer}


def table(folder: Path) -> str:
    """Markdown: both sides' values and whether they are equal, or "not run"."""
    held = {}
    for side in ("lavis", "qformer"):
        file = folder / f"{side}.pt"
        held[side] = torch.load(file, weights_only=True) if file.is_file() else None
    lines = ["| | LAVIS | qformer | difference | equal |", "|---|---|---|---|---|"]
    for measure in MEASURES:
        one, two = (held[side] and held[side][measure] for side in ("lavis", "qformer"))
        shown = [_shown(each) for each in (one, two)]
        if held["lavis"] is None or held["qformer"] is None:
            lines.append(f"| {measure} | {shown[0]} | {shown[1]} | not run | not run |")
        elif isinstance(one, torch.Tensor):
            scale = 1.0 if measure == "soft prompts" else float(one.abs().mean())
            apart = float((one - two).abs().max()) / scale
            lines.append(f"| {measure} | {shown[0]} | {shown[1]} | {apart:.1e} | {apart <= TOLERANCES[measure]} |")
        else:
            lines.append(f"| {measure} | {shown[0]} | {shown[1]} | | {one == two} |")
    return "\n".join(lines)


def _shown(value: Any) -> str:
    if value is None:
        return "not run"
    return f"mean {float(value.mean()):.5f}" if isinstance(value, torch.Tensor) else "; ".join(value)


def main() -> None:
    """Run a side, or compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path, nargs="?", help="a released or own .pth file of InstructBLIP")
    parser.add_argument("--side", choices=("lavis", "qformer", "compare"), default="compare")
    parser.add_argument("--vision", default="eva_vit_g.pth")
    parser.add_argument("--language", default="google/flan-t5-xl")
    parser.add_argument("--instruction-tokenizer", help="a directory, instead of bert-base-uncased from the hub")
    parser.add_argument("--projection", choices=tuple(MODELS), default="t5_proj")
    parser.add_argument("--folder", type=Path, default=Path("runs/against_lavis"))
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    if options.side == "lavis":
        torch.save(by_lavis(options.checkpoint, options.projection), options.folder / "lavis.pt")
    elif options.side == "qformer":
        found = by_qformer(options.checkpoint, options.vision, options.language, options.instruction_tokenizer)
        torch.save(found, options.folder / "qformer.pt")
    written = table(options.folder)
    (options.folder / "table.md").write_text(written + "\n", encoding="utf-8")
    print(written)


if __name__ == "__main__":
    main()
