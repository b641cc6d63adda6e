"""`vilg export`: a sharded checkpoint becomes one folder for inference, checked before it appears.

fp32 comes from the optimizer's master weights where the run computed in less. bf16 and fp16 are those rounded, which
for a run of that precision are exactly the weights it computed with.
"""

import argparse
import json
import os
import re
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from vilg.checkpoint.card import model_card
from vilg.checkpoint.load import find_checkpoint
from vilg.checkpoint.probes import TOLERANCE, compute_probes, largest_difference, largest_logit, load_probes
from vilg.checkpoint.reader import Weights, open_weights
from vilg.checkpoint.state import RunState
from vilg.checkpoint.tensors import write_failure
from vilg.config.schema import ModelConfig, SamplesConfig
from vilg.errors import UserError
from vilg.inference.format import (
    CONFIG_FILE,
    EXPORT_FORMAT_VERSION,
    GENERATION_FILE,
    IMAGE_TOKENIZER_FOLDER,
    INDEX_FILE,
    TEXT_MODEL_FILE,
)
from vilg.inference.load import load_model
from vilg.tokens.text import TextTokenizer
from vilg.tokens.vqgan import ImageTokenizer

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_UNITS = {"MB": 10**6, "GB": 10**9}


@dataclass(frozen=True)
class Exported:
    """What an export found. difference: the largest of any stored logit, None if it was not verified."""

    folder: Path
    step: int
    parameters: int
    bytes: int
    difference: float | None


def export(
    source: Path,
    out: Path,
    *,
    dtype: str | None = None,
    shard_bytes: int = 5 * 10**9,
    text_model: Path | None = None,
    image_model: Path | None = None,
    overwrite: bool = False,
    verify: bool = True,
    progress: Callable[[str], None] = lambda _: None,
) -> Exported:
    """Turn a run's latest checkpoint, or the checkpoint named, into the folder `out`.

    dtype: fp32, bf16 or fp16; by default that of the run. shard_bytes: most bytes of a weights file, unless one tensor
    is larger. text_model, image_model: where the tokenizers lie now, if not where the recipe says.
    Nothing appears under `out` before it is whole and verified. Raises UserError naming the file at fault, also when
    the exported model's logits differ from those stored in the checkpoint.
    """
    checkpoint = find_checkpoint(source)
    weights = open_weights(checkpoint)
    state = weights.state
    dtype = dtype or state.layout["precision"]
    if out.exists() and not overwrite and any(out.iterdir() if out.is_dir() else [out]):
        raise UserError(f"{out} exists already; name a new folder, or replace it with --overwrite")
    if out.exists() and any(out.iterdir() if out.is_dir() else [out]) and not (out / INDEX_FILE).exists():
        raise UserError(f"{out} holds no export, so --overwrite will not replace it; name a new folder")
    partial = out.absolute().with_name(f".{out.absolute().name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        _write_tokenizers(partial, state, text_model, image_model)
        parameters, size = _write_weights(partial, weights, DTYPES[dtype], shard_bytes, progress)
        _write_texts(partial, checkpoint, state, dtype, parameters)
        difference = _verified(partial, checkpoint, dtype) if verify else None
        _publish(partial, out)
    except (OSError, SafetensorError) as error:
        raise UserError(f"cannot write {out}: {write_failure(error)}; nothing was left there") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return Exported(out, state.step, parameters, size, difference)


def main(argv: Sequence[str]) -> int:
    """The command `vilg export`."""
    parser = argparse.ArgumentParser(prog="vilg export", description="Turn a checkpoint into one folder for inference.")
    parser.add_argument("source", type=Path, help="a run folder (its latest checkpoint), or one checkpoints/step_*")
    parser.add_argument("--out", type=Path, required=True, help="folder to make")
    parser.add_argument("--dtype", choices=sorted(DTYPES), help="of the weights; default: what the run computed in")
    parser.add_argument("--shard-size", default="5GB", help="largest weights file, like 5GB or 500MB")
    parser.add_argument("--text-model", type=Path, help="SentencePiece file, if not where the recipe says")
    parser.add_argument("--image-model", type=Path, help="image tokenizer folder, if not where the recipe says")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing folder")
    parser.add_argument("--no-verify", action="store_true", help="do not recompute the checkpoint's stored logits")
    options = parser.parse_args(argv)
    started = time.perf_counter()
    done = export(
        options.source,
        options.out,
        dtype=options.dtype,
        shard_bytes=_bytes(options.shard_size),
        text_model=options.text_model,
        image_model=options.image_model,
        overwrite=options.overwrite,
        verify=not options.no_verify,
        progress=print,
    )
    checked = "not verified" if done.difference is None else f"largest logit difference {done.difference:.2g}"
    print(
        f"exported step {done.step} to {done.folder}: {done.parameters / 1e6:.1f}M parameters, "
        f"{done.bytes / 1e6:.1f} MB, {checked}, {time.perf_counter() - started:.1f} s"
    )
    return 0


def _write_tokenizers(folder: Path, state: RunState, text_model: Path | None, image_model: Path | None) -> None:
    text = TextTokenizer.load(text_model or Path(state.recipe["tokens"]["text_model"]))
    image = ImageTokenizer.load(image_model or Path(state.recipe["tokens"]["image_model"]))
    for option, now, trained in (
        ("--text-model", text.hash, state.tokenizers["text"]),
        ("--image-model", image.hash, state.tokenizers["image"]),
    ):
        if now != trained:
            raise UserError(
                f"the tokenizer found has hash {now[:12]}, the run was trained with {trained[:12]}; "
                f"name that one with {option}"
            )
    text.save(folder / TEXT_MODEL_FILE)
    image.save(folder / IMAGE_TOKENIZER_FOLDER)


def _write_weights(
    folder: Path, weights: Weights, dtype: torch.dtype, shard_bytes: int, progress: Callable[[str], None]
) -> tuple[int, int]:
    """Number of parameters and of bytes. Holds one shard in memory."""
    width = dtype.itemsize
    shards: list[list[str]] = []
    room = 0
    counts = {name: int(torch.Size(shape).numel()) for name, shape in weights.sizes()}
    for name, count in counts.items():
        if not shards or count * width > room:
            shards.append([])
            room = shard_bytes
        shards[-1].append(name)
        room -= count * width
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        save_file({name: _converted(weights, name, dtype) for name in names}, folder / file, metadata={"format": "pt"})
        weight_map |= {name: file for name in names}
        progress(f"wrote {file} ({number} of {len(shards)})")
    total = sum(counts.values()) * width
    _write_json(folder / INDEX_FILE, {"metadata": {"total_size": total}, "weight_map": weight_map})
    return sum(counts.values()), total


def _converted(weights: Weights, name: str, dtype: torch.dtype) -> Tensor:
    tensor = weights.read(name, kind="master").to(dtype).contiguous()
    if not tensor.isfinite().all():
        raise UserError(
            f"{weights.folder}: {name} holds numbers that are not finite in {dtype}; "
            "choose another checkpoint or --dtype"
        )
    return tensor.clone() if tensor.untyped_storage().nbytes() != tensor.nbytes else tensor


def _write_texts(folder: Path, checkpoint: Path, state: RunState, dtype: str, parameters: int) -> None:
    recipe = state.recipe
    sequence = {key: recipe["tokens"][key] for key in ("text_slots", "grid", "text_vocab_size", "image_vocab_size")}
    config = {
        "format_version": EXPORT_FORMAT_VERSION,
        "name": recipe["name"],
        "dtype": str(DTYPES[dtype]).removeprefix("torch."),
        "model": ModelConfig(**recipe["model"]).model_dump(mode="json"),
        "sequence": sequence,
        "text_tokenizer": {"file": TEXT_MODEL_FILE, "hash": state.tokenizers["text"]},
        "image_tokenizer": {"folder": IMAGE_TOKENIZER_FOLDER, "hash": state.tokenizers["image"]},
        "training": {
            "step": state.step,
            "samples": state.samples,
            "tokens": state.tokens,
            "recipe_hash": state.recipe_hash,
            "versions": state.versions,
        },
    }
    samples = SamplesConfig(**recipe["samples"])
    generation = dict(guidance=samples.guidance, temperature=samples.temperature, top_k=samples.top_k, top_p=1.0)
    _write_json(folder / CONFIG_FILE, config)
    _write_json(folder / GENERATION_FILE, {"format_version": EXPORT_FORMAT_VERSION, **generation})
    (folder / "README.md").write_text(model_card(checkpoint, state, dtype, parameters), encoding="utf-8")


def _verified(folder: Path, checkpoint: Path, dtype: str) -> float:
    """Largest difference between the checkpoint's stored logits and those of the exported model, in the same dtype."""
    stored = load_probes(checkpoint)
    bundle = load_model(folder, dtype=getattr(torch, stored.dtype))
    found = compute_probes(bundle.model, stored.inputs)
    difference = largest_difference(stored, found)
    exported = str(DTYPES[dtype]).removeprefix("torch.")
    allowed = max(TOLERANCE[stored.dtype], TOLERANCE[exported]) * largest_logit(stored)
    if not difference <= allowed:
        raise UserError(
            f"the exported model gives other logits than the trainer stored in {checkpoint}: largest difference "
            f"{difference:.3g}, allowed {allowed:.3g}. The export was not kept; the checkpoint may be damaged"
        )
    return difference


def _publish(partial: Path, out: Path) -> None:
    for path in partial.rglob("*"):
        if path.is_file():
            with open(path, "rb+") as stream:
                os.fsync(stream.fileno())
    old = out.absolute().with_name(f".{out.absolute().name}.replaced")
    shutil.rmtree(old, ignore_errors=True)
    if out.exists():
        os.rename(out, old)
    os.rename(partial, out)
    shutil.rmtree(old, ignore_errors=True)


def _write_json(path: Path, data: dict) -> None:
    path.write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _bytes(text: str) -> int:
    match = re.fullmatch(r"(\d+(?:\.\d+)?) ?(MB|GB)", text)
    if not match or float(match[1]) <= 0:
        raise UserError(f"--shard-size {text!r}: write a size like 5GB or 500MB")
    return int(float(match[1]) * _UNITS[match[2]])
