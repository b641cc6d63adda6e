"""Frechet distance and Inception Score against other formulae; the command with a stand-in feature network."""

import json
import math

import numpy as np
import pytest
import torch
from PIL import Image

from vilg.__main__ import main as vilg
from vilg.evaluate.frechet import FeatureMoments, Gaussian, frechet_distance, inception_score


def gaussian(features):
    moments = FeatureMoments(features.shape[1])
    for part in features.split(7):
        moments.add(part)
    return moments.gaussian()


def test_moments_are_those_of_numpy_also_far_from_zero():
    features = torch.randn(100, 6, dtype=torch.float64) + 1e6
    found = gaussian(features)
    np.testing.assert_allclose(found.mean, features.mean(0), rtol=1e-12)
    np.testing.assert_allclose(found.covariance, np.cov(features.numpy(), rowvar=False), rtol=1e-6, atol=1e-9)
    with pytest.raises(ValueError, match="1 features have no covariance"):
        gaussian(features[:1])


@pytest.mark.parametrize("count", [300, 20])  # 20 features of 32 numbers: singular covariances
def test_distance_is_the_formula_with_eigenvalues_of_the_product(count):
    torch.manual_seed(0)
    mix = torch.randn(32, 32, dtype=torch.float64)
    first, second = torch.randn(count, 32, dtype=torch.float64), torch.randn(count, 32, dtype=torch.float64) @ mix + 0.3
    a, b = gaussian(first), gaussian(second)
    overlap = torch.linalg.eigvals(a.covariance @ b.covariance).real.clamp(min=0).sqrt().sum()
    expected = (a.mean - b.mean).square().sum() + a.covariance.trace() + b.covariance.trace() - 2 * overlap
    assert frechet_distance(a, b) == pytest.approx(float(expected), rel=1e-6)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-6)


def test_distance_of_independent_numbers_is_known():
    a = Gaussian(torch.tensor([0.0, 1.0]).double(), torch.diag(torch.tensor([1.0, 4.0]).double()), 9)
    b = Gaussian(torch.tensor([3.0, 1.0]).double(), torch.diag(torch.tensor([9.0, 4.0]).double()), 9)
    assert frechet_distance(a, b) == pytest.approx(9 + (3 - 1) ** 2)


def test_inception_score_of_known_probabilities():
    sure = torch.eye(4).repeat(10, 1)  # four classes, each picture sure of its own
    assert inception_score(sure, splits=10) == pytest.approx((4, 0))
    assert inception_score(torch.full((10, 4), 0.25), splits=1) == pytest.approx((1, 0))
    p, q = 0.9, 0.1
    expected = math.exp(p * math.log(p / 0.5) + q * math.log(q / 0.5))
    assert inception_score(torch.tensor([[p, q], [q, p]]), splits=1)[0] == pytest.approx(expected)
    with pytest.raises(ValueError, match="3 pictures cannot be cut into 4"):
        inception_score(sure[:3], splits=4)


class StandIn(torch.nn.Module):
    """Mean, spread and corners of a picture; takes what the Inception file takes."""

    def forward(self, x: torch.Tensor, return_features: bool = False, no_output_bias: bool = False) -> torch.Tensor:
        x = x / 255
        features = torch.cat([x.mean((2, 3)), x.std((2, 3)), x[:, :, 0, 0]], 1)
        return features if return_features else torch.softmax(features, 1)


@pytest.fixture
def place(tmp_path):
    torch.jit.script(StandIn()).save(str(tmp_path / "network.pt"))
    rng = np.random.default_rng(0)
    for folder, shift in (("real", 0), ("drawn", 60)):
        (tmp_path / folder / "deep").mkdir(parents=True)
        for index in range(24):
            noise = rng.integers(0, 190, (20, 24, 3)) + shift
            Image.fromarray(noise.astype(np.uint8)).save(tmp_path / folder / "deep" / f"{index}.png")
    (tmp_path / "drawn" / "grid.png").write_bytes(b"not a sample")
    return tmp_path


def run(place, *arguments):
    out = place / "fid.json"
    command = ["eval", "fid", *arguments, "--real", str(place / "real"), "--inception", str(place / "network.pt"),
               "--out", str(out), "--batch", "7", "--device", "cpu"]  # fmt: skip
    return vilg(command), json.loads(out.read_text()) if out.exists() else None


@pytest.mark.parametrize("resize", ["network", "clean"])
def test_the_command_measures_folders_and_says_how(place, capsys, resize):
    code, result = run(place, str(place / "drawn"), "--resize", resize)
    assert code == 0 and result["drawn"]["pictures"] == result["real"]["pictures"] == 24
    assert result["resize"]["name"] == resize and len(result["network"]["sha256"]) == 64 and result["side"] == 20
    assert result["fid"] > 0.1
    assert run(place, str(place / "real"), "--resize", resize)[1]["fid"] == pytest.approx(0, abs=1e-6)
    assert "biased upwards" in capsys.readouterr().out


def test_figures_do_not_depend_on_the_batch(place):
    first = run(place, str(place / "drawn"))[1]["fid"]
    assert run(place, str(place / "drawn"), "--batch", "24")[1]["fid"] == pytest.approx(first, rel=1e-6)


def test_what_cannot_be_measured_is_explained(place, capsys):
    assert run(place)[0] == 2 and "--reconstruct MODEL, not both" in capsys.readouterr().err
    assert run(place, str(place / "drawn"), "--sha256", "0" * 64)[0] == 2 and "figures would not compare" in capsys.readouterr().err
    for side in (0, -5):
        assert run(place, str(place / "drawn"), "--side", str(side))[0] == 2
        assert f"--side {side}: at least one pixel" in capsys.readouterr().err
    (place / "real" / "bad.png").write_bytes(b"")
    assert run(place, str(place / "drawn"))[0] == 2 and "bad.png" in capsys.readouterr().err
    (place / "empty").mkdir()
    assert run(place, str(place / "empty"))[0] == 2 and "holds 0 pictures" in capsys.readouterr().err
    (place / "network.pt").write_bytes(b"x")
    assert run(place, str(place / "drawn"))[0] == 2 and "no TorchScript file" in capsys.readouterr().err
