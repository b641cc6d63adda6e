"""Time of one optimizer step from what a rank computes, reads and sends: a roofline with four fitted constants.

    micro-batch  =  operations / (peak * sustained * MATMUL)  +  bytes of everything else / (HBM * MEMORY)
                    +  tensor collectives / (link * LINK)  +  sends to the next stage / (link * LINK)
    with ZeRO 2-3   max(that, collectives of the micro-batch)  +  UNHIDDEN * min(that, collectives)
    step         =  (micro-batches + (stages - 1) / chunks) * micro-batch
                    +  collectives once a step / (link * LINK)  +  optimizer's bytes / (HBM * MEMORY)

A micro-batch is its forward and backward pass, and what is computed again. Tensor collectives and sends are waited
for, as the trainer does; so are the gradients' at the end of a step. The sums are of the slowest stage.
"""

from dataclasses import dataclass

from vilg.model.size import BACKWARD_FACTOR
from vilg.tools.plan.hardware import Gpu


@dataclass(frozen=True)
class Constants:
    """Shares of the data sheet's rates that are reached. `published.py` fits them; the values are its result.

    matmul: of what the best matrix product sustains, by the layers'. memory: of the HBM's rate, by norms, GELU,
    residuals, softmax, Adam.
    link: of NVLink and network, by collectives. unhidden: part of ZeRO 2-3's collectives that computing does not hide.
    """

    matmul: float
    memory: float
    link: float
    unhidden: float


CALIBRATED = Constants(matmul=0.81, memory=0.95, link=0.69, unhidden=0.85)

# Adam reads and writes master weights and two moments (fp32), reads a gradient (fp32), writes the weights (bf16).
OPTIMIZER_BYTES = 3 * 8 + 4 + 2
# Offloaded: gradients down and weights up (2 bytes each), by PCIe 4.0 x16 and a node's DDR4 shared by its 8 GPUs.
PCIE, HOST_MEMORY = 25e9, 25e9


@dataclass(frozen=True)
class Spread:
    """How ranks are laid out: tensor ranks are neighbours, data groups go across them, stages are farthest apart."""

    data: int = 1
    tensor: int = 1
    pipeline: int = 1
    chunks: int = 1  # model chunks of a stage (Megatron's interleaved schedule); 1 here, the published runs have more

    @property
    def gpus(self) -> int:
        return self.data * self.tensor * self.pipeline


@dataclass(frozen=True)
class Work:
    """What one rank of the slowest stage does.

    A micro-batch: flops, forward; again_flops, computed again; passes, bytes that forward reads and writes outside of
    matrix products; again_passes; tensor_bytes sent by tensor collectives, all directions; boundary_bytes sent to
    neighbouring stages; zero_bytes sent by ZeRO 2-3 across all data ranks, node_bytes within a node. A step: step_bytes
    sent to data ranks; optimizer_parameters, whose state this rank updates. Sent: by a ring, per rank.
    """

    flops: float
    passes: float
    micro_batches: int
    again_flops: float = 0.0
    again_passes: float = 0.0
    tensor_bytes: float = 0.0
    boundary_bytes: float = 0.0
    zero_bytes: float = 0.0
    node_bytes: float = 0.0
    step_bytes: float = 0.0
    optimizer_parameters: float = 0.0
    offload: bool = False


@dataclass(frozen=True)
class Timing:
    """Seconds of a step and where they go; the parts add up to it."""

    compute: float  # matrix products
    memory_bound: float  # everything else that the GPU computes
    tensor: float
    boundary: float
    zero: float  # of ZeRO's collectives what is not hidden
    bubble: float
    data: float  # collectives at the end of the step
    optimizer: float

    @property
    def step(self) -> float:
        return sum(vars(self).values())


def step_time(work: Work, spread: Spread, gpu: Gpu, constants: Constants = CALIBRATED) -> Timing:
    """Predicted seconds of one optimizer step."""
    peak, hbm = gpu.peak_flops * gpu.sustained * constants.matmul, gpu.hbm * constants.memory
    passes = 1 + BACKWARD_FACTOR
    compute = (passes * work.flops + work.again_flops) / peak
    memory_bound = (passes * work.passes + work.again_passes) / hbm
    tensor = work.tensor_bytes / (tensor_rate(spread, gpu) * constants.link)
    boundary = work.boundary_bytes / (boundary_rate(spread, gpu) * constants.link)
    busy = compute + memory_bound + tensor + boundary
    zero = work.zero_bytes / (data_rate(spread, gpu) * constants.link) + work.node_bytes / (gpu.nvlink * constants.link)
    exposed = max(0.0, zero - busy) + constants.unhidden * min(zero, busy)
    count = work.micro_batches
    data = work.step_bytes / (data_rate(spread, gpu) * constants.link)
    if work.offload:
        optimizer = work.optimizer_parameters * (4 / PCIE + OPTIMIZER_BYTES / HOST_MEMORY)
    else:
        optimizer = work.optimizer_parameters * OPTIMIZER_BYTES / hbm
    return Timing(
        compute=count * compute,
        memory_bound=count * memory_bound,
        tensor=count * tensor,
        boundary=count * boundary,
        zero=count * exposed,
        bubble=(spread.pipeline - 1) / spread.chunks * (busy + exposed),
        data=data,
        optimizer=optimizer,
    )


def tensor_rate(spread: Spread, gpu: Gpu) -> float:
    """Bytes/s of a rank's tensor collectives: NVLink within a node, else its adapter."""
    return gpu.nvlink if spread.tensor <= gpu.node else gpu.network


def data_rate(spread: Spread, gpu: Gpu) -> float:
    """Bytes/s of a rank's data collectives. A group's rings use the adapters of all its members in a node in turn."""
    members = max(1, gpu.node // spread.tensor)
    return gpu.nvlink if spread.data <= members else min(gpu.nvlink, members * gpu.network)


def boundary_rate(spread: Spread, gpu: Gpu) -> float:
    """Bytes/s to the next stage: NVLink only where the whole run is one node."""
    return gpu.nvlink if spread.gpus <= gpu.node else gpu.network


def ring(size: int, bytes_: float) -> float:
    """Bytes that each of `size` ranks sends to gather, or to reduce and scatter, `bytes_`; an all-reduce is both."""
    return (size - 1) / size * bytes_
