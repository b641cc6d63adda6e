"""An export folder of a tiny model, written without a checkpoint."""

import json
from pathlib import Path

from safetensors.torch import save_file

from tests.model_support import tiny_config, tiny_model
from vilg.checkpoint.huggingface.files import config_keys, write_files
from vilg.config.schema import ModelConfig
from vilg.inference.format import EXPORT_FORMAT_VERSION, generation_settings, weights_file
from vilg.inference.sampling import SamplingConfig
from vilg.tokens.sequence import SequenceSpec
from vilg.tokens.text import TextTokenizer, train_text_tokenizer
from vilg.tokens.vqgan import ImageTokenizer
from vilg.tokens.vqgan.config import ImageTokenizerConfig

SHARD = weights_file(1, 1)


def write_export(
    folder: Path, *, config: ModelConfig | None = None, sampling: SamplingConfig = SamplingConfig(), lookup="euclidean"
) -> Path:
    """A whole export of a tiny model with random weights, in `folder`, which is returned."""
    config = config or tiny_config()
    captions = ["a cat", "一只猫", "a red horse on a blue wall"]
    train_text_tokenizer(captions, folder / "text.model", vocab_size=300)
    text = TextTokenizer.load(folder / "text.model")
    image = ImageTokenizer(
        ImageTokenizerConfig(image_size=16, num_codes=16, encoder_width=8, decoder_width=8, lookup=lookup)
    )
    image.codebook.vectors.normal_()
    image.save(folder / "image_tokenizer")
    # Rounded up, as for tensor ranks: ids past the tokenizer's may never be written.
    sequence = {"text_slots": 6, "grid": [4, 4], "text_vocab_size": text.vocab_size + 50, "image_vocab_size": 16}
    weights = tiny_model(config, spec=SequenceSpec(**sequence)).state_dict()
    save_file(weights, folder / SHARD, metadata={"format": "pt"})
    write_files(folder, text)
    content = {
        "config": {
            "format_version": EXPORT_FORMAT_VERSION,
            **config_keys(sequence),
            "name": "tiny",
            "dtype": "float32",
            "model": config.model_dump(mode="json"),
            "sequence": sequence,
            "text_tokenizer": {"file": "text.model", "hash": text.hash},
            "image_tokenizer": {"folder": "image_tokenizer", "hash": image.hash},
        },
        "generation_config": generation_settings(
            sampling, text_pieces=text.vocab_size, text_vocab_size=sequence["text_vocab_size"]
        ),
        "model.safetensors.index": {"metadata": {"total_size": 0}, "weight_map": dict.fromkeys(weights, SHARD)},
    }
    for name, values in content.items():
        (folder / f"{name}.json").write_text(json.dumps(values), encoding="utf-8")
    return folder
