"""Sample sheets: the same prompts drawn with the same random numbers each time, so that only the weights differ."""

from pathlib import Path

import torch
from torch import Tensor

from vilg.config.schema import SamplesConfig
from vilg.errors import UserError
from vilg.inference.generate import generate_codes
from vilg.inference.sampling import SamplingConfig
from vilg.model.vilg import Vilg
from vilg.pictures.sheet import grid_sheet
from vilg.tokens.text import TextTokenizer
from vilg.tokens.vqgan import ImageTokenizer
from vilg.tokens.vqgan.images import to_uint8


class Sampler:
    """Draws the recipe's prompts. Prompts are checked at once, so that a long one fails before the first step."""

    def __init__(
        self, config: SamplesConfig, model: Vilg, text: TextTokenizer, image: ImageTokenizer, *, seed: int
    ) -> None:
        self.config, self.model, self.image, self.seed = config, model, image, seed
        self.sampling = SamplingConfig(config.guidance, config.temperature, config.top_k)
        self.prompts = [text.encode(prompt) for prompt in config.prompts]
        for prompt, ids in zip(config.prompts, self.prompts):
            if not 0 < len(ids) <= model.spec.text_slots:
                raise UserError(
                    f"samples.prompts: {prompt!r} has {len(ids)} tokens; the text segment takes 1 to "
                    f"{model.spec.text_slots} (tokens.text_slots)"
                )

    def draw(self) -> Tensor:
        """Codes int64 [prompts, slots] of all prompts.

        Every rank draws, because a model that is spread over ranks needs them all, and the others would only wait.
        """
        self.model.eval()
        # A prompt's random stream hangs on its place in the list and the run's seed.
        seeds = [self.seed * 1_000_003 + i for i in range(len(self.prompts))]
        codes = generate_codes(self.model, self.model.spec, self.prompts, num=1, seeds=seeds, sampling=self.sampling)
        self.model.train()
        return codes.view(len(self.prompts), -1)

    def write(self, codes: Tensor, path: Path, *, title: str) -> None:
        """A sheet of what `draw` gave. Raises OSError or UserError if it cannot be written."""
        with torch.inference_mode():
            images = self.image.to(codes.device).decode(codes.view(len(self.prompts), *self.model.spec.grid))
        path.parent.mkdir(parents=True, exist_ok=True)
        grid_sheet(list(to_uint8(images)), list(self.config.prompts), path, title=title)
