"""`vilg eval fid`: FID and Inception Score of a folder of pictures, or rFID of a model's image tokenizer.

Figures compare only where network, resizing, crop and number of pictures are the same: all of them are in the result.
"""

import argparse
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from vilg.errors import UserError
from vilg.evaluate.frechet import FeatureMoments, Gaussian, frechet_distance, inception_score
from vilg.evaluate.inception import RESIZES, Inception
from vilg.inference.options import check_device
from vilg.inference.load import load_model
from vilg.tokens.files import write_atomically
from vilg.tokens.vqgan.images import IMAGE_SUFFIXES, BadImage, decode_image

FORMAT_VERSION = 1
_FEW = 10_000  # FID's bias grows as one over the number of pictures; papers use 30,000 or 50,000
_NOT_SAMPLES = ("grid.png",)  # what `vilg generate` puts beside its pictures


def pictures_in(folder: Path) -> list[Path]:
    """All JPEG, PNG and WebP files below a folder, sorted by path. Raises UserError if there are fewer than two."""
    found = sorted(
        path for path in folder.rglob("*") if path.suffix.lower().lstrip(".") in IMAGE_SUFFIXES and path.name not in _NOT_SAMPLES
    )
    if len(found) < 2:
        raise UserError(f"{folder}: holds {len(found)} pictures ({', '.join(IMAGE_SUFFIXES)}); two or more are needed")
    return found


def measure(
    network: Inception, batches: Iterator[np.ndarray], *, total: int, what: str
) -> tuple[Gaussian, torch.Tensor]:
    """Moments of the features of all pictures, and their class probabilities [B, C]. batches: uint8 [b, S, S, 3]."""
    moments, classes = None, []
    with tqdm(total=total, unit="image", desc=what) as bar:
        for pictures in batches:
            features, probabilities = network(pictures)
            moments = moments or FeatureMoments(features.shape[1])
            moments.add(features)
            classes.append(probabilities)
            bar.update(len(pictures))
    assert moments is not None
    return moments.gaussian(), torch.cat(classes)


def read_batches(
    paths: Sequence[Path], *, side: int, batch: int, change: Callable[[np.ndarray], np.ndarray] | None = None
) -> Iterator[np.ndarray]:
    """Pictures uint8 [b, side, side, 3], cropped as `decode_image` does. Raises UserError naming an unreadable one."""
    for start in range(0, len(paths), batch):
        pictures = []
        for path in paths[start : start + batch]:
            try:
                pictures.append(decode_image(path.read_bytes(), side))
            except (OSError, BadImage) as error:
                raise UserError(f"{path}: {error}") from None
        stacked = np.stack(pictures)
        yield stacked if change is None else change(stacked)


def main(argv: Sequence[str]) -> int:
    """FID and Inception Score of pictures against real ones, or of a model's reconstructions (rFID)."""
    parser = argparse.ArgumentParser(prog="vilg eval fid", description=main.__doc__)
    parser.add_argument("pictures", nargs="?", type=Path, help="folder of drawn pictures")
    parser.add_argument("--reconstruct", type=Path, metavar="MODEL",
                        help="instead: an export whose image tokenizer encodes and decodes the real pictures")  # fmt: skip
    parser.add_argument("--real", type=Path, required=True, help="folder of real pictures")
    parser.add_argument("--inception", type=Path, required=True, help="inception-2015-12-05.pt")
    parser.add_argument("--sha256", help="what that file's sha256 must be")
    parser.add_argument("--resize", choices=tuple(RESIZES), default="network", help="how pictures come to 299 x 299")
    parser.add_argument("--side", type=int, help="real pictures are cropped to this side first (default: the drawn ones')")
    parser.add_argument("--batch", type=int, default=32, help="pictures at once")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda")
    parser.add_argument("--out", type=Path, help="JSON file for the figures and the settings behind them")
    args = parser.parse_args(argv)
    if (args.pictures is None) == (args.reconstruct is None):
        raise UserError("give a folder of drawn pictures, or --reconstruct MODEL, not both")
    if args.batch < 1:
        raise UserError(f"--batch {args.batch}: at least one picture")
    if args.side is not None and args.side < 1:
        raise UserError(f"--side {args.side}: at least one pixel; leave it out for the drawn pictures' own")
    check_device(args.device)

    network = Inception(args.inception, sha256=args.sha256, resize=args.resize, device=args.device)
    print(f"feature network {args.inception}: sha256 {network.sha256}; resize: {RESIZES[args.resize]}")
    real = pictures_in(args.real)
    bundle = None if args.reconstruct is None else load_model(args.reconstruct, device=args.device)
    drawn = pictures_in(args.pictures) if bundle is None else real
    side = args.side or (_side(drawn) if bundle is None else bundle.image_size[0])
    again = None if bundle is None else lambda pictures: bundle.decode_images(bundle.encode_images(pictures))

    ours, classes = measure(
        network, read_batches(drawn, side=side, batch=args.batch, change=again), total=len(drawn), what="drawn"
    )
    theirs, _ = measure(network, read_batches(real, side=side, batch=args.batch), total=len(real), what="real")
    splits = min(10, len(drawn))
    mean, spread = inception_score(classes, splits=splits)
    result = {
        "format_version": FORMAT_VERSION,
        "fid" if bundle is None else "rfid": frechet_distance(ours, theirs),
        "inception_score": {"mean": mean, "standard_deviation": spread, "splits": splits},
        "drawn": {"from": str(args.pictures or args.reconstruct), "pictures": ours.count},
        "real": {"from": str(args.real), "pictures": theirs.count},
        "side": side,
        "crop": "shorter side scaled (bicubic) to `side`, centre cut out",
        "resize": {"name": args.resize, "how": RESIZES[args.resize]},
        "network": {"file": args.inception.name, "sha256": network.sha256, "features": len(ours.mean)},
    }
    if args.out:
        write_atomically(args.out, (json.dumps(result, indent=1) + "\n").encode())
    name = "fid" if bundle is None else "rfid"
    print(f"{name} {result[name]:.4f}  inception score {mean:.3f} +- {spread:.3f}  ({ours.count} drawn, {theirs.count} real)")
    if min(ours.count, theirs.count) < _FEW:
        print(f"note: with fewer than {_FEW} pictures on a side FID is biased upwards; compare equal numbers only")
    return 0


def _side(drawn: Sequence[Path]) -> int:
    from PIL import Image

    with Image.open(drawn[0]) as picture:
        return min(picture.size)
