"""The shipped large recipes, built for every rank of their layouts without memory: parameters as `vilg plan` counts them."""

import os
from pathlib import Path

from tests.distributed.helpers import run_distributed
from vilg.config import Recipe, load_recipe
from vilg.model.size import rank_parameters, state_bytes
from vilg.train.open import sequence_spec

ROOT = Path(__file__).resolve().parents[2]
LAYOUTS = (
    ("300m", 1), ("1b", 8), ("10b", 8), ("10b-tensor4", 8), ("10b-tensor4", 64), ("10b-tensor4-pipe4", 64),
)  # fmt: skip
BYTES_BF16 = 2


def load_large(name: str, processes: int) -> Recipe:
    os.chdir(ROOT)  # recipes name `ds_configs/...` relative to the clone's root
    return load_recipe(f"launch/recipes/{name}.yaml", world_size=processes)


def build_every_rank(rank: int, world_size: int) -> dict[tuple[str, int], list[tuple[int, int, int]]]:
    """(stage, parameters, bytes) of each rank's own module, as `vilg train` builds it, on the meta device.

    The process group is torch's fake one: it has the sizes and ranks of a real job and moves nothing.
    """
    import torch
    import torch.distributed as dist
    from torch.testing._internal.distributed.fake_pg import FakeStore

    from vilg.model.vilg import Vilg
    from vilg.parallel.grid import Grid
    from vilg.train.deepspeed_engine import import_deepspeed, silent

    def build(recipe: Recipe, grid: Grid) -> torch.nn.Module:
        place = dict(grid=grid, device="meta", dtype=torch.bfloat16)
        if grid.pipeline_size == 1:
            return Vilg(recipe.model, sequence_spec(recipe), **place)
        import_deepspeed(torch.device("cpu"))
        from vilg.model.pipe import VilgPipe

        VilgPipe.to = lambda self, *arguments, **more: self  # DeepSpeed moves a stage to its device at once
        with silent():
            return VilgPipe(recipe.model, sequence_spec(recipe), factor=1, **place)

    found = {}
    os.environ["LOCAL_RANK"] = "0"
    for name, processes in LAYOUTS:
        recipe, counts = load_large(name, processes), []
        for place_in_job in range(processes):
            dist.init_process_group("fake", rank=place_in_job, world_size=processes, store=FakeStore())
            parallel = recipe.parallel
            grid = Grid.build(tensor=parallel.tensor, pipeline=parallel.pipeline, sequence_parallel=parallel.sequence)
            parameters = list(build(recipe, grid).parameters())
            counts.append(
                (grid.pipeline_rank, sum(p.numel() for p in parameters), sum(p.numel() * p.element_size() for p in parameters))
            )
            dist.destroy_process_group()
        found[name, processes] = counts
    return found


def test_every_rank_holds_what_the_planner_counts():
    (found,) = run_distributed(1, build_every_rank, init=False)
    for name, processes in LAYOUTS:
        recipe, ranks = load_large(name, processes), found[name, processes]
        stages = recipe.parallel.pipeline
        planned = rank_parameters(
            recipe.model, sequence_spec(recipe), tensor=recipe.parallel.tensor, pipeline=stages
        )
        assert len(ranks) == processes and {stage for stage, _, _ in ranks} == set(range(stages))
        for stage, parameters, held in ranks:
            assert parameters == planned[stage], (name, processes, stage)
            weights = state_bytes(planned[stage], precision="bf16", zero_stage=1, data_size=processes).weights
            assert held == weights == BYTES_BF16 * parameters


def test_every_shipped_layout_of_the_large_recipes_is_built():
    names = {path.stem for path in (ROOT / "launch/recipes").glob("*.yaml")} - {"debug", "ingest"}
    names = {name for name in names if not name.startswith("tune-")}  # of the size of the export that is tuned
    assert names == {name for name, _ in LAYOUTS}
