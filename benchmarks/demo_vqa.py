"""Claim: pre-training lets the demo's model, tuned for minutes on a CPU, answer questions about scenes it never saw.

    .venv/bin/vilg demo --out runs/demo
    .venv/bin/python benchmarks/demo_vqa.py --demo runs/demo --work runs/demo_vqa --json benchmarks/results/demo_vqa.json

Four questions about each scene: its object and its background, in Chinese and in English. They are terse because the demo's text
segment has 12 slots and its pieces spell nothing but captions: "左边是什么？" would take 19 tokens, all but one of them bytes
(and the demo's scenes have one object, so nothing is on the left). Everything is done with vilg's commands: `data ingest` of a
table of questions, `data tokenize`, `train` with `data.directions: answer`, `export`, `answer`, `eval vqa`. Options that are not the
script's own override the training recipe, for a model of another shape than launch/recipes/demo/train.yaml's.

Contenders, same data, steps and batch:

- tuned: launch/recipes/demo/train.yaml with `init_from` the demo's export, in fp32 (not every CPU has bf16);
- scratch: the same from random weights, at the rate of the demo's own pre-training (the better one for it);
- export: the demo's export as it is, which was never asked anything;
- majority: the most usual answer to each question (of the references themselves, which favours it).

held_out: combinations of object and background that neither pre-training nor tuning showed; seen: shown ones. A figure is the
share of exactly matching answers; answers about one scene are not
independent, so its standard error is that of the number of scenes rather than of answers.
"""

import argparse
import itertools
import json
import os
import platform
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
os.environ.setdefault("OMP_NUM_THREADS", "1")

from PIL import Image  # noqa: E402

from vilg.checkpoint.state import source_commit, versions  # noqa: E402
from vilg.demo.generate_data import read_scenes  # noqa: E402
from vilg.demo.glyphs import load_glyphs  # noqa: E402
from vilg.demo.scenes import BACKGROUNDS, Scene, SceneConfig, make_scene, render  # noqa: E402

RATES = {"tuned": 5e-4, "scratch": 2e-3}


def questions(scene: Scene) -> list[dict[str, str]]:
    """All questions about a scene with their answers."""
    glyph, background = load_glyphs()[scene.glyphs[0]], BACKGROUNDS[scene.background]
    asked = {
        "背景上的": glyph.zh,
        "背景色？": background.zh,
        "what on a background?": glyph.en,
        "what background?": background.en,
    }
    return [{"question": question, "answer": answer} for question, answer in asked.items()]


def write_table(config: SceneConfig, split: str, count: int, folder: Path, glyphs: set[int]) -> Path:
    """Pictures and a JSONL table of image, question and answer, as `data ingest`, `answer` and `eval vqa` read them, of the
    first `count` scenes of a split that show one of `glyphs`."""
    folder.mkdir(parents=True)
    lines = []
    every = (make_scene(config, split, index) for index in itertools.count())
    known = (scene for scene in every if scene.glyphs[0] in glyphs)
    for index, scene in enumerate(itertools.islice(known, count)):
        Image.fromarray(render(config, scene)).save(folder / f"{index:05d}.png")
        lines += [{"image": f"{index:05d}.png"} | each for each in questions(scene)]
    table = folder / "questions.jsonl"
    table.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")
    return table


def vilg(*argv: object, output: Path | None = None) -> float:
    """Run a command; its CPU seconds, those of its child processes included."""
    before = os.times()
    print("$ vilg", *argv, file=sys.stderr, flush=True)
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    with open(output or os.devnull, "w", encoding="utf-8") as file:
        command = [sys.executable, "-m", "vilg", *map(str, argv)]
        subprocess.run(command, check=True, cwd=ROOT, env=environment, stdout=file)
    after = os.times()
    return after.children_user + after.children_system - before.children_user - before.children_system


def scores(model: Path, tables: dict[str, Path], work: Path) -> dict:
    """Exact match of a model's answers on each split, all together and by question."""
    found = {}
    for split, table in tables.items():
        answers, result = work / f"{split}.answers.jsonl", work / f"{split}.json"
        vilg("answer", "--model", model, "--questions", table, "--batch", 256, "--device", "cpu", output=answers)
        vilg("eval", "vqa", answers, "--references", table, "--out", result)
        figures = json.loads(result.read_text())
        by_question = {question: each["accuracy"] for question, each in figures["questions"].items()}
        majority = {question: each["majority"] for question, each in figures["questions"].items()}
        found[split] = {
            "accuracy": figures["accuracy"], "majority": figures["majority"], "answers": figures["answers"],
            "by_question": by_question, "majority_by_question": majority,
        }  # fmt: skip
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--demo", type=Path, default=Path("runs/demo"), help="folder of a finished demo")
    parser.add_argument("--work", type=Path, required=True, help="new folder for data and runs")
    parser.add_argument("--json", type=Path, help="write the result there")
    parser.add_argument("--scenes", type=int, default=4000, help="training scenes")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--asked", type=int, default=256, help="scenes asked about, of each split")
    parser.add_argument("--glyphs", type=int, nargs="+", help="objects asked about, by number; default: the demo's")
    options, overrides = parser.parse_known_args()  # what is left overrides the training recipe
    demo, work = options.demo.resolve(), options.work.resolve()
    if work.exists():
        sys.exit(f"error: --work {work} is there already; name a new folder")
    config, export = read_scenes(demo / "raw"), demo / "export"
    glyphs = set(options.glyphs or range(config.num_glyphs))
    tables = {split: write_table(config, split, options.asked, work / split, glyphs) for split in ("seen", "held_out")}
    table = write_table(config, "train", options.scenes, work / "train", glyphs)
    vilg("data", "ingest", table, "--out", work / "raw")
    vilg("data", "tokenize", work / "raw", "--image-model", export / "image_tokenizer", "--out", work / "tokens")
    results = {"export": {"figures": scores(export, tables, work)}}
    for name, rate in RATES.items():
        start = [f"--init_from={export}"] if name == "tuned" else []
        seconds = vilg(
            "train", "launch/recipes/demo/train.yaml", f"--run_dir={work / name}", *start, f"--data.train={work / 'tokens'}",
            f"--tokens.text_model={export / 'text.model'}", f"--tokens.image_model={export / 'image_tokenizer'}",
            "--precision=fp32", "--data.directions=answer", f"--optimizer.lr={rate}", f"--schedule.steps={options.steps}",
            f"--schedule.warmup_steps={min(20, options.steps)}", "--samples.every_steps=0", *overrides,
        )  # fmt: skip
        vilg("export", work / name, "--out", work / name / "export")
        results[name] = {
            "lr": rate,
            "training_cpu_seconds": round(seconds, 1),
            "figures": scores(work / name / "export", tables, work / name),
        }
    result = {
        "claim": "held-out questions: tuned from the demo's export above scratch and above the most usual answer",
        "command": "python benchmarks/demo_vqa.py " + " ".join(sys.argv[1:]),
        "settings": {"scenes": options.scenes, "steps": options.steps, "batch": 32, "scenes_asked": options.asked, "objects": len(glyphs)},
        "contenders": results,
        "machine": {"processor": platform.processor() or platform.machine(), "threads": 1},
        "versions": versions(),
        "commit": source_commit(),
    }
    print(json.dumps(result, indent=1, ensure_ascii=False))
    if options.json:
        options.json.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
