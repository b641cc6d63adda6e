"""Every shipped DeepSpeed file trains: two ranks with it give the parameters of one process without DeepSpeed."""

from pathlib import Path

import torch
from torch import Tensor, nn

from tests.distributed.helpers import run_distributed
from vilg.config.deepspeed import merged_deepspeed_config
from vilg.config.schema import Recipe

FILES = sorted((Path(__file__).resolve().parents[2] / "ds_configs").glob("*.json"))
STEPS, GLOBAL, MICRO, CLIP, WIDTH = 3, 8, 2, 0.05, 16


def _recipe(file: Path, precision: str) -> Recipe:
    return Recipe.model_validate(
        {
            "name": "x",
            "run_dir": "x",
            "precision": precision,
            "model": {"num_layers": 1, "hidden_size": 8, "num_heads": 1},
            "tokens": {
                "text_model": "x",
                "image_model": "x",
                "text_slots": 4,
                "grid": [2, 2],
                "text_vocab_size": 9,
                "image_vocab_size": 8,
            },
            "data": {"train": "x"},
            "batch": {"global_size": GLOBAL, "micro_size": MICRO},
            "optimizer": {"lr": 0.01, "grad_clip": CLIP},
            "schedule": {"steps": STEPS},
            "checkpoint": {"every_steps": 1},
            "parallel": {"deepspeed": file},
        }
    )


def _model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, 1))


def _inputs(step: int) -> Tensor:
    return torch.randn(GLOBAL, WIDTH, generator=torch.Generator().manual_seed(step))


def _optimizer(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=0.01, fused=True)


def _reference() -> list[Tensor]:
    model = _model()
    optimizer = _optimizer(model)
    for step in range(STEPS):
        model(_inputs(step)).square().mean().backward()
        nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad()
    return [p.detach() for p in model.parameters()]


def _for_two_ranks(file: Path, folder: Path) -> Path:
    """The file; a copy for nodes of two ranks where it is for nodes of eight, for DeepSpeed refuses that with two."""
    text = file.read_text(encoding="utf-8")
    smaller = folder / file.name
    smaller.write_text(text.replace('"zero_hpz_partition_size": 8', '"zero_hpz_partition_size": 2'), encoding="utf-8")
    return smaller


def _train(rank: int, world_size: int, cases: list[tuple[Path, str]]) -> list[list[Tensor]]:
    import deepspeed
    from deepspeed.utils import safe_get_full_fp32_param

    # Else DeepSpeed builds a C++ extension on every fresh machine, which only its inference uses.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    results = []
    for file, precision in cases:
        model = _model()
        config = merged_deepspeed_config(_recipe(file, precision), data_size=world_size)
        engine, *_ = deepspeed.initialize(
            model=model, optimizer=_optimizer(model), config=config, dist_init_required=False
        )
        for step in range(STEPS):
            for micro in _inputs(step).split(MICRO)[rank::world_size]:
                engine.backward(engine(micro.to(next(model.parameters()).dtype)).float().square().mean())
                if (file.name, precision) == ("zero1.json", "bf16"):  # they are in the fp32 sum, and not kept twice
                    assert all(p.grad is None for p in model.parameters())
                engine.step()
        whole = [p if file.name == "zero0.json" else safe_get_full_fp32_param(p) for p in model.parameters()]
        results.append([p.detach().float().clone() for p in whole])
    return results


def test_shipped_files_train_like_one_process(tmp_path):
    files = [_for_two_ranks(file, tmp_path) for file in FILES]
    cases = [(file, "fp32") for file in files] + [(f, "bf16") for f in files if f.name != "zero0.json"]
    tolerance = {"fp32": 1e-5, "bf16": 5e-3}
    expected = _reference()
    for rank_results in run_distributed(2, _train, (cases,)):
        for (file, precision), parameters in zip(cases, rank_results, strict=True):
            for ours, reference in zip(parameters, expected, strict=True):
                torch.testing.assert_close(
                    ours, reference, atol=tolerance[precision], rtol=0, msg=lambda m: f"{file.name} {precision}: {m}"
                )
