"""The image tokenizer trained beside the model, in one process: whose codes the model reads, what moves them, what does not."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from tests.distributed.parity import FACTOR, MICRO_BATCHES, SPEC, Case, Trainer, image_tokenizer, micro_batch
from tests.distributed.resume_support import Layout
from tests.golden.make import DEBUG_RECIPE
from vilg.config import load_recipe
from vilg.errors import UserError
from vilg.parallel.grid import Grid
from vilg.tokens.sequence import all_images, collate, image_codes, image_to_text, text_to_image, with_image_codes
from vilg.tokens.vqgan import ImageTokenizer
from vilg.tokens.vqgan.images import to_float
from vilg.tokens.vqgan.perceptual import edge_loss
from vilg.train.changes import compare
from vilg.train.joint_quantizer import JointQuantizer
from vilg.train.step import plan_step

CASE = Case(Layout(engine="torch"), model="joint quantizer")
JOINT = "model.reconstructor.joint_quantizer"


def recipe_of(folder: Path, **changes: object):
    """The case's recipe with changes of the section."""
    recipe = CASE.recipe(folder)
    reconstructor = recipe.model.reconstructor
    section = reconstructor.joint_quantizer.model_copy(update=changes)
    reconstructor = reconstructor.model_copy(update={"joint_quantizer": section})
    return recipe.model_copy(update={"model": recipe.model.model_copy(update={"reconstructor": reconstructor})})


def quantizer_of(folder: Path, *, lookup: str = "euclidean", **changes: object) -> JointQuantizer:
    tokenizer = image_tokenizer()
    if lookup != "euclidean":
        weights = tokenizer.state_dict()
        tokenizer = ImageTokenizer(tokenizer.config.model_copy(update={"lookup": lookup}))
        tokenizer.load_state_dict(weights, strict=lookup != "gumbel")
        tokenizer.codebook.vectors.data = F.normalize(tokenizer.codebook.vectors.data, dim=1)
    return JointQuantizer(recipe_of(folder, **changes), tokenizer, SPEC, grid=Grid.single(), device=torch.device("cpu"))


def plan_of(folder: Path, step: int):
    return plan_step(recipe_of(folder), step, text_targets=10, image_targets=32)


def batches_of(step: int):
    return [micro_batch(step, place) for place in range(MICRO_BATCHES)]


def turned(vectors: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
    """The codes with the rotation's gradient, from the formula: |c|/|z| (I - 2 r r^T + 2 c^ z^T) z with all but z constant."""
    z, length = vectors.detach(), vectors.detach().norm(dim=1, keepdim=True)
    z_unit, c_unit = z / length, F.normalize(chosen, dim=1)
    middle = F.normalize(z_unit + c_unit, dim=1)

    def along(axis: torch.Tensor) -> torch.Tensor:
        return (vectors * axis).sum(1, keepdim=True)

    found = vectors - 2 * along(middle) * middle + 2 * along(z_unit) * c_unit
    return found * chosen.norm(dim=1, keepdim=True) / length


def weights_of(tokenizer: ImageTokenizer) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in tokenizer.state_dict().items()}


@pytest.mark.parametrize("lookup", ["euclidean", "cosine"])
def test_the_model_reads_the_codes_of_the_encoder_as_it_is_now(tmp_path, lookup):
    quantizer, seen = quantizer_of(tmp_path, lookup=lookup), []
    for step in (1, 2, 3):
        given = batches_of(1)
        now = weights_of(quantizer.tokenizer)
        batches = quantizer(plan_of(tmp_path, step), given)
        for before, batch in zip(given, batches, strict=True):
            wanted = quantizer.tokenizer.encode(to_float(all_images(batch)))
            assert torch.equal(image_codes(batch), wanted.flatten(1))
            assert torch.equal(batch.text_input, before.text_input) and batch.target_counts() == before.target_counts()
        assert all(map(torch.equal, now.values(), quantizer.tokenizer.state_dict().values()))  # nothing moves before the end
        figures = quantizer.finish(skipped=False)
        assert figures["tokenizer_grad_norm"] > 0 and 0 < figures["codes_used"] <= SPEC.image_vocab_size
        moved = {name for name, tensor in quantizer.tokenizer.state_dict().items() if not torch.equal(tensor, now[name])}
        assert moved == now.keys()
        seen.append(torch.cat([image_codes(batch) for batch in batches]))
    if lookup == "cosine":
        assert torch.allclose(quantizer.codebook.vectors.norm(dim=1), torch.ones(SPEC.image_vocab_size))
    assert not torch.equal(seen[0], seen[2])  # the same images, another step


@pytest.mark.parametrize("lookup", ["euclidean", "cosine"])
def test_gradients_and_code_vectors_are_those_of_the_whole_global_batch(tmp_path, lookup):
    """However it is split: against one graph over all images, and the moving averages written out."""
    quantizer = quantizer_of(tmp_path, lookup=lookup)
    section = recipe_of(tmp_path).model.reconstructor
    tokenizer = ImageTokenizer(quantizer.tokenizer.config)
    tokenizer.load_state_dict(quantizer.tokenizer.state_dict())
    uses = None
    for step in (1, 2):
        images = torch.cat([to_float(all_images(batch)) for batch in batches_of(step)])
        vectors = tokenizer.encoder(images)
        codes = tokenizer.codebook.nearest(vectors.detach())
        vectors = F.normalize(vectors, dim=1) if lookup == "cosine" else vectors
        chosen = tokenizer.codebook.lookup(codes).clone()
        error = tokenizer.decoder(turned(vectors, chosen)) - images
        pixels = section.l1 * error.abs().mean() + section.mse * error.square().mean()
        pixels = pixels + section.perceptual * edge_loss(error, torch.zeros_like(error))
        commitment = (vectors - chosen).square().mean()
        tokenizer.zero_grad()
        (pixels + section.joint_quantizer.commitment * commitment).backward()
        flat, own = vectors.detach().permute(0, 2, 3, 1).flatten(0, 2), F.one_hot(codes.flatten(), SPEC.image_vocab_size).float()
        counts, decay = own.sum(0), section.joint_quantizer.decay
        before = counts.mean().expand(len(counts)) if uses is None else uses
        uses = decay * before + (1 - decay) * counts
        moved = (decay * before[:, None] * tokenizer.codebook.vectors + (1 - decay) * own.T @ flat) / uses[:, None]
        moved = F.normalize(moved, dim=1) if lookup == "cosine" else moved

        gradients = []
        with pytest.MonkeyPatch.context() as patch:  # clipping changes them in place
            patch.setattr("vilg.train.optim.clip_gradients", lambda weights, *_: gradients.extend(p.grad.clone() for p in weights))
            quantizer(plan_of(tmp_path, step), batches_of(step))
            figures = quantizer.finish(skipped=False)
        for gradient, p in zip(gradients, tokenizer.parameters(), strict=True):
            assert torch.allclose(gradient, p.grad, rtol=1e-4, atol=1e-6)
        assert torch.allclose(quantizer.codebook.vectors, moved, rtol=1e-4, atol=1e-6)
        assert torch.allclose(quantizer.uses, uses, rtol=1e-5)
        assert figures["tokenizer_pixel_loss"] == pytest.approx(float(pixels.detach()), rel=1e-5)
        assert figures["commitment_loss"] == pytest.approx(float(commitment.detach()), rel=1e-5)
        tokenizer.load_state_dict(quantizer.tokenizer.state_dict())


def test_a_code_that_no_image_uses_stays_where_it_is(tmp_path):
    quantizer = quantizer_of(tmp_path, decay=0.0)
    with torch.no_grad():
        quantizer.codebook.vectors[3] = 1e3
    for step in (1, 2, 3):
        quantizer(plan_of(tmp_path, step), batches_of(step))
        quantizer.finish(skipped=False)
    assert quantizer.uses[3] == 0 and bool((quantizer.codebook.vectors[3] == 1e3).all())
    assert bool(quantizer.codebook.vectors.isfinite().all())


def test_after_its_stop_step_the_tokenizer_is_frozen_and_still_gives_the_codes(tmp_path):
    quantizer = quantizer_of(tmp_path, stop_step=2)
    for step in (1, 2):
        quantizer(plan_of(tmp_path, step), batches_of(step))
        quantizer.finish(skipped=False)
    frozen = weights_of(quantizer.tokenizer)
    batches = quantizer(plan_of(tmp_path, 3), batches_of(3))
    figures = quantizer.finish(skipped=False)
    assert figures["tokenizer_grad_norm"] == figures["tokenizer_skipped"] == 0 and figures["codes_used"] > 0
    assert all(map(torch.equal, frozen.values(), quantizer.tokenizer.state_dict().values()))
    wanted = quantizer.tokenizer.encode(to_float(all_images(batches[0]))).flatten(1)
    assert torch.equal(image_codes(batches[0]), wanted)


def test_changed_codes_are_counted_against_those_of_the_shards(tmp_path):
    quantizer = quantizer_of(tmp_path)
    quantized = quantizer(plan_of(tmp_path, 1), batches_of(1))
    quantizer.finish(skipped=True)
    quantizer(plan_of(tmp_path, 2), quantized)
    assert quantizer.finish(skipped=True)["codes_changed"] == 0
    spoilt = image_codes(quantized[0])
    spoilt[:, 0] = (spoilt[:, 0] + 1) % SPEC.image_vocab_size
    quantizer(plan_of(tmp_path, 2), [with_image_codes(SPEC, quantized[0], spoilt)])
    assert quantizer.finish(skipped=True)["codes_changed"] == pytest.approx(1 / SPEC.image_slots)


def test_a_step_that_is_left_out_or_not_finite_moves_nothing(tmp_path):
    quantizer = quantizer_of(tmp_path)
    before = weights_of(quantizer.tokenizer)
    quantizer(plan_of(tmp_path, 1), batches_of(1))
    assert quantizer.finish(skipped=True)["tokenizer_skipped"] == 1
    assert all(map(torch.equal, before.values(), quantizer.tokenizer.state_dict().values()))
    with torch.no_grad():
        quantizer.tokenizer.decoder.head.bias[0] = torch.nan
    quantizer(plan_of(tmp_path, 1), batches_of(1))
    assert quantizer.finish(skipped=False)["tokenizer_skipped"] == 1
    assert torch.equal(before["codebook.vectors"], quantizer.codebook.vectors) and not quantizer.uses.any()


def test_going_back_to_a_kept_state_gives_the_same_steps_again(tmp_path):
    quantizer = quantizer_of(tmp_path)

    def step(number: int) -> dict[str, torch.Tensor]:
        quantizer(plan_of(tmp_path, number), batches_of(number))
        quantizer.finish(skipped=False)
        return {name: tensor.clone() for name, tensor in quantizer.state().items()}

    step(1)
    kept = step(2)
    wanted = step(3)
    quantizer.load(kept, tmp_path)
    assert all(torch.equal(tensor, kept[name]) for name, tensor in quantizer.state().items())
    again = step(3)
    assert again.keys() == wanted.keys() and all(torch.equal(again[name], wanted[name]) for name in wanted)
    with pytest.raises(UserError, match="image_tokenizer's .* is none there"):
        quantizer.load({}, tmp_path)


def test_training_steps_stay_finite_and_without_the_section_no_figure_is_there(tmp_path):
    joint, frozen = (Trainer.build(replace(CASE, model=model), tmp_path) for model in ("joint quantizer", "end to end"))
    results = [joint.step(step) for step in range(1, 5)]
    assert all(np.isfinite(float(result.loss)) and not result.skipped for result in results)
    assert {"codes_changed", "code_perplexity", "commitment_loss"} <= results[0].figures.keys()
    assert not {"codes_changed", "codes_used"} & frozen.step(1).figures.keys()


def test_images_come_back_in_the_order_of_their_sequences():
    side, draw = SPEC.grid[0] * FACTOR, np.random.default_rng(0)
    pixels = draw.integers(0, 256, (3, side, side, 3), np.uint8)
    codes = draw.integers(0, SPEC.image_vocab_size, (3, SPEC.image_slots))
    first, middle = image_to_text(SPEC, [5], codes[0]), text_to_image(SPEC, [5], codes[1], pixels[1])
    batch = collate([first._replace(image=pixels[0]), middle, first._replace(image=pixels[2], codes=codes[2])])
    assert batch.images.shape[0] == 1 and batch.source_images.shape[0] == 2
    np.testing.assert_array_equal(all_images(batch), pixels)
    np.testing.assert_array_equal(image_codes(batch), codes)
    again = with_image_codes(SPEC, batch, torch.zeros(3, SPEC.image_slots, dtype=torch.int64))
    assert not image_codes(again).any() and again.image_input[1, 0] == SPEC.begin_of_image
    back = with_image_codes(SPEC, again, image_codes(batch))
    assert torch.equal(back.image_input, batch.image_input) and torch.equal(back.image_target, batch.image_target)


def test_a_tokenizer_of_logits_is_refused_by_its_folder(tmp_path):
    with pytest.raises(UserError, match="has lookup=gumbel; use a tokenizer of lookup euclidean or cosine"):
        quantizer_of(tmp_path, lookup="gumbel")


def test_a_run_does_not_go_on_with_the_section_where_it_was_without(tmp_path):
    joint, frozen = CASE.recipe(tmp_path), replace(CASE, model="end to end").recipe(tmp_path)
    for before, now in ((frozen, joint), (joint, frozen)):
        with pytest.raises(UserError, match="joint_quantizer.decay.*another model") as caught:
            compare(before, now, tmp_path)
        assert "--accept" not in str(caught.value)
    with pytest.raises(UserError, match=f"--accept={JOINT}.stop_step"):
        compare(joint, recipe_of(tmp_path, stop_step=9), tmp_path)


@pytest.mark.parametrize(
    ("section", "said"),
    [
        ("{stop_step: 50}", r"stop_step=50 freezes nothing within schedule.steps=50"),
        ("{decay: 1.0}", r"joint_quantizer.decay"),
        ("{lr: 0}", r"joint_quantizer.lr"),
        ("{stop_stepp: 5}", r"did you mean 'stop_step'"),
    ],
)
def test_mistakes_of_the_section_are_named_with_their_place(tmp_path, section, said):
    text = DEBUG_RECIPE.read_text().replace("  dropout: 0.1\n", f"  dropout: 0.1\n  reconstructor:\n    joint_quantizer: {section}\n")
    (tmp_path / "mine.yaml").write_text(text)
    line = 1 + text.splitlines().index(f"    joint_quantizer: {section}")
    with pytest.raises(UserError, match=rf"mine.yaml:{line}:\d+: .*{said}"):
        load_recipe(tmp_path / "mine.yaml", [])


def test_the_section_is_off_by_default_and_on_when_it_is_empty():
    assert load_recipe(DEBUG_RECIPE, ["model.reconstructor={}"]).model.reconstructor.joint_quantizer is None
    section = load_recipe(DEBUG_RECIPE, [f"{JOINT}={{}}"]).model.reconstructor
    assert section.joint_quantizer.lr == pytest.approx(0.05 * section.lr)
