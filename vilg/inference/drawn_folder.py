"""The folder that `vilg generate` fills prompt by prompt, so that a run that was stopped can go on where it was.

    settings.json     what decides the results: a folder takes only what the same settings give
    NNNN_RR.png       prompt and rank; the best is 00
    scores.jsonl      a line a candidate, the best first; a prompt's lines are added once its pictures are written
    grid.png          the first pictures on one page
"""

import hashlib
import itertools
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from vilg.errors import UserError
from vilg.inference.pictures import png_bytes
from vilg.pictures.sheet import Cell, Picture, Section, sample_sheet
from vilg.tokens.files import write_atomically
from vilg.tokens.vqgan.images import IMAGE_SUFFIXES

SETTINGS_FILE, SCORES_FILE, GRID_FILE = "settings.json", "scores.jsonl", "grid.png"
FORMAT_VERSION = 1
GRID_PICTURES = 240  # a page of thousands is neither looked at nor held in memory with pleasure
_OURS = re.compile(r"\d{4,}_\d{2,}\.png")
_INSTEAD = "name another folder, or say --overwrite, which deletes what `vilg generate` left there"


def files_stamp(folder: Path, *, without: Path) -> str:
    """Changes when a file of a folder does: a hash of names, sizes and times, since weights are too large to read.

    without: a folder that may lie inside it and does not count.
    """
    files = (path for path in sorted(folder.resolve().rglob("*")) if path.is_file())
    stats = ((path, path.stat()) for path in files if not path.is_relative_to(without.resolve()))
    about = [(path.name, status.st_size, status.st_mtime_ns) for path, status in stats]
    return hashlib.sha256(json.dumps(about).encode()).hexdigest()[:16]


class DrawnFolder:
    """The results of one run. `num` candidates a prompt are noted, the best `keep` of them as pictures."""

    def __init__(
        self, path: Path, prompts: Sequence[str], *, num: int, keep: int, settings: Mapping[str, object]
    ) -> None:
        self.path, self.prompts, self.num, self.keep = path, prompts, num, keep
        listed = hashlib.sha256(json.dumps(list(prompts)).encode()).hexdigest()[:16]
        about = {"prompts": len(prompts), "prompts_hash": listed, "num": num, "keep": keep}
        self.settings = {"format_version": FORMAT_VERSION} | about | settings
        self.shown_prompts = max(1, GRID_PICTURES // min(keep, GRID_PICTURES))

    def claim(self, *, overwrite: bool) -> int:
        """Make the folder and prove that it can be written to; how many prompts a run of these settings finished there.

        overwrite: delete what an earlier run left. Raises UserError if the folder holds the results of other settings or
        pictures of another origin, which `vilg eval fid` would count, or cannot be written to.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            present = [entry.name for entry in self.path.iterdir()]
        except OSError as error:
            raise UserError(f"--out {self.path}: cannot make this folder ({error.strerror}); name another one") from None
        results = [name for name in present if name in (SCORES_FILE, GRID_FILE) or _OURS.fullmatch(name)]
        foreign = [name for name in present if name not in results and Path(name).suffix[1:].lower() in IMAGE_SUFFIXES]
        if foreign:
            raise UserError(
                f"--out {self.path}: holds pictures that `vilg generate` did not draw ({min(foreign)}), and "
                "`vilg eval fid` would count them; name another folder"
            )
        if overwrite:
            for name in results:
                (self.path / name).unlink()
        elif results:
            self._check_same_run()
        said = json.dumps(self.settings, indent=1, ensure_ascii=False) + "\n"
        write_atomically(self.path / SETTINGS_FILE, said.encode())
        return sum(1 for _ in self._lines()) // self.num

    def _check_same_run(self) -> None:
        """Raise UserError unless settings.json says that these are the results of the same settings."""
        try:
            found = json.loads((self.path / SETTINGS_FILE).read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise UserError(f"--out {self.path}: holds an earlier run's results; {_INSTEAD}") from None
        except (OSError, ValueError) as error:
            raise UserError(f"--out {self.path}: {SETTINGS_FILE} cannot be read ({error}); {_INSTEAD}") from None
        found = found if isinstance(found, dict) else {}
        wanted = json.loads(json.dumps(self.settings))
        for name in [*wanted, *(name for name in found if name not in wanted)]:
            if found.get(name) != wanted.get(name):
                raise UserError(
                    f"--out {self.path}: holds another run's results ({name} {found.get(name)!r} there, "
                    f"{wanted.get(name)!r} now); {_INSTEAD}"
                )

    def begin(self, finished: int) -> None:
        """Keep the lines of the first `finished` prompts; those behind them are added anew."""
        if (self.path / SCORES_FILE).exists():
            os.truncate(self.path / SCORES_FILE, sum(map(len, self._lines(finished))))

    def add(self, row: int, images: np.ndarray, scores: np.ndarray, facts: Mapping[str, object]) -> None:
        """Write what was drawn for prompt number `row`: images uint8 [K, height, width, 3], scores [K]."""
        digits = max(4, len(str(len(self.prompts) - 1)))
        lines = []
        for rank, candidate in enumerate(np.argsort(-scores, kind="stable").tolist()):
            score = round(float(scores[candidate]), 6)
            said = {"prompt": self.prompts[row], "candidate": candidate, "score": score} | facts
            name = f"{row:0{digits}d}_{rank:02d}.png" if rank < self.keep else None
            if name:
                write_atomically(self.path / name, png_bytes(images[candidate], said))
            lines.append(json.dumps(said | {"file": name}, ensure_ascii=False) + "\n")
        try:
            with open(self.path / SCORES_FILE, "a", encoding="utf-8") as file:
                file.write("".join(lines))
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise UserError(f"{self.path / SCORES_FILE}: cannot write: {error.strerror}") from None

    def write_grid(self, finished: int) -> None:
        """Once the first prompts are there, unless it was done: one page with their best pictures, from the files."""
        if (self.path / GRID_FILE).exists() or finished < min(self.shown_prompts, len(self.prompts)):
            return
        lines = [json.loads(line) for line in self._lines(self.shown_prompts)]
        shown = min(self.keep, GRID_PICTURES)
        cells = []
        for start in range(0, len(lines), self.num):
            best = lines[start : start + shown]
            pictures = [Picture(self._read(line["file"]), f"{line['score']:.2f}") for line in best]
            cells.append(Cell(pictures, [best[0].get("drawn_text", best[0]["prompt"])]))
        note = f"under each picture: {lines[0]['score_is']}"
        sample_sheet([Section("", cells, columns=max(1, 8 // shown), note=note)], self.path / GRID_FILE)

    def summary(self) -> str:
        """What the folder holds, in a line."""
        said = f"{len(self.prompts)} prompts x {self.keep} of {self.num} candidates -> {self.path / GRID_FILE}"
        if len(self.prompts) > self.shown_prompts:
            said += f" (the first {self.shown_prompts} prompts)"
        if self.keep > GRID_PICTURES:
            said += f" (the best {GRID_PICTURES} of each)"
        return said

    def _read(self, name: str) -> np.ndarray:
        try:
            with Image.open(self.path / name) as picture:
                return np.asarray(picture.convert("RGB"))
        except OSError as error:
            raise UserError(f"{self.path / name}: cannot be read ({error}); draw again with --overwrite") from None

    def _lines(self, prompts: int | None = None) -> Iterator[bytes]:
        """The lines of scores.jsonl of the first prompts (None: of all) that were written whole."""
        if not (self.path / SCORES_FILE).exists():
            return
        with open(self.path / SCORES_FILE, "rb") as file:
            for line in itertools.islice(file, None if prompts is None else prompts * self.num):
                if line.endswith(b"\n"):
                    yield line
