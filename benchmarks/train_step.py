"""Claim: training steps of a slice of the 10B model, at full width, against its peers. For one GPU; `--tiny` tries it on a CPU.

    python benchmarks/train_step.py                      # as many layers as fit, 50 steps each
    python benchmarks/train_step.py --layers 12 --micro 4
    python benchmarks/train_step.py --tiny --device cpu

Three contenders, each in a process of its own, in bf16 under ds_configs/zero1.json with the same AdamW, the same number of
layers and sequences, random tokens:

- `sparse`: launch/recipes/10b.yaml as `vilg train` builds it;
- `dense`: the same model whose attention is torch's fused causal attention (`scaled_dot_product_attention`, is_causal: the
  fastest dense kernel; it also attends from text to later text, which costs it nothing);
- `llama`: transformers' LlamaForCausalLM of the same width, heads and layers, SwiGLU sized to the same parameters, one
  softmax over both vocabularies, as LlamaGen and most open image generators are built.

Prints and writes benchmarks/results/train_step.json: median step and 20/80 % quantiles over the steps after the warm-up,
tokens/s, MFU (each contender's own operations: `vilg.model.size`; for llama 6 P + 6 L h s per token), memory, and
ratios. `--profile` also writes sparse's time per kind of kernel.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
os.chdir(ROOT)  # recipes name ds_configs/ relative to it

import numpy as np  # noqa: E402
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402

from vilg.checkpoint.state import source_commit, versions  # noqa: E402
from vilg.config import Recipe, load_recipe  # noqa: E402
from vilg.config.deepspeed import merged_deepspeed_config  # noqa: E402
from vilg.model.block import set_recompute  # noqa: E402
from vilg.model.size import block_parameters, sequence_flops  # noqa: E402
from vilg.model.vilg import Vilg  # noqa: E402
from vilg.parallel.grid import Grid  # noqa: E402
from vilg.tokens.sequence import SequenceBatch, collate, image_to_text, text_to_image  # noqa: E402
from vilg.train.distributed import distributed  # noqa: E402
from vilg.train.engine import build_engine  # noqa: E402
from vilg.train.metrics import peak_flops, peak_memory  # noqa: E402
from vilg.train.open import sequence_spec  # noqa: E402
from vilg.train.optim import build_adamw  # noqa: E402
from vilg.train.step import count, plan_step  # noqa: E402

RESULT = ROOT / "benchmarks" / "results" / "train_step.json"
CONTENDERS = ("sparse", "dense", "llama")
WARM_UP = 5
BYTES_A_PARAMETER = 18  # bf16 weight, fp32 gradient sum, fp32 master and two moments
TINY = ["model.hidden_size=64", "model.num_heads=2", "tokens.grid=[8,8]", "tokens.text_slots=16", "tokens.text_vocab_size=512",
        "tokens.image_vocab_size=512"]  # fmt: skip


def recipe_of(args: argparse.Namespace) -> Recipe:
    """The 10B recipe, cut to `args.layers` layers and one micro-batch of `args.micro` pairs (two sequences each)."""
    cut = [f"model.num_layers={args.layers}", f"batch.micro_size={args.micro}", f"batch.global_size={args.micro}",
           "parallel.deepspeed=ds_configs/zero1.json", f"parallel.recompute={args.recompute}"]  # fmt: skip
    return load_recipe("launch/recipes/10b.yaml", [*cut, *(TINY if args.tiny else [])], world_size=1)


def batch_of(recipe: Recipe) -> SequenceBatch:
    """`micro` pairs in both directions, captions of 20 tokens or as many as fit."""
    spec, generator = sequence_spec(recipe), np.random.default_rng(0)
    sequences = []
    for _ in range(recipe.batch.micro_size):
        text = generator.integers(4, spec.text_vocab_size, min(20, spec.text_slots - 1)).tolist()
        codes = generator.integers(0, spec.image_vocab_size, spec.image_slots)
        sequences += [text_to_image(spec, text, codes), image_to_text(spec, text, codes)]
    return collate(sequences)


class CausalVilg(Vilg):
    """The model with torch's fused causal attention in every layer."""

    def forward(self, text_input, image_input, text_len, text_prefix, image_is_target, *, dropout_seeds=None):
        hidden = self.embed(text_input, image_input, text_prefix, image_is_target)
        for block in self.blocks:
            hidden = block(hidden, causal_attention, dropout_seeds)
        return self.heads(hidden)


def causal_attention(q, k, v, pattern: str):
    """As `SparseAttend`: q, k, v [B, H, S, D]."""
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def vilg_step(recipe: Recipe, device: torch.device, *, dense: bool) -> tuple[Callable[[], None], float, int]:
    """(one step, operations of a step, parameters)."""
    grid, spec = Grid.build(), sequence_spec(recipe)
    model = (CausalVilg if dense else Vilg)(recipe.model, spec, grid=grid, device=device)
    model.reset_parameters(0)
    set_recompute(model, recipe.parallel)
    engine, batch = build_engine(recipe, grid, model, device), batch_of(recipe)
    text_targets, image_targets, _ = count([batch])
    plan = plan_step(recipe, 1, text_targets=text_targets, image_targets=image_targets)
    shape = recipe.model.model_copy(update={"attention": "dense"}) if dense else recipe.model
    flops = recipe.batch.micro_size * sum(sequence_flops(shape, spec, image_is_target=d) for d in (True, False))

    def step() -> None:
        if engine.train_step([batch], plan).skipped:
            raise SystemExit("a step was left out for non-finite gradients: its time would say nothing")

    return step, flops, sum(p.numel() for p in model.parameters())


def llama_step(recipe: Recipe, device: torch.device) -> tuple[Callable[[], None], float, int]:
    from transformers import LlamaConfig, LlamaForCausalLM

    from vilg.train.deepspeed_engine import import_deepspeed, silent

    deepspeed = import_deepspeed(device)
    spec, shape = sequence_spec(recipe), recipe.model
    hidden = shape.hidden_size
    # SwiGLU has three matrices: as wide as gives a layer the parameters of ours.
    wide = round((block_parameters(shape) - 4 * hidden * hidden) / (3 * hidden) / 8) * 8
    config = LlamaConfig(
        hidden_size=hidden, intermediate_size=wide, num_hidden_layers=shape.num_layers,
        num_attention_heads=shape.num_heads, vocab_size=spec.text_vocab_size + spec.image_vocab_size,
        max_position_embeddings=spec.num_slots, use_cache=False, attn_implementation="sdpa",
    )  # fmt: skip
    with torch.device(device):
        model = LlamaForCausalLM(config).train()
    if recipe.parallel.recompute != "none":
        model.gradient_checkpointing_enable({"use_reentrant": False})
    optimizer, _ = build_adamw([{"params": list(model.parameters())}], recipe.optimizer, device)
    settings = merged_deepspeed_config(recipe, data_size=1)
    with silent():
        engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings, dist_init_required=False)
    sequences = 2 * recipe.batch.micro_size
    ids = torch.randint(0, config.vocab_size, (sequences, spec.num_slots), device=device)

    def step() -> None:
        engine.backward(engine(input_ids=ids, labels=ids).loss)
        engine.step()

    parameters = sum(p.numel() for p in model.parameters())
    matrices = parameters - config.vocab_size * hidden  # the input table multiplies nothing
    per_token = 6 * matrices + 6 * shape.num_layers * hidden * spec.num_slots
    return step, per_token * sequences * spec.num_slots, parameters


def measure(args: argparse.Namespace) -> dict:
    """One contender, in this process."""
    device, recipe = torch.device(args.device), recipe_of(args)
    with distributed(device):
        if args.contender == "llama":
            step, flops, parameters = llama_step(recipe, device)
        else:
            step, flops, parameters = vilg_step(recipe, device, dense=args.contender == "dense")
        seconds = []
        for number in range(WARM_UP + args.steps):
            started = time.perf_counter()
            step()
            if device.type == "cuda":
                torch.cuda.synchronize()
            if number >= WARM_UP:
                seconds.append(time.perf_counter() - started)
        if args.profile and args.contender == "sparse":
            profile(step)
        median, tokens = statistics.median(seconds), 2 * args.micro * sequence_spec(recipe).num_slots
        peak = peak_flops(device)
        return {
            "parameters": parameters,
            "median_ms": 1e3 * median,
            "q20_q80_ms": [1e3 * float(q) for q in np.quantile(seconds, (0.2, 0.8))],
            "tokens_per_second": tokens / median,
            "tflop_per_step": flops / 1e12,
            "mfu": flops / median / peak if peak else None,
            "peak_memory_gib": peak_memory(device) / 2**30,
        }


def profile(step: Callable[[], None]) -> None:
    """Print where one step's time goes."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as found:
        step()
    key = "cuda_time_total" if torch.cuda.is_available() else "cpu_time_total"
    print(found.key_averages().table(sort_by=key, row_limit=25), file=sys.stderr)


def layers_that_fit(device: torch.device) -> int:
    """Whole layers of 10b.yaml whose state, and as much again for activations, fit beside the tables; 2 on a CPU."""
    if device.type != "cuda":
        return 2
    recipe = load_recipe("launch/recipes/10b.yaml")
    spec, shape = sequence_spec(recipe), recipe.model
    tables = 2 * (spec.text_vocab_size + spec.image_vocab_size) * shape.hidden_size
    free = 0.8 * torch.cuda.get_device_properties(device).total_memory - BYTES_A_PARAMETER * tables
    return max(1, min(shape.num_layers, int(free / (1.3 * BYTES_A_PARAMETER * block_parameters(shape)))))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=0, help="0: as many as fit")
    parser.add_argument("--micro", type=int, default=2, help="pairs of a step, two sequences each")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--recompute", default="none", choices=("none", "selective", "full"))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--tiny", action="store_true", help="a small shape, to try the script; writes no result")
    parser.add_argument("--profile", action="store_true", help="print where a sparse step's time goes")
    parser.add_argument("--contender", choices=CONTENDERS, help="run one in this process and print it as JSON")
    args = parser.parse_args()
    args.layers = args.layers or layers_that_fit(torch.device(args.device))
    if args.contender:
        print(json.dumps(measure(args)))
        return 0
    on_gpu = args.device.startswith("cuda")
    result = {
        "hardware": torch.cuda.get_device_name() if on_gpu else platform.machine(), "versions": versions(),
        "commit": source_commit(), "layers": args.layers, "pairs": args.micro, "steps": args.steps,
        "recompute": args.recompute, "contenders": {},
    }  # fmt: skip
    for contender in CONTENDERS:
        own = [f"--contender={contender}", f"--layers={args.layers}"]
        command = [sys.executable, __file__, *(a for a in sys.argv[1:]), *own]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
        if done.returncode:
            print(f"{contender}: ended with exit code {done.returncode}; its message is above", file=sys.stderr)
            return 1
        found = result["contenders"][contender] = json.loads(done.stdout.splitlines()[-1])
        mfu = f"MFU {found['mfu']:.1%}" if found["mfu"] else "MFU n/a"
        print(f"{contender:7} {found['parameters'] / 1e9:6.3f}B  {found['median_ms']:9.1f} ms  "
              f"{found['tokens_per_second']:9.0f} tokens/s  {mfu}  {found['peak_memory_gib']:5.1f} GiB", flush=True)  # fmt: skip
    ours = result["contenders"]["sparse"]["median_ms"]
    for peer in CONTENDERS[1:]:
        ratio = result[f"{peer}_over_sparse_time"] = result["contenders"][peer]["median_ms"] / ours
        print(f"a step of {peer} takes {ratio:.2f} x that of sparse")
    if not args.tiny:
        RESULT.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
