"""Frechet distance between two sets of features, and the Inception Score. B features, D numbers each, C classes."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Gaussian:
    """Mean [D] and unbiased covariance [D, D] of `count` features, float64."""

    mean: Tensor
    covariance: Tensor
    count: int


class FeatureMoments:
    """Sums features batch by batch, so that memory does not grow with their number."""

    def __init__(self, size: int) -> None:
        self.count = 0
        self._shift: Tensor | None = None  # a first guess of the mean: squares of large numbers would cancel
        self._sum = torch.zeros(size, dtype=torch.float64)
        self._outer = torch.zeros(size, size, dtype=torch.float64)

    def add(self, features: Tensor) -> None:
        """features: [B, D], any float type and device."""
        features = features.detach().double().cpu()
        if self._shift is None:
            self._shift = features.mean(0)
        features = features - self._shift
        self.count += len(features)
        self._sum += features.sum(0)
        self._outer += features.T @ features

    def gaussian(self) -> Gaussian:
        """Raises ValueError for fewer than two features, which have no covariance."""
        if self.count < 2 or self._shift is None:
            raise ValueError(f"{self.count} features have no covariance; two or more are needed")
        mean = self._sum / self.count
        covariance = (self._outer - self.count * torch.outer(mean, mean)) / (self.count - 1)
        return Gaussian(mean + self._shift, covariance, self.count)


def frechet_distance(first: Gaussian, second: Gaussian) -> float:
    """|m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)), the FID of Heusel et al. (arXiv 1706.08500, equation 6).

    The trace of the root is the sum of the singular values of S1^(1/2) S2^(1/2): real and stable where S1 S2 is
    singular, as it is with fewer features than dimensions.
    """
    roots = [_root(gaussian.covariance) for gaussian in (first, second)]
    overlap = torch.linalg.svdvals(roots[0] @ roots[1]).sum()
    traces = first.covariance.trace() + second.covariance.trace()
    return float((first.mean - second.mean).square().sum() + traces - 2 * overlap)


def _root(covariance: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(covariance)
    return vectors * values.clamp(min=0).sqrt() @ vectors.T


def inception_score(probabilities: Tensor, *, splits: int = 10) -> tuple[float, float]:
    """Mean and standard deviation over `splits` parts of exp(mean KL(p(y|x) | p(y))) (Salimans et al., 1606.03498).

    probabilities: [B, C], rows sum to 1, in the order in which pictures were drawn. Raises ValueError if there are fewer
    pictures than parts.
    """
    if len(probabilities) < splits:
        raise ValueError(f"{len(probabilities)} pictures cannot be cut into {splits} parts")
    scores = []
    for part in probabilities.double().tensor_split(splits):
        marginal = part.mean(0, keepdim=True)
        divergence = (part * (part.clamp_min(1e-300).log() - marginal.clamp_min(1e-300).log())).sum(1)
        scores.append(divergence.mean().exp())
    found = torch.stack(scores)
    return float(found.mean()), float(found.std(correction=0))
