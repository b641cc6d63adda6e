"""Cached decoding of a model that is split over tensor ranks, as training draws its sample sheets with one."""

import json
import os
from contextlib import redirect_stdout
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from tests.distributed.helpers import free_port, run_distributed
from tests.export_support import write_export
from tests.model_support import SPEC, tiny_config, tiny_model
from vilg.__main__ import main
from vilg.inference.caption import answer_codes
from vilg.inference.generate import generate_codes
from vilg.inference.sampling import SamplingConfig
from vilg.inference.text_decoder import TextDecoder
from vilg.parallel.grid import Grid

PROMPTS = [[5, 6, 7], [8]]


def drawn(rank: int, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes drawn for two prompts, and the first text logits under two pictures."""
    model = tiny_model(grid=Grid.build(tensor=size)).eval()
    sampling = SamplingConfig(guidance=2.0, temperature=0.9)
    codes = generate_codes(model, SPEC, PROMPTS, num=2, seeds=[1, 2], sampling=sampling)
    pictures = np.random.default_rng(0).integers(0, SPEC.image_vocab_size, (2, SPEC.image_slots))
    with torch.inference_mode():
        logits = TextDecoder(model, SPEC, torch.from_numpy(pictures)).step(0, torch.ones(2, dtype=torch.long))
    return codes.clone(), logits.clone()


def test_every_tensor_rank_draws_what_one_process_draws():
    wanted_codes, wanted_logits = drawn(0, 1)
    for codes, logits in run_distributed(2, drawn):
        assert torch.equal(codes, wanted_codes)
        torch.testing.assert_close(logits, wanted_logits, rtol=1e-4, atol=1e-5)


class Ids:
    """A text tokenizer that leaves ids as they are."""

    vocab_size = SPEC.text_vocab_size

    def decode(self, ids: list[int]) -> str:
        return " ".join(map(str, ids))


def drawn_with_each_pattern(rank: int, size: int) -> list[torch.Tensor | list[str]]:
    """Sixty candidates of one prompt, and answers and captions of sixty pictures (the first also one by one): row layers
    of both styles and dense ones, greedy and sampled, pictures with and without guidance."""
    found: list[torch.Tensor | list[str]] = []
    questions = [[*PROMPTS, [], []][i % 4] for i in range(60)]  # half of them none: captions
    for changes in ({}, {"row_style": "wrap"}, {"attention": "dense"}):
        model = tiny_model(tiny_config(**changes), grid=Grid.build(tensor=size)).eval()
        for sampling in (SamplingConfig(temperature=0), SamplingConfig(guidance=2.0, temperature=0.9)):
            codes = generate_codes(model, SPEC, PROMPTS[:1], num=60, seeds=[3], sampling=sampling)
            found.append(codes.clone())
            writing = replace(sampling, guidance=1.0)
            for count, batch in ((60, 60), (4, 1)):
                asked = questions[:count]
                texts = answer_codes(model, SPEC, Ids(), codes[0, :count], asked, sampling=writing, batch=batch)
                found.append(texts)
    return found


def test_sixty_candidates_and_answers_are_the_same_on_two_tensor_ranks_for_every_pattern():
    wanted = drawn_with_each_pattern(0, 1)
    for at_once, one_by_one in zip(wanted[1::3], wanted[2::3], strict=True):
        assert at_once[:4] == one_by_one
    for found in run_distributed(2, drawn_with_each_pattern):
        for ours, theirs in zip(found, wanted, strict=True):
            assert torch.equal(ours, theirs) if isinstance(ours, torch.Tensor) else ours == theirs


def drawn_and_written(rank: int, size: int, folder: Path, ports: list[int]) -> None:
    """The commands as torchrun starts them, each with a port of its own (a process that is quick would find the other's
    store of the command before); the printed lines go to a file of the rank's own."""
    out = folder / f"drawn on {size}"

    def vilg(command: list[str]) -> int:
        if size > 1:
            os.environ["MASTER_PORT"] = str(ports.pop())
        return main(command)

    assert vilg(["generate", "--model", str(folder / "export"), "--prompt", "a cat", "--num", "3", "--out", str(out)]) == 0
    written = ["--model", str(folder / "export"), "--device", "cpu", *(str(out / f"0000_0{i}.png") for i in range(3))]
    with open(folder / f"{rank} of {size}", "w", encoding="utf-8") as file, redirect_stdout(file):
        assert vilg(["caption", *written, "--beams", "2"]) == 0
        assert vilg(["answer", *written, "--question", "red"]) == 0


def test_a_model_cut_over_processes_draws_scores_writes_and_answers_the_same(tmp_path):
    (tmp_path / "export").mkdir()
    write_export(tmp_path / "export")
    drawn_and_written(0, 1, tmp_path, [])
    run_distributed(2, drawn_and_written, (tmp_path, [free_port() for _ in range(3)]), init=False)
    for name in ("0000_00.png", "0000_01.png", "0000_02.png"):
        assert np.array_equal(*(np.array(Image.open(tmp_path / f"drawn on {size}" / name)) for size in (1, 2)))
    one, two = ((tmp_path / f"drawn on {size}" / "scores.jsonl").read_text().splitlines() for size in (1, 2))
    scores = [[json.loads(line).pop("score") for line in lines] for lines in (one, two)]
    np.testing.assert_allclose(*scores, atol=1e-5)
    texts = (tmp_path / "0 of 1").read_text(encoding="utf-8").replace("drawn on 1", "drawn on 2")
    assert texts.count("caption") == texts.count("answer") == 3
    assert (tmp_path / "0 of 2").read_text(encoding="utf-8") == texts
    assert (tmp_path / "1 of 2").read_text() == ""
