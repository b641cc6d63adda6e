"""`vilg demo-data`: write the demo's scenes as raw shards, laid out as img2dataset lays out a download.

    vilg demo-data --out runs/demo/raw --set num_glyphs=64 --set num_train=12000

    out/scenes.json                    format version, configuration, number of samples and shards
    out/{train,seen,held_out}/NNNNN.tar         samples of three files: key.png, key.txt (the caption), key.json
    out/{train,seen,held_out}/NNNNN_stats.json  img2dataset's counts of the shard

`key.json` holds img2dataset's fields and ours (captions in both languages, glyphs, background, sizes, places). Two
things differ from a real download: there is no NNNNN.parquet (it repeats the JSON, and would drag in pyarrow), and the
stats' times are 0, since the same configuration must give the same bytes.
"""

from __future__ import annotations

import argparse
import difflib
import hashlib
import io
import json
import math
import shutil
import sys
from dataclasses import asdict
from pathlib import Path

import webdataset
import yaml
from PIL import Image
from pydantic import ValidationError
from tqdm import tqdm

from vilg.demo.glyphs import ASSETS
from vilg.demo.scenes import SPLITS, Scene, SceneConfig, make_scene, render
from vilg.errors import UserError

FORMAT_VERSION = 1
INDEX_NAME = "scenes.json"


def write_raw(
    config: SceneConfig, out_dir: str | Path, *, samples_per_shard: int = 1000, progress: bool = True
) -> dict:
    """Write all splits of `config` under `out_dir`; return what `scenes.json` holds.

    The folder appears in one piece: it is built beside its place and renamed. A folder that already holds exactly this
    data is left alone.

    Raises:
        UserError: `out_dir` holds something else, or `samples_per_shard` is not positive.
    """
    if samples_per_shard < 1:
        raise UserError(f"samples_per_shard={samples_per_shard}: use 1 or more")
    out_dir = Path(out_dir)
    index = _describe(config, samples_per_shard)
    if out_dir.exists() and (not out_dir.is_dir() or any(out_dir.iterdir())):
        if not (out_dir / INDEX_NAME).is_file():
            raise UserError(f"{out_dir} is not empty and not demo data (no {INDEX_NAME}); name another folder")
        if _read_index(out_dir) != index:
            raise UserError(
                f"{out_dir} holds demo data of another configuration: {_difference(_read_index(out_dir), index)}. "
                "Name another folder or remove this one"
            )
        return index
    partial = out_dir.with_name(f".{out_dir.name}.partial")
    if partial.exists():  # what an interrupted run left behind
        shutil.rmtree(partial)
    total = sum(config.count(split) for split in SPLITS)
    with tqdm(total=total, desc="demo scenes", unit="scene", disable=not progress) as bar:
        for split in SPLITS:
            (partial / split).mkdir(parents=True)
            for shard in range(index["splits"][split]["shards"]):
                _write_shard(config, split, shard, samples_per_shard, partial / split, bar)
    (partial / INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    if out_dir.exists():  # an empty folder; os.replace would refuse it on some systems
        out_dir.rmdir()
    partial.rename(out_dir)
    return index


def read_scenes(out_dir: str | Path) -> SceneConfig:
    """The configuration that the demo data in `out_dir` was made with; UserError when there is none to read."""
    return SceneConfig(**_read_index(Path(out_dir))["config"])


def load_scene_config(path: str | Path | None = None, overrides: list[str] | tuple[str, ...] = ()) -> SceneConfig:
    """A SceneConfig from a YAML file of its fields, with `key=value` overrides on top.

    Raises:
        UserError: naming the file or option, the key and what would work.
    """
    values: dict = {}
    sources: dict[str, str] = {}
    if path is not None:
        try:
            loaded = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise UserError(f"{path}: cannot be read as YAML: {error}") from error
        if not isinstance(loaded, dict):
            raise UserError(f"{path}: expected lines of `key: value`, found {type(loaded).__name__}")
        values.update(loaded)
        sources.update(dict.fromkeys(loaded, str(path)))
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals:
            raise UserError(f"--set {override}: expected key=value, e.g. --set num_glyphs=64")
        try:
            values[key] = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise UserError(f"--set {override}: the value is not valid YAML") from error
        sources[key] = f"--set {override}"
    try:
        return SceneConfig(**values)
    except ValidationError as error:
        raise UserError("; ".join(_explain(problem, sources) for problem in error.errors())) from error


def _explain(problem: dict, sources: dict[str, str]) -> str:
    """One pydantic problem in one clause that names where the value came from and what would work."""
    key = str(problem["loc"][0]) if problem["loc"] else ""
    where = f"{sources[key]}: " if key in sources else ""
    if problem["type"] == "extra_forbidden":
        near = difflib.get_close_matches(key, SceneConfig.model_fields, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"known keys: {', '.join(SceneConfig.model_fields)}"
        return f"{where}unknown key {key!r}; {hint}"
    message = problem["msg"].removeprefix("Value error, ")
    return f"{where}{key}={problem['input']!r}: {message}" if key else message


def _describe(config: SceneConfig, samples_per_shard: int) -> dict:
    """What `scenes.json` says of data not yet written."""
    counts = {split: config.count(split) for split in SPLITS}
    return {
        "format_version": FORMAT_VERSION,
        "config": config.model_dump(mode="json"),
        "samples_per_shard": samples_per_shard,
        "glyphs_sha256": hashlib.sha256((ASSETS / "glyphs.json").read_bytes()).hexdigest(),
        "splits": {s: {"samples": n, "shards": math.ceil(n / samples_per_shard)} for s, n in counts.items()},
    }


def _read_index(out_dir: Path) -> dict:
    path = out_dir / INDEX_NAME
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"{path} does not exist; `vilg demo-data --out {out_dir}` makes it") from error
    except ValueError as error:
        raise UserError(f"{path} is not JSON: {error}") from error
    version = index.get("format_version") if isinstance(index, dict) else None
    if version != FORMAT_VERSION:
        raise UserError(f"{path}: format_version {version!r} is unknown; this vilg reads version {FORMAT_VERSION}")
    return index


def _difference(there: dict, wanted: dict) -> str:
    """The first few settings that differ, "there, not wanted"."""
    pairs = [(key, there["config"].get(key), value) for key, value in wanted["config"].items()]
    pairs += [(key, there.get(key), wanted[key]) for key in ("samples_per_shard", "glyphs_sha256")]
    return ", ".join(f"{key} is {old!r}, not {new!r}" for key, old, new in pairs if old != new)


def _write_shard(
    config: SceneConfig, split: str, shard: int, samples_per_shard: int, folder: Path, bar: tqdm
) -> None:
    """Write one tar and its stats. Scene `shard * samples_per_shard + n` becomes the n-th sample."""
    first = shard * samples_per_shard
    indices = range(first, min(first + samples_per_shard, config.count(split)))
    digits = max(1, math.ceil(math.log10(samples_per_shard)))
    # mtime is fixed: a tar header carries it, and equal data must be equal bytes.
    with open(folder / f"{shard:05d}.tar", "wb") as file:
        with webdataset.TarWriter(file, encoder=False, mtime=0) as tar:
            for position, index in enumerate(indices):
                tar.write(_sample(config, make_scene(config, split, index), f"{shard:05d}{position:0{digits}d}"))
                bar.update()
    stats = {
        "count": len(indices),
        "successes": len(indices),
        "failed_to_download": 0,
        "failed_to_resize": 0,
        "duration": 0.0,
        "start_time": 0.0,
        "end_time": 0.0,
        "status_dict": {"success": len(indices)},
    }
    (folder / f"{shard:05d}_stats.json").write_text(json.dumps(stats, indent=4), encoding="utf-8")


def _sample(config: SceneConfig, scene: Scene, key: str) -> dict:
    """One webdataset sample, all values bytes."""
    buffer = io.BytesIO()
    Image.fromarray(render(config, scene)).save(buffer, format="PNG")
    meta = {
        "url": f"vilg-demo:{scene.split}/{scene.index}",
        "caption": scene.caption(),
        "key": key,
        "status": "success",
        "error_message": None,
        "width": config.image_size,
        "height": config.image_size,
        "original_width": config.image_size,
        "original_height": config.image_size,
        "exif": "{}",
        "sha256": hashlib.sha256(buffer.getvalue()).hexdigest(),
        "caption_zh": scene.caption("zh"),
        "caption_en": scene.caption("en"),
        **asdict(scene),
    }
    return {
        "__key__": key,
        "png": buffer.getvalue(),
        "txt": scene.caption().encode(),
        "json": json.dumps(meta, indent=4, ensure_ascii=False).encode(),
    }


def main(argv: list[str] | None = None) -> int:
    """Entry point of `vilg demo-data`."""
    parser = argparse.ArgumentParser(
        prog="vilg demo-data",
        description="Write the demo's image-text pairs as raw shards (see vilg/demo/generate_data.py for the layout).",
        epilog="keys: " + "; ".join(f"{k} ({f.default}): {f.description}" for k, f in SceneConfig.model_fields.items()),
    )
    parser.add_argument("--out", type=Path, required=True, help="folder to write; it must not hold anything else")
    parser.add_argument("--config", type=Path, help="YAML file of scene settings")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override one scene setting")
    parser.add_argument("--samples-per-shard", type=int, default=1000, help="samples in one tar (default 1000)")
    args = parser.parse_args(argv)
    config = load_scene_config(args.config, args.set)
    index = write_raw(config, args.out, samples_per_shard=args.samples_per_shard, progress=sys.stderr.isatty())
    counts = ", ".join(f"{split} {part['samples']}" for split, part in index["splits"].items())
    print(f"{args.out}: {counts} scenes of {config.num_glyphs} glyphs x {config.num_backgrounds} backgrounds")
    return 0


if __name__ == "__main__":
    sys.exit(main())
