"""Small image tokenizers and raw shards for the tests of the image tokenizer."""

import io
import tarfile

import numpy as np
from PIL import Image

from vilg.tokens.vqgan.config import ImageTokenizerConfig, ImageTokenizerRecipe, TrainConfig

SMALL = ImageTokenizerConfig(
    image_size=16, factor=4, num_codes=32, code_dim=8, encoder_width=16, decoder_width=16, decoder_blocks=1
)


def small_recipe(seed=0, model=SMALL, **train):
    settings = {"steps": 30, "batch_size": 8, "warmup_steps": 5, "log_every": 10, "held_back": 16, **train}
    return ImageTokenizerRecipe(seed=seed, model=model, train=TrainConfig(**settings))


def pictures(count, size=16, seed=0):
    """Two flat colours each, split at a multiple of four pixels: uint8 [count, size, size, 3]."""
    random = np.random.default_rng(seed)
    images = np.repeat(random.integers(0, 256, (count, 1, 1, 3), np.uint8), size, axis=1).repeat(size, axis=2)
    for image in images:
        image[:, : 4 * random.integers(1, size // 4)] = random.integers(0, 256, 3)
    return images


def encoded(image, file_format="PNG", **options):
    content = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(content, file_format, **options)
    return content.getvalue()


def write_shards(folder, images, per_shard=50, bad=()):
    """Raw shards of PNGs; the images whose number is in `bad` are junk."""
    folder.mkdir(parents=True, exist_ok=True)
    for start in range(0, len(images), per_shard):
        with tarfile.open(folder / f"{start // per_shard:05d}.tar", "w") as archive:
            for number in range(start, min(start + per_shard, len(images))):
                content = b"junk" if number in bad else encoded(images[number])
                for suffix, data in (("png", content), ("txt", b"caption")):
                    info = tarfile.TarInfo(f"{number:09d}.{suffix}")
                    info.size = len(data)
                    archive.addfile(info, io.BytesIO(data))
    return folder
