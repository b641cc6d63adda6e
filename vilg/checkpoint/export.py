"""`vilg export`: a sharded checkpoint becomes one folder for inference, checked before it appears.

fp32 comes from the optimizer's master weights where the run computed in less. bf16 and fp16 are those rounded, which
for a run of that precision are exactly the weights it computed with.
"""

import argparse
import json
import math
import os
import re
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from tqdm import tqdm

from vilg.checkpoint.card import model_card
from vilg.checkpoint.folders import PARTIAL, hidden, put_back, put_in_place
from vilg.checkpoint.huggingface.files import config_keys, write_files
from vilg.checkpoint.load import find_checkpoint
from vilg.checkpoint.probes import PROBE_FILE, TOLERANCE, compute_probes, largest_difference, largest_logit, load_probes
from vilg.checkpoint.reader import Weights, open_weights
from vilg.checkpoint.reconstructor_file import RECONSTRUCTOR_FILE, kept_weights, read_reconstructor_file, trained_tokenizer
from vilg.checkpoint.state import RunState, read_state
from vilg.checkpoint.stream import Progress, load_when_used, plan_files, write_weights
from vilg.checkpoint.tensors import write_exit_code, write_failure
from vilg.checkpoint.verify import ReadFiles
from vilg.config.schema import ModelConfig, SamplesConfig
from vilg.errors import UserError
from vilg.inference.format import (
    CONFIG_FILE,
    EXPORT_FORMAT_VERSION,
    GENERATION_FILE,
    IMAGE_TOKENIZER_FOLDER,
    INDEX_FILE,
    RECONSTRUCTOR_FOLDER,
    TEXT_MODEL_FILE,
    generation_settings,
    weights_file,
)
from vilg.inference.load import empty_model, read_description
from vilg.inference.sampling import SamplingConfig
from vilg.inference.weights import FolderWeights
from vilg.model.reconstructor import save_reconstructor
from vilg.parallel.precision import DTYPE_OF_NAME, DTYPES, dtype_name
from vilg.tokens.text import TextTokenizer
from vilg.tokens.vqgan import ImageTokenizer

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
    ema: bool = False,
    show_progress: bool = False,
) -> Exported:
    """Turn a run's latest checkpoint, or the checkpoint named, into the folder `out`.

    dtype: fp32, bf16 or fp16; by default that of the run. shard_bytes: most bytes of a weights file, unless one tensor
    is larger. text_model, image_model: where the tokenizers lie now, if not where the recipe says. ema: the moving
    average of the weights, an error as long as the trainer keeps none. show_progress: a bar on a terminal.
    verify: compare the checksums of the files read and recompute the stored logits, which many damages do not touch.
    Holds one tensor in memory at a time, also while it verifies. Nothing appears under `out` before it is whole and
    verified. Raises UserError naming the file at fault, also when the exported model's logits differ from those stored
    in the checkpoint.
    """
    checkpoint = find_checkpoint(source)
    state = read_state(checkpoint)
    if ema:
        raise UserError(
            f"{checkpoint}: holds no moving average (EMA) of the weights, as `vilg train` keeps none; "
            "export the weights themselves, without --ema"
        )
    dtype = dtype or state.layout["precision"]
    if dtype not in DTYPES:
        raise UserError(f"dtype {dtype!r} is unknown; use one of {', '.join(DTYPES)}")
    partial = hidden(out.absolute(), PARTIAL)
    shutil.rmtree(partial, ignore_errors=True)
    parameters = sum(math.prod(entry["shape"]) for entry in state.parameters.values())
    size = parameters * DTYPES[dtype].itemsize
    try:
        _check_place(out, overwrite)
        partial.mkdir(parents=True)
        _check_space(partial, size)
        with ReadFiles() as files:
            weights = open_weights(checkpoint, state, on_open=files.add if verify else None)
            for name in {PROBE_FILE, RECONSTRUCTOR_FILE} & state.files.keys() if verify else ():
                files.add(checkpoint, state, name)
            text, image = _tokenizers(checkpoint, state, text_model, image_model)
            text.save(partial / TEXT_MODEL_FILE)
            image.save(partial / IMAGE_TOKENIZER_FOLDER)
            write_files(partial, text)
            with _bar("writing", size, show_progress) as bar:
                _write_weights(partial, weights, DTYPES[dtype], shard_bytes, bar.update)
            _write_reconstructor(partial, checkpoint, state, image)
            _write_texts(partial, checkpoint, state, dtype, parameters, text=text, image=image)
        difference = None
        if verify:
            with _bar("verifying", size, show_progress) as bar:
                difference = _verified(partial, checkpoint, DTYPES[dtype], bar.update)
        _publish(partial, out)
    except (OSError, SafetensorError) as error:
        what = f"cannot write {out}: {write_failure(error)}; nothing was left there"
        raise UserError(what, write_exit_code(error)) from error
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
    parser.add_argument("--ema", action="store_true", help="the moving average of the weights, where one is kept")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing folder")
    parser.add_argument(
        "--no-verify", action="store_true", help="neither compare the files' checksums nor recompute the stored logits"
    )
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
        ema=options.ema,
        show_progress=True,
    )
    checked = "not verified" if done.difference is None else f"largest logit difference {done.difference:.2g}"
    print(
        f"exported step {done.step} to {done.folder}: {done.parameters / 1e6:.1f}M parameters, "
        f"{done.bytes / 1e6:.1f} MB, {checked}, {time.perf_counter() - started:.1f} s"
    )
    return 0


def _tokenizers(
    checkpoint: Path, state: RunState, text_model: Path | None, image_model: Path | None
) -> tuple[TextTokenizer, ImageTokenizer]:
    """Those that the run was trained with; the image tokenizer as the checkpoint has it if it was trained too."""
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
    if state.recipe["model"].get("reconstructor") is not None:
        if trained := trained_tokenizer(read_reconstructor_file(checkpoint)):
            image.load_state_dict(trained)
            start = {"trained_on_from": state.tokenizers["image"], "steps": state.step}
            image.origin = {**(image.origin or {}), **start}
    return text, image


def _write_reconstructor(folder: Path, checkpoint: Path, state: RunState, image: ImageTokenizer) -> None:
    """Mapping and decoder of end-to-end training in fp32: their moving average if the run keeps one."""
    if state.recipe["model"].get("reconstructor") is None:
        return
    facts = {"step": state.step, "image_tokenizer": image.hash}
    save_reconstructor(folder / RECONSTRUCTOR_FOLDER, kept_weights(read_reconstructor_file(checkpoint)), facts)


def _write_weights(
    folder: Path, weights: Weights, dtype: torch.dtype, shard_bytes: int, progress: Progress
) -> None:
    sizes = [(name, torch.Size(shape).numel() * dtype.itemsize) for name, shape in weights.sizes()]
    files = plan_files(sizes, limit=shard_bytes)
    weight_map: dict[str, str] = {}
    for number, names in enumerate(files, 1):
        file = weights_file(number, len(files))
        write_weights(folder / file, weights, names, dtype, progress)
        weight_map |= dict.fromkeys(names, file)
    total = sum(size for _, size in sizes)
    _write_json(folder / INDEX_FILE, {"metadata": {"total_size": total}, "weight_map": weight_map})


def _write_texts(
    folder: Path, checkpoint: Path, state: RunState, dtype: str, parameters: int, *, text: TextTokenizer,
    image: ImageTokenizer,
) -> None:  # fmt: skip
    recipe = state.recipe
    sequence = {key: recipe["tokens"][key] for key in ("text_slots", "grid", "text_vocab_size", "image_vocab_size")}
    config = {
        "format_version": EXPORT_FORMAT_VERSION,
        **config_keys(sequence),
        "name": recipe["name"],
        "dtype": dtype_name(DTYPES[dtype]),
        "model": ModelConfig(**recipe["model"]).model_dump(mode="json"),
        "sequence": sequence,
        "text_tokenizer": {"file": TEXT_MODEL_FILE, "hash": state.tokenizers["text"]},
        "image_tokenizer": {"folder": IMAGE_TOKENIZER_FOLDER, "hash": image.hash},
        "training": {
            "step": state.step,
            "samples": state.samples,
            "tokens": state.tokens,
            "recipe_hash": state.recipe_hash,
            "versions": state.versions,
        },
    }
    samples = SamplesConfig(**recipe["samples"])
    sampling = SamplingConfig(guidance=samples.guidance, temperature=samples.temperature, top_k=samples.top_k)
    _write_json(folder / CONFIG_FILE, config)
    sizes = dict(text_pieces=text.vocab_size, text_vocab_size=sequence["text_vocab_size"])
    _write_json(folder / GENERATION_FILE, generation_settings(sampling, **sizes))
    (folder / "README.md").write_text(model_card(checkpoint, state, dtype, parameters), encoding="utf-8")


def _verified(folder: Path, checkpoint: Path, dtype: torch.dtype, progress: Progress) -> float:
    """Largest difference between the checkpoint's stored logits and those of the exported model, in the same dtype."""
    stored = load_probes(checkpoint)
    computed_in = DTYPE_OF_NAME[stored.dtype]
    model = empty_model(folder, read_description(folder)).to(computed_in)
    load_when_used(model, FolderWeights(folder), computed_in, progress)
    difference = largest_difference(stored, compute_probes(model, stored.inputs, device="cpu"))
    allowed = max(TOLERANCE[stored.dtype], TOLERANCE[dtype_name(dtype)]) * largest_logit(stored)
    if not difference <= allowed:
        raise UserError(
            f"the exported model gives other logits than the trainer stored in {checkpoint}: largest difference "
            f"{difference:.3g}, allowed {allowed:.3g}. The export was not kept; the checkpoint may be damaged"
        )
    return difference


def _check_place(out: Path, overwrite: bool) -> None:
    put_back(out.absolute())  # the folder that an export was to replace and, cut off, did not
    if not out.exists() or not any(out.iterdir() if out.is_dir() else [out]):
        return
    if not overwrite:
        raise UserError(f"{out} exists already; name a new folder, or replace it with --overwrite")
    if not (out / INDEX_FILE).exists():
        raise UserError(f"{out} holds no export, so --overwrite will not replace it; name a new folder")


def _check_space(folder: Path, size: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < size:
        raise UserError(
            f"{folder.parent}: the weights need {size / 1e9:.2f} GB, but {free / 1e9:.2f} GB are free; make room, "
            "choose another place, or a smaller --dtype"
        )


def _bar(what: str, size: int, shown: bool) -> tqdm:
    # None: shown on a terminal, not in a log.
    return tqdm(total=size, desc=what, unit="B", unit_scale=True, disable=None if shown else True)


def _publish(partial: Path, out: Path) -> None:
    for path in partial.rglob("*"):
        if path.is_file():
            with open(path, "rb+") as stream:
                os.fsync(stream.fileno())
    put_in_place(partial, out.absolute())


def _write_json(path: Path, data: dict) -> None:
    path.write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _bytes(text: str) -> int:
    match = re.fullmatch(r"(\d+(?:\.\d+)?) ?(MB|GB)", text)
    if not match or float(match[1]) <= 0:
        raise UserError(f"--shard-size {text!r}: write a size like 5GB or 500MB")
    return int(float(match[1]) * _UNITS[match[2]])
