"""`vilg demo`: the whole way from raw pictures to new pictures and captions, each stage an ordinary `vilg` command.

The commands are printed as they run, so the demo is the tutorial too. A stage whose command, recipes and predecessors
are unchanged, and whose product is still there, is skipped on a rerun; an interrupted one continues where its own
command continues.
"""

import argparse
import hashlib
import json
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

import vilg
from vilg.config import Recipe, load_recipe
from vilg.errors import UserError
from vilg.tokens.files import write_atomically

STATE_FORMAT_VERSION = 1
FAST_EVALUATION = ("--num-scenes", "8", "--num-candidates", "2")


@dataclass(frozen=True)
class Stage:
    """One command of the demo: its name in the report, what to run, the recipe files it reads, and the file that its
    command writes last."""

    name: str
    title: str
    command: tuple[str, ...]
    recipes: tuple[Path, ...] = ()
    makes: Path | None = None

    def key(self, before: str) -> str:
        """Changes when the command, a recipe or any stage before it changes."""
        digest = hashlib.sha256(f"{before}\n{shlex.join(self.command)}\n{vilg.__version__}".encode())
        for path in self.recipes:
            digest.update(path.read_bytes())
        return digest.hexdigest()

    @property
    def missing(self) -> bool:
        """Whether the product is not there: never made, or deleted since."""
        return self.makes is not None and not self.makes.exists()


def stages(
    out: Path, recipes: Path, *, seed: int, processes: int, prompts: Sequence[str],
    training: Sequence[str] = (), evaluation: Sequence[str] = (),
) -> list[Stage]:  # fmt: skip
    """The demo's commands in order. `recipes` holds scenes.yaml, image_tokenizer.yaml and train.yaml; `prompts` are
    drawn at the end; `training` and `evaluation` are further options of these two."""
    raw, tokens, held_out, export = (out / name for name in ("raw", "tokens", "tokens_held_out", "export"))
    scenes, image, train = (recipes / name for name in ("scenes.yaml", "image_tokenizer.yaml", "train.yaml"))
    alone = ("vilg",)
    together = ("torchrun", "--standalone", f"--nproc-per-node={processes}", "-m", "vilg")
    text_model, image_model = out / "text.model", out / "image_tokenizer"
    plan = [
        ("data", "Compose image-text pairs from emoji glyphs, as img2dataset would write them",
         (*alone, "demo-data", "--out", raw, "--config", scenes, "--set", f"seed={seed}"), (scenes,),
         raw / "scenes.json"),
        ("text_tokenizer", "Train the SentencePiece text tokenizer on the captions",
         (*alone, "tokenizer", "train-text", "--captions", raw / "train", "--vocab-size", 1000, "--out", text_model),
         (), text_model),
        ("image_tokenizer", "Train the image tokenizer: pictures to codes and back",
         (*together, "tokenizer", "train-image", "--data", raw / "train", "--out", image_model, "--config", image,
          "--set", f"seed={seed}"), (image,), image_model / "metrics.json"),
        ("tokenize", "Turn the pictures into token shards",
         (*alone, "data", "tokenize", raw / "train", "--image-model", image_model, "--out", tokens), (),
         tokens / "manifest.json"),
        ("tokenize_held_out", "The same with combinations that training never shows",
         (*alone, "data", "tokenize", raw / "held_out", "--image-model", image_model, "--out", held_out), (),
         held_out / "manifest.json"),
        ("train", "Train the transformer in both directions",
         (*together, "train", train, f"--run_dir={out / 'run'}", f"--seed={seed}", f"--data.train={tokens}",
          f"--evaluation.data={held_out}",
          f"--tokens.text_model={text_model}", f"--tokens.image_model={image_model}", *training), (train,),
         out / "run" / "DONE"),
        ("export", "Convert the sharded checkpoint into one folder for inference",
         (*alone, "export", out / "run", "--out", export, "--overwrite"), (), export / "config.json"),
        ("evaluate", "Measure both directions on seen and held-out scenes, and draw the sheet",
         (*alone, "eval", "scenes", "--model", export, "--raw", raw, "--out", out / "evaluation", "--seed", seed,
          *evaluation), (), out / "evaluation" / "scenes.json"),
        ("generate", "Draw pictures from text",
         (*alone, "generate", "--model", export, *(part for text in prompts for part in ("--prompt", text)),
          "--num", 8, "--best", 4, "--seed", seed, "--out", out / "generated", "--overwrite"), (),
         out / "generated" / "scores.jsonl"),
        ("caption", "Write captions under pictures",
         (*alone, "caption", "--model", export, out / "generated" / "0000_00.png", out / "generated" / "0001_00.png"),
         (), None),
    ]  # fmt: skip
    return [Stage(name, title, tuple(map(str, command)), *files) for name, title, command, *files in plan]


class MemoryPeak(threading.Thread):
    """Samples the summed proportional memory (bytes) of this process and its descendants every two seconds (reading it costs 50 ms)."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.peak = 0
        self._stopped = threading.Event()

    def run(self) -> None:
        while not self._stopped.wait(2.0):
            processes = [psutil.Process(), *psutil.Process().children(recursive=True)]
            self.peak = max(self.peak, sum(map(_memory, processes)))

    def stop(self) -> int:
        self._stopped.set()
        self.join()
        return self.peak


def _memory(process: psutil.Process) -> int:
    try:
        # Proportional set size counts shared pages once; not every system reports it.
        return getattr(process.memory_full_info(), "pss", None) or process.memory_info().rss
    except psutil.Error:
        return 0  # the process ended between listing and reading


def run_stages(plan: Sequence[Stage], state_file: Path) -> dict[str, dict[str, float]]:
    """Run what is not done yet; returns seconds and peak bytes per stage, also of skipped ones.

    Raises UserError naming the stage whose command failed.
    """
    state = _read_state(state_file)
    before, measured = "", {}
    for number, stage in enumerate(plan, 1):
        before = stage.key(before)
        heading = f"[{number}/{len(plan)}] {stage.title}"
        if state.get(stage.name, {}).get("key") == before and not stage.missing:
            print(f"{heading}: done before ({state[stage.name]['seconds']:.0f} s)", flush=True)
        else:
            print(f"\n{heading}\n$ {shlex.join(stage.command)}", flush=True)
            state[stage.name] = {"key": before, **_run(stage)}
            content = {"format_version": STATE_FORMAT_VERSION, "stages": state}
            write_atomically(state_file, json.dumps(content, indent=2).encode() + b"\n")
        measured[stage.name] = {k: state[stage.name][k] for k in ("seconds", "peak_bytes")}
    return measured


def _run(stage: Stage) -> dict[str, float]:
    # One thread a process: two processes of two threads each fight over two cores.
    environment = {**os.environ, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
    runner = {"vilg": ("vilg",), "torchrun": ("torch.distributed.run",)}[stage.command[0]]
    memory, start = MemoryPeak(), time.monotonic()
    memory.start()
    try:
        code = _wait(subprocess.Popen([sys.executable, "-m", *runner, *stage.command[1:]], env=environment))
    finally:
        peak = memory.stop()
    if code:
        raise UserError(
            f"stage {stage.name!r} ended with exit code {code}; its message is above. Mend the cause and run the same "
            "command again: finished stages are kept"
        )
    if stage.missing:  # a training that a signal stops is saved and ends with 0
        raise UserError(f"stage {stage.name!r} was stopped before it was through; the same command continues it")
    return {"seconds": round(time.monotonic() - start, 1), "peak_bytes": peak}


def _wait(process: subprocess.Popen) -> int:
    """Exit code of a stage, which is never killed from here: ranks have sessions of their own and would train on alone.

    Ctrl-C reaches the stage from the terminal; this waits for its orderly end (a training saves first). A SIGTERM is
    handed on.
    """
    before = signal.signal(signal.SIGTERM, lambda *_: process.terminate())
    try:
        return process.wait()
    except KeyboardInterrupt:
        process.wait()
        raise
    finally:
        signal.signal(signal.SIGTERM, before)


def _read_state(path: Path) -> dict[str, dict]:
    if not path.exists():
        return {}
    state = json.loads(path.read_text())
    if state.get("format_version") != STATE_FORMAT_VERSION:
        raise UserError(f"{path}: written by another version of the demo; choose another --out or delete the folder")
    return state["stages"]


def recipes_folder(scale: str) -> Path:
    """Folder with the recipes of a scale, in the checkout this package runs from."""
    folder = Path(vilg.__file__).resolve().parent.parent / "launch" / "recipes" / scale
    if not folder.is_dir():
        raise UserError(f"{folder}: not found; the demo runs from a clone of the repository (see README.md)")
    return folder


def read_train_recipe(folder: Path, processes: int) -> Recipe:
    """The scale's train.yaml, checked before the first stage rather than minutes later, when training starts.

    Raises UserError, also where the working directory is not the clone: recipes name ds_configs/ relative to it.
    """
    if processes < 1:
        raise UserError(f"--processes {processes}: training needs at least one")
    root = folder.parent.parent.parent
    if not Path("ds_configs").is_dir():
        raise UserError(f"recipes name files of ds_configs/ relative to the clone; run this in {root}")
    return load_recipe(folder / "train.yaml", world_size=processes)


def precision_option(recipe: Recipe) -> tuple[str, ...]:
    """The recipe's bf16, or fp32 said aloud where the processor would have to emulate it."""
    from vilg.parallel.precision import computes_bf16  # imports torch

    if recipe.precision == "fp32" or computes_bf16():
        return ()
    print("this processor has no bf16 arithmetic, which torch would emulate eight times slower: training in fp32")
    return ("--precision=fp32",)


def main(argv: Sequence[str]) -> int:
    """From clone to pictures and captions: every stage in turn, a sheet, a report."""
    parser = argparse.ArgumentParser(prog="vilg demo", description=main.__doc__)
    parser.add_argument("--out", type=Path, help="folder for everything; default runs/demo, with --fast runs/demo-fast")
    parser.add_argument("--seed", type=int, default=0, help="seed of data, tokenizers, training and sampling")
    parser.add_argument("--processes", type=int, help="training processes; default 2, with --gpu-size 1 (one a GPU)")
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--fast", action="store_true", help="about a minute, for tests; the pictures are bad")
    size.add_argument("--gpu-size", type=int, choices=(48, 64), help="two objects at 48 or 64 pixels, for a GPU")
    args = parser.parse_args(argv)
    scale = "demo-fast" if args.fast else f"demo-gpu-{args.gpu_size}" if args.gpu_size else "demo"

    out = args.out or Path("runs") / scale
    processes = (1 if args.gpu_size else 2) if args.processes is None else args.processes
    recipes = recipes_folder(scale)
    recipe = read_train_recipe(recipes, processes)
    out.mkdir(parents=True, exist_ok=True)
    plan = stages(
        out, recipes, seed=args.seed, processes=processes, prompts=recipe.samples.prompts[:2],
        training=precision_option(recipe), evaluation=FAST_EVALUATION if args.fast else (),
    )  # fmt: skip
    measured = run_stages(plan, out / "stages.json")
    from vilg.demo.report import write_report

    write_report(out, measured, scale=scale, seed=args.seed)
    return 0
