"""The paper's Table 7 in small, on a CPU: does training generator and reconstructor together draw better pictures?

    python benchmarks/end_to_end.py --demo runs/demo                  # everything, one after another
    python benchmarks/end_to_end.py --demo runs/demo --only 1         # seed 1 alone, as a job of its own
    python benchmarks/end_to_end.py --demo runs/demo --collect        # tables and result file from finished seeds

Real images of the demo at 16 pixels, 4 x 4 codes (end_to_end_setup.py); a transformer of 3 layers, 96 wide. Two trainings a
seed, same data order and initial weights, by `vilg train`:

- two-stage: the reconstructor is trained beside it with model.reconstructor.stop_gradient, so that the generator is, number for
  number, the one without a reconstructor;
- end-to-end: the pixels' gradient reaches the transformer; equal weights, everything else by default.

Rows (2112.15283, Table 7): which generator's codes, decoded how. "true tokens" are the encoder's codes of the held-back images,
fed to the model as if it had drawn them. Beside the paper's five rows one more: the two-stage generator with the
reconstructor that was trained on its states, which tells what the decoder gains from what the generator gains.

The figure is a Frechet distance (1706.08500) between 1,000 pictures drawn for the captions of a held-back shard and its 1,000 real
images, in the 64 features of a small network: convolutions trained for this benchmark on the other shards to name glyph and
background, once, with a fixed seed; the result file records its hash and how often it is right on held-back images. Its scale
is its own: compare rows, not with Inception's. Checks of the measure stand beside: real images against real images, reconstructions,
blurred ones, shuffled patches, noise.
"""

import argparse
import hashlib
import io
import json
import platform
import statistics
import sys
import tarfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from PIL import Image, ImageFilter  # noqa: E402
from torch import Tensor, nn  # noqa: E402

from benchmarks.end_to_end_setup import END_TO_END, SIDE, prepare, side_by_side, train, vilg  # noqa: E402
from vilg.checkpoint.state import source_commit, versions  # noqa: E402
from vilg.evaluate.frechet import FeatureMoments, Gaussian, frechet_distance  # noqa: E402
from vilg.inference.decode import decode_pictures  # noqa: E402
from vilg.inference.generate import generate_codes  # noqa: E402
from vilg.inference.load import Bundle, load_model  # noqa: E402
from vilg.inference.sampling import SamplingConfig  # noqa: E402
from vilg.tokens.vqgan.images import decode_image, to_float  # noqa: E402

RESULT = ROOT / "benchmarks" / "results" / "end_to_end.json"
SEEDS, SHARDS, STEPS = (0, 1, 2), 8, 1000
SETTINGS = {
    "model.num_layers": 3, "model.hidden_size": 96, "model.num_heads": 2, "batch.global_size": 32, "batch.micro_size": 32,
    "optimizer.lr": 2e-3, "data.text_to_image_fraction": 0.8, "schedule.warmup_steps": 50,
    f"{END_TO_END}lr": 1e-3, f"{END_TO_END}ramp_steps": 100, f"{END_TO_END}ema": 0.99, f"{END_TO_END}betas": "[0.9,0.95]",
}  # fmt: skip
RUNS = {"two-stage": True, "end-to-end": False}  # name -> stop_gradient
ROWS = (  # row -> run, codes drawn or true, decode
    ("two-stage generator, two-stage decoder", "two-stage", "drawn", "codebook"),
    ("end-to-end generator, two-stage decoder", "end-to-end", "drawn", "codebook"),
    ("end-to-end generator, end-to-end decoder", "end-to-end", "drawn", "hidden"),
    ("true tokens, two-stage decoder", "two-stage", "true", "codebook"),
    ("true tokens, end-to-end decoder", "end-to-end", "true", "hidden"),
    ("two-stage generator, decoder trained on its states", "two-stage", "drawn", "hidden"),
    ("true tokens, decoder trained on two-stage states", "two-stage", "true", "hidden"),
)
FEATURES, CLASSIFIER_STEPS = 64, 400


@dataclass
class Labelled:
    """Images uint8 [n, S, S, 3], captions, glyph and background numbers int64 [n]."""

    images: np.ndarray
    captions: list[str]
    glyphs: Tensor
    backgrounds: Tensor


def read_labelled(folder: Path) -> Labelled:
    images, captions, glyphs, backgrounds = [], [], [], []
    for shard in sorted(folder.glob("*.tar")):
        with tarfile.open(shard) as tar:
            members = {member.name: tar.extractfile(member).read() for member in tar if member.isfile()}
        for name in sorted(name for name in members if name.endswith(".json")):
            facts, key = json.loads(members[name]), name.removesuffix(".json")
            images.append(decode_image(members[f"{key}.png"], SIDE))
            captions.append(members[f"{key}.txt"].decode())
            glyphs.append(str(facts["glyphs"]))
            backgrounds.append(str(facts["background"]))
    return Labelled(np.stack(images), captions, _numbered(glyphs), _numbered(backgrounds))


def _numbered(names: list[str]) -> Tensor:
    """Numbers by the names' order; a thousand images or more show every class."""
    order = {name: number for number, name in enumerate(sorted(set(names)))}
    return torch.tensor([order[name] for name in names])


class FeatureNet(nn.Module):
    """Images [B, 3, 16, 16] -> features [B, 64]; two linear heads name glyph and background from them."""

    def __init__(self, num_glyphs: int, num_backgrounds: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 32, 3, padding=1), nn.GELU(), nn.Conv2d(32, 64, 3, stride=2, padding=1), nn.GELU(),
            nn.Conv2d(64, 64, 3, stride=2, padding=1), nn.GELU(), nn.Flatten(), nn.Linear(64 * 16, FEATURES),
        )  # fmt: skip
        self.glyph, self.background = nn.Linear(FEATURES, num_glyphs), nn.Linear(FEATURES, num_backgrounds)

    def forward(self, images: Tensor) -> Tensor:
        return self.body(images)


def feature_net(data: Labelled, held_back: Labelled) -> tuple[FeatureNet, dict]:
    """Trained with seed 0 whatever the run's seed: every row of every seed is measured by the same network."""
    torch.manual_seed(0)
    net = FeatureNet(int(data.glyphs.max()) + 1, int(data.backgrounds.max()) + 1)
    optimizer = torch.optim.AdamW(net.parameters(), lr=2e-3, weight_decay=0.01)
    draw = np.random.default_rng(0)
    for step in range(CLASSIFIER_STEPS):
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * (1 - step / CLASSIFIER_STEPS)
        chosen = draw.integers(0, len(data.images), 64)
        features = F.gelu(net(to_float(data.images[chosen])))
        loss = F.cross_entropy(net.glyph(features), data.glyphs[chosen])
        loss = loss + F.cross_entropy(net.background(features), data.backgrounds[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    net.eval()
    digest = hashlib.sha256()
    for name, tensor in sorted(net.state_dict().items()):
        digest.update(name.encode() + tensor.numpy().tobytes())
    with torch.no_grad():
        features = F.gelu(net(to_float(held_back.images)))
    right = {
        "glyph_right": float((net.glyph(features).argmax(1) == held_back.glyphs).float().mean()),
        "background_right": float((net.background(features).argmax(1) == held_back.backgrounds).float().mean()),
    }
    return net, {"sha256": digest.hexdigest(), "steps": CLASSIFIER_STEPS, **{k: round(v, 4) for k, v in right.items()}}


@torch.no_grad()
def gaussian(net: FeatureNet, images: np.ndarray) -> Gaussian:
    moments = FeatureMoments(FEATURES)
    for part in np.array_split(images, -(-len(images) // 250)):
        moments.add(net(to_float(part)))
    return moments.gaussian()


def checks(net: FeatureNet, data: Labelled, held_back: Labelled, bundle: Bundle) -> dict[str, float]:
    """Distances that a sound measure must put in order."""
    real, draw = gaussian(net, held_back.images), np.random.default_rng(0)
    pictures = [Image.fromarray(image) for image in held_back.images]

    def blurred(radius: float) -> np.ndarray:
        return np.stack([np.asarray(picture.filter(ImageFilter.GaussianBlur(radius))) for picture in pictures])

    patches = held_back.images.reshape(-1, 4, 4, 4, 4, 3).transpose(0, 1, 3, 2, 4, 5).reshape(-1, 16, 4, 4, 3)
    shuffled = np.stack([patch[draw.permutation(16)] for patch in patches])
    shuffled = shuffled.reshape(-1, 4, 4, 4, 4, 3).transpose(0, 1, 3, 2, 4, 5).reshape(held_back.images.shape)
    shown = {
        "other real images": data.images[: len(held_back.images)],
        "reconstructions by the codebook": bundle.decode_images(bundle.encode_images(held_back.images)),
        "blurred, radius 0.5": blurred(0.5),
        "blurred, radius 1": blurred(1.0),
        "patches shuffled": shuffled,
        "noise": draw.integers(0, 256, held_back.images.shape, np.uint8),
    }
    return {name: round(frechet_distance(real, gaussian(net, images)), 3) for name, images in shown.items()}


def measure(work: Path, seed: int, data: Labelled, held_back: Labelled, net: FeatureNet) -> dict:
    """All rows of one seed, from its two exports."""
    bundles = {name: load_model(work / f"{name}-{seed}" / "export") for name in RUNS}
    any_bundle = bundles["two-stage"]
    true_codes = any_bundle.encode_images(held_back.images)
    prompts = [any_bundle.encode_prompt(caption) for caption in held_back.captions]
    seeds = [1_000_003 * seed + number for number in range(len(prompts))]
    drawn = {
        name: generate_codes(bundle.model, bundle.spec, prompts, num=1, seeds=seeds, sampling=SamplingConfig(), batch_rows=250)[:, 0]
        for name, bundle in bundles.items()
    }  # fmt: skip
    real, rows = gaussian(net, held_back.images), {}
    for row, run, codes, decode in ROWS:
        pictures = decode_pictures(bundles[run], prompts, drawn[run] if codes == "drawn" else true_codes, decode=decode)
        found = {"frechet": round(frechet_distance(real, gaussian(net, pictures)), 3)}
        if codes == "true":
            error = (pictures.astype(float) - held_back.images) / 127.5
            found["psnr_db"] = round(float(10 * np.log10(4 / np.square(error).mean())), 2)
        rows[row] = found
        picture = Image.fromarray(np.concatenate(pictures[:24], 1))
        content = io.BytesIO()
        picture.resize((24 * SIDE * 3, SIDE * 3), Image.Resampling.NEAREST).save(content, "PNG")
        (work / f"seed{seed}-{row.replace(', ', '-').replace(' ', '_')}.png").write_bytes(content.getvalue())
    losses = {name: _last_losses(work / f"{name}-{seed}") for name in RUNS}
    return {"rows": rows, "losses": losses, "checks": checks(net, data, held_back, any_bundle)}


def _last_losses(run: Path) -> dict[str, float]:
    """Means over the last tenth of the steps."""
    lines = [json.loads(line) for line in (run / "logs" / "metrics.jsonl").read_text().splitlines()]
    last = lines[-len(lines) // 10 :]
    return {
        key: round(statistics.mean(line[key] for line in last if line[key] is not None), 4)
        for key in ("image_loss", "text_loss", "reconstruction_loss", "balance")
    }


def one_seed(work: Path, seed: int, steps: int) -> None:
    for name, stop in RUNS.items():
        run = work / f"{name}-{seed}"
        own = {"seed": seed, "schedule.steps": steps, "checkpoint.every_steps": steps, f"{END_TO_END}stop_gradient": stop}
        print(f"{name}, seed {seed}: {train(work, run, SETTINGS | own):.0f} s", flush=True)
        if not (run / "export").exists():
            vilg("export", run, "--out", run / "export")
    data, held_back = read_labelled(work / "raw"), read_labelled(work / "held_back")
    net, facts = feature_net(data, held_back)
    found = measure(work, seed, data, held_back, net) | {"feature_network": facts}
    (work / f"seed{seed}.json").write_text(json.dumps(found, indent=1) + "\n")


def collect(work: Path, steps: int) -> dict:
    """Mean and spread (sample standard deviation) over the finished seeds."""
    found = {seed: json.loads((work / f"seed{seed}.json").read_text()) for seed in SEEDS if (work / f"seed{seed}.json").exists()}
    networks = {json.dumps(one["feature_network"]) for one in found.values()}
    if len(networks) != 1:
        raise SystemExit("seeds were measured by different feature networks: make them on one machine, with one torch")
    table = {}
    for row, *_ in ROWS:
        values = [one["rows"][row]["frechet"] for one in found.values()]
        spread = round(statistics.stdev(values), 3) if len(values) > 1 else 0.0
        table[row] = {"mean": round(statistics.mean(values), 3), "spread": spread, "values": values}
        psnr = [one["rows"][row]["psnr_db"] for one in found.values() if "psnr_db" in one["rows"][row]]
        table[row] |= {"psnr_db": round(statistics.mean(psnr), 2)} if psnr else {}
        print(f"{row:52} {table[row]['mean']:8.3f} ± {spread:6.3f}  {values}")
    return {
        "claim": "Table 7 of 2112.15283 in small: Frechet distance in the features of a classifier of the demo's images",
        "hardware": f"{platform.processor() or platform.machine()}, 1 thread", "versions": versions(), "commit": source_commit(),
        "steps": steps, "settings": SETTINGS, "pictures": 1000, "seeds": list(found), "rows": table,
        "losses": {seed: one["losses"] for seed, one in found.items()},
        "checks": {seed: one["checks"] for seed, one in found.items()}, "feature_network": json.loads(networks.pop()),
    }  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--demo", type=Path, default=Path("runs/demo"), help="folder of `vilg demo`")
    parser.add_argument("--work", type=Path, default=Path("runs/end_to_end"), help="folder for shards and runs")
    parser.add_argument("--only", type=int, metavar="SEED", help="do one seed and stop")
    parser.add_argument("--jobs", type=int, default=1, help="seeds trained side by side, a core each")
    parser.add_argument("--collect", action="store_true", help="train nothing; result from the seeds in --work")
    parser.add_argument("--steps", type=int, default=STEPS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    work = args.work.resolve()
    if not args.collect:
        prepare(args.demo.resolve(), work, shards=SHARDS)
        if args.only is not None:
            one_seed(work, args.only, args.steps)
        else:
            own = ["--demo", str(args.demo), "--work", str(work), "--steps", str(args.steps)]
            side_by_side(__file__, [[*own, "--only", str(seed)] for seed in SEEDS], args.jobs)
    if args.only is None:
        result = collect(work, args.steps)
        if args.steps == STEPS:
            RESULT.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
