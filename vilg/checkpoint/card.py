"""The README.md of an export folder."""

import json
from pathlib import Path

from vilg.checkpoint.state import RunState

# A test runs these lines in a folder made by `vilg export`.
USE_WITH_TRANSFORMERS = """\
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("THIS_FOLDER", trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained("THIS_FOLDER", trust_remote_code=True)

drawn = model.generate(**model.draw_inputs(tokenizer, ["a cat"]))  # text -> image
pictures = model.image_tokenizer.decode(model.drawn_codes(drawn))  # uint8 [1, height, width, 3]

codes = model.image_tokenizer.encode(pictures)
written = model.generate(**model.caption_inputs(codes))  # image -> text
print(model.written_texts(tokenizer, written))
"""


def model_card(checkpoint: Path, state: RunState, dtype: str, parameters: int) -> str:
    """Markdown: what the model is, how it was trained, how it is used."""
    recipe, layout = state.recipe, state.layout
    model, tokens, data = recipe["model"], recipe["tokens"], recipe["data"]
    lines = [
        f"# {recipe['name']}",
        "",
        "One transformer for text -> image and image -> text, after ERNIE-ViLG (arXiv 2112.15283), trained with vilg.",
        "",
        "| | |",
        "|---|---|",
        f"| parameters | {parameters:,} ({dtype}) |",
        f"| shape | {model['num_layers']} layers, hidden {model['hidden_size']}, {model['num_heads']} heads, "
        f"{model['attention']} attention |",
        f"| sequence | {tokens['text_slots']} text slots, {tokens['grid'][0]} x {tokens['grid'][1]} image tokens |",
        f"| vocabularies | {tokens['text_vocab_size']} text pieces, {tokens['image_vocab_size']} image codes |",
        f"| training | step {state.step} of {recipe['schedule']['steps']}, "
        f"{state.samples:,} pairs, {state.tokens:,} tokens |",
        f"| batch, precision | {recipe['batch']['global_size']} pairs, {layout['precision']} |",
        f"| directions | {data['directions']}, caption dropout {data['caption_dropout']} |",
        *_losses(checkpoint, state.step),
        f"| recipe hash | `{state.recipe_hash[:16]}` |",
        *([f"| source | commit `{state.commit}` |"] if state.commit else []),
        f"| versions | {', '.join(f'{name} {version}' for name, version in state.versions.items())} |",
        "",
        "## Use",
        "",
        "With vilg:",
        "",
        '    vilg generate --model THIS_FOLDER --prompt "..." --out pictures',
        "    vilg caption --model THIS_FOLDER picture.png",
        "",
        "With transformers, offline (the modeling files lie in this folder):",
        "",
        *(f"    {line}" if line else "" for line in USE_WITH_TRANSFORMERS.splitlines()),
        "",
        "The weights are plain safetensors; `config.json` describes the model, `text.model` is a SentencePiece model,",
        "`tokenizer.json` the same for `tokenizers`, `image_tokenizer/` turns pictures into codes and back.",
        "",
    ]
    return "\n".join(lines)


def _losses(checkpoint: Path, step: int) -> list[str]:
    """The losses logged at the checkpoint's step, if the run folder is still around it."""
    path = checkpoint.parent.parent / "logs" / "metrics.jsonl"
    if not path.is_file():
        return []
    for line in reversed(path.read_text(encoding="utf-8", errors="replace").splitlines()):
        try:
            row = json.loads(line)
        except json.JSONDecodeError:  # a line that a crash cut short
            continue
        if row.get("step") == step and row.get("loss") is not None:
            parts = {"total": row["loss"], "image": row["image_loss"], "text": row["text_loss"]}
            shown = ", ".join(f"{name} {value:.3f}" for name, value in parts.items() if value is not None)
            return [f"| loss at that step (nats per target token) | {shown} |"]
    return []
