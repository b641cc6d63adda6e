"""Claim: many candidates of one prompt are drawn with a fraction of a dense cache, and faster than generate() does.

    python benchmarks/decode.py --json benchmarks/results/decode.json        # on a quiet machine
    python benchmarks/decode.py --quick                                      # to try the script

60 candidates of one prompt, text 64 slots, image grids 32 x 32 and 64 x 64, a small model with the paper's mix of layer
patterns and random weights, sampled at temperature 1 without guidance. Contenders, same weights, in turn:

- vilg: `ImageDecoder`: rings that keep what the pattern reads, the text once for all candidates;
- vilg, dense cache: the same decoder with every image slot of every layer kept, and attended to where the pattern says;
- transformers: `generate()` of the exported model's code with cache_implementation="static", 60 return sequences.

A step of `vilg` costs more or less by its slot (a column reads more below), so whole pictures are drawn. A step with a
static cache attends to the whole cache at every slot, so `transformers` draws the first slots only (--slots) and is
scaled to the picture; the first call, which allocates, is not counted. That the drawn tokens are the same is a test
(tests/unit/test_huggingface.py), not part of this script. Bytes are those of keys and values.
"""

import argparse
import json
import os
import platform
import statistics
import sys
import time
from importlib.metadata import version
from pathlib import Path
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch

from kernels.patterns import visible_image_slots
from vilg.checkpoint.huggingface.files import config_keys
from vilg.checkpoint.huggingface.modeling_vilg import VilgConfig, VilgForCausalLM
from vilg.checkpoint.state import source_commit, versions
from vilg.config.schema import ModelConfig
from vilg.inference import generate
from vilg.inference.cache import Reads, as_reads
from vilg.inference.sampling import SamplingConfig
from vilg.model.vilg import Vilg
from vilg.tokens.sequence import SequenceSpec

SAMPLING = SamplingConfig(temperature=1.0)
PROMPT = list(range(4, 16))


def dense_reads(pattern: str, grid: tuple[int, int], conv_size: int) -> tuple[int, tuple[Reads, ...]]:
    """As `ring_reads`, with an entry for every slot."""
    slots = range(grid[0] * grid[1])
    return len(slots), tuple(as_reads(visible_image_slots(pattern, grid, s, conv_size=conv_size)) for s in slots)


def our_bytes(model: Vilg, spec: SequenceSpec, num: int) -> int:
    return generate.ImageDecoder(model, spec, [PROMPT], candidates=num).cache.num_bytes


def draw_ours(model: Vilg, spec: SequenceSpec, num: int) -> float:
    """Seconds for `num` whole pictures."""
    started = time.perf_counter()
    generate.generate_codes(model, spec, [PROMPT], num=num, seeds=[0], sampling=SAMPLING, batch_rows=num)
    return time.perf_counter() - started


def draw_theirs(theirs: VilgForCausalLM, spec: SequenceSpec, num: int, slots: int) -> tuple[float, int]:
    """Seconds for whole pictures, scaled from the first slots, and the bytes of a static cache for whole ones."""
    ids = torch.tensor([[*PROMPT, theirs.config.vocab_size - 1]])
    settings = dict(
        input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=True, top_k=0, num_return_sequences=num,
        cache_implementation="static", max_length=len(PROMPT) + 1 + spec.image_slots, return_dict_in_generate=True,
    )  # fmt: skip
    from transformers import StoppingCriteria

    times: list[float] = []

    class Until(StoppingCriteria):
        """The cache is made for a whole picture, but only the first slots are drawn."""

        def __call__(self, input_ids, scores, **_):
            times.append(time.perf_counter())
            done = len(times) > slots
            return torch.full((len(input_ids),), done, dtype=torch.bool)

    found = theirs.generate(**settings, stopping_criteria=[Until()])
    cache = found.past_key_values
    size = sum(t.numel() * t.element_size() for layer in cache.layers for t in (layer.keys, layer.values))
    steps = np.diff(times)
    return float(np.sum(steps)) / len(steps) * spec.image_slots, size


def measure(model_config: ModelConfig, grid: tuple[int, int], *, num: int, slots: int, rounds: int, codes: int) -> dict:
    spec = SequenceSpec(text_slots=64, grid=grid, text_vocab_size=512, image_vocab_size=codes)
    model = Vilg(model_config, spec).eval()
    model.reset_parameters(0)
    sequence = {"text_slots": 64, "grid": list(grid), "text_vocab_size": 512, "image_vocab_size": codes}
    keys = config_keys(sequence)
    theirs = VilgForCausalLM(VilgConfig(**keys, model=model_config.model_dump(mode="json"), sequence=sequence)).eval()
    theirs.load_state_dict(model.state_dict())
    theirs.generation_config.pad_token_id = keys["pad_token_id"]
    seconds: dict[str, list[float]] = {"vilg": [], "vilg, dense cache": [], "transformers": []}
    bytes_held: dict[str, int] = {}

    def note(name: str, value: float) -> None:
        seconds[name].append(value)
        print(f"  {grid[0]}x{grid[1]} {name}: {value:.1f} s for {num} pictures", file=sys.stderr, flush=True)

    for _ in range(rounds):
        bytes_held["vilg"] = our_bytes(model, spec, num)
        note("vilg", draw_ours(model, spec, num))
        with mock.patch.object(generate, "ring_reads", dense_reads):
            bytes_held["vilg, dense cache"] = our_bytes(model, spec, num)
            note("vilg, dense cache", draw_ours(model, spec, num))
        value, bytes_held["transformers"] = draw_theirs(theirs, spec, num, slots)
        note("transformers", value)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    return {
        "images_per_second": {name: num / value for name, value in medians.items()},
        "seconds": seconds,
        "kv_bytes": bytes_held,
        "kv_bytes_of_dense": bytes_held["vilg"] / bytes_held["vilg, dense cache"],
        "kv_bytes_of_transformers": bytes_held["vilg"] / bytes_held["transformers"],
        "times_faster_than_dense": medians["vilg, dense cache"] / medians["vilg"],
        "times_faster_than_transformers": medians["transformers"] / medians["vilg"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="write the result there")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--num", type=int, default=60, help="candidates")
    parser.add_argument("--slots", type=int, default=48, help="slots that transformers draws")
    parser.add_argument("--quick", action="store_true", help="8 candidates on 8 x 8 and 16 x 16")
    options = parser.parse_args()
    num, grids = (8, (8, 16)) if options.quick else (options.num, (32, 64))
    shape = ModelConfig(num_layers=8, hidden_size=256, num_heads=8)
    torch.manual_seed(0)
    result = {
        "claim": "KV bytes at most 0.4 of dense, at least 2x the images/s of generate() with a static cache",
        "command": "python benchmarks/decode.py",
        "model": {"num_layers": 8, "hidden_size": 256, "num_heads": 8, "patterns": "the default mix", "dtype": "fp32"},
        "candidates": num,
        "slots_drawn_by_transformers": options.slots,
        "grids": {
            f"{side}x{side}": measure(
                shape, (side, side), num=num, slots=min(options.slots, side * side - 1), rounds=options.rounds,
                codes=1024,
            )
            for side in grids
        },
        "machine": {"processor": platform.processor() or platform.machine(), "threads": torch.get_num_threads()},
        "versions": {**versions(), "transformers": version("transformers")},
        "commit": source_commit(),
    }
    print(json.dumps(result, indent=1))
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
