"""Claim: training steps of a slice of the 10B model, at full width, against its peers. For one GPU; `--tiny` tries it on a CPU.

    python benchmarks/train_step.py                      # as many layers as fit, 50 steps of ours and 15 of each peer
    python benchmarks/train_step.py --layers 12 --profile --json OUT.json
    python benchmarks/train_step.py --grid 64 64 --micro 1 --json OUT.json     # where sparse layers matter more
    python benchmarks/train_step.py --tiny --device cpu --steps 2 --peer-steps 2

Three contenders, each in a process of its own, in bf16 under ds_configs/zero1.json with the same AdamW, the same number of
layers, sequences and micro-batches (`--accumulate`: a real run has 4 to 32 of them a step), random weights and tokens:

- `sparse`: launch/recipes/10b.yaml as `vilg train` builds it;
- `dense`: the same model whose attention is torch's fused causal attention (`scaled_dot_product_attention`, is_causal: the
  fastest dense kernel; it also attends from text to later text, which costs it nothing);
- `llama`: transformers' LlamaForCausalLM of the same width, heads and layers, SwiGLU sized to the same parameters, one
  softmax over both vocabularies, as LlamaGen and most open image generators are built.

Prints and writes benchmarks/results/train_step.json (`--json`: elsewhere): median step and 20/80 % quantiles over the steps
after the warm-up, tokens/s, MFU (each contender's own operations: `vilg.model.size`; for llama 6 P + 6 L h s per token),
memory, and ratios; written anew after each contender. `--profile` adds the share of a step of ours by kind of kernel.
A contender that fails is named, the others still run, and the exit code is 1.
"""

import argparse
import json
import os
import platform
import re
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
from vilg.model.block import compile_blocks, set_recompute  # noqa: E402
from vilg.model.size import block_parameters, sequence_flops  # noqa: E402
from vilg.model.vilg import Vilg  # noqa: E402
from vilg.parallel import layout  # noqa: E402
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
WARM_UP = 3
BYTES_A_PARAMETER = 20  # bf16 weight and gradient, fp32 gradient sum, master and two moments
# What the peer with the most activations keeps: transformers' Llama, whose norms work in fp32. Bytes for a slot, per
# channel and layer, and per column of its one softmax.
BYTES_A_CHANNEL, BYTES_A_LOGIT = 48, 16
KINDS = {  # kernel name -> kind, the first that matches
    "attention": r"flash|fmha|cudnn.*sdpa|forward_kernel|(query|key)_gradient_kernel",
    "matrix product": r"gemm|nvjet|xmma|cutlass|cublas|splitk|sgemm",
    "optimizer": r"multi_tensor|adam",
    "norm": r"layer_?norm|rms_?norm|gamma_?beta|split_heads",
    "loss": r"softmax|nll_loss|cross_entropy",
    "copies and fills": r"memcpy|memset|copy|fill|cat",
    "sums": r"reduce",
    "element by element": r"elementwise|triton_poi|triton_red|triton_per|gelu",
}
TINY = ["model.hidden_size=64", "model.num_heads=2", "tokens.grid=[8,8]", "tokens.text_slots=16", "tokens.text_vocab_size=512",
        "tokens.image_vocab_size=512"]  # fmt: skip


def recipe_of(args: argparse.Namespace) -> Recipe:
    """The 10B recipe, cut to `args.layers` layers and steps of `args.micro` x `args.accumulate` pairs, two sequences each."""
    cut = [f"model.num_layers={args.layers}", f"batch.micro_size={args.micro}",
           f"batch.global_size={args.micro * args.accumulate}", "parallel.deepspeed=ds_configs/zero1.json",
           f"parallel.recompute={args.recompute}", f"parallel.compile={args.compile}"]  # fmt: skip
    return load_recipe("launch/recipes/10b.yaml", [*cut, *(TINY if args.tiny else []), *grid_of(args)], world_size=1)


def grid_of(args: argparse.Namespace) -> list[str]:
    """The override of `--grid`, if there is one."""
    return [f"tokens.grid={args.grid}"] if args.grid else []


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
    draw_weights(model)
    set_recompute(model, recipe.parallel)
    if recipe.parallel.compile:
        compile_blocks(model)
    engine = build_engine(recipe, grid, model, device)
    batches = [batch_of(recipe)] * (recipe.batch.global_size // recipe.batch.micro_size)
    text_targets, image_targets, _ = count(batches)
    plan = plan_step(recipe, 1, text_targets=text_targets, image_targets=image_targets)
    shape = recipe.model.model_copy(update={"attention": "dense"}) if dense else recipe.model
    flops = recipe.batch.global_size * sum(sequence_flops(shape, spec, image_is_target=d) for d in (True, False))

    def step() -> None:
        if engine.train_step(batches, plan).skipped:
            raise SystemExit("a step was left out for non-finite gradients: its time would say nothing")

    return step, flops, sum(p.numel() for p in model.parameters())


@torch.no_grad()
def draw_weights(model: Vilg) -> None:
    """As `Vilg.reset_parameters`, but matrices are drawn where they are: on a CPU it would take a minute."""
    config = model.config
    for name, parameter in model.named_parameters():
        rule, layers = layout.rule_of(name), 2 * config.num_layers
        if rule.init in ("normal", "residual"):
            parameter.normal_(0.0, config.init_std / (layers**0.5 if rule.init == "residual" else 1.0))
        else:
            parameter.fill_(float(rule.init == "ones"))


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
    if recipe.parallel.compile:
        for layer in model.model.layers:
            layer.compile(dynamic=False)
    optimizer, _ = build_adamw([{"params": list(model.parameters())}], recipe.optimizer, device)
    settings = merged_deepspeed_config(recipe, data_size=1)
    with silent():
        engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings, dist_init_required=False)
    ids = torch.randint(0, config.vocab_size, (2 * recipe.batch.micro_size, spec.num_slots), device=device)

    def step() -> None:
        for _ in range(settings["gradient_accumulation_steps"]):
            engine.backward(engine(input_ids=ids, labels=ids).loss)
            engine.step()

    parameters = sum(p.numel() for p in model.parameters())
    matrices = parameters - config.vocab_size * hidden  # the input table multiplies nothing
    per_token = 6 * matrices + 6 * shape.num_layers * hidden * spec.num_slots
    return step, per_token * 2 * recipe.batch.global_size * spec.num_slots, parameters


def measure(args: argparse.Namespace) -> dict:
    """One contender, in this process."""
    started = time.perf_counter()
    device, recipe = torch.device(args.device), recipe_of(args)
    ours = args.contender != "llama"
    with distributed(device):
        if ours:
            step, flops, parameters = vilg_step(recipe, device, dense=args.contender == "dense")
        else:
            step, flops, parameters = llama_step(recipe, device)
        for _ in range(WARM_UP):
            timed(step, device)
        built = time.perf_counter() - started
        seconds = [timed(step, device) for _ in range(args.steps if args.contender == "sparse" else args.peer_steps)]
        median, peak = statistics.median(seconds), peak_flops(device)
        found = {
            "parameters": parameters,
            "steps": len(seconds),
            "seconds_before": built,
            "median_ms": 1e3 * median,
            "q20_q80_ms": [1e3 * float(q) for q in np.quantile(seconds, (0.2, 0.8))],
            "tokens_per_second": 2 * recipe.batch.global_size * sequence_spec(recipe).num_slots / median,
            "tflop_per_step": flops / 1e12,
            "mfu": flops / median / peak if peak else None,
            "peak_memory_gib": peak_memory(device) / 2**30,
        }
        return found | ({"kernels": profile(step, device)} if args.profile and args.contender == "sparse" else {})


def timed(step: Callable[[], None], device: torch.device) -> float:
    """Seconds of one step, until the device has done it."""
    started = time.perf_counter()
    step()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def profile(step: Callable[[], None], device: torch.device) -> dict:
    """Milliseconds of one step by kind of kernel (on a CPU: of operator), and the longest ones by name."""
    on_gpu = device.type == "cuda"
    activity = torch.profiler.ProfilerActivity.CUDA if on_gpu else torch.profiler.ProfilerActivity.CPU
    with torch.profiler.profile(activities=[activity]) as found:
        timed(step, device)
    key = "self_device_time_total" if on_gpu else "self_cpu_time_total"
    kinds, names = dict.fromkeys([*KINDS, "other"], 0.0), {}
    for event in found.key_averages():
        spent = getattr(event, key) / 1e3
        kind = next((kind for kind, names in KINDS.items() if re.search(names, event.key, re.IGNORECASE)), "other")
        kinds[kind] += spent
        names[event.key] = spent
    longest = sorted(names, key=names.get, reverse=True)[:25]
    return {"ms_by_kind": kinds, "longest_ms": {name[:120]: names[name] for name in longest}}


def layers_that_fit(device: torch.device, args: argparse.Namespace) -> int:
    """Whole layers of 10b.yaml whose state and activations fit, for the hungriest contender; 2 on a CPU."""
    if device.type != "cuda":
        return 2
    recipe = load_recipe("launch/recipes/10b.yaml", grid_of(args))
    spec, shape = sequence_spec(recipe), recipe.model
    slots, vocabulary = 2 * args.micro * spec.num_slots, spec.text_vocab_size + spec.image_vocab_size
    fixed = BYTES_A_PARAMETER * 2 * vocabulary * shape.hidden_size + BYTES_A_LOGIT * slots * vocabulary
    layer = BYTES_A_PARAMETER * block_parameters(shape) + BYTES_A_CHANNEL * slots * shape.hidden_size
    free = 0.9 * torch.cuda.get_device_properties(device).total_memory - fixed
    return max(1, min(shape.num_layers, int(free / layer)))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=0, help="0: as many as fit")
    parser.add_argument("--micro", type=int, default=4, help="pairs of a micro-batch, two sequences each")
    parser.add_argument("--grid", nargs=2, type=int, metavar=("H", "W"), help="another grid than the recipe's 32 32")
    parser.add_argument("--accumulate", type=int, default=4, help="micro-batches of a step")
    parser.add_argument("--steps", type=int, default=50, help="measured steps of sparse")
    parser.add_argument("--peer-steps", type=int, default=15, help="measured steps of each peer")
    parser.add_argument("--recompute", default="none", choices=("none", "selective", "full"))
    parser.add_argument("--compile", action="store_true", help="parallel.compile for ours, torch.compile for llama's layers")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--tiny", action="store_true", help="a small shape, to try the script; writes only what --json names")
    parser.add_argument("--profile", action="store_true", help="add where one step of sparse spends its time")
    parser.add_argument("--json", type=Path, help="write the result here")
    parser.add_argument("--contender", choices=CONTENDERS, help="run one in this process and print it as JSON")
    args = parser.parse_args()
    device = torch.device(args.device)
    args.layers = args.layers or layers_that_fit(device, args)
    if args.contender:
        print(json.dumps(measure(args)))
        return 0
    result = {
        "hardware": torch.cuda.get_device_name() if device.type == "cuda" else platform.machine(), "versions": versions(),
        "commit": source_commit(), "layers": args.layers, "grid": args.grid or [32, 32], "pairs": args.micro, "micro_batches": args.accumulate,
        "recompute": args.recompute, "compile": args.compile, "contenders": {},
    }  # fmt: skip
    path = args.json or (None if args.tiny else RESULT)
    for contender in CONTENDERS:
        command = [sys.executable, __file__, *sys.argv[1:], f"--contender={contender}", f"--layers={args.layers}"]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
        if done.returncode:
            print(f"{contender}: ended with exit code {done.returncode}; its message is above", flush=True)
            continue
        found = result["contenders"][contender] = json.loads(done.stdout.splitlines()[-1])
        print_contender(contender, found)
        ours = result["contenders"].get("sparse")
        if ours and contender != "sparse":
            ratio = result[f"{contender}_over_sparse_time"] = found["median_ms"] / ours["median_ms"]
            print(f"        a step of {contender} takes {ratio:.2f} x that of sparse", flush=True)
        if path:
            path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return 0 if len(result["contenders"]) == len(CONTENDERS) else 1


def print_contender(name: str, found: dict) -> None:
    mfu = f"MFU {found['mfu']:.1%}" if found["mfu"] else "MFU n/a"
    print(f"{name:7} {found['parameters'] / 1e9:6.3f}B  {found['median_ms']:9.1f} ms  {found['tokens_per_second']:9.0f} tokens/s  "
          f"{mfu}  {found['peak_memory_gib']:5.1f} GiB  ({found['steps']} steps, {found['seconds_before']:.0f} s before them)",
          flush=True)  # fmt: skip
    for kind, spent in sorted(found.get("kernels", {}).get("ms_by_kind", {}).items(), key=lambda item: -item[1]):
        print(f"        {kind:20} {spent:9.2f} ms", flush=True)


if __name__ == "__main__":
    sys.exit(main())
