"""The grid of ranks: data x tensor x pipeline, made before the model and passed to it; doubles as DeepSpeed's `mpu`.

Ranks are laid out as DeepSpeed's `PipeModelDataParallelTopology` does, the tensor axis fastest, so that a tensor group
stays inside a node:

    rank = (pipeline_rank * data_size + data_rank) * tensor_size + tensor_rank
"""

from dataclasses import dataclass

import torch.distributed as dist

from vilg.errors import UserError
from vilg.parallel.ops import Group


@dataclass(frozen=True)
class Grid:
    """Where this process stands. A group is None when its axis has one rank: collectives over it are then left out.

    sequence_parallel: norms, dropout and residuals are split over the tensor ranks along the slots (2205.05198).
    group_of_one: a real group, for DeepSpeed's questions about axes of size one.
    """

    data_size: int = 1
    tensor_size: int = 1
    pipeline_size: int = 1
    rank: int = 0
    data_group: Group = None
    tensor_group: Group = None
    pipeline_group: Group = None
    sequence_parallel: bool = False
    group_of_one: Group = None

    @classmethod
    def single(cls) -> "Grid":
        """One process, no process groups."""
        return cls()

    @classmethod
    def build(cls, *, tensor: int = 1, pipeline: int = 1, sequence_parallel: bool = False) -> "Grid":
        """Make all groups; every rank of an initialised `torch.distributed` must call it with the same arguments.

        Without `torch.distributed` it is `Grid.single()`. Raises UserError if the number of processes does not fit.
        """
        world = dist.get_world_size() if dist.is_initialized() else 1
        check_sizes(world, tensor=tensor, pipeline=pipeline)
        if not dist.is_initialized():
            return cls.single()
        data, rank = world // (tensor * pipeline), dist.get_rank()
        made = {
            axis: _make_group(rank_lists, rank) if len(rank_lists[0]) > 1 else None
            for axis, rank_lists in axis_ranks(data, tensor, pipeline).items()
        }
        return cls(
            data_size=data,
            tensor_size=tensor,
            pipeline_size=pipeline,
            rank=rank,
            data_group=made["data"],
            tensor_group=made["tensor"],
            pipeline_group=made["pipeline"],
            sequence_parallel=sequence_parallel and tensor > 1,
            group_of_one=_make_group([[r] for r in range(world)], rank),
        )

    @property
    def tensor_rank(self) -> int:
        return self.rank % self.tensor_size

    @property
    def data_rank(self) -> int:
        return self.rank // self.tensor_size % self.data_size

    @property
    def pipeline_rank(self) -> int:
        return self.rank // (self.tensor_size * self.data_size)

    @property
    def world_size(self) -> int:
        return self.data_size * self.tensor_size * self.pipeline_size

    @property
    def replicas(self) -> int:
        """Ranks that read the same data."""
        return self.tensor_size * self.pipeline_size

    # What DeepSpeed asks of an `mpu`. Its "model parallel" is the tensor axis: with a pipeline it asks its own grid.

    def get_data_parallel_group(self) -> Group:
        return self.data_group or self.group_of_one

    def get_data_parallel_rank(self) -> int:
        return self.data_rank

    def get_data_parallel_world_size(self) -> int:
        return self.data_size

    def get_model_parallel_group(self) -> Group:
        return self.tensor_group or self.group_of_one

    def get_model_parallel_rank(self) -> int:
        return self.tensor_rank

    def get_model_parallel_world_size(self) -> int:
        return self.tensor_size

    def get_tensor_model_parallel_group(self) -> Group:
        return self.get_model_parallel_group()

    def get_tensor_model_parallel_rank(self) -> int:
        return self.tensor_rank

    def get_tensor_model_parallel_world_size(self) -> int:
        return self.tensor_size

    def get_tensor_model_parallel_src_rank(self) -> int:
        """Global rank of the first member of this tensor group."""
        return self.rank - self.tensor_rank

    def get_pipeline_model_parallel_rank(self) -> int:
        return self.pipeline_rank

    def get_pipeline_model_parallel_world_size(self) -> int:
        return self.pipeline_size


def check_sizes(world: int, *, tensor: int, pipeline: int) -> None:
    """Raise UserError unless `world` processes can form whole tensor x pipeline groups."""
    if world % (tensor * pipeline):
        raise UserError(
            f"{world} processes cannot form groups of parallel.tensor={tensor} x parallel.pipeline={pipeline}; "
            f"start a multiple of {tensor * pipeline}"
        )


def axis_ranks(data: int, tensor: int, pipeline: int) -> dict[str, list[list[int]]]:
    """Axis name -> the list of its groups, each a list of global ranks."""

    def rank(p: int, d: int, t: int) -> int:
        return (p * data + d) * tensor + t

    return {
        "data": [[rank(p, d, t) for d in range(data)] for p in range(pipeline) for t in range(tensor)],
        "tensor": [[rank(p, d, t) for t in range(tensor)] for p in range(pipeline) for d in range(data)],
        "pipeline": [[rank(p, d, t) for p in range(pipeline)] for d in range(data) for t in range(tensor)],
    }


def _make_group(rank_lists: list[list[int]], rank: int) -> Group:
    """Make every group, as all ranks must, and return the one that holds `rank`."""
    groups = [dist.new_group(ranks) for ranks in rank_lists]
    return next(group for group, ranks in zip(groups, rank_lists) if rank in ranks)
