"""Held-out losses: which pairs, how ranks share them, and that they are the losses of the weights as they stand."""

from dataclasses import replace

import json
import shutil
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from tests.golden.make import DEBUG_RECIPE, NUM_HELD_OUT, make_data
from vilg.config import load_recipe
from vilg.config.check import check_recipe
from vilg.data.loader import Loader, open_data
from vilg.errors import UserError
from vilg.parallel.grid import Grid
from vilg.parallel.ranks import Ranks
from vilg.tokens.sequence import IGNORE, SequenceSpec, all_images, answer, collate, text_to_image, without_targets
from vilg.tokens.text import TextTokenizer
from vilg.train.engine import build_engine, build_model
from vilg.train.evaluation import Evaluation, read_pairs
from vilg.train.log import loss_text
from vilg.train.open import sequence_spec
from vilg.train.step import StepResult, count, plan_step

SINGLE = Grid.single()


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_data(tmp_path_factory.mktemp("evaluation")) | {"evaluation.every_steps": 5, "evaluation.pairs": 21}


def recipe_of(data, **overrides):
    changes = data | {"parallel.engine": "torch"} | {key.replace("__", "."): value for key, value in overrides.items()}
    return load_recipe(DEBUG_RECIPE, [f"{key}={value}" for key, value in changes.items()])


def source(recipe):
    return dict(text_tokenizer=TextTokenizer.load(recipe.tokens.text_model), spec=sequence_spec(recipe))


def read(recipe, grid=SINGLE, **more):
    return read_pairs(recipe, grid, open_data(recipe.data), **source(recipe), **more)


def evaluation_of(recipe):
    return Evaluation.read(recipe, SINGLE, Ranks(), open_data(recipe.data), **source(recipe))


def counted(batches):
    """The sequences that have a target, as text, in some order."""
    rows = []
    for batch in batches:
        for i in range(len(batch)):
            if (batch.text_target[i] != IGNORE).any() or (batch.image_target[i] != IGNORE).any():
                rows.append(str([tensor[i].tolist() for tensor in batch.tensors().values()]))
    return sorted(rows)


@pytest.mark.parametrize(("data_size", "micro"), [(1, 1), (1, 16), (2, 8), (3, 4)])
def test_every_split_over_ranks_has_the_same_sequences_once_and_equally_many_micro_batches(data, data_size, micro):
    alone = recipe_of(data)
    pairs, whole, bad = read(alone)
    assert pairs == 21 and bad == 0 and len(counted(whole)) == 2 * 21
    assert all(len(batch) == alone.batch.micro_size for batch in whole)  # no larger than those of a step
    recipe, shares = recipe_of(data, batch__micro_size=micro, batch__global_size=48), []
    for rank in range(data_size):
        grid = Grid(data_size=data_size, rank=rank)
        shares.append(read(recipe, grid)[1])
    assert len({len(share) for share in shares}) == 1
    assert counted([batch for share in shares for batch in share]) == counted(whole)


def test_pairs_behind_a_url_are_those_of_the_folder(data, tmp_path):
    local = recipe_of(data)
    behind = recipe_of(data, evaluation__data=f"file://{Path(local.evaluation.data).absolute()}", data__cache_dir=tmp_path)
    (pairs, here, _), (pairs_there, there, _) = read(local), read(behind)
    assert pairs == pairs_there == 21 and counted(here) == counted(there)
    assert any(tmp_path.rglob("*"))  # read through the cache


def test_runs_of_other_seeds_and_shares_of_directions_evaluate_the_same_pairs(data):
    recipe, other = recipe_of(data), recipe_of(data, seed=7, data__text_to_image_fraction=0.9, data__caption_dropout=0.5)
    first, second = (counted(read(r)[1]) for r in (recipe, other))
    assert first == second


@pytest.mark.parametrize(("fraction", "texts", "images"), [(1.0, False, True), (0.0, True, False)])
def test_only_the_direction_that_is_trained_is_evaluated(data, fraction, texts, images):
    recipe = recipe_of(data, data__text_to_image_fraction=fraction)
    evaluation = evaluation_of(recipe)
    assert (evaluation.text_targets > 0, evaluation.image_targets > 0) == (texts, images)
    keys = evaluation.figures(StepResult(1.0, 2.0, 3.0, 0.0, False, 0.0)).keys()
    assert keys == {"val_loss", "val_text_loss" if texts else "val_image_loss"}


def test_the_losses_are_those_of_a_loop_over_sequences_without_dropout(data):
    recipe = recipe_of(data, loss__text_weight=0.25)
    assert recipe.model.dropout > 0
    model = build_model(recipe, sequence_spec(recipe), SINGLE, torch.device("cpu"))
    model.reset_parameters(0)
    engine = build_engine(recipe, SINGLE, model, torch.device("cpu"))
    before = [p.detach().clone() for p in model.parameters()]
    evaluation = evaluation_of(recipe)
    result = engine.evaluate(evaluation.batches, evaluation.plan(3))
    assert model.training and all(map(torch.equal, before, model.parameters()))
    assert all(p.grad is None for p in model.parameters())
    model.eval()
    texts, images = [], []
    for batch in evaluation.batches:
        for i in range(len(batch)):
            one = [tensor[i : i + 1] for tensor in batch.tensors().values()]
            with torch.no_grad():
                text, image = model(one[0], one[1], one[4], one[5], one[6])
            for losses, logits, target in ((texts, text, one[2]), (images, image, one[3])):
                kept = target != IGNORE
                losses += F.cross_entropy(logits[kept], target[kept], reduction="none").tolist()
    assert (len(texts), len(images)) == (evaluation.text_targets, evaluation.image_targets)
    mean_text, mean_image = sum(texts) / len(texts), sum(images) / len(images)
    assert float(result.text_loss) == pytest.approx(mean_text, rel=1e-5)
    assert float(result.image_loss) == pytest.approx(mean_image, rel=1e-5)
    assert float(result.loss) == pytest.approx(0.25 * mean_text + mean_image, rel=1e-5)


@pytest.mark.parametrize("directions", [{"data__text_to_image_fraction": 0.75}, {"data__directions": "both"}])
def test_a_loss_that_sums_over_pairs_is_on_the_scale_of_the_trainings(data, directions):
    recipe = recipe_of(data, loss__reduction="sum", batch__global_size=96, evaluation__pairs=0, **directions)
    evaluation = evaluation_of(recipe)
    step = next(iter(Loader(open_data(recipe.data), data_config=recipe.data, seed=0, global_size=96, micro_size=8, **source(recipe))))
    text_targets, image_targets, _ = count(step)
    trained = plan_step(recipe, 1, text_targets=text_targets, image_targets=image_targets)
    plan = evaluation.plan(1)
    # Were every token's loss 1, the losses would be the targets times their scales; captions differ a little in length.
    assert evaluation.image_targets * plan.image_scale == pytest.approx(image_targets * trained.image_scale, rel=0.1)
    assert evaluation.text_targets * plan.text_scale == pytest.approx(text_targets * trained.text_scale, rel=0.2)


def test_bad_pairs_are_counted_once_under_every_split_and_kept_by_name(data, tmp_path):
    held_out = shutil.copytree(data["evaluation.data"], tmp_path / "held_out")
    recipe = recipe_of(data | {"evaluation.data": held_out}, tokens__text_slots=5, data__max_bad_fraction=1.0)
    found = {}
    for ranks in (1, 2, 3):
        lines = []
        for rank in range(ranks):
            path = tmp_path / f"bad{ranks}_{rank}.jsonl"
            path.write_text("of the start before\n")
            bad = read(recipe, Grid(data_size=ranks, rank=rank), quarantine=path)[2]
            kept = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
            assert bad == sum(line["global_index"] < 21 for line in kept)
            lines += [line["key"] for line in kept if line["global_index"] < 21]
        found[ranks] = sorted(lines)
    assert found[1] == found[2] == found[3] and 0 < len(found[1]) < 21


def test_a_loss_that_is_not_finite_is_said_so(data):
    figures = evaluation_of(recipe_of(data)).figures(StepResult(float("nan"), 2.0, float("inf"), 0.0, False, 0.0))
    assert figures == {"val_loss": None, "val_text_loss": 2.0, "val_image_loss": None}
    assert loss_text(figures, prefix="val_") == "loss not finite (text 2.000)"


def test_sequences_without_targets_keep_their_pixels_as_sources():
    spec = SequenceSpec(4, (2, 2), 16, 8)
    codes, pixels = [0, 1, 2, 3], [torch.full((2, 2, 3), i, dtype=torch.uint8).numpy() for i in range(4)]
    batch = collate(
        [
            text_to_image(spec, [5], codes, pixels[0]),
            answer(spec, [], [6], codes, pixels[1]),
            text_to_image(spec, [7], codes, pixels[2]),
            answer(spec, [], [8], codes, pixels[3]),
        ]
    )
    found = without_targets(batch, torch.tensor([False, False, True, True]))
    assert found.image_is_target.tolist() == [1, 0, 0, 0] and found.target_counts() == (2, 4)
    assert torch.equal(all_images(found), all_images(batch)) and found.images[:, 0, 0, 0].tolist() == [0]
    drawn_only = replace(batch, source_images=None)
    assert without_targets(drawn_only, torch.tensor([True, False, False, False])).images[:, 0, 0, 0].tolist() == [2]


def test_too_few_pairs_and_the_trained_data_are_refused(data):
    recipe = recipe_of(data, evaluation__pairs=NUM_HELD_OUT + 1)
    with pytest.raises(UserError, match=f"evaluation.pairs={NUM_HELD_OUT + 1}, but .*held_out holds {NUM_HELD_OUT} pairs"):
        read(recipe)
    assert read(recipe_of(data, evaluation__pairs=0))[0] == NUM_HELD_OUT
    link = Path(data["data.train"]).with_name("link")
    link.symlink_to(data["data.train"])
    with pytest.raises(UserError, match="link holds the same shards as .*tokens, which is trained on"):
        read(recipe_of(data | {"evaluation.data": link}))
    plain = load_recipe(DEBUG_RECIPE, ["evaluation.every_steps=5"], cross_checks=False)
    assert "evaluation.data is not set" in check_recipe(plain)[0]
    same = load_recipe(DEBUG_RECIPE, [f"evaluation.data={plain.data.train}"], cross_checks=False)
    assert "is data.train too" in check_recipe(same)[0]
