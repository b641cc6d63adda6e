"""Bytes of training state that real engines hold on every rank, against the planner's count, equal to the byte.

Whole storages are counted, each once:

    weights      the parameters' own storage; under ZeRO 3 the parts, parameters kept whole, and second copies
    optimizer    the fp32 copies, unless they are the weights themselves, and both moments
    gradients    wherever DeepSpeed keeps them or their sum: the most that is there once a backward has ended, before
                 and after it is reduced. DeepSpeed frees or reuses some as it reduces them, and copies others for the
                 optimizer's step; neither those copies nor the buckets that gradients are reduced in are state

All in the second step, because in the first ZeRO 3 has not yet kept small parameters whole from the step before; weights
when its optimizer begins, for then ZeRO 3 has released what it gathered for the backward.
"""

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.distributed.helpers import run_distributed
from tests.distributed.parity import MICRO_BATCHES, SHAPE, SPEC, Trainer
from tests.distributed.resume_support import Layout
from tests.golden.make import DEBUG_RECIPE
from vilg.config import Recipe, load_recipe
from vilg.config.deepspeed import read_deepspeed_file
from vilg.model.state_size import StateBytes, stage_parameters, state_bytes
from vilg.parallel.grid import Grid
from vilg.tools.storage import checkpoint_bytes
from vilg.train.distributed import distributed
from vilg.train.engine import build_engine, build_model

# So that there is padding: norms of heads have 9 numbers, and the undecayed group is no multiple of 4.
SIZES = {"model.hidden_size": 18, "model.num_heads": 2, "model.qk_norm": True}
# What a DeepSpeed file may add. The second copies only the larger parameters, since the small ones stay whole.
EXTRAS = {
    "": {},
    "few whole": {"stage3_param_persistence_threshold": 20},
    "second copies": {"stage3_param_persistence_threshold": 20, "zero_hpz_partition_size": 2},
    "optimizer on the host": {"offload_optimizer": {"device": "cpu"}},
}
HELD_AS_GRADIENTS = (
    "averaged_gradients",
    "all_grad_tensors",
    "grads_in_partition",
    "fp32_groups_gradients_flat",
    "grad_partitions_flat_buffer",
)


@dataclass(frozen=True)
class Case:
    layout: Layout
    precision: str
    extra: str = ""

    @property
    def name(self) -> str:
        return " ".join(filter(None, (self.layout.name, self.precision, self.extra)))

    def recipe(self, folder: Path) -> Recipe:
        """As `vilg train` reads it. folder: for the case's own DeepSpeed file."""
        values = {**SHAPE, **SIZES, **self.layout.overrides(), "precision": self.precision}
        if self.layout.engine == "deepspeed":
            config = json.loads(Path(values["parallel.deepspeed"]).read_text())
            config["zero_optimization"] |= EXTRAS[self.extra]
            values["parallel.deepspeed"] = folder / "ds_config.json"
            values["parallel.deepspeed"].write_text(json.dumps(config))
        overrides = [f"{key}={value}" for key, value in values.items()]
        return load_recipe(DEBUG_RECIPE, overrides, world_size=self.layout.processes)


CASES = [
    Case(Layout(engine="torch"), "fp32"),
    Case(Layout(engine="torch"), "bf16"),
    *(Case(Layout(data=2, zero=stage), "fp32") for stage in (0, 1, 2, 3)),
    *(Case(Layout(data=2, zero=stage), "bf16") for stage in (1, 2, 3)),
    Case(Layout(data=2, zero=1), "bf16", "optimizer on the host"),
    Case(Layout(data=2, zero=3), "bf16", "few whole"),
    Case(Layout(pipeline=2, zero=1), "fp32"),
    Case(Layout(pipeline=2, zero=1), "bf16"),
    Case(Layout(tensor=2, data=2, zero=1), "bf16"),
    Case(Layout(tensor=2, data=2, zero=3), "fp32", "few whole"),
    # Last of its size: DeepSpeed keeps the groups of ranks that share copies for all later engines.
    Case(Layout(data=2, zero=3), "bf16", "second copies"),
]  # fmt: skip


def held_states(rank: int, world_size: int, cases: list[Case], folder: Path) -> list[tuple[StateBytes, int]]:
    """What this rank holds under each case, and bytes of the tensors that it would save."""
    found = []
    with distributed(torch.device("cpu")):
        for number, case in enumerate(cases):
            place = folder / f"{number}-{rank}"
            place.mkdir()
            recipe = case.recipe(place)
            grid = Grid.build(tensor=recipe.parallel.tensor, pipeline=recipe.parallel.pipeline)
            model = build_model(recipe, SPEC, grid, torch.device("cpu"))
            model.reset_parameters(recipe.seed)
            trainer = Trainer(recipe, grid, build_engine(recipe, grid, model, torch.device("cpu")))
            trainer.step(1)
            state, files = watched_step(trainer), trainer.engine.files(copy=False)
            saved = [tensor for write in files.values() for tensor in tensors_in(list(write.args))]
            found.append((state, sum(tensor.numel() * tensor.element_size() for tensor in saved)))
            if case.layout.engine == "deepspeed":
                from deepspeed.utils import groups

                groups.mpu = None  # else the groups of tensor ranks outlive their engine
    return found


def watched_step(trainer: Trainer) -> StateBytes:
    """What is held in one more step."""
    engine, weights, gradients = trainer.engine, [], []
    model, optimizer = engine.model, getattr(engine, "engine", engine).optimizer

    def look_at_gradients() -> None:
        gradients.append(bytes_of(gradients_of(model, engine, optimizer), but=buckets_of(optimizer)))

    with pytest.MonkeyPatch.context() as patch:
        if hasattr(engine, "engine"):
            call_before(patch, engine.engine, "allreduce_gradients", look_at_gradients)
            call_before(patch, engine.engine, "buffered_allreduce_fallback", look_at_gradients)  # by a bf16 pipeline
            call_before(patch, optimizer, "_release_ipg_buffers", look_at_gradients)  # once reduced, in ZeRO 1 and 2
        else:
            call_before(patch, engine, "_collect_gradients", look_at_gradients)
        call_before(patch, optimizer, "step", lambda: weights.append(bytes_of(weights_of(model))))
        trainer.step(2)
    return StateBytes(weights[-1], max(gradients), bytes_of(optimizer_of(optimizer), but=weights_of(model)))


def call_before(patch: pytest.MonkeyPatch, owner: Any, name: str, look) -> None:
    """Call `look` before the owner's method of that name, if it has one."""
    if method := getattr(owner, name, None):
        patch.setattr(owner, name, lambda *arguments, **options: (look(), method(*arguments, **options))[1])


def weights_of(model: torch.nn.Module) -> Iterator[Tensor]:
    for p in model.parameters():
        yield from (p.data, *tensors_in([getattr(p, name, None) for name in ("ds_tensor", "ds_secondary_tensor")]))


def gradients_of(model: torch.nn.Module, engine: Any, optimizer: Any) -> Iterator[Tensor]:
    for p in (*model.parameters(), *getattr(engine, "masters", ())):
        yield from tensors_in([p.grad, getattr(p, "grad_accum", None)])
    for name in HELD_AS_GRADIENTS:
        yield from tensors_in(getattr(optimizer, name, None))


def optimizer_of(optimizer: Any) -> Iterator[Tensor]:
    base = getattr(optimizer, "optimizer", optimizer)
    # ZeRO 3 shows the inner optimizer one flat part at a time; the others are its own parameters.
    parts = getattr(optimizer, "fp32_partitioned_groups_flat", None)
    yield from parts or (p for group in base.param_groups for p in group["params"])
    yield from (state[moment] for state in base.state.values() for moment in ("exp_avg", "exp_avg_sq"))


def buckets_of(optimizer: Any) -> Iterator[Tensor]:
    for bucket in getattr(optimizer, "ipg_buckets", {}).values():
        yield from tensors_in(bucket.buffer)


def tensors_in(nest: Any) -> Iterator[Tensor]:
    if isinstance(nest, Tensor):
        yield nest
    elif isinstance(nest, dict | list | tuple):
        for inner in nest.values() if isinstance(nest, dict) else nest:
            yield from tensors_in(inner)


def bytes_of(tensors: Iterable[Tensor], *, but: Iterable[Tensor] = ()) -> int:
    """Of the storages behind the tensors, each once, without those behind `but`."""
    left_out = {tensor.untyped_storage().data_ptr() for tensor in but}
    storages = {s.data_ptr(): s.nbytes() for s in (tensor.untyped_storage() for tensor in tensors) if s.nbytes()}
    return sum(nbytes for pointer, nbytes in storages.items() if pointer not in left_out)


@pytest.fixture(scope="module")
def held(tmp_path_factory) -> dict[Case, list[tuple[StateBytes, int]]]:
    """Of every case, what each rank holds and saves."""
    found: dict[Case, list[tuple[StateBytes, int]]] = {}
    for processes in sorted({case.layout.processes for case in CASES}):
        same = [case for case in CASES if case.layout.processes == processes]
        folder = tmp_path_factory.mktemp("cases")
        ranks = run_distributed(processes, held_states, (same, folder), init=False)
        found |= {case: [states[number] for states in ranks] for number, case in enumerate(same)}
    return found


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_every_rank_holds_what_the_planner_counts_to_the_byte(held, case, tmp_path):
    recipe, layout = case.recipe(tmp_path), case.layout
    stages = stage_parameters(recipe.model, SPEC, tensor=layout.tensor, pipeline=layout.pipeline)
    zero = read_deepspeed_file(recipe.parallel.deepspeed).value if layout.engine == "deepspeed" else {}
    micro_batches = MICRO_BATCHES // layout.data
    planned = [
        state_bytes(parameters, precision=case.precision, zero=zero, data_size=layout.data, micro_batches=micro_batches)
        for parameters in stages
    ]
    ranks = [state for state, _ in held[case]]
    stage_of = [rank // (layout.tensor * layout.data) for rank in range(layout.processes)]
    if layout.zero == 2 and case.precision == "fp32":  # the rank that has most whole gradients
        ranks = [max(ranks, key=lambda state: state.total)] * len(ranks)
    assert ranks == [planned[stage] for stage in stage_of]


@pytest.mark.parametrize("case", [case for case in CASES if case.layout.tensor == 1], ids=lambda case: case.name)
def test_files_of_a_checkpoint_are_as_large_as_preflight_says(held, case, tmp_path):
    saved = sum(saved for _, saved in held[case])
    assert saved == pytest.approx(checkpoint_bytes(case.recipe(tmp_path)), rel=0.01)  # padding, step counters
