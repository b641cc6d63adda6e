"""The pipeline under DeepSpeed against one process: losses and weights over several optimizer steps, in fp32."""

import contextlib
import io
import os

import pytest
import torch

from tests.distributed.helpers import run_distributed
from tests.model_support import SPEC, mixed_batch, tiny_config, tiny_model
from vilg.config.schema import ParallelConfig
from vilg.model.block import set_recompute
from vilg.model.loss import direction_losses
from vilg.parallel import layout
from vilg.parallel.grid import Grid
from vilg.parallel.rng import sequence_seeds
from vilg.tokens.sequence import SequenceBatch

STEPS, MICRO_BATCHES, LR = 3, 3, 0.05
SCALES = (0.02, 0.01)  # weight / target tokens of the global batch, in a real run
MICRO_SIZE = 7


def micro_batch(step: int, index: int) -> SequenceBatch:
    """Micro-batch `index` of the step's global batch; each mixes directions in its own proportion."""
    return mixed_batch(seed=100 * step + index)


def seeds_of(step: int, index: int) -> torch.Tensor:
    return sequence_seeds(0, step=step, first=index * MICRO_SIZE, count=MICRO_SIZE)


def one_process(config, data_size: int):
    """Loss, both sums and gradient norm of each step, and the weights at the end."""
    model = tiny_model(config)
    optimizer = torch.optim.SGD(model.parameters(), LR, momentum=0.9)
    history = []
    for step in range(STEPS):
        optimizer.zero_grad()
        total = torch.zeros(2, dtype=torch.float64)
        for index in range(MICRO_BATCHES * data_size):
            batch = micro_batch(step, index)
            logits = model(*batch.inputs(), dropout_seeds=seeds_of(step, index))
            sums = torch.stack(direction_losses(*logits, batch.text_target, batch.image_target))
            (sums * torch.tensor(SCALES)).sum().backward()
            total += sums.detach()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1e9)
        history.append((float(total @ torch.tensor(SCALES).double()), total, float(norm)))
        optimizer.step()
    return history, model.state_dict()


def deepspeed_without_compiling():
    os.environ["DS_ACCELERATOR"] = "cpu"
    with contextlib.redirect_stdout(io.StringIO()):
        import deepspeed
        import deepspeed.ops

        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        deepspeed.init_distributed(dist_backend="gloo", auto_mpi_discovery=False, verbose=False)
    return deepspeed


def pipeline(rank, world_size, config, tensor, stages, sequence_parallel, recompute):
    """This rank's coordinates, history and weights, from DeepSpeed's pipeline engine."""
    deepspeed = deepspeed_without_compiling()
    from vilg.model.pipe import DEEPSPEED_SETTINGS, VilgPipe, pipe_inputs

    grid = Grid.build(tensor=tensor, pipeline=stages, sequence_parallel=sequence_parallel)
    settings = {
        "train_micro_batch_size_per_gpu": MICRO_SIZE,
        "gradient_accumulation_steps": MICRO_BATCHES,
        "zero_optimization": {"stage": 1},
        "zero_allow_untested_optimizer": True,
        "gradient_clipping": 1e9,  # so that the norm is computed
        "pipeline": DEEPSPEED_SETTINGS,
        "steps_per_print": 10_000,
    }
    with contextlib.redirect_stdout(io.StringIO()):
        model = VilgPipe(
            config, SPEC, grid=grid, factor=MICRO_BATCHES * grid.data_size, dtype=torch.float32
        )
        set_recompute(model, ParallelConfig(recompute=recompute))
        model.reset_parameters(0)
        optimizer = torch.optim.SGD(model.parameters(), LR, momentum=0.9)
        engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings)

    def data(step):
        for index in range(MICRO_BATCHES):
            place = index * grid.data_size + grid.data_rank
            yield pipe_inputs(micro_batch(step, place), dropout_seeds=seeds_of(step, place), scales=SCALES)

    history = []
    for step in range(STEPS):
        loss = engine.train_batch(data_iter=data(step))
        history.append((float(loss), model.loss_fn.take_sums(), float(engine.get_global_grad_norm())))
    evaluated = float(engine.eval_batch(data(0)))
    where = dict(stage=grid.pipeline_rank, tensor=grid.tensor_rank, data=grid.data_rank)
    weights = {name: p.detach().float().clone() for name, p in model.named_parameters()}
    return where, history, evaluated, weights


CASES = {
    "2 stages, recomputed, dropout": (2, tiny_config(dropout=0.2, qk_norm=True), 1, 2, False, "full"),
    "tensor 2 x 2 stages, slots split": (4, tiny_config(attention="dense"), 2, 2, True, "none"),
    "2 stages x data 2": (4, tiny_config(), 1, 2, False, "none"),
}


@pytest.mark.parametrize(
    ("world_size", "config", "tensor", "stages", "sequence_parallel", "recompute"), CASES.values(), ids=CASES
)
def test_pipeline_has_the_losses_gradient_norms_and_weights_of_one_process(
    world_size, config, tensor, stages, sequence_parallel, recompute
):
    arguments = (config, tensor, stages, sequence_parallel, recompute)
    ranks = run_distributed(world_size, pipeline, arguments)
    wanted, weights = one_process(config, world_size // (tensor * stages))
    assert wanted[0][0] > wanted[-1][0]  # it learns, so that later steps test the updates
    for _, history, evaluated, _ in ranks:
        assert [loss for loss, _, _ in history] == pytest.approx([loss for loss, _, _ in wanted], rel=1e-5)
        assert [norm for _, _, norm in history] == pytest.approx([norm for _, _, norm in wanted], rel=1e-4)
        assert evaluated == pytest.approx(ranks[0][2])
    for step in range(STEPS):
        sums = sum(history[step][1] for where, history, _, _ in ranks if where["tensor"] == 0)
        torch.testing.assert_close(sums, wanted[step][1], rtol=1e-5, atol=0)
    gathered = {}
    for where, _, _, local in sorted(ranks, key=lambda rank: rank[0]["tensor"]):
        if where["data"] == 0:
            for name, value in local.items():
                gathered.setdefault(name, []).append(value)
    assert gathered.keys() == weights.keys()
    for name, value in weights.items():
        error = (layout.merge(name, gathered[name]) - value).norm() / value.norm()
        assert error < 1e-5, f"{name}: relative error {error:.1e}"
