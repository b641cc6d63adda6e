"""The training loop of an image tokenizer, the same alone and under plain data parallelism."""

import json
import math
import time
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

from vilg.errors import UserError
from vilg.tokens.files import write_atomically
from vilg.tokens.vqgan.adversarial import average_gradients
from vilg.tokens.vqgan.config import ImageTokenizerRecipe
from vilg.tokens.vqgan.ema import Average
from vilg.tokens.vqgan.evaluate import draw_sheet
from vilg.tokens.vqgan.images import to_float
from vilg.tokens.vqgan.losses import code_use, psnr_db
from vilg.tokens.vqgan.model import ImageTokenizer
from vilg.tokens.vqgan.objective import Objective
from vilg.tokens.vqgan.source import ImageData, seeded_random


@dataclass(frozen=True)
class Place:
    """Where this process stands: its rank among world_size, and its device."""

    rank: int
    world_size: int
    device: torch.device

    @property
    def leads(self) -> bool:
        return self.rank == 0


class Autoencoder(nn.Module):
    """Tokenizer and training quantizer: one forward pass with gradients through the codes."""

    def __init__(self, tokenizer: ImageTokenizer, recipe: ImageTokenizerRecipe, *, synchronise: bool):
        super().__init__()
        from vilg.tokens.vqgan.quantize import training_quantizer  # slow to import, needed in training alone

        self.tokenizer = tokenizer
        self.quantizer = training_quantizer(
            tokenizer.codebook, recipe.model, recipe.quantizer, synchronise=synchronise
        )

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """images [B, 3, S, S] -> (output of the same shape, codes int64 [B, h, w], weighted commitment loss)."""
        vectors, codes, commitment = self.quantizer(self.tokenizer.encoder(images))
        return self.tokenizer.decoder(vectors), codes, commitment


class Progress:
    """Sums over the steps since the last log line, added up over all ranks when it is drawn."""

    def __init__(self, num_codes: int, device: torch.device):
        self._sums = torch.zeros(3, dtype=torch.float64, device=device)  # loss, squared error, steps
        self._counts = torch.zeros(num_codes, dtype=torch.float64, device=device)
        self._terms: dict[str, list[Tensor]] = {}
        self._since = time.monotonic()

    def add(self, loss: Tensor, output: Tensor, images: Tensor, codes: Tensor, terms: dict[str, Tensor]) -> None:
        """Count one step of this rank. terms: further scalars, the same names on every rank."""
        error = (output.detach() - images).square().mean()
        for name, value in terms.items():
            self._terms.setdefault(name, []).append(value.double())
        self._sums += torch.stack([loss.detach(), error, torch.ones_like(error)]).double()
        self._counts += torch.bincount(codes.flatten(), minlength=self._counts.numel())

    def draw(self, place: Place) -> dict[str, float]:
        """loss, psnr_db, codes_used, perplexity, seconds_per_step and the terms, since the last call; all ranks call it."""
        steps = float(self._sums[2])
        terms = {name: torch.stack(values).mean() for name, values in self._terms.items()}
        if place.world_size > 1:
            dist.all_reduce(self._sums)
            dist.all_reduce(self._counts)
            for value in terms.values():
                dist.all_reduce(value)
                value /= place.world_size
        loss, error, ranks_times_steps = self._sums.tolist()
        used, perplexity = code_use(self._counts)
        now = time.monotonic()
        drawn = {
            "loss": loss / ranks_times_steps,
            "psnr_db": psnr_db(error / ranks_times_steps),
            "codes_used": used,
            "perplexity": perplexity,
            "seconds_per_step": (now - self._since) / steps,
            **{name: value.item() for name, value in terms.items()},
        }
        self._terms.clear()
        self._sums.zero_()
        self._counts.zero_()
        self._since = now
        return drawn


def learning_rate(step: int, recipe: ImageTokenizerRecipe) -> float:
    """Of step 0, 1, ..: linear warm-up, then a cosine that reaches zero after the last step."""
    config = recipe.train
    warmup = min(1.0, (step + 1) / (config.warmup_steps + 1))
    return config.lr * warmup * 0.5 * (1 + math.cos(math.pi * step / config.steps))


def train(
    recipe: ImageTokenizerRecipe, data: ImageData, out: Path, place: Place, *, workers: int = 0
) -> ImageTokenizer:
    """Run all steps and return the trained tokenizer (the same on every rank), in eval mode.

    The leading rank prints log lines and writes metrics.jsonl and sheets into `out`. Raises UserError when the loss is
    no longer finite.
    """
    config = recipe.train
    torch.manual_seed(int(seeded_random(recipe.seed, "initial weights", 0).integers(2**62)))
    tokenizer = ImageTokenizer(recipe.model).to(place.device)
    autoencoder = Autoencoder(tokenizer, recipe, synchronise=place.world_size > 1).to(place.device)
    torch.manual_seed(int(seeded_random(recipe.seed, "renewal of codes", place.rank).integers(2**62)))
    optimizer = _optimizer(tokenizer, recipe)
    objective = Objective(
        recipe.loss,
        seed=int(seeded_random(recipe.seed, "discriminator", 0).integers(2**62)),
        device=place.device,
        world_size=place.world_size,
    )
    average = Average(tokenizer.parameters(), config.ema) if config.ema else None
    progress = Progress(recipe.model.num_codes, place.device)
    lines = []
    batches = data.batches(rank=place.rank, world_size=place.world_size, workers=workers)
    started = time.monotonic()
    for step in range(config.steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, recipe)
        images = to_float(next(batches).to(place.device, non_blocking=True))
        autoencoder.quantizer.set_progress(step / config.steps)
        output, codes, commitment = autoencoder(images)
        cost = objective(output, images, last_layer=tokenizer.decoder.last_layer, step=step)
        loss = cost.loss + commitment
        optimizer.zero_grad()
        loss.backward()
        if place.world_size > 1:
            average_gradients(list(tokenizer.parameters()), place.world_size)
        norm = nn.utils.clip_grad_norm_(tokenizer.parameters(), config.grad_clip)
        if not torch.isfinite(norm):
            raise UserError(
                f"step {step + 1}: loss {loss.item():.4g}, gradient {norm.item():.4g}: diverged; lower train.lr"
            )
        optimizer.step()
        if average is not None:
            average.update()
        taught = objective.teach_adversary(output, images, step=step, lr_share=learning_rate(step, recipe) / config.lr)
        progress.add(loss, output, images, codes, cost.terms | taught)
        done = step + 1
        if done % config.log_every == 0 or done == config.steps:
            lines.append({"step": done, "lr": learning_rate(step, recipe), **progress.draw(place)})
            if place.leads:
                _report(lines, recipe, out, time.monotonic() - started)
        if config.sheet_every and done % config.sheet_every == 0 and done < config.steps and place.leads:
            autoencoder.quantizer.copy_to(tokenizer.codebook)
            with average.in_place() if average is not None else nullcontext():
                draw_sheet(tokenizer, data.held_back, out / f"recon_{done:06d}.png", place.device)
    autoencoder.quantizer.copy_to(tokenizer.codebook)
    if average is not None:
        average.copy_to_parameters()
    return tokenizer.eval().requires_grad_(False)


def _optimizer(tokenizer: ImageTokenizer, recipe: ImageTokenizerRecipe) -> torch.optim.Optimizer:
    """AdamW; only matrices and filters are decayed."""
    parameters = list(tokenizer.parameters())
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": recipe.train.weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=recipe.train.lr, betas=(0.9, 0.95), fused=True)


def _report(lines: list[dict], recipe: ImageTokenizerRecipe, out: Path, elapsed: float) -> None:
    last, steps = lines[-1], recipe.train.steps
    left = int(elapsed / last["step"] * (steps - last["step"]))
    print(
        f"step {last['step']}/{steps}  loss {last['loss']:.4f}  psnr {last['psnr_db']:.1f} dB  "
        f"codes {last['codes_used']}/{recipe.model.num_codes}  perplexity {last['perplexity']:.0f}  {_adversaries(last)}"
        f"{recipe.train.batch_size / last['seconds_per_step']:.0f} images/s  eta {left // 60}m{left % 60:02d}s",
        flush=True,
    )
    write_atomically(out / "metrics.jsonl", "".join(json.dumps(line) + "\n" for line in lines).encode())


def _adversaries(line: dict[str, float]) -> str:
    if "discriminator_loss" not in line:
        return ""
    return f"discriminator {line['discriminator_loss']:.3f} (its share x {line['adversarial_factor']:.3g})  "
