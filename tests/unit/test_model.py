"""The model in one process: schedule of patterns, shapes, finite padding, decoding entry points, dropout, losses."""

import pytest
import torch
import torch.nn.functional as F

from kernels.attention.reference import reference_attention
from tests.model_support import SPEC, mixed_batch, tiny_config, tiny_model
from vilg.errors import UserError
from vilg.model.attention import layer_patterns
from vilg.model.loss import direction_losses
from vilg.model.vilg import Vilg
from vilg.parallel.rng import dropout, keep_mask, sequence_seeds
from vilg.tokens.sequence import IGNORE, SequenceSpec

CONFIGS = {
    "strict": tiny_config(),
    "wrap": tiny_config(row_style="wrap"),
    "dense": tiny_config(attention="dense"),
    "rmsnorm and qk_norm": tiny_config(norm="rmsnorm", qk_norm=True),
    "sandwich_norm": tiny_config(sandwich_norm=True),
}
each_config = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)


def test_schedule_of_the_48_layer_model_is_35_row_12_column_1_conv():
    patterns = layer_patterns(tiny_config(num_layers=48))
    assert [i for i, p in enumerate(patterns, 1) if p == "column"] == list(range(2, 47, 4))
    assert [i for i, p in enumerate(patterns, 1) if p == "conv"] == [48]
    assert patterns.count("row") == 35


def test_wrapping_rows_and_dense_attention_are_settings():
    assert layer_patterns(tiny_config(row_style="wrap")) == ("row_wrap", "column", "row_wrap", "row_wrap", "conv")
    assert layer_patterns(tiny_config(attention="dense")) == ("dense",) * 5


@each_config
def test_logits_have_exactly_the_vocabularies_and_are_finite_everywhere(config):
    batch = mixed_batch()
    text_logits, image_logits = tiny_model(config)(*batch.inputs())
    assert text_logits.shape == (7, SPEC.text_slots, SPEC.text_vocab_size)
    assert image_logits.shape == (7, SPEC.image_slots, SPEC.image_vocab_size)
    assert text_logits.isfinite().all() and image_logits.isfinite().all()


@each_config
def test_sparse_schedule_gives_the_logits_and_gradients_of_dense_masks(config):
    batch = mixed_batch()

    def run(attend=None):
        model = tiny_model(config, dtype=torch.float64)
        if attend is None:
            logits = model(*batch.inputs())
        else:
            hidden = model.embed(batch.text_input, batch.image_input, batch.text_prefix, batch.image_is_target)
            for block in model.blocks:
                hidden = block(hidden, attend)
            logits = model.heads(hidden)
        sum(direction_losses(*logits, batch.text_target, batch.image_target)).backward()
        return logits, {name: p.grad for name, p in model.named_parameters()}

    def reference(q, k, v, pattern):
        samples = dict(
            text_len=batch.text_len, text_prefix=batch.text_prefix, image_is_target=batch.image_is_target
        )
        return reference_attention(q, k, v, grid=SPEC.grid, pattern=pattern, conv_size=config.conv_size, **samples)

    logits, grads = run()
    wanted_logits, wanted_grads = run(reference)
    torch.testing.assert_close(logits, wanted_logits, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(grads, wanted_grads, rtol=1e-9, atol=1e-9)


def test_every_parameter_gets_a_gradient_from_a_mixed_batch():
    batch, model = mixed_batch(), tiny_model(tiny_config(qk_norm=True))
    sum(direction_losses(*model(*batch.inputs()), batch.text_target, batch.image_target)).backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0] == []


def test_embedding_single_slots_equals_the_same_slots_of_a_whole_pass():
    model, batch = tiny_model(), mixed_batch()
    whole = model.embed(batch.text_input, batch.image_input, batch.text_prefix, batch.image_is_target)
    slots = torch.arange(SPEC.text_slots)
    for slot in slots:
        one = model.embed.text(
            batch.text_input[:, slot : slot + 1], slots[slot : slot + 1], (slot >= batch.text_prefix)[:, None]
        )
        torch.testing.assert_close(one[:, 0], whole[:, slot])
    for slot in range(SPEC.image_slots):
        one = model.embed.image(batch.image_input[:, slot : slot + 1], torch.tensor([slot]), batch.image_is_target)
        torch.testing.assert_close(one[:, 0], whole[:, SPEC.text_slots + slot])


def test_begin_of_image_is_a_vector_of_its_own_and_the_table_has_only_codes():
    model = tiny_model()
    assert model.embed.image_table.weight.shape[0] == SPEC.image_vocab_size
    begin = torch.tensor([[SPEC.begin_of_image]])
    before = model.embed.image(begin, torch.tensor([0]), torch.tensor([1]))
    model.embed.image_table.weight.data.zero_()
    torch.testing.assert_close(model.embed.image(begin, torch.tensor([0]), torch.tensor([1])), before)


def test_source_and_target_slots_are_embedded_differently():
    model, ids, slots = tiny_model(), torch.tensor([[5]]), torch.tensor([1])
    for embed, flag in ((model.embed.text, torch.tensor([[0]])), (model.embed.image, torch.tensor([0]))):
        assert not torch.equal(embed(ids, slots, flag), embed(ids, slots, 1 - flag))


def test_heads_on_single_slots_equal_a_whole_pass():
    model, hidden = tiny_model(), torch.randn(2, SPEC.num_slots, 16)
    text_logits, image_logits = model.heads(hidden)
    torch.testing.assert_close(model.heads.text(hidden[:, 2:3]), text_logits[:, 2:3])
    torch.testing.assert_close(model.heads.image(hidden[:, SPEC.text_slots :][:, 3:4]), image_logits[:, 3:4])


def test_losses_are_fp32_sums_over_target_tokens_per_direction():
    batch = mixed_batch()
    text_logits, image_logits = tiny_model(dtype=torch.bfloat16)(*batch.inputs())
    text_sum, image_sum = direction_losses(text_logits, image_logits, batch.text_target, batch.image_target)
    assert text_sum.dtype == image_sum.dtype == torch.float32
    wanted = F.log_softmax(text_logits.float(), -1)
    rows, slots = torch.nonzero(batch.text_target != IGNORE, as_tuple=True)
    torch.testing.assert_close(text_sum, -wanted[rows, slots, batch.text_target[rows, slots]].sum())
    assert image_sum > 0


def test_direction_without_targets_has_zero_loss_and_zero_gradients():
    logits = torch.randn(2, 3, 5, requires_grad=True)
    none = torch.full((2, 3), IGNORE)
    text_sum, _ = direction_losses(logits, torch.randn(2, 3, 5), none, none)
    text_sum.backward()
    assert text_sum.item() == 0 and torch.equal(logits.grad, torch.zeros_like(logits))


def test_dropout_is_a_function_of_seed_step_and_sequence_alone():
    x = torch.ones(4, 10, 8)
    seeds = sequence_seeds(3, step=7, first=8, count=4)
    whole = dropout(x, 0.3, seeds, site=2)
    assert torch.equal(whole, dropout(x, 0.3, sequence_seeds(3, step=7, first=8, count=4), site=2))
    assert torch.equal(whole[2:], dropout(x[2:], 0.3, sequence_seeds(3, step=7, first=10, count=2), site=2))
    assert torch.equal(whole[:, 5:], dropout(x[:, 5:], 0.3, seeds, site=2, first_slot=5))
    others = [dropout(x, 0.3, seeds, site=3), dropout(x, 0.3, sequence_seeds(3, step=8, first=8, count=4), site=2)]
    assert not any(torch.equal(whole, other) for other in others)


def test_dropout_keeps_the_asked_share_evenly_and_the_mean():
    keep = keep_mask((8, 80, 256), 0.1, sequence_seeds(0, step=0, first=0, count=8), site=0).float()
    assert abs(keep.mean() - 0.9) < 0.003
    assert (keep.mean((0, 1)) - 0.9).abs().max() < 0.06  # 640 draws a channel: 5 standard deviations
    assert (keep.mean((1, 2)) - 0.9).abs().max() < 0.011
    pairs = torch.corrcoef(torch.stack([keep.flatten(1)[i] for i in range(8)]))
    assert (pairs - torch.eye(8)).abs().max() < 0.04
    dropped = dropout(torch.ones(8, 80, 256), 0.1, sequence_seeds(0, step=0, first=0, count=8), site=0)
    assert abs(dropped.mean() - 1) < 0.004


def test_dropout_acts_in_training_only_and_demands_its_seeds():
    batch, model = mixed_batch(), tiny_model(tiny_config(dropout=0.5))
    seeds = sequence_seeds(0, step=1, first=0, count=len(batch))
    trained, again = (model(*batch.inputs(), dropout_seeds=seeds)[1] for _ in range(2))
    with pytest.raises(ValueError, match="dropout_seeds"):
        model(*batch.inputs())
    assert torch.equal(trained, again)
    assert not torch.equal(trained, model.eval()(*batch.inputs())[1])
    torch.testing.assert_close(model(*batch.inputs()), tiny_model()(*batch.inputs()))


def test_impossible_shapes_are_refused_with_the_values():
    with pytest.raises(UserError, match="model.hidden_size=16 .* model.num_heads=3"):
        tiny_model(tiny_config(num_heads=3))


def test_one_slot_grid_and_single_layer_run():
    spec = SequenceSpec(text_slots=6, grid=(1, 1), text_vocab_size=24, image_vocab_size=16)
    logits = tiny_model(tiny_config(num_layers=1), spec=spec)(*mixed_batch(spec).inputs())
    assert logits[1].shape == (7, 1, 16) and logits[1].isfinite().all()


def test_model_is_nan_until_it_is_filled():
    assert all(p.isnan().all() for p in Vilg(tiny_config(), SPEC).parameters())
