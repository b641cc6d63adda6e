"""The trainer's engines under every layout against one process of plain PyTorch, for tests and benchmarks/parity.py.

A case builds its model and engine exactly as `vilg train` does (`build_model`, `build_engine`) from a recipe, and takes
a few optimizer steps over fixed micro-batches: some of both directions, some of one, so that ranks see different
numbers of targets. The gradient of step 1 is read out of the files that the engine saves: Adam's first moment after one update
is (1 - beta1) times the clipped gradient, so that clipping is compared too.
"""

import json
import math
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from tests.distributed.helpers import run_distributed
from tests.distributed.resume_support import Layout
from tests.golden.make import DEBUG_RECIPE
from tests.model_support import mixed_batch
from vilg.checkpoint.probes import compute_probes
from vilg.checkpoint.reader import open_weights
from vilg.checkpoint.reconstructor_file import read_reconstructor_file
from vilg.checkpoint.save import Saver
from vilg.checkpoint.state import RunState, parameter_table
from vilg.config import Recipe, load_recipe
from vilg.parallel.grid import Grid
from vilg.parallel.ranks import Ranks
from vilg.tokens.sequence import SequenceBatch, SequenceSpec, collate, image_to_text, text_to_image
from vilg.tokens.vqgan import ImageTokenizer, ImageTokenizerConfig
from vilg.train.distributed import distributed
from vilg.train.engine import Engine, build_engine, build_model
from vilg.train.reconstruction import build_reconstruction
from vilg.train.step import StepPlan, StepResult, count, plan_step

SPEC = SequenceSpec(text_slots=8, grid=(4, 4), text_vocab_size=24, image_vocab_size=16)  # 24 slots: 2 and 4 divide them
MICRO_SIZE, MICRO_BATCHES = 7, 4  # of the global batch
SHAPE = {
    "model.num_layers": 5,  # row, column and conv layers all occur
    "model.hidden_size": 16,
    "model.num_heads": 4,
    "model.conv_size": 3,
    "model.init_std": 0.2,
    "tokens.text_slots": SPEC.text_slots,
    "tokens.grid": list(SPEC.grid),
    "tokens.text_vocab_size": SPEC.text_vocab_size,
    "tokens.image_vocab_size": SPEC.image_vocab_size,
    "batch.micro_size": MICRO_SIZE,
    "batch.global_size": MICRO_SIZE * MICRO_BATCHES,
    "schedule.steps": 20,
    "schedule.warmup_steps": 5,
}
MODELS = {
    "sparse": {"model.dropout": 0.1, "model.qk_norm": True},
    "dense": {
        "model.attention": "dense",
        "model.norm": "rmsnorm",
        "model.sandwich_norm": True,
        "model.embedding_gradient": 0.1,
        "model.dropout": 0.1,
        "loss.z_loss": 1e-3,
    },
    "end to end": {
        "model.dropout": 0.1,
        "model.reconstructor.ramp_steps": 4,
        "model.reconstructor.lr": 1e-2,
        "model.reconstructor.adversarial.weight": 0.5,
        "model.reconstructor.adversarial.start_step": 2,
        "model.reconstructor.adversarial.ramp_steps": 2,
        "model.reconstructor.adversarial.r1_every": 2,
        "model.reconstructor.adversarial.width": 8,
        "model.reconstructor.adversarial.layers": 1,
    },
}
MODELS["joint quantizer"] = MODELS["end to end"] | {
    "model.reconstructor.joint_quantizer.lr": 1e-2,
    "model.reconstructor.joint_quantizer.decay": 0.9,
}
FACTOR = 2  # pixels per code of the end-to-end model's image tokenizer
# What a DeepSpeed file may add to ZeRO; the last two need stage 3, and one cuts the weights over two ranks of the data ranks.
ON_HOST, WITHIN, ALL_CUT = "optimizer on the host", "weights cut within 2 ranks", "no weights kept whole"
ZERO_EXTRAS = {
    ON_HOST: {"offload_optimizer": {"device": "cpu"}},
    WITHIN: {"zero_hpz_partition_size": 2},
    ALL_CUT: {"stage3_param_persistence_threshold": 0, "stage3_prefetch_bucket_size": 100, "stage3_max_live_parameters": 1000},
}


@dataclass(frozen=True)
class Case:
    """A layout and what else may change the arithmetic's order. extra: of ZERO_EXTRAS."""

    layout: Layout
    sequence: bool = False
    recompute: str = "none"
    every: int = 1
    model: str = "sparse"
    extra: str = ""
    compiled: bool = False

    @property
    def name(self) -> str:
        """For people: `t2p2d1z1 slots split, recompute full every 2, dense`."""
        every = f" every {self.every}" if self.every > 1 else ""
        notes = [
            self.layout.name + (" slots split" if self.sequence else ""),
            *([f"recompute {self.recompute}{every}"] if self.recompute != "none" else []),
            *([self.extra] if self.extra else []),
            *(["compiled"] if self.compiled else []),
            self.model,
        ]
        return ", ".join(notes)

    def recipe(self, folder: Path) -> Recipe:
        """As `vilg train` reads it; a DeepSpeed file of its own goes into `folder`."""
        values = {
            **SHAPE,
            **MODELS[self.model],
            **self.layout.overrides(),
            "parallel.sequence": self.sequence,
            "parallel.recompute": self.recompute,
            "parallel.recompute_every": self.every,
            "parallel.compile": self.compiled,
        }
        if self.extra:
            config = json.loads(Path(values["parallel.deepspeed"]).read_text())
            config["zero_optimization"] |= ZERO_EXTRAS[self.extra]
            values["parallel.deepspeed"] = folder / f"ds_config_{os.getpid()}.json"  # every rank writes its own
            values["parallel.deepspeed"].write_text(json.dumps(config))
        overrides = [f"{key}={value}" for key, value in values.items()]
        return load_recipe(DEBUG_RECIPE, overrides, world_size=self.layout.processes)


@dataclass(frozen=True)
class Outcome:
    """losses, norms: of each step (the norm before clipping). evaluated: losses of batches that are not trained on, before
    the first step and after the last. gradients: of step 1, clipped, whole, by name. logits: of
    the weights at the end, for the batch that is stored in checkpoints. beside, figures: what end-to-end training has
    beside the model at the end, on the rank that saves it, and what it logged in each step."""

    losses: list[float]
    norms: list[float]
    evaluated: list[float]
    gradients: dict[str, Tensor]
    logits: Tensor
    beside: dict[str, Tensor]
    figures: list[dict[str, float]]


def micro_batch(step: int, place: int) -> SequenceBatch:
    """Micro-batch number `place` of a step's global batch: of both directions, but the second of four has no text
    targets and the third no image targets. Every image has its pixels."""
    batch = _micro_batch_of_codes(100 * step + place, place)
    count, side = int(batch.image_is_target.sum()), SPEC.grid[0] * FACTOR
    draw = np.random.default_rng([step, place])
    numbers = dict(images=count, source_images=len(batch) - count)
    pixels = {name: draw.integers(0, 256, (number, side, side, 3), np.uint8) for name, number in numbers.items()}
    return replace(batch, **{name: torch.from_numpy(found) for name, found in pixels.items() if len(found)})


def _micro_batch_of_codes(seed: int, place: int) -> SequenceBatch:
    if place % 4 not in (1, 2):
        return mixed_batch(SPEC, seed=seed)
    draw = np.random.default_rng(seed)
    form = text_to_image if place % 4 == 1 else image_to_text
    samples = []
    for length in draw.integers(1, SPEC.text_slots - 1, MICRO_SIZE):
        text = draw.integers(4, SPEC.text_vocab_size, length).tolist()
        samples.append(form(SPEC, text, draw.integers(0, SPEC.image_vocab_size, SPEC.image_slots)))
    return collate(samples)


@dataclass(frozen=True)
class Trainer:
    """A case's engine on this rank, built as `vilg train` does."""

    recipe: Recipe
    grid: Grid
    engine: Engine

    @classmethod
    def build(cls, case: Case, folder: Path) -> "Trainer":
        """All ranks call it. folder: for files of the case's own."""
        recipe, device = case.recipe(folder), torch.device("cpu")
        parallel = recipe.parallel
        grid = Grid.build(tensor=parallel.tensor, pipeline=parallel.pipeline, sequence_parallel=parallel.sequence)
        model = build_model(recipe, SPEC, grid, device)
        model.reset_parameters(recipe.seed)
        reconstruction = build_reconstruction(recipe, grid, model, image_tokenizer(), device, fresh=True)
        return cls(recipe, grid, build_engine(recipe, grid, model, device, reconstruction))

    def step(self, step: int, *, loss_limit: float = math.inf) -> StepResult:
        """One optimizer step, numbered from 1, over this rank's share of its global batch."""
        return self.engine.train_step(*self._share(step, MICRO_BATCHES, loss_limit=loss_limit))

    def evaluate(self) -> list[float]:
        """Losses of two global batches' pairs that no step has."""
        result = self.engine.evaluate(*self._share(0, 2 * MICRO_BATCHES))
        found = [result.loss, result.text_loss, result.image_loss, result.z_loss, result.reconstruction_loss]
        return [float(value) for value in found[: 5 if self.engine.reconstruction else 4]]

    def _share(self, step: int, micro_batches: int, **more: float) -> tuple[list[SequenceBatch], StepPlan]:
        """This rank's micro-batches of a step, and the plan for those of all."""
        batches = [micro_batch(step, place) for place in range(micro_batches)]
        text_targets, image_targets, _ = count(batches)
        plan = plan_step(self.recipe, step, text_targets=text_targets, image_targets=image_targets, **more)
        return batches[self.grid.data_rank :: self.grid.data_size], plan


def image_tokenizer() -> ImageTokenizer:
    """An untrained one that fits `SPEC`."""
    torch.manual_seed(0)
    shape = dict(encoder_width=8, decoder_width=8, decoder_blocks=1, code_dim=4, num_codes=SPEC.image_vocab_size)
    tokenizer = ImageTokenizer(ImageTokenizerConfig(image_size=SPEC.grid[0] * FACTOR, factor=FACTOR, **shape))
    tokenizer.codebook.vectors.normal_()
    return tokenizer


def train(case: Case, steps: int, ranks: Ranks, folder: Path) -> Outcome:
    """All ranks call it. The gradients are on rank 0 only."""
    trainer = Trainer.build(case, folder)
    evaluated, results, gradients = trainer.evaluate(), [], {}
    for step in range(1, steps + 1):
        results.append(trainer.step(step))
        if step == 1:
            gradients = _first_gradients(trainer, ranks, folder)
    evaluated += trainer.evaluate()
    probes = compute_probes(trainer.engine.model)
    if case.layout.engine == "deepspeed":
        # DeepSpeed keeps the groups of the last engine with tensor ranks for all later ones; `vilg train` has one.
        from deepspeed.utils import groups

        groups.mpu = None
    return Outcome(
        losses=[float(result.loss) for result in results],
        norms=[float(result.grad_norm) for result in results],
        evaluated=evaluated,
        gradients=gradients,
        logits=torch.cat([probes.text_logits.flatten(), probes.image_logits.flatten()]),
        beside=_beside(trainer, folder),
        figures=[dict(result.figures) for result in results],
    )


def _beside(trainer: Trainer, folder: Path) -> dict[str, Tensor]:
    reconstruction = trainer.engine.reconstruction
    for name, write in (reconstruction.files(copy=False) if reconstruction else {}).items():
        write(folder / name)
        return read_reconstructor_file(folder)
    return {}


def _first_gradients(trainer: Trainer, ranks: Ranks, folder: Path) -> dict[str, Tensor]:
    """After one update: whole clipped gradients by name, out of a checkpoint; empty on all ranks but 0."""
    engine = trainer.engine
    state = RunState(
        step=1, samples=0, tokens=0, loader={}, skipped={}, layout=engine.layout, recipe={}, tokenizers={},
        parameters=parameter_table(engine.model, trainer.grid, ranks),
    )  # fmt: skip
    saver = Saver(folder, ranks=ranks, keep_last=1)
    saver.begin(state, engine.files(copy=False))
    saved = saver.wait()
    if not ranks.is_main:
        return {}
    weights = open_weights(saved.path)
    beta = trainer.recipe.optimizer.betas[0]
    return {name: weights.read(name, kind="exp_avg") / (1 - beta) for name in weights.names}


def train_all(rank: int, world_size: int, cases: Sequence[Case], steps: int, folder: Path) -> list[Outcome]:
    """Several cases of one size in one process group: an outcome each."""
    found: list[Outcome] = []
    with distributed(torch.device("cpu")) as ranks:
        for number, case in enumerate(cases):
            place = folder / str(number)
            ranks.on_main(lambda: place.mkdir())
            found.append(train(case, steps, ranks, place))
    return found


def run_cases(cases: Sequence[Case], *, steps: int, timeout: float = 180.0) -> dict[Case, list[Outcome]]:
    """Outcomes of every rank, in rank order; cases of one number of processes share their processes."""
    outcomes: dict[Case, list[Outcome]] = {}
    for size in sorted({case.layout.processes for case in cases}):
        same = [case for case in cases if case.layout.processes == size]
        with tempfile.TemporaryDirectory() as folder:
            values = run_distributed(size, train_all, (same, steps, Path(folder)), init=False, timeout=timeout)
        outcomes |= {case: [value[i] for value in values] for i, case in enumerate(same)}
    return outcomes


def reference(model: str, *, steps: int) -> Outcome:
    """One process without DeepSpeed."""
    case = Case(Layout(engine="torch"), model=model)
    return run_cases([case], steps=steps)[case][0]


@dataclass(frozen=True)
class Errors:
    """Largest relative errors: of a loss, of a gradient norm, of a loss that was evaluated, of a parameter's gradient and of
    all logits (2-norms)."""

    loss: float
    norm: float
    evaluated: float
    gradient: float
    worst: str  # parameter
    logits: float

    @property
    def largest(self) -> float:
        return max(self.loss, self.norm, self.evaluated, self.gradient, self.logits)


def compare(ranks: Sequence[Outcome], wanted: Outcome) -> Errors:
    """Every rank's numbers against the reference. Raises AssertionError if ranks differ in any digit."""
    for rank, outcome in enumerate(ranks):
        assert outcome.losses == ranks[0].losses, f"rank {rank} has other losses than rank 0"
        assert outcome.norms == ranks[0].norms, f"rank {rank} has other gradient norms than rank 0"
        assert outcome.evaluated == ranks[0].evaluated, f"rank {rank} has evaluated other losses than rank 0"
        assert torch.equal(outcome.logits, ranks[0].logits), f"rank {rank} has other logits than rank 0"
    found = ranks[0]
    assert found.gradients.keys() == wanted.gradients.keys()
    errors = {name: _distance(found.gradients[name], wanted.gradients[name]) for name in wanted.gradients}
    worst = max(errors, key=errors.__getitem__)
    return Errors(
        loss=_largest(found.losses, wanted.losses),
        norm=_largest(found.norms, wanted.norms),
        evaluated=_largest(found.evaluated, wanted.evaluated),
        gradient=errors[worst],
        worst=worst,
        logits=_distance(found.logits, wanted.logits),
    )


def _distance(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())


def _largest(found: Sequence[float], wanted: Sequence[float]) -> float:
    return max(abs(a - b) / (abs(b) or 1.0) for a, b in zip(found, wanted, strict=True))
