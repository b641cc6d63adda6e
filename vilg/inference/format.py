"""Names, version and settings of the export folder: `checkpoint/export.py` writes it, `inference` reads it."""

from typing import Any

from vilg.errors import UserError
from vilg.inference.sampling import SamplingConfig
from vilg.tokens.sequence import BEGIN_OF_TEXT, END_OF_TEXT, PAD, UNKNOWN

EXPORT_FORMAT_VERSION = 2
CONFIG_FILE = "config.json"
GENERATION_FILE = "generation_config.json"
INDEX_FILE = "model.safetensors.index.json"
TEXT_MODEL_FILE = "text.model"
IMAGE_TOKENIZER_FOLDER = "image_tokenizer"
RECONSTRUCTOR_FOLDER = "reconstructor"  # only of a run with model.reconstructor



def weights_file(number: int, count: int) -> str:
    """Name of the weights file `number` (from 1) of `count`, as Hugging Face calls it."""
    return f"model-{number:05d}-of-{count:05d}.safetensors"


def generation_settings(sampling: SamplingConfig, *, text_pieces: int = 0, text_vocab_size: int = 0) -> dict[str, Any]:
    """How pictures are drawn, in the words of `transformers`, which says greedy with a flag of its own.

    A text may hold none of the ids that belong to the layout, and none past the tokenizer's `text_pieces`, which the
    model's vocabulary is often rounded up from.
    """
    drawn = sampling.temperature > 0
    return {
        "format_version": EXPORT_FORMAT_VERSION,
        "do_sample": drawn,
        "temperature": sampling.temperature if drawn else 1.0,
        "top_k": sampling.top_k,
        "top_p": sampling.top_p,
        "guidance_scale": sampling.guidance,
        "bos_token_id": BEGIN_OF_TEXT,
        "eos_token_id": END_OF_TEXT,
        "pad_token_id": PAD,
        "suppress_tokens": [UNKNOWN, BEGIN_OF_TEXT, PAD, *range(text_pieces, text_vocab_size)],
    }


def sampling_of(settings: dict[str, Any]) -> SamplingConfig:
    """Back from `generation_settings`. Raises KeyError for a missing key, UserError for an unknown one or a value."""
    known = generation_settings(SamplingConfig())
    if unknown := sorted(set(settings) - set(known)):
        raise UserError(f"{', '.join(unknown)}: unknown; the keys are {', '.join(known)}")
    return SamplingConfig(
        guidance=settings["guidance_scale"],
        temperature=settings["temperature"] if settings["do_sample"] else 0.0,
        top_k=settings["top_k"],
        top_p=settings["top_p"],
    )
