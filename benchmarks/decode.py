"""Claim: many candidates of one prompt are drawn with a fraction of a dense cache, and faster than generate() does.

    python benchmarks/decode.py --json benchmarks/results/decode.json                        # about 6 minutes of a core
    python benchmarks/decode.py --device cuda --json benchmarks/results/decode_gpu.json      # 80 GB GPU, under two minutes
    python benchmarks/decode.py --quick [--device cuda]                                      # to try the script

60 candidates of one prompt, text 64 slots, random weights with the paper's mix of layer patterns, sampled at temperature
1 without guidance. Contenders, same weights, in turn:

- vilg: rings that keep what the pattern reads, the text once for all candidates;
- vilg, dense cache (CPU): the same with every image slot of every layer kept, and attended to where the pattern says;
- vilg, no graph (GPU): the same step started kernel by kernel instead of replayed as one CUDA graph;
- vilg at equal memory (GPU): as many candidates as fit into what `transformers` took at its peak;
- transformers: `generate()` of the exported model's code with cache_implementation="static", 60 return sequences, not
  compiled (its masks grow with every step, so each step would be compiled anew).

CPU: 8 layers, 256 wide, fp32, grids 32 x 32 and 64 x 64; both of ours draw the same --own-slots slots, one drawn at
random from each stretch of the picture (a column reads more below), turn by turn, so that what else the machine does
meets both; pages are touched before; seconds are CPU seconds of the one thread, for the same reason. GPU: the 10B model (--layers 48) in bf16 on 32 x 32; `vilg` draws whole pictures.
A step with a static cache attends to the whole cache at every slot, so `transformers` draws the first --slots slots only.
All are scaled to whole pictures. That the drawn tokens are the same is a test (tests/unit/test_huggingface.py,
test_drawing.py), not part of this script. Bytes are those of keys and values.
"""

import argparse
import gc
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

import numpy as np  # noqa: E402
import torch  # noqa: E402

from kernels.patterns import visible_image_slots  # noqa: E402
from vilg.checkpoint.huggingface.files import config_keys  # noqa: E402
from vilg.checkpoint.huggingface.modeling_vilg import VilgConfig, VilgForCausalLM  # noqa: E402
from vilg.checkpoint.state import source_commit, versions  # noqa: E402
from vilg.config.schema import ModelConfig  # noqa: E402
from vilg.inference import image_decoder  # noqa: E402
from vilg.inference.cache import Reads, as_reads  # noqa: E402
from vilg.inference.drawing import Drawing  # noqa: E402
from vilg.inference.generate import generate_codes  # noqa: E402
from vilg.inference.sampling import SamplingConfig, candidate_uniforms  # noqa: E402
from vilg.model.vilg import Vilg  # noqa: E402
from vilg.tokens.sequence import SequenceSpec  # noqa: E402

SAMPLING = SamplingConfig(temperature=1.0)
PROMPT = list(range(4, 16))


def dense_reads(pattern: str, grid: tuple[int, int], conv_size: int) -> tuple[int, tuple[Reads, ...]]:
    """As `ring_reads`, with an entry for every slot."""
    slots = range(grid[0] * grid[1])
    return len(slots), tuple(as_reads(visible_image_slots(pattern, grid, s, conv_size=conv_size)) for s in slots)


def sequence_of(side: int, *, codes: int, text_vocab: int) -> dict:
    return {"text_slots": 64, "grid": [side, side], "text_vocab_size": text_vocab, "image_vocab_size": codes}


def build(config: ModelConfig, sequence: dict, *, device: str, dtype: torch.dtype) -> Vilg:
    """Random weights, drawn on the device."""
    model = Vilg(config, SequenceSpec(**sequence), device=device, dtype=dtype).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            is_scale = parameter.dim() == 1 and name.endswith("norm.weight")
            parameter.fill_(1) if is_scale else parameter.normal_(0, config.init_std)
    return model.requires_grad_(False)


def theirs_of(model: Vilg, sequence: dict) -> VilgForCausalLM:
    """The exported model's code on the same tensors."""
    keys = config_keys(sequence)
    with torch.device("meta"):
        theirs = VilgForCausalLM(VilgConfig(**keys, model=model.config.model_dump(mode="json"), sequence=sequence))
    theirs.load_state_dict(model.state_dict(), assign=True)
    theirs.generation_config.pad_token_id = keys["pad_token_id"]
    return theirs.eval()


def drawing_of(model: Vilg, num: int, *, replayable: bool) -> Drawing:
    spec = model.spec
    decoder = image_decoder.ImageDecoder(model, spec, [PROMPT], candidates=num)
    for ring in (tensor for pair in decoder.cache.rings for tensor in pair):
        ring.zero_()  # a write: memory that was only promised is there from now on
    uniforms = torch.from_numpy(np.stack([candidate_uniforms(0, i, spec.image_slots) for i in range(num)]))
    return Drawing(
        decoder, uniforms.to(decoder.device), SAMPLING, begin=spec.begin_of_image, replayable=replayable
    )


def now() -> float:
    """Seconds: of the clock when the GPU is done, or of CPU time."""
    if not torch.cuda.is_available():
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def seconds_of(work) -> float:
    started = now()
    work()
    return now() - started


def draw_theirs(theirs: VilgForCausalLM, spec: SequenceSpec, num: int, slots: int) -> tuple[float, int]:
    """Seconds for whole pictures, scaled from the first slots, and the bytes of a static cache for whole ones."""
    from transformers import StoppingCriteria

    ids = torch.tensor([[*PROMPT, theirs.config.vocab_size - 1]], device=theirs.device)
    settings = dict(
        input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=True, top_k=0, num_return_sequences=num,
        cache_implementation="static", max_length=len(PROMPT) + 1 + spec.image_slots, return_dict_in_generate=True,
        disable_compile=True,
    )  # fmt: skip
    times: list[float] = []

    class Until(StoppingCriteria):
        """The cache is made for a whole picture, but only the first slots are drawn."""

        def __call__(self, input_ids, scores, **_):
            times.append(now())
            return torch.full((len(input_ids),), len(times) > slots, dtype=torch.bool, device=input_ids.device)

    cache = theirs.generate(**settings, stopping_criteria=[Until()]).past_key_values
    theirs.__dict__.pop("_cache", None)  # older versions keep it for the next call
    size = sum(t.numel() * t.element_size() for layer in cache.layers for t in (layer.keys, layer.values))
    return float(np.mean(np.diff(times))) * spec.image_slots, size


def measure_cpu(options: argparse.Namespace, config: ModelConfig, side: int, codes: int) -> dict:
    sequence = sequence_of(side, codes=codes, text_vocab=512)
    model = build(config, sequence, device="cpu", dtype=torch.float32)
    theirs, spec, num = theirs_of(model, sequence), model.spec, options.num
    edges = np.linspace(0, spec.image_slots, min(options.own_slots, spec.image_slots) + 1).astype(int)
    slots = np.random.default_rng(0).integers(edges[:-1], edges[1:]).tolist()
    with mock.patch.object(image_decoder, "ring_reads", dense_reads):
        dense = drawing_of(model, num, replayable=False)
    ours = {"vilg": drawing_of(model, num, replayable=False), "vilg, dense cache": dense}
    bytes_held = {name: drawing.decoder.cache.num_bytes for name, drawing in ours.items()}
    seconds: dict[str, list[float]] = {"vilg": [], "vilg, dense cache": [], "transformers": []}
    for drawing in ours.values():
        drawing.step(slots[0])
    for _ in range(options.rounds):
        spent = dict.fromkeys(ours, 0.0)
        for number, slot in enumerate(slots):
            for name in sorted(ours, reverse=bool(number % 2)):
                spent[name] += seconds_of(lambda: ours[name].step(slot))  # noqa: B023
        for name, total in spent.items():
            note(seconds, name, total / len(slots) * spec.image_slots, num)
    del ours, dense, drawing
    gc.collect()
    for _ in range(options.rounds):
        value, bytes_held["transformers"] = draw_theirs(theirs, spec, num, min(options.slots, spec.image_slots - 1))
        note(seconds, "transformers", value, num)
    return summary(seconds, dict.fromkeys(seconds, num), bytes_held) | {"own_slots_drawn": len(slots)}


def measure_gpu(options: argparse.Namespace, config: ModelConfig, side: int, codes: int) -> dict:
    sequence = sequence_of(side, codes=codes, text_vocab=32768)
    model = build(config, sequence, device="cuda", dtype=torch.bfloat16)
    theirs, spec, num = theirs_of(model, sequence), model.spec, options.num
    slots = min(options.slots, spec.image_slots - 1)
    names = ("vilg", "vilg, no graph", "transformers", "vilg at equal memory")
    seconds: dict[str, list[float]] = {name: [] for name in names}
    drawn, bytes_held, peaks = dict.fromkeys(names, num), {}, {}

    def whole(candidates: int) -> float:
        call = dict(num=candidates, seeds=[0], sampling=SAMPLING, batch_rows=candidates)
        return seconds_of(lambda: generate_codes(model, spec, [PROMPT], **call))

    def peak_of(name: str, work):
        """What `work` returns; the peak of device memory goes to `peaks`."""
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        value = work()
        peaks[name] = torch.cuda.max_memory_allocated()
        return value

    def without_graph() -> float:
        drawing = drawing_of(model, num, replayable=True)
        bytes_held["vilg"] = drawing.decoder.cache.num_bytes
        drawing.step()
        return seconds_of(lambda: [drawing.step() for _ in range(slots)]) / slots * spec.image_slots

    peak_of("vilg, no graph", without_graph)  # compiles the kernels; not counted
    for _ in range(options.rounds):
        note(seconds, "vilg", peak_of("vilg", lambda: whole(num)), num)
        note(seconds, "vilg, no graph", peak_of("vilg, no graph", without_graph), num)
        value, bytes_held["transformers"] = peak_of("transformers", lambda: draw_theirs(theirs, spec, num, slots))
        note(seconds, "transformers", value, num)
        if peaks["transformers"] > peaks["vilg"]:
            weights = sum(p.numel() * p.element_size() for p in model.parameters())
            each = (peaks["vilg"] - weights) / num
            drawn["vilg at equal memory"] = more = int((peaks["transformers"] - weights) / each) // 8 * 8
            value = peak_of("vilg at equal memory", lambda: whole(more))
            note(seconds, "vilg at equal memory", value, more)
    seconds = {name: values for name, values in seconds.items() if values}
    # Not drawn on a GPU: the kernel reads rings. Every slot of every layer, the text once.
    itemsize = 2
    slots_held = num * spec.image_slots + len(PROMPT)
    bytes_held["vilg, dense cache"] = 2 * config.num_layers * config.hidden_size * slots_held * itemsize
    return summary(seconds, drawn, bytes_held) | {"peak_device_bytes": peaks}


def note(seconds: dict[str, list[float]], name: str, value: float, num: int) -> None:
    seconds[name].append(value)
    print(f"  {name}: {value:.1f} s for {num} pictures", file=sys.stderr, flush=True)


def summary(seconds: dict[str, list[float]], drawn: dict[str, int], bytes_held: dict[str, int]) -> dict:
    rates = {name: drawn[name] / statistics.median(values) for name, values in seconds.items()}
    return {
        "images_per_second": rates,
        "seconds": seconds,
        "candidates": {name: drawn[name] for name in seconds},
        "kv_bytes": bytes_held,
        "kv_bytes_of_dense": bytes_held["vilg"] / bytes_held["vilg, dense cache"],
        "kv_bytes_of_transformers": bytes_held["vilg"] / bytes_held["transformers"],
        "times_faster_than": {name: rates["vilg"] / rate for name, rate in rates.items() if name != "vilg"},
    } | (
        {"times_faster_than_transformers_at_equal_memory": rates["vilg at equal memory"] / rates["transformers"]}
        if "vilg at equal memory" in rates
        else {}
    )


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="write the result there")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--rounds", type=int, help="default: 3, on a GPU 2")
    parser.add_argument("--num", type=int, default=60, help="candidates")
    parser.add_argument("--slots", type=int, default=32, help="slots that transformers, and a GPU without graph, draw")
    parser.add_argument("--own-slots", type=int, default=128, help="slots that ours draw on a CPU")
    parser.add_argument("--sides", type=int, nargs="+", help="sides of the grids; default: 32 64, on a GPU 32")
    parser.add_argument("--layers", type=int, help="default: 8, on a GPU 48")
    parser.add_argument("--quick", action="store_true", help="8 candidates on 8 x 8, 4 layers, one round")
    options = parser.parse_args()
    gpu = options.device == "cuda"
    options.rounds = options.rounds or (1 if options.quick else 2 if gpu else 3)
    options.num = 8 if options.quick else options.num
    sides = options.sides or ([8] if options.quick else [32] if gpu else [32, 64])
    layers = options.layers or (4 if options.quick else 48 if gpu else 8)
    wide = dict(hidden_size=4096, num_heads=64, qk_norm=True) if gpu else dict(hidden_size=256, num_heads=8)
    config = ModelConfig(num_layers=layers, **wide)
    torch.manual_seed(0)
    measure, codes = (measure_gpu, 8192) if gpu else (measure_cpu, 1024)
    result = {
        "claim": "KV bytes at most 0.4 of dense; at least 2x (CPU), 4x at equal memory (GPU) the images/s of generate() "
        "with a static cache",
        "command": "python benchmarks/decode.py " + " ".join(sys.argv[1:]),
        "model": config.model_dump(mode="json") | {"dtype": "bf16" if gpu else "fp32", "image_vocab_size": codes},
        "slots_drawn_by_transformers": options.slots,
        "grids": {f"{side}x{side}": measure(options, config, side, codes) for side in sides},
        "machine": {
            "processor": platform.processor() or platform.machine(),
            "threads": torch.get_num_threads(),
            "gpu": torch.cuda.get_device_name() if gpu else None,
        },
        "versions": {**versions(), "transformers": version("transformers")},
        "commit": source_commit(),
    }
    print(json.dumps(result, indent=1))
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
