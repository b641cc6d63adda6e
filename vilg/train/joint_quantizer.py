"""The image tokenizer trained beside the model: the codes of a batch are those that it gives to the images now.

    z = encoder(image);   c(z) = the nearest code vector
    loss = distance(decoder(R z), image) + commitment * mean |z - sg[c(z)]|^2           means over images

R turns and scales z into its code and counts as constant (arXiv 2410.06424), as in the tokenizer's own training: with the
plain straight-through gradient a trained tokenizer's encoder runs away from its codes, at a twentieth of the rate too
(benchmarks/joint_quantizer.py, second table). Code vectors learn by the moving average of what falls to them (van den Oord
2017, arXiv 1711.00937, appendix A.1). With n_k and s_k count and sum of the global batch's vectors at code k, and N_k the
moving average of n_k:

    N_k <- decay N_k + (1 - decay) n_k;    c_k <- c_k + (1 - decay) (s_k - n_k c_k) / N_k

which is the ratio of both averages; a code that a batch does not use stays where it is, and none is renewed: a code that
suddenly means something else would be news to the transformer. Sums go over the whole global batch and are applied once
per optimizer step, so that neither micro-batches nor ranks change them (the stand-alone trainer's quantizer updates in
every forward pass and starts by k-means). Every rank holds all of it, the stages of a pipeline too.
Legend: B sequences of a micro-batch, N = h * w codes of an image, K codes, D width of a code vector, S side in pixels.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from vilg.checkpoint.reconstructor_file import TOKENIZER, trained_tokenizer
from vilg.config.schema import Recipe
from vilg.errors import UserError
from vilg.parallel.grid import Grid
from vilg.tokens.sequence import SequenceBatch, SequenceSpec, all_images, image_codes, with_image_codes
from vilg.tokens.vqgan import ImageTokenizer
from vilg.tokens.vqgan.images import to_float
from vilg.tokens.vqgan.losses import code_use
from vilg.train.beside import Beside, sum_over_data
from vilg.train.judge import PixelDistance
from vilg.train.step import StepPlan

_VECTORS = "codebook.vectors"  # of an `ImageTokenizer`, where they are no parameter
_USES = f"{TOKENIZER}.code_uses"
_IMAGES, _PIXEL_LOSS, _COMMITMENT, _CHANGED = range(4)  # of `self.sums`


class JointQuantizer:
    """Itself called at the beginning of a step, then `finish`. tokenizer: trained in place, in eval mode as it encodes data.

    Raises UserError for a tokenizer whose codes are chosen by logits (Gumbel).
    """

    def __init__(
        self, recipe: Recipe, tokenizer: ImageTokenizer, spec: SequenceSpec, *, grid: Grid, device: torch.device
    ) -> None:
        from vilg.tokens.vqgan.quantize import carried_over  # slow to import, needed in training alone

        section, self._carried_over = recipe.model.reconstructor, carried_over
        if tokenizer.codebook.logits is not None:
            raise UserError(
                f"model.reconstructor.joint_quantizer learns codes chosen by distance, but {recipe.tokens.image_model} has "
                f"lookup={tokenizer.config.lookup}; use a tokenizer of lookup euclidean or cosine, or leave the section out"
            )
        self.config, self.base_lr = section.joint_quantizer, recipe.optimizer.lr
        self.spec, self.grid, self.device = spec, grid, device
        self.tokenizer = tokenizer.to(device).eval().requires_grad_(True)
        self.codebook = self.tokenizer.codebook
        self.distance = PixelDistance(section, device=device)
        self.trained = Beside(TOKENIZER, self.tokenizer, betas=section.betas, grad_clip=self.config.grad_clip)
        self.vector_sums = torch.zeros_like(self.codebook.vectors)  # s [K, D]
        self.counts = torch.zeros(len(self.vector_sums), device=device)  # n [K]
        self.uses = torch.zeros_like(self.counts)  # N [K]; all 0: no batch was seen
        self.sums = torch.zeros(4, device=device)

    def __call__(self, plan: StepPlan, batches: Sequence[SequenceBatch]) -> list[SequenceBatch]:
        """A new step: this rank's micro-batches (host tensors, with all images) under the codes of now. Gradients and
        statistics are added up. All ranks call it."""
        self.plan = plan
        self.learns = not 0 < self.config.stop_step < plan.step
        for total in (self.vector_sums, self.counts, self.sums):
            total.zero_()
        if self.learns:
            self.trained.begin()
        return [self._encode(batch) for batch in batches]

    def _encode(self, batch: SequenceBatch) -> SequenceBatch:
        images = to_float(all_images(batch).to(self.device))
        with torch.set_grad_enabled(self.learns):
            vectors = self.tokenizer.encoder(images)
            codes = self._codes(vectors.detach())
            if self.learns:
                self._learn(images, vectors, codes)
        self.counts += torch.bincount(codes.flatten(), minlength=len(self.counts))
        found = codes.flatten(1).cpu()
        self.sums[_IMAGES] += len(images)
        self.sums[_CHANGED] += int((found != image_codes(batch)).sum())
        return with_image_codes(self.spec, batch, found)

    @torch.no_grad()
    def recode(self, batch: SequenceBatch) -> SequenceBatch:
        """A micro-batch (host tensors, with all images) under the codes of now; nothing is learnt. All ranks call it."""
        codes = self._codes(self.tokenizer.encoder(to_float(all_images(batch).to(self.device))))
        return with_image_codes(self.spec, batch, codes.flatten(1).cpu())

    def _codes(self, vectors: Tensor) -> Tensor:
        codes = self.codebook.nearest(vectors)
        for group in (self.grid.tensor_group, self.grid.pipeline_group):
            if group is not None:  # they read the same images; a last bit of a GPU must not give them other codes
                dist.broadcast(codes, dist.get_process_group_ranks(group)[0], group=group)
        return codes

    def _learn(self, images: Tensor, vectors: Tensor, codes: Tensor) -> None:
        """Add up gradients of sums over images, and the code vectors' statistics. vectors [B, D, h, w] with their graph."""
        if self.codebook.cosine:
            vectors = F.normalize(vectors, dim=1)
        chosen, count = self.codebook.lookup(codes), len(images)
        pixel_loss = count * self.distance(self.tokenizer.decoder(self._carried_over(vectors, chosen)), images)
        commitment = count * (vectors - chosen).square().mean()
        (pixel_loss + self.config.commitment * commitment).backward()
        self.sums[_PIXEL_LOSS] += pixel_loss.detach()
        self.sums[_COMMITMENT] += commitment.detach()
        self.vector_sums.index_add_(0, codes.flatten(), vectors.detach().permute(0, 2, 3, 1).flatten(0, 2))

    def finish(self, *, skipped: bool) -> dict[str, float]:
        """Update the tokenizer, unless the engine left its step out; figures of the step, the same on all ranks. All ranks
        call it."""
        gradients = self.trained.gradients if self.learns else []
        sum_over_data([*gradients, self.vector_sums, self.counts, self.sums], self.grid, stages=True)
        images, pixel_loss, commitment, changed = self.sums.tolist()
        used, perplexity = code_use(self.counts)
        norm, done = 0.0, not self.learns
        if self.learns and not skipped:
            for gradient in gradients:
                gradient /= images
            norm, done = self.trained.step(self.config.lr * self.plan.lr / self.base_lr)
            if done:
                self._move_codes()
        return {
            "tokenizer_pixel_loss": pixel_loss / images,
            "commitment_loss": commitment / images,
            "tokenizer_grad_norm": norm,
            "tokenizer_skipped": float(not done),
            "codes_used": float(used),
            "code_perplexity": perplexity,
            "codes_changed": changed / (images * self.spec.image_slots),
        }

    @torch.no_grad()
    def _move_codes(self) -> None:
        """The moving average; before the first one, all codes count as if each had been used equally often."""
        vectors, decay = self.codebook.vectors, self.config.decay
        before = self.uses if bool(self.uses.any()) else self.counts.mean().expand_as(self.counts)
        self.uses.copy_(decay * before + (1 - decay) * self.counts)
        used = self.counts > 0
        pull = self.vector_sums - self.counts[:, None] * vectors
        share = torch.where(used, (1 - decay) / self.uses, 0.0)
        vectors += share[:, None] * pull
        if self.codebook.cosine:
            vectors[used] = F.normalize(vectors[used], dim=1)

    def state(self) -> dict[str, Tensor]:
        """Everything that a checkpoint keeps of it, under the keys of `reconstructor_file.py`; not copied."""
        return self.trained.state() | {f"{TOKENIZER}.weight.{_VECTORS}": self.codebook.vectors, _USES: self.uses}

    @torch.no_grad()
    def load(self, tensors: dict[str, Tensor], source: Path) -> None:
        """Continue exactly from a checkpoint. Raises UserError if its tokenizer is of other shapes, or was frozen."""
        self.trained.load(tensors, source)
        self.codebook.vectors.copy_(trained_tokenizer(tensors)[_VECTORS])
        self.uses.copy_(tensors[_USES])
