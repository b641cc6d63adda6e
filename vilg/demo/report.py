"""What the demo leaves behind: samples.png, loss.png, report.json and a summary on the screen."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vilg.demo.scenes import LANGUAGES
from vilg.pictures.plots import loss_plot, read_metrics
from vilg.pictures.sheet import Cell, Picture, Section, sample_sheet
from vilg.tokens.files import write_atomically
from vilg.tools.env import environment

CELLS_PER_LANGUAGE = 12
SPLIT_HEADINGS = {
    "seen": "Seen in training (this is memorisation)",
    "held_out": "Held out: this object was never shown on this background",
}


def draw_samples(results: Mapping[str, Any], path: Path, *, best_of: int) -> Path:
    """Real, reconstruction and best-of-n sample side by side; both languages, seen and held-out apart."""
    sections = []
    for split, result in results.items():
        cells = []
        for index in range(min(CELLS_PER_LANGUAGE, len(result.scenes))):
            for language in LANGUAGES:
                scene = result.scenes[index]
                written = result.captions[language][index]
                prompt = scene.caption(language)
                pictures = [
                    Picture(result.real[index]),
                    Picture(result.reconstructed[index]),
                    Picture(result.best[language][index], right=bool(result.best_right[language][index])),
                ]
                verdict = "as the prompt" if written == prompt else f"“{written}”"
                cells.append(Cell(pictures, [prompt, f"its caption of the real one: {verdict}"]))
        labels = ("real", "reconstruction", f"drawn, best of {best_of}")
        sections.append(Section(SPLIT_HEADINGS[split], cells, columns=4, labels=labels))
    return sample_sheet(
        sections,
        path,
        title="vilg demo: pictures from text, captions from pictures, one transformer",
        subtitle="green frame: nearest of all scenes in pixel space is the one asked for",
    )


def print_figures(report: Mapping[str, Any]) -> None:
    """The evaluation as a table."""
    count = report["best_of_n"]
    print(f"\n{'':34}{'seen (memorised)':>20}{'held out':>14}")
    print(f"    {'scenes measured':30}{report['seen']['scenes']:20}{report['held_out']['scenes']:14}")
    for language in LANGUAGES:
        for key, label in (
            ("caption_exact", "caption exactly right"),
            ("image_glyph_recall", "object right, one sample"),
            ("image_glyph_recall_best_of_n", f"object right, best of {count}"),
            ("image_background_accuracy", "background right, one sample"),
            ("nll_right", "nats/token, right caption"),
            ("nll_wrong_caption", "nats/token, wrong caption"),
        ):
            seen, held_out = (report[split][language][key] for split in SPLIT_HEADINGS)
            print(f"{language}  {label:30}{seen:20.3f}{held_out:14.3f}")
    for what in ("reconstruction", "real"):
        label = f"object right on {what} pictures"
        seen, held_out = (report[split][what]["glyph_recall"] for split in SPLIT_HEADINGS)
        print(f"    {label:30}{seen:20.3f}{held_out:14.3f}")


def write_report(out: Path, measured: Mapping[str, Mapping[str, float]], *, scale: str, seed: int) -> None:
    """report.json, loss.png and samples.png from what the stages left in `out`; prints the summary."""
    evaluation = json.loads((out / "evaluation" / "scenes.json").read_text())
    tokenizer = json.loads((out / "image_tokenizer" / "metrics.json").read_text())
    write_atomically(out / "samples.png", (out / "evaluation" / "samples.png").read_bytes())
    metrics = read_metrics(out / "run" / "logs" / "metrics.jsonl")
    loss_plot(metrics, out / "loss.png", title=f"vilg {scale}, seed {seed}")
    report = {
        **evaluation,
        "scale": scale,
        "seed": seed,
        "seconds": {name: stage["seconds"] for name, stage in measured.items()},
        "total_seconds": round(sum(stage["seconds"] for stage in measured.values()), 1),
        "peak_memory_gb": round(max(stage["peak_bytes"] for stage in measured.values()) / 1e9, 2),
        "vq": {key: tokenizer[key] for key in ("psnr_db", "codebook_used", "codebook_size", "perplexity")},
        "machine": environment(),
    }
    write_atomically(out / "report.json", json.dumps(report, indent=2).encode() + b"\n")
    print_figures(report)
    vq = report["vq"]
    print(
        f"\nimage tokenizer: {vq['psnr_db']:.1f} dB, {vq['codebook_used']} of {vq['codebook_size']} codes used\n"
        f"time {report['total_seconds'] / 60:.1f} min, peak memory {report['peak_memory_gb']:.1f} GB\n"
        f"look at {out / 'samples.png'} and {out / 'loss.png'}; all figures are in {out / 'report.json'}"
    )
