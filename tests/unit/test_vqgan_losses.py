"""What a tokenizer's output costs beyond pixel errors: LPIPS, edges, the discriminator; and the average of weights."""

import numpy as np
import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from torch import nn

from tests.distributed.helpers import run_distributed
from vilg.errors import UserError
from vilg.tokens.vqgan.adversarial import Adversary, adaptive_weight
from vilg.tokens.vqgan.config import AdversarialConfig
from vilg.tokens.vqgan.discriminator import hinge_loss, patch_discriminator, r1_penalty
from vilg.tokens.vqgan.ema import Average
from vilg.tokens.vqgan.perceptual import EdgeLoss, Lpips, edge_loss, perceptual_loss

CPU = torch.device("cpu")
CFG = "64 64 M 128 128 M 256 256 256 M 512 512 512 M 512 512 512 M".split()


@pytest.fixture(scope="module")
def vgg():
    """Random weights under the names that torchvision's vgg16 and the lpips package write."""
    random, tensors, channels, number = torch.Generator().manual_seed(0), {}, 3, 0
    for width in CFG:
        if width == "M":
            number += 1
            continue
        width = int(width)
        std = (2 / (9 * channels)) ** 0.5
        tensors[f"features.{number}.weight"] = torch.randn(width, channels, 3, 3, generator=random) * std
        tensors[f"features.{number}.bias"] = torch.randn(width, generator=random) * 0.1
        channels, number = width, number + 2
    widths = (64, 128, 256, 512, 512)
    return tensors, {f"lin{k}.model.1.weight": torch.rand(1, w, 1, 1, generator=random) for k, w in enumerate(widths)}


@pytest.fixture(scope="module")
def lpips_folder(vgg, tmp_path_factory):
    folder = tmp_path_factory.mktemp("lpips")
    safetensors.torch.save_file({**vgg[0], "classifier.0.weight": torch.zeros(2, 2)}, folder / "vgg16.safetensors")
    torch.save(vgg[1], folder / "vgg.pth")
    (folder / "README.md").write_text("not looked at")
    return folder


def reference_lpips(vgg, output, images):
    """The published formula, straight from torchvision's layer numbers."""
    tensors, heads = vgg

    def maps(x):
        shift, scale = torch.tensor([[-0.030, -0.088, -0.188], [0.458, 0.448, 0.450]]).view(2, 1, 3, 1, 1)
        x = (x - shift) / scale
        kept = []
        for number in range(30):  # conv, rectifier or pooling, as in vgg16.features[:30]
            if f"features.{number}.weight" in tensors:
                x = F.conv2d(x, tensors[f"features.{number}.weight"], tensors[f"features.{number}.bias"], padding=1)
            elif f"features.{number - 1}.weight" in tensors:
                x = x.relu()
                if number in (3, 8, 15, 22, 29):
                    kept.append(x / (x.norm(dim=1, keepdim=True) + 1e-10))
            else:
                x = F.max_pool2d(x, 2, 2)
        return kept

    pairs = zip(maps(output), maps(images), range(5), strict=True)
    return sum(F.conv2d((a - b) ** 2, heads[f"lin{k}.model.1.weight"]).mean() for a, b, k in pairs)


def test_lpips_is_the_published_formula_and_its_gradient_is_finite(vgg, lpips_folder):
    loss = perceptual_loss(lpips_folder)
    assert isinstance(loss, Lpips) and not any(p.requires_grad for p in loss.parameters())
    images = torch.rand(2, 3, 32, 32) * 2 - 1
    output = (images + torch.randn_like(images) * 0.3).requires_grad_()
    assert loss(output, images).item() == pytest.approx(reference_lpips(vgg, output, images).item(), rel=1e-4)
    assert loss(images, images).item() == 0
    grey = torch.zeros(1, 3, 16, 16, requires_grad=True)
    (loss(grey, images[:1, :, :16, :16]) + loss(output, images)).backward()
    assert grey.grad.isfinite().all() and output.grad.abs().sum() > 0
    with pytest.raises(ValueError, match="at least 16 pixels"):
        loss(images[..., :8, :8], images[..., :8, :8])


def test_lpips_reads_one_file_with_the_packages_own_names(vgg, lpips_folder, tmp_path):
    tensors, heads = vgg
    slices = {"features.": "net.slice1."}
    renamed = {name.replace(*next(iter(slices.items()))): tensor for name, tensor in tensors.items()}
    torch.save({**renamed, **heads, "scaling_layer.shift": torch.zeros(1)}, tmp_path / "lpips.pth")
    images = torch.rand(2, 1, 3, 16, 16)
    assert torch.equal(Lpips.load(tmp_path / "lpips.pth")(*images), Lpips.load(lpips_folder)(*images))


def test_unfit_perceptual_weights_are_named(vgg, tmp_path):
    with pytest.raises(UserError, match="absent.pth: cannot read"):
        perceptual_loss(tmp_path / "absent.pth")
    torch.save(vgg[1], tmp_path / "vgg.pth")
    with pytest.raises(UserError, match=r"features.0.weight is missing.* and 22 more.*torchvision's vgg16"):
        perceptual_loss(tmp_path)
    torch.save({**vgg[0], **vgg[1], "lin0.model.1.weight": torch.zeros(1, 3, 1, 1)}, tmp_path / "vgg.pth")
    with pytest.raises(UserError, match=r"lin0.model.1.weight is \[1, 3, 1, 1\], needed \[1, 64, 1, 1\]"):
        perceptual_loss(tmp_path)
    (tmp_path / "vgg.pth").write_bytes(b"junk")
    with pytest.raises(UserError, match="vgg.pth: cannot be read"):
        perceptual_loss(tmp_path)
    with pytest.raises(UserError, match="not a weight file by its name"):
        perceptual_loss(tmp_path / "vgg.onnx")


def test_the_edge_loss_sees_blur_and_shift_but_not_brightness():
    assert isinstance(perceptual_loss(None), EdgeLoss)
    images = torch.zeros(1, 3, 16, 16)
    images[..., 8:] = 1
    blurred = F.avg_pool2d(F.pad(images, (1, 1, 1, 1), mode="replicate"), 3, 1)
    assert edge_loss(images + 0.3, images).item() == pytest.approx(0, abs=1e-6)
    assert EdgeLoss()(blurred, images) > 0.02 and edge_loss(images.roll(2, 3), images) > edge_loss(images.roll(1, 3), images)
    # one pixel wrong by 16 of 16 x 16: of 240 differences along each axis two are 16, and half and quarter size likewise
    spot = torch.zeros(1, 1, 16, 16)
    spot[..., 5, 5] = 16
    wanted = 2 * (2 * 16 / 240 + 2 * 4 / 56 + 2 * 1 / 12)
    assert edge_loss(spot, torch.zeros(1, 1, 16, 16)).item() == pytest.approx(wanted)


def test_the_discriminator_judges_patches_and_comes_from_its_seed():
    torch.manual_seed(5)
    before = torch.get_rng_state()
    one, again, other = (patch_discriminator(8, 2, seed=s) for s in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), before)
    images = torch.rand(2, 3, 32, 32)
    assert one(images).shape == (2, 1, 8, 8)
    assert torch.equal(one(images), again(images)) and not torch.equal(one(images), other(images))
    changed = images.clone()
    changed[..., :4, :4] = -1
    assert torch.equal(one(images)[..., 4:, 4:], one(changed)[..., 4:, 4:])  # far patches do not see it


def test_hinge_loss_and_r1_penalty_by_hand():
    real, decoded = torch.tensor([2.0, 0.5]), torch.tensor([-3.0, 1.0])
    assert hinge_loss(real, decoded).item() == pytest.approx(((0 + 0.5) / 2 + (0 + 2) / 2) / 2)
    linear = nn.Conv2d(3, 1, 1, bias=False)
    nn.init.constant_(linear.weight, 2.0)
    # D = mean over 16 places of 2 (r + g + b): each of 48 inputs has slope 2/16
    penalty = r1_penalty(linear, torch.rand(5, 3, 4, 4))
    assert penalty.item() == pytest.approx(48 * (2 / 16) ** 2)
    penalty.backward()
    assert linear.weight.grad.abs().sum() > 0


def test_the_adaptive_weight_is_the_ratio_of_gradients_at_the_last_layer():
    last = nn.Parameter(torch.tensor([3.0, 4.0]))
    reconstruction, adversarial = (last * torch.tensor([6.0, 8.0])).sum(), (last * torch.tensor([0.3, 0.4])).sum()
    ratio = adaptive_weight(reconstruction, adversarial, last)
    assert ratio.item() == pytest.approx(10 / (0.5 + 1e-4)) and not ratio.requires_grad
    assert adaptive_weight(reconstruction, adversarial * 0, last).item() == 1e4
    (reconstruction + adversarial).backward()  # both graphs are still there
    assert last.grad.tolist() == pytest.approx([6.3, 8.4])


CONFIG = AdversarialConfig(weight=0.5, start_step=10, ramp_steps=4, width=4, layers=1, lr=1e-2, r1_weight=0.1)


def test_the_adversary_waits_then_grows():
    adversary = Adversary(CONFIG, seed=0, device=CPU)
    weights = [adversary.weight(step) for step in (0, 9, 10, 11, 13, 500)]
    assert weights == [0, 0, 0.125, 0.25, 0.5, 0.5]


def test_a_discriminator_learns_to_tell_and_the_generator_learns_to_fool_it():
    torch.manual_seed(0)
    adversary = Adversary(CONFIG, seed=0, device=CPU)
    images, output = torch.rand(8, 3, 8, 8), torch.nn.Parameter(torch.full((8, 3, 8, 8), -0.5))
    losses = [adversary.learn(output, images, step) for step in range(10, 60)]
    assert losses[0] == pytest.approx(1, abs=0.3) and losses[-1] < 0.2
    assert output.grad is None
    gap = (adversary.discriminator(images).mean() - adversary.discriminator(output).mean()).item()
    reconstruction = (output - images).square().mean()
    term, factor = adversary.term(reconstruction, output, output, 100)
    assert factor == pytest.approx(0.5 * adaptive_weight(reconstruction, term / factor, output).item(), rel=1e-3)
    adversary.optimizer.zero_grad()
    term.backward()
    assert all(p.grad is None for p in adversary.discriminator.parameters())
    with torch.no_grad():
        output -= 2 * output.grad / output.grad.abs().max()
    assert (adversary.discriminator(images).mean() - adversary.discriminator(output).mean()).item() < gap


def test_r1_is_added_every_nth_step_only():
    def weights_after(step, r1_weight):
        config = CONFIG.model_copy(update={"r1_weight": r1_weight, "r1_every": 4})
        adversary = Adversary(config, seed=0, device=CPU)
        random = torch.Generator().manual_seed(0)
        adversary.learn(torch.rand(4, 3, 8, 8, generator=random), torch.rand(4, 3, 8, 8, generator=random), step)
        return torch.cat([p.flatten() for p in adversary.discriminator.parameters()])

    assert torch.equal(weights_after(11, 0), weights_after(11, 50))
    assert not torch.equal(weights_after(14, 0), weights_after(14, 50))


def test_a_step_that_is_not_finite_leaves_the_discriminator_alone():
    adversary = Adversary(CONFIG, seed=0, device=CPU)
    before = [p.clone() for p in adversary.discriminator.parameters()]
    adversary.learn(torch.full((2, 3, 8, 8), torch.nan), torch.rand(2, 3, 8, 8), 11)
    assert all(torch.equal(p, b) for p, b in zip(adversary.discriminator.parameters(), before, strict=True))


def learn_on_rank(rank, world_size):
    random = torch.Generator().manual_seed(0)
    images, output = torch.rand(2, 8, 3, 8, 8, generator=random)
    adversary = Adversary(CONFIG, seed=0, device=CPU, world_size=world_size)
    for step in (10, 11, 12):
        mine = slice(rank * 8 // world_size, (rank + 1) * 8 // world_size)
        adversary.learn(output[mine], images[mine], step)
    return torch.cat([p.detach().flatten() for p in adversary.discriminator.parameters()]).numpy()


def test_two_processes_train_the_discriminator_of_one():
    two = run_distributed(2, learn_on_rank)
    assert np.array_equal(two[0], two[1])
    np.testing.assert_allclose(two[0], learn_on_rank(0, 1), atol=2e-5)


def test_the_average_follows_the_weights_by_its_rule():
    weight = nn.Parameter(torch.tensor([0.0]))
    average = Average([weight], decay=0.9)
    wanted = 0.0
    for n, value in enumerate([1.0, 5.0, -2.0, 4.0] * 30):
        with torch.no_grad():
            weight.fill_(value)
        average.update()
        decay = min(0.9, (1 + n) / (10 + n))
        wanted = decay * wanted + (1 - decay) * value
    assert average.values[0].item() == pytest.approx(wanted, rel=1e-5)
    with average.in_place():
        assert weight.item() == average.values[0].item()
    assert weight.item() == 4.0
    average.copy_to_parameters()
    assert weight.item() == average.values[0].item()
