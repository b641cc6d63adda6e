"""What the commands that open an export folder share: their options, and pictures and texts read from files."""

import argparse
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

from vilg.config.environment import process_environment
from vilg.errors import UserError
from vilg.inference.load import Bundle, load_model
from vilg.parallel.grid import Grid
from vilg.tokens.vqgan.images import BadImage, decode_image


def parse_options(
    parser: argparse.ArgumentParser, argv: Sequence[str], *, temperature: float | None
) -> argparse.Namespace:
    """Add the shared options, read argv, check what can be checked before the model is opened. Raises UserError."""
    parser.add_argument("--model", type=Path, required=True, help="export folder")
    parser.add_argument("--seed", type=int, default=0, help="seed of the random streams")
    parser.add_argument("--temperature", type=float, default=temperature, help="sampling temperature; 0 is greedy")
    parser.add_argument("--top-k", type=int, help="tokens kept when sampling; 0 keeps all")
    parser.add_argument("--top-p", type=float, help="probability mass kept when sampling; 1 keeps all")
    parser.add_argument("--batch", type=int, default=64, help="rows decoded together")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda")
    args = parser.parse_args(argv)
    if args.batch < 1:
        raise UserError(f"--batch {args.batch}: decode at least one row at a time")
    if args.seed < 0:
        raise UserError(f"--seed {args.seed}: must be 0 or more")
    check_device(args.device)
    return args


@contextmanager
def opened(folder: Path, *, device: str) -> Iterator[Bundle]:
    """The model of an export folder. Under torchrun or with its variables set, all processes hold parts of one model
    (tensor parallelism, for one that does not fit a GPU); each makes the same calls, and `is_main` says which one speaks."""
    place = process_environment(os.environ, slurm=False)
    world, local = int(place["WORLD_SIZE"]), int(place["LOCAL_RANK"])
    if world == 1:
        yield load_model(folder, device=device)
        return
    if device == "cuda":
        torch.cuda.set_device(local)
        device = f"cuda:{local}"
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.startswith("cuda") else "gloo")
    try:
        yield load_model(folder, device=device, grid=Grid.build(tensor=world))
        dist.barrier()
    finally:
        dist.destroy_process_group()


def is_main(bundle: Bundle) -> bool:
    """Whether this process writes and prints."""
    return bundle.model.grid.rank == 0


def is_first_process() -> bool:
    """The same before the model is there: of the processes that torchrun started, the one that will write and print."""
    return int(os.environ.get("RANK", 0)) == 0


def of_first_process(value: int) -> int:
    """The first process's `value` in every process, once the model is opened. Others may not see its files."""
    if dist.is_initialized():
        shared = [value]
        dist.broadcast_object_list(shared, src=0)
        return shared[0]
    return value


def check_device(name: str) -> None:
    """Raise UserError unless torch can compute on `--device name` here."""
    try:
        torch.zeros(1, device=name).item()  # read back, which the meta device cannot
    except (RuntimeError, AssertionError) as error:  # an unknown name; a GPU that is not there, or torch without CUDA
        reason = str(error).splitlines()[0]
        raise UserError(f"--device {name}: cannot be used here ({reason}); use cpu, or cuda with a GPU") from None


def read_lines(path: Path, *, option: str, expected: str) -> list[tuple[int, str]]:
    """Lines of a UTF-8 file that are not blank, stripped, with their numbers from 1. Raises UserError."""
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()  # editors on Windows begin files with a mark
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{option} {path}: {error}; expected a UTF-8 file with {expected}") from None
    return [(number, line.strip()) for number, line in enumerate(lines, 1) if line.strip()]


def read_image(path: Path, size: int) -> np.ndarray:
    """uint8 [size, size, 3] (`decode_image`). Raises UserError naming the file."""
    try:
        return decode_image(path.read_bytes(), size)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}") from None
    except BadImage as error:
        raise UserError(f"{path}: {error}") from None


def encode_files(bundle: Bundle, paths: Sequence[Path], *, batch: int) -> Tensor:
    """Codes int64 [I, N] of picture files, `batch` of them in memory at once. Raises UserError naming a bad one."""
    parts = []
    with tqdm(total=len(paths), unit="image", desc="reading", disable=not is_main(bundle)) as bar:
        for start in range(0, len(paths), batch):
            pictures = [read_image(path, bundle.image_size[0]) for path in paths[start : start + batch]]
            parts.append(bundle.encode_images(np.stack(pictures)))
            bar.update(len(pictures))
    return torch.cat(parts)
