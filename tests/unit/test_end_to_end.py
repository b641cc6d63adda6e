"""What training end to end does to the transformer, in one process: gradients, balance, ramps, and when it keeps out."""

import math
from pathlib import Path

import pytest
import torch

from tests.distributed.parity import MICRO_BATCHES, SPEC, Case, Trainer, image_tokenizer, micro_batch
from tests.distributed.resume_support import Layout
from tests.golden.make import DEBUG_RECIPE
from vilg.checkpoint.reconstructor_file import read_reconstructor_file
from vilg.config import load_recipe
from vilg.errors import UserError
from vilg.model.reconstructor import Reconstructor, load_reconstructor, save_reconstructor
from vilg.parallel.grid import Grid
from vilg.tokens.sequence import target_images
from vilg.tokens.vqgan.images import to_float
from vilg.tokens.vqgan.perceptual import edge_loss
from vilg.train.changes import compare
from vilg.train.engine import build_engine, build_model
from vilg.train.reconstruction import build_reconstruction
from vilg.train.step import count, dropout_seeds, micro_batch_loss, plan_step

CASE = Case(Layout(engine="torch"), model="end to end")
QUIET = {"ramp_steps": 0, "balance": False, "adversarial.weight": 0}


def recipe_of(folder: Path, changes: dict[str, object] | None):
    """The case's recipe with changes of its model.reconstructor section; None: without the section."""
    recipe = CASE.recipe(folder)
    if changes is None:
        return recipe.model_copy(update={"model": recipe.model.model_copy(update={"reconstructor": None})})
    section = recipe.model.reconstructor
    adversarial = {k.removeprefix("adversarial."): v for k, v in changes.items() if k.startswith("adversarial.")}
    own = {key: value for key, value in changes.items() if not key.startswith("adversarial.")}
    own["adversarial"] = section.adversarial.model_copy(update=adversarial)
    return recipe.model_copy(update={"model": recipe.model.model_copy(update={"reconstructor": section.model_copy(update=own)})})


def trainer_of(folder: Path, changes: dict[str, object] | None) -> Trainer:
    recipe, device = recipe_of(folder, changes), torch.device("cpu")
    grid = Grid.single()
    model = build_model(recipe, SPEC, grid, device)
    model.reset_parameters(recipe.seed)
    reconstruction = build_reconstruction(recipe, grid, model, image_tokenizer(), device, fresh=True)
    return Trainer(recipe, grid, build_engine(recipe, grid, model, device, reconstruction))


def test_with_stop_gradient_the_transformer_is_bit_for_bit_that_of_two_stage_training(tmp_path):
    alone, beside = trainer_of(tmp_path, None), trainer_of(tmp_path, {"stop_gradient": True})
    for step in (1, 2, 3):
        plain, more = alone.step(step), beside.step(step)
        assert more.figures["reconstructor_grad_norm"] > 0 and plain.grad_norm == more.grad_norm
    assert all(map(torch.equal, alone.engine.model.parameters(), beside.engine.model.parameters()))


def test_the_transformers_gradient_is_that_of_one_graph_over_everything(tmp_path):
    trainer = trainer_of(tmp_path, QUIET | {"perceptual": 0.5})
    model, section = trainer.engine.model, trainer.recipe.model.reconstructor
    batches = [micro_batch(1, place) for place in range(MICRO_BATCHES)]
    text_targets, image_targets, _ = count(batches)
    plan = plan_step(trainer.recipe, 1, text_targets=text_targets, image_targets=image_targets)
    reconstructor = Reconstructor(trainer.recipe.model, image_tokenizer(), SPEC.grid)
    reconstructor.load_state_dict(trainer.engine.reconstruction.reconstructor.state_dict())

    updates = []
    with pytest.MonkeyPatch.context() as patch:  # gradients stay what they are, and so do weights
        patch.setattr(torch.optim.AdamW, "step", lambda self: updates.append(self))
        patch.setattr("vilg.train.optim.clip_gradients", lambda *_: None)
        result = trainer.engine.train_step(batches, plan)
    assert len(updates) == 2  # the transformer's and the reconstructor's
    found = {name: p.grad.clone() for name, p in model.named_parameters()}
    beside = [g.clone() for g in trainer.engine.reconstruction.trained.gradients]

    model.zero_grad()
    model.heads.watch = None
    total, pixels_mean = torch.zeros(()), torch.zeros(())
    for index, batch in enumerate(batches):
        seeds = dropout_seeds(trainer.recipe, trainer.grid, plan, index, batch)
        total = total + micro_batch_loss(model, batch, plan, seeds, trainer.grid)[0]
        if batch.images is None:
            continue
        *_, states = model(*batch.inputs(), dropout_seeds=seeds, with_states=True)
        pixels = reconstructor(states[batch.image_is_target.bool()])
        error = pixels - to_float(target_images(batch))
        loss = section.l1 * error.abs().mean() + section.mse * error.square().mean() + 0.5 * edge_loss(error, torch.zeros_like(error))
        pixels_mean = pixels_mean + loss * len(pixels) / plan.images
    (total + section.weight * pixels_mean).backward()
    assert float(result.reconstruction_loss) == pytest.approx(float(pixels_mean.detach()), rel=1e-5)
    assert float(result.loss) == pytest.approx(float((total + pixels_mean).detach()), rel=1e-5)
    for name, p in model.named_parameters():
        assert torch.allclose(found[name], p.grad, rtol=1e-4, atol=1e-6), name
    for gradient, p in zip(beside, reconstructor.parameters(), strict=True):
        assert torch.allclose(gradient, p.grad, rtol=1e-4, atol=1e-6)


def test_balance_brings_the_pixels_gradient_to_the_generations_norm(tmp_path):
    trainer = trainer_of(tmp_path, {"ramp_steps": 0, "adversarial.weight": 0, "largest_balance": 1e6})
    figures = [trainer.step(step).figures for step in range(1, 6)]
    assert figures[0]["balance"] == 0  # nothing was measured yet
    for before, now in zip(figures, figures[1:]):
        assert now["balance"] > 0
        wanted = before["generation_gradient"] / before["reconstruction_gradient"]
        assert now["balance"] == pytest.approx(wanted, rel=0.5)  # a moving average of the norms
    limited = trainer_of(tmp_path, {"ramp_steps": 0, "adversarial.weight": 0, "largest_balance": 1e-3})
    assert [limited.step(step).figures["balance"] for step in (1, 2)] == [0, 1e-3]


def test_weights_ramp_and_the_discriminator_waits_for_its_step(tmp_path):
    recipe = recipe_of(tmp_path, {"ramp_steps": 4, "weight": 2.0})
    targets = dict(text_targets=10, image_targets=32)
    assert [plan_step(recipe, step, **targets).reconstruction for step in (1, 2, 4, 9)] == [0.5, 1.0, 2.0, 2.0]
    trainer = trainer_of(tmp_path, {"adversarial.start_step": 3})
    figures = [trainer.step(step).figures for step in (1, 2, 3)]
    assert [f["discriminator_grad_norm"] > 0 for f in figures] == [False, False, True]


def test_a_penalised_step_logs_loss_and_penalty_apart_and_is_clipped_as_the_steps_it_stands_for(tmp_path):
    r1 = {"adversarial.start_step": 1, "adversarial.r1_every": 2, "adversarial.r1_weight": 10.0}
    plain = trainer_of(tmp_path, r1 | {"adversarial.r1_weight": 0.0})
    without = [plain.step(step).figures for step in (1, 2)]
    trainer = trainer_of(tmp_path, r1)
    judge = trainer.engine.reconstruction.judge
    first = trainer.step(1).figures
    assert first["r1_penalty"] == 0 and judge.trained.grad_clip == judge.config.adversarial.grad_clip
    second = trainer.step(2).figures
    assert second["r1_penalty"] > 0 and judge.trained.grad_clip == 2 * judge.config.adversarial.grad_clip
    assert second["discriminator_loss"] == pytest.approx(without[1]["discriminator_loss"], rel=1e-6)
    assert second["discriminator_grad_norm"] != without[1]["discriminator_grad_norm"]


def test_a_step_that_is_not_finite_changes_neither_model_nor_reconstructor_nor_discriminator(tmp_path):
    trainer = trainer_of(tmp_path, {"adversarial.start_step": 1})
    trainer.step(1)
    beside = trainer.engine.reconstruction

    def state() -> list[torch.Tensor]:
        weights = *trainer.engine.model.parameters(), *beside.trained.weights, *beside.judge.trained.weights
        return [p.detach().clone() for p in weights]

    before = state()
    assert trainer.step(2, loss_limit=1e-6).skipped  # counts as a spike
    assert all(map(torch.equal, before, state()))
    with torch.no_grad():
        trainer.engine.reconstruction.reconstructor.mapping[0].bias[0] = math.nan
    broken = state()
    result = trainer.step(3)
    assert result.skipped and result.figures["reconstructor_skipped"] == result.figures["discriminator_skipped"] == 1
    assert all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(broken, state(), strict=True))


def test_a_reconstructors_folder_gives_the_same_pixels_and_refuses_another_tokenizer(tmp_path):
    recipe, tokenizer = CASE.recipe(tmp_path), image_tokenizer()
    made = Reconstructor(recipe.model, tokenizer, SPEC.grid).eval()
    made.reset_mapping(tokenizer, seed=3)
    save_reconstructor(tmp_path / "kept", made.state_dict(), {"step": 1})
    opened = load_reconstructor(tmp_path / "kept", recipe.model, tokenizer, SPEC.grid, "cpu")
    states = torch.randn(2, SPEC.image_slots, recipe.model.hidden_size)
    with torch.no_grad():
        assert torch.equal(made(states), opened(states)) and made(states).shape == (2, 3, 8, 8)
    wider = recipe.model.model_copy(update={"reconstructor": replace_width(recipe.model.reconstructor, 7)})
    with pytest.raises(UserError, match="mapping_width"):
        load_reconstructor(tmp_path / "kept", wider, tokenizer, SPEC.grid, "cpu")
    (tmp_path / "kept" / "model.safetensors").write_bytes(b"cut")
    with pytest.raises(UserError, match="no whole reconstructor"):
        load_reconstructor(tmp_path / "kept", recipe.model, tokenizer, SPEC.grid, "cpu")


def test_a_two_stage_run_does_not_go_on_end_to_end(tmp_path):
    with pytest.raises(UserError, match="model.reconstructor.mapping_width: None there, 0 here"):
        compare(recipe_of(tmp_path, None), recipe_of(tmp_path, {}), tmp_path)
    with pytest.raises(UserError, match="take the section out"):
        read_reconstructor_file(tmp_path)


def replace_width(section, width: int):
    return section.model_copy(update={"mapping_width": width})


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model.reconstructor.l1": 0, "model.reconstructor.mse": 0, "model.reconstructor.perceptual": 0}, "are all 0"),
        ({"model.reconstructor.l1": 1, "data.text_to_image_fraction": 0}, "leaves none"),
        ({"model.reconstructor.l1": 1, "loss.image_weight": 0}, "balance=false"),
        ({"model.reconstructor.lll": 1}, "did you mean 'l1'|unknown key"),
    ],
)
def test_mistakes_of_the_section_are_named(tmp_path, changes, said):
    with pytest.raises(UserError, match=said):
        load_recipe(DEBUG_RECIPE, [f"{key}={value}" for key, value in changes.items()])
