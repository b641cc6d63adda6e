"""Published runs that the timing model is fitted on (every second one) and checked against (the others).

All are GPTs, so they are told by their shape. `python -m vilg.tools.plan.published` fits again and prints the table.
Sources: Megatron-LM 2104.04473 table 1 (micro-batches: examples/sc21/run_table_1.sh); Korthikanti 2205.05198 table 5;
BLOOM (Stas Bekman's ML Engineering); MosaicML llm-foundry, scripts/train/benchmarking, all its rows of 2048 tokens with
3 to 70 billion parameters. paper.md section 3 of the project's notes compares their definitions.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from vilg.tools.plan.hardware import GPUS, Gpu
from vilg.tools.plan.timing import CALIBRATED, Constants, Spread, Timing, Work, ring, step_time

# Bytes a token that a GPT layer's forward reads and writes outside of matrix products, fp16, per hidden channel: two
# norms (in, out), two sums of bias, dropout and residual (in, in, out, mask); per channel that tensor ranks split:
# GELU of four. Per head and key where scores are stored: product out, softmax in and out, dropout in, out and mask,
# product in.
WHOLE_PASSES, SPLIT_PASSES, SCORE_PASSES = 2 * 4 + 2 * 7, 4 * 4, 13
LOGIT_PASSES = 2 + 2 + 4 + 4 + 4  # a logit: out in 16 bits, read, fp32 out, read for the maximum and for the sum


@dataclass(frozen=True)
class Run:
    """A published run. value: TFLOP/s per GPU by the source's own count of operations (`count`: HFU with everything
    recomputed, or MFU, or tokens for tokens/s per GPU). full: all layers recomputed; scores: attention stores its
    scores, and with `selective` computes them again; zero3 with gradients of `gradient_bytes`."""

    source: str
    name: str
    gpu: Gpu
    shape: tuple[int, int, int, int]  # layers, hidden, heads, vocabulary
    spread: Spread
    batch: int
    micro: int
    value: float
    count: str
    full: bool = True
    scores: bool = True
    sequence: bool = False
    selective: bool = False
    zero3: bool = False
    gradient_bytes: int = 2
    slots: int = 2048

    @property
    def tokens(self) -> int:
        return self.batch * self.slots

    @property
    def forward_flops(self) -> float:
        """Of one token: 24 h^2 + 4 s h a layer (attention over all pairs, as all these sources count), 2 V h."""
        layers, hidden, _, vocabulary = self.shape
        return layers * (24 * hidden**2 + 4 * self.slots * hidden) + 2 * vocabulary * hidden

    @property
    def seconds(self) -> float:
        """The published value as seconds a step."""
        if self.count == "tokens/s":
            return self.tokens / self.spread.gpus / self.value
        layers, hidden, _, vocabulary = self.shape
        times = 4 if self.count == "HFU" else 3
        # with everything recomputed Megatron counts the logits three times all the same
        flops = times * self.forward_flops - (times - 3) * 2 * vocabulary * hidden
        return self.tokens * flops / self.spread.gpus / (self.value * 1e12)


def work_of(run: Run) -> Work:
    """The run's work on a rank of its last stage, which has the logits."""
    layers, hidden, heads, vocabulary = run.shape
    tensor, data, pipeline = run.spread.tensor, run.spread.data, run.spread.pipeline
    tokens, held = run.micro * run.slots, layers / pipeline
    products = held * 24 * hidden**2
    pairs = held * 4 * run.slots * hidden / (1 if run.scores else 2)  # flash attention leaves out what causality hides
    whole = WHOLE_PASSES * hidden / (tensor if run.sequence else 1)
    scores = SCORE_PASSES * heads * run.slots / tensor if run.scores else 0
    layer_passes = held * (whole + SPLIT_PASSES * hidden / tensor + scores)
    parameters = (layers * 12 * hidden**2 / pipeline + vocabulary * hidden) / tensor
    collective = 2 * ring(tensor, tokens * hidden * 2)
    again_collectives = 2 if run.full else 1 if run.sequence else 0  # an all-gather alone is half of an all-reduce
    gathered = ring(data, 2 * parameters)
    return Work(
        flops=tokens * (products + pairs + 2 * vocabulary * hidden) / tensor,
        again_flops=tokens * (products + pairs if run.full else pairs if run.selective else 0) / tensor,
        passes=tokens * (layer_passes + LOGIT_PASSES * vocabulary / tensor),
        again_passes=tokens * (layer_passes if run.full else held * scores if run.selective else 0),
        micro_batches=run.batch // (run.micro * data),
        tensor_bytes=held * (4 + again_collectives) * collective,
        boundary_bytes=2 * run.spread.chunks * tokens * hidden * 2 / tensor if pipeline > 1 else 0.0,
        zero_bytes=2 * gathered + ring(data, run.gradient_bytes * parameters) if run.zero3 else 0.0,
        step_bytes=0.0 if run.zero3 else 2 * ring(data, run.gradient_bytes * parameters),
        optimizer_parameters=parameters / (data if run.zero3 else 1),
    )


def predict(run: Run, constants: Constants = CALIBRATED) -> Timing:
    """The timing model on a published run."""
    return step_time(work_of(run), run.spread, run.gpu, constants)


def error(run: Run, constants: Constants = CALIBRATED) -> float:
    """Predicted over published seconds, minus one."""
    return predict(run, constants).step / run.seconds - 1


def halves(runs: Sequence[Run] | None = None) -> tuple[list[Run], list[Run]]:
    """Every second run, from the first, to fit on; the others to check."""
    runs = RUNS if runs is None else runs
    return list(runs[::2]), list(runs[1::2])


def fit(runs: Sequence[Run]) -> Constants:
    """Constants of the least mean |log(predicted / published)|, by coordinate descent on ever finer steps.

    The absolute value, because a few runs were held up by something that no model of the hardware knows.
    """
    best = Constants(0.8, 0.7, 0.7, 0.2)

    def loss(constants: Constants) -> float:
        return sum(abs(math.log1p(error(run, constants))) for run in runs) / len(runs)

    lowest, stride = loss(best), 0.1
    while stride > 0.004:
        moved = False
        for key in vars(best):
            for value in (getattr(best, key) - stride, getattr(best, key) + stride):
                if not 0.02 <= value <= 0.95:
                    continue
                trial = replace(best, **{key: value})
                if loss(trial) < lowest - 1e-9:
                    best, lowest, moved = trial, loss(trial), True
        stride = stride if moved else stride / 2
    return replace(best, **{key: round(value, 2) for key, value in vars(best).items()})


def table(constants: Constants = CALIBRATED) -> str:
    """Predicted and published, as Markdown."""
    lines = ["| run | GPUs | layout | published | predicted | error | |", "|---|---|---|---|---|---|---|"]
    for number, run in enumerate(RUNS):
        spread, off = run.spread, error(run, constants)
        layout = "ZeRO-3" if run.zero3 else f"t{spread.tensor} p{spread.pipeline} d{spread.data}"
        layout += f", micro-batch {run.micro}"
        layout += ", recomputed" if run.full else ", selective" if run.selective else ""
        unit = "tokens/s/GPU" if run.count == "tokens/s" else f"TFLOP/s ({run.count})"
        lines.append(
            f"| {run.source} {run.name} | {spread.gpus} {run.gpu.name} | {layout} | {run.value:,.5g} {unit} | "
            f"{run.value / (1 + off):,.4g} | {-off / (1 + off):+.0%} | {'fitted' if number % 2 == 0 else 'held out'} |"
        )
    return "\n".join(lines)


def _megatron() -> list[Run]:
    rows = (  # name, layers, hidden, heads, tensor, pipeline, chunks, gpus, batch, micro, TFLOP/s
        ("1.7B", 24, 2304, 24, 1, 1, 1, 32, 512, 16, 137),
        ("3.6B", 30, 3072, 32, 2, 1, 1, 64, 512, 16, 138),
        ("7.5B", 36, 4096, 32, 4, 1, 1, 128, 512, 16, 142),
        ("18.4B", 40, 6144, 48, 8, 1, 1, 256, 1024, 8, 135),
        ("39.1B", 48, 8192, 64, 8, 2, 1, 512, 1536, 4, 138),
        ("76.1B", 60, 10240, 80, 8, 4, 3, 1024, 1792, 2, 140),
        ("145.6B", 80, 12288, 96, 8, 8, 2, 1536, 2304, 2, 148),
        ("310.1B", 96, 16384, 128, 8, 16, 2, 1920, 2160, 1, 155),
        ("529.6B", 105, 20480, 128, 8, 35, 3, 2520, 2520, 1, 163),
        ("1008B", 128, 25600, 160, 8, 64, 1, 3072, 3072, 1, 163),
    )
    return [
        Run("Megatron", name, GPUS["a100-80g"], (layers, hidden, heads, 51200), Spread(gpus // t // p, t, p, chunks),
            batch, micro, value, "HFU", gradient_bytes=4 if p == 1 else 2)
        for name, layers, hidden, heads, t, p, chunks, gpus, batch, micro, value in rows
    ]  # fmt: skip


def _korthikanti() -> list[Run]:
    rows = (  # name, layers, hidden, heads, pipeline, chunks, batch, micro, MFU in percent
        ("22B", 48, 6144, 64, 1, 1, 4, 4, 41.5),
        ("175B", 96, 12288, 96, 8, 3, 64, 1, 51.4),
        ("530B", 105, 20480, 128, 35, 3, 280, 1, 56.0),
        ("1T", 128, 25600, 160, 64, 1, 512, 1, 56.3),
    )
    return [
        Run("Korthikanti", name, GPUS["a100-80g"], (layers, hidden, heads, 51200), Spread(1, 8, p, chunks), batch, micro,
            mfu / 100 * 312, "MFU", full=False, sequence=True, selective=True)
        for name, layers, hidden, heads, p, chunks, batch, micro, mfu in rows
    ]  # fmt: skip


def _bloom() -> list[Run]:
    # Jean Zay: four Omni-Path adapters of 100 Gb/s for the eight GPUs of a node.
    gpu = replace(GPUS["a100-80g"], network=6.25e9)
    return [
        Run("BLOOM", f"176B, batch {batch}", gpu, (70, 14336, 112, 250880), Spread(8, 4, 12), batch, 2, value, "HFU")
        for batch, value in ((2048, 150), (192, 73), (16, 8))
    ]


def _mosaic() -> list[Run]:
    shapes = {
        "3B": (32, 2560, 32), "7B": (32, 4096, 32), "13B": (40, 5120, 40), "30B": (48, 7168, 56), "70B": (80, 8192, 64)
    }  # fmt: skip
    rows = (  # gpu, model, gpus, micro, micro-batches, recomputed, all in 16 bits, tokens/s per GPU
        ("a100-80g", "70B", 64, 8, 4, True, True, 410),
        ("a100-80g", "70B", 32, 2, 16, True, True, 373),
        ("a100-80g", "30B", 8, 3, 21, True, False, 916),
        ("a100-80g", "13B", 8, 2, 3, False, False, 2262),
        ("a100-80g", "7B", 8, 6, 2, False, False, 4641),
        ("a100-80g", "3B", 8, 10, 2, False, False, 10811),
        ("a100-40g", "70B", 128, 4, 1, True, True, 376),
        ("a100-40g", "70B", 64, 2, 1, True, True, 276),
        ("a100-40g", "30B", 128, 6, 1, True, True, 865),
        ("a100-40g", "30B", 32, 4, 1, True, True, 857),
        ("a100-40g", "13B", 128, 16, 1, True, True, 1972),
        ("a100-40g", "13B", 64, 16, 1, True, True, 1976),
        ("a100-40g", "13B", 32, 14, 1, True, True, 1998),
        ("a100-40g", "13B", 16, 10, 1, True, True, 1993),
        ("a100-40g", "13B", 8, 4, 16, True, True, 1668),
        ("a100-40g", "7B", 128, 18, 1, True, True, 3623),
        ("a100-40g", "7B", 64, 18, 1, True, True, 3665),
        ("a100-40g", "7B", 32, 18, 1, True, True, 3725),
        ("a100-40g", "7B", 16, 16, 1, True, True, 3645),
        ("a100-40g", "7B", 8, 12, 4, True, True, 3679),
        ("a100-40g", "3B", 128, 6, 1, False, True, 9538),
        ("a100-40g", "3B", 64, 6, 1, False, True, 9736),
        ("h100", "70B", 64, 8, 4, True, False, 1039),
        ("h100", "70B", 32, 2, 16, True, False, 882),
        ("h100", "30B", 32, 14, 3, True, False, 2308),
        ("h100", "30B", 16, 10, 3, True, False, 2263),
        ("h100", "30B", 8, 3, 21, True, False, 2002),
        ("h100", "13B", 64, 2, 1, False, False, 4800),
        ("h100", "13B", 32, 2, 1, False, False, 4811),
        ("h100", "13B", 16, 2, 1, False, False, 4767),
        ("h100", "13B", 8, 2, 1, False, False, 4792),
        ("h100", "7B", 8, 6, 1, False, False, 10643),
        ("h100", "3B", 64, 6, 3, False, False, 22525),
        ("h100", "3B", 32, 6, 3, False, False, 23021),
        ("h100", "3B", 16, 10, 3, False, False, 24142),
    )
    return [
        Run("MosaicML", model, GPUS[gpu], (*shapes[model], 50368), Spread(gpus), gpus * micro * count, micro, value,
            "tokens/s", full=full, scores=False, zero3=True, gradient_bytes=2 if pure else 4)
        for gpu, model, gpus, micro, count, full, pure, value in rows
    ]  # fmt: skip


RUNS: tuple[Run, ...] = (*_megatron(), *_korthikanti(), *_bloom(), *_mosaic())


if __name__ == "__main__":
    fitted = fit(halves()[0])
    print(fitted)
    print(table(fitted))
