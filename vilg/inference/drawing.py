"""One step of drawing pictures in tensors that stay where they are, so that a CUDA graph can replay it for every slot.

On a GPU a step of a large model is a thousand small kernels, and starting them takes longer than running them; a graph
starts all of them at once. On a CPU, and on tensor-parallel ranks, the same step runs without one.
Shapes: R rows (candidates; twice as many are decoded with guidance), N image slots.
"""

from collections.abc import Callable
from contextlib import nullcontext

import torch
from torch import Tensor

from vilg.inference.image_decoder import ImageDecoder
from vilg.inference.sampling import SamplingConfig, guidance_by_slot, guided, sample_tokens

# Called with the number of slots drawn and the codes int64 [R, N], of which only these are set; on a GPU the kernels may
# still be under way. What it raises ends the drawing.
OnStep = Callable[[int, Tensor], None]


class Drawing:
    """Pictures in the making: `codes` int64 [R, N], filled slot by slot by calling `step`.

    decoder: of the prompts' rows and, if `sampling` has guidance, as many rows of empty prompts behind them.
    uniforms: float64 [R, N], the candidates' random numbers. replayable: keep the slot in a tensor (`step_at`).
    """

    def __init__(
        self, decoder: ImageDecoder, uniforms: Tensor, sampling: SamplingConfig, *, begin: int, replayable: bool
    ) -> None:
        self.decoder, self.uniforms, self.sampling = decoder, uniforms, sampling
        self.begin, self.replayable = begin, replayable
        rows, self.num_slots = uniforms.shape
        self.codes = torch.empty(rows, self.num_slots, dtype=torch.long, device=uniforms.device)
        self.previous = torch.full((rows,), begin, device=uniforms.device)
        decoded = 2 * rows if sampling.is_guided else rows
        self.slots = torch.zeros(decoded, dtype=torch.int32, device=uniforms.device)
        self.guidance = guidance_by_slot(sampling, self.num_slots).to(uniforms.device)  # [N]

    def draw(self, *, graph: bool, on_step: OnStep | None = None) -> Tensor:
        """All slots; returns `codes`. graph: replay a CUDA graph of the step; on_step: called after each slot."""
        with torch.cuda.device(self.codes.device) if graph else nullcontext():
            step = self._captured() if graph else self.step
        for slot in range(self.num_slots):
            step() if graph else self.step(slot)
            if on_step:
                on_step(slot + 1, self.codes)
        return self.codes

    def step(self, slot: int = 0) -> None:
        """Draw one slot: number `slot`, or where `replayable` the one that the tensors say, which then count on."""
        rows = len(self.previous)
        fed = self.previous.repeat(2) if self.sampling.is_guided else self.previous
        if self.replayable:
            logits, place = self.decoder.step_at(self.slots, fed), self.slots[:1].long()
        else:
            logits, place = self.decoder.step(slot, fed), torch.tensor([slot], device=fed.device)
        if self.sampling.is_guided:
            logits = guided(logits[:rows], logits[rows:], self.guidance[place])
        drawn = sample_tokens(logits, self.uniforms.index_select(1, place)[:, 0], self.sampling)
        self.codes.index_copy_(1, place, drawn[:, None])
        self.previous.copy_(drawn)
        self.slots.add_(1)

    def _captured(self) -> Callable[[], None]:
        """A CUDA graph of `step`, and the tensors as they were before the first slot."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # kernels are compiled and libraries make room before the capture
            for _ in range(2):
                self._rewind()
                self.step()
        torch.cuda.current_stream().wait_stream(stream)
        self._rewind()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self.step()
        return graph.replay

    def _rewind(self) -> None:
        self.slots.zero_()
        self.previous.fill_(self.begin)
