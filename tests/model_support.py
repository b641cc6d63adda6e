"""Tiny models and batches for the tests of `vilg.model` and `vilg.parallel`."""

import numpy as np
import torch

from vilg.config.schema import ModelConfig
from vilg.model.vilg import Vilg
from vilg.tokens.sequence import SequenceBatch, SequenceSpec, answer, collate, image_to_text, text_to_image

SPEC = SequenceSpec(text_slots=6, grid=(4, 4), text_vocab_size=24, image_vocab_size=16)


def tiny_config(**changes) -> ModelConfig:
    """Five layers, so that row, column and conv all occur; a conv window smaller than the grid."""
    values = dict(num_layers=5, hidden_size=16, num_heads=4, conv_size=3, init_std=0.2)
    return ModelConfig(**{**values, **changes})


def tiny_model(
    config: ModelConfig | None = None, *, spec: SequenceSpec = SPEC, seed: int = 0, dtype=torch.float32, **place
) -> Vilg:
    model = Vilg(config or tiny_config(), spec, dtype=dtype, **place)
    model.reset_parameters(seed)
    return model


def mixed_batch(spec: SequenceSpec = SPEC, *, seed: int = 0) -> SequenceBatch:
    """Both directions, a question with its answer, an empty prompt, the longest texts: seven sequences."""
    generator = np.random.default_rng(seed)

    def text(length: int) -> list[int]:
        return generator.integers(4, spec.text_vocab_size, length).tolist()

    def codes() -> np.ndarray:
        return generator.integers(0, spec.image_vocab_size, spec.image_slots)

    longest = spec.text_slots
    return collate(
        [
            text_to_image(spec, text(3), codes()),
            image_to_text(spec, text(4), codes()),
            text_to_image(spec, [], codes()),
            answer(spec, text(2), text(longest - 3), codes()),
            text_to_image(spec, text(longest), codes()),
            image_to_text(spec, text(longest - 1), codes()),
            answer(spec, text(1), text(2), codes()),
        ]
    )
