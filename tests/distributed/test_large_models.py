"""The shipped large recipes, built for every rank of their layouts without memory: `vilg plan` counts them to the byte.

Each rank's own module lies on the meta device, and DeepSpeed's own classes cut it there, as `deepspeed.initialize` has
them do: ZeRO 1's optimizer as a whole, of ZeRO 3 the conversion of parameters, whose parts its optimizer's buffers are
made for. tests/distributed/test_state_bytes.py holds the same counts against engines that train.
"""

import os
from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from tests.distributed.helpers import run_distributed
from vilg.config import Recipe, load_recipe
from vilg.config.deepspeed import merged_deepspeed_config, zero_stage
from vilg.model.state_size import StateBytes
from vilg.parallel.grid import Grid
from vilg.tools.plan import plan
from vilg.train import optim
from vilg.train.open import sequence_spec

ROOT = Path(__file__).resolve().parents[2]
LAYOUTS = (
    ("300m", 1), ("1b", 8), ("10b", 8), ("10b", 24), ("10b-tensor4", 8), ("10b-tensor4", 24), ("10b-tensor4-pipe4", 64),
)  # fmt: skip
BATCHES = {24: 2304}  # 3 divides little of the model, so that everything is padded; it does not divide the recipes' batch
Held = tuple[int, int, StateBytes]  # stage, parameters before ZeRO, bytes


def load_large(name: str, processes: int) -> Recipe:
    os.chdir(ROOT)  # recipes name `ds_configs/...` relative to the clone's root
    given = [f"batch.global_size={BATCHES[processes]}"] if processes in BATCHES else []
    return load_recipe(f"launch/recipes/{name}.yaml", given, world_size=processes)


def build_every_rank(rank: int, world_size: int) -> dict[tuple[str, int], list[Held]]:
    """What each rank of each layout holds.

    The process group is torch's fake one: it has the sizes and ranks of a real job and moves nothing.
    """
    import torch.distributed as dist
    from torch.testing._internal.distributed.fake_pg import FakeStore

    from vilg.train.deepspeed_engine import import_deepspeed, silent

    found = {}
    os.environ["LOCAL_RANK"] = "0"
    for name, processes in LAYOUTS:
        recipe, ranks = load_large(name, processes), []
        for place_in_job in range(processes):
            dist.init_process_group("fake", rank=place_in_job, world_size=processes, store=FakeStore())
            import_deepspeed(torch.device("cpu"))
            parallel = recipe.parallel
            grid = Grid.build(tensor=parallel.tensor, pipeline=parallel.pipeline, sequence_parallel=parallel.sequence)
            with silent():
                module = build_rank(recipe, grid)
                count = sum(p.numel() for p in module.parameters())
                cut = {1: cut_by_zero_1, 3: cut_by_zero_3}
                config = merged_deepspeed_config(recipe, data_size=grid.data_size)
                ranks.append((grid.pipeline_rank, count, cut[zero_stage(config)](recipe, module, grid, config)))
            dist.destroy_process_group()
        found[name, processes] = ranks
    return found


def build_rank(recipe: Recipe, grid: Grid) -> nn.Module:
    """This rank's module as `vilg train` builds it, but on the meta device and in bf16 from the start."""
    from vilg.model.pipe import VilgPipe
    from vilg.model.vilg import Vilg

    place = dict(grid=grid, device="meta", dtype=torch.bfloat16)
    if grid.pipeline_size == 1:
        return Vilg(recipe.model, sequence_spec(recipe), **place)
    VilgPipe.to = lambda self, *arguments, **more: self  # DeepSpeed moves a stage to its device at once
    return VilgPipe(recipe.model, sequence_spec(recipe), factor=1, **place)


def cut_by_zero_1(recipe: Recipe, module: nn.Module, grid: Grid, config: dict[str, Any]) -> StateBytes:
    """DeepSpeed's optimizer for ZeRO 1 in bf16 with fp32 sums, after a step of AdamW."""
    from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
    from deepspeed.runtime.precision_config import DeepSpeedBF16Config

    assert config["data_types"]["grad_accum_dtype"] == "fp32" and recipe.precision == "bf16"
    named = list(module.named_parameters())
    adamw = torch.optim.AdamW(optim.parameter_groups(named, recipe.optimizer.weight_decay))
    zero = BF16_Optimizer(
        adamw, {p: name for name, p in named}, DeepSpeedBF16Config(**config["bf16"]), mpu=grid,
        dp_process_group=grid.get_data_parallel_group(), grad_acc_dtype=torch.float32,
    )  # fmt: skip
    for part in zero.fp32_groups_flat_partition:
        part.grad = torch.zeros_like(part)
    adamw.step()
    moments = [state[name] for state in adamw.state.values() for name in ("exp_avg", "exp_avg_sq")]
    return StateBytes(
        weights=bytes_of(zero.bf16_groups_flat),
        gradients=bytes_of(zero.fp32_groups_gradients_flat),
        optimizer=bytes_of([*zero.fp32_groups_flat_partition, *moments]),
    )


def cut_by_zero_3(recipe: Recipe, module: nn.Module, grid: Grid, config: dict[str, Any]) -> StateBytes:
    """DeepSpeed's parts and second copies; whole are those that it marks. fp32 copies, moments and gradients follow
    `partition_numel`, as stage3.py makes them."""
    from deepspeed.runtime.zero.parameter_offload import DeepSpeedZeRoOffload
    from deepspeed.runtime.zero.partition_parameters import Init
    from deepspeed.utils import groups

    assert config["data_types"]["grad_accum_dtype"] == "fp32" and recipe.precision == "bf16"
    groups._ZERO_PARAM_INTRA_PARALLEL_GROUP = None  # of the rank before
    group = grid.get_data_parallel_group()
    init = Init(data_parallel_group=group, config_dict_or_path=config, dtype=torch.bfloat16, enabled=False)
    init.local_device = init.remote_device = torch.device("meta")
    parameters = list(module.parameters())
    init._convert_to_zero_parameters(parameters)
    smallest = config["zero_optimization"]["stage3_param_persistence_threshold"]
    whole = DeepSpeedZeRoOffload.mark_persistent_parameters(SimpleNamespace(module=module), smallest, float("inf"))
    second = [p.ds_secondary_tensor for p in parameters if not p.ds_persist]
    part = sum(p.partition_numel() for p in parameters)
    return StateBytes(
        weights=bytes_of([p.ds_tensor for p in parameters] + second) + sum(2 * p.ds_numel_aligned for p in whole),
        gradients=4 * part,
        optimizer=12 * part,
    )


def bytes_of(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def test_every_rank_holds_what_the_planner_counts_to_the_byte():
    (found,) = run_distributed(1, build_every_rank, init=False)
    for name, processes in LAYOUTS:
        made, ranks = plan(load_large(name, processes), gpus=processes), found[name, processes]
        assert len(ranks) == processes and {stage for stage, _, _ in ranks} == set(range(made.pipeline))
        for stage, parameters, held in ranks:
            memory = made.stages[stage].memory
            assert parameters == made.stages[stage].parameters, (name, processes, stage)
            assert held == StateBytes(memory.weights, memory.gradients, memory.optimizer), (name, processes, stage)


def test_every_shipped_layout_of_the_large_recipes_is_built():
    names = {path.stem for path in (ROOT / "launch/recipes").glob("*.yaml")} - {"debug", "ingest"}
    names = {name for name in names if not name.startswith("tune-")}  # of the size of the export that is tuned
    assert names == {name for name, _ in LAYOUTS}
