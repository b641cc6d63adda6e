"""From logits to tokens: temperature, top-k, top-p, classifier-free guidance. Pure functions.

Shapes: R rows (one per candidate), V vocabulary.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from vilg.errors import UserError

_PURPOSE_CANDIDATE = 0x5A4D  # keeps candidates' streams apart from every other use of the same seed

# Far beyond what anybody draws with, and far from where float32 logits turn into infinities.
MOST_GUIDANCE = 100.0
TEMPERATURES = (1e-3, 1e3)


@dataclass(frozen=True)
class SamplingConfig:
    """How one token is drawn.

    guidance: scale g of classifier-free guidance, logits = null + g * (prompt - null); 1 is none (one pass instead of
    two). guidance_start: scale of the first slot, from which it moves in equal steps to `guidance` at the last one; None
    is `guidance` throughout. temperature: 0 is greedy. top_k, top_p: keep the k likeliest, or the smallest set whose
    probability reaches p; 0 and 1.0 keep all.
    """

    guidance: float = 1.0
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    guidance_start: float | None = None

    @property
    def is_guided(self) -> bool:
        """Whether any slot needs the model without the prompt too."""
        return self.guidance != 1 or self.guidance_start not in (None, 1)

    def __post_init__(self) -> None:
        scale = f"at least 0 and at most {MOST_GUIDANCE:g}; 1 is no guidance"
        coldest, hottest = TEMPERATURES
        rules = {
            "guidance": (0 <= self.guidance <= MOST_GUIDANCE, scale),
            "guidance_start": (self.guidance_start is None or 0 <= self.guidance_start <= MOST_GUIDANCE, scale),
            "temperature": (
                self.temperature == 0 or coldest <= self.temperature <= hottest,
                f"0 (greedy), or at least {coldest:g} and at most {hottest:g}",
            ),
            "top_k": (self.top_k >= 0, "at least 0; 0 keeps all"),
            "top_p": (0 < self.top_p <= 1, "above 0 and at most 1; 1 keeps all"),
        }
        for name, (holds, allowed) in rules.items():
            if not holds:
                raise UserError(f"{name}={getattr(self, name)}: must be {allowed}")


def changed_sampling(base: SamplingConfig, given: Mapping[str, float | int | None]) -> SamplingConfig:
    """`base` with what a user gave (None: not given). Raises UserError for a bad value and for one without effect."""
    changed = replace(base, **{name: value for name, value in given.items() if value is not None})
    check_effect(changed, base=base)
    return changed


def check_effect(sampling: SamplingConfig, *, base: SamplingConfig) -> None:
    """Raise UserError for a cut that differs from that of `base` where drawing is greedy: it would change nothing."""
    if sampling.temperature != 0:
        return
    for name, off in (("top_k", 0), ("top_p", 1.0)):
        value = getattr(sampling, name)
        if value not in (off, getattr(base, name)):
            raise UserError(
                f"{name}={value}: limits what is sampled, but temperature=0 is greedy; give a temperature above 0, 1 say, "
                "or leave it out"
            )


def candidate_uniforms(seed: int, candidate: int, count: int) -> np.ndarray:
    """The random numbers of one candidate, float64 [count] in [0, 1).

    A function of (seed, candidate) alone, so that the same candidate comes out whatever else is in its batch.
    """
    sequence = np.random.SeedSequence([_PURPOSE_CANDIDATE, seed, candidate])
    return np.random.Generator(np.random.Philox(sequence)).random(count)


def guidance_by_slot(config: SamplingConfig, num_slots: int) -> Tensor:
    """Scale of each slot, float32 [N]: constant, or a straight line over the slots in raster order.

    Muse (arXiv 2301.00704, section 2.7) raises the scale so while it draws: diversity is decided early, fit to the
    prompt late.
    """
    start = config.guidance if config.guidance_start is None else config.guidance_start
    return torch.linspace(start, config.guidance, num_slots)


def guided(prompt_logits: Tensor, null_logits: Tensor, guidance: float | Tensor) -> Tensor:
    """Classifier-free guidance (Ho & Salimans, arXiv 2207.12598) on logits [R, V]; a scale for all, or [1]."""
    return null_logits + guidance * (prompt_logits - null_logits)


def sample_tokens(logits: Tensor, uniforms: Tensor, config: SamplingConfig) -> Tensor:
    """Draw one token a row by inverting the cumulative distribution at `uniforms`.

    logits: float [R, V] (minus infinity forbids a token); uniforms: float64 [R] in [0, 1). Returns int64 [R].
    """
    if config.temperature == 0:
        return logits.argmax(-1)
    # Cut, then sum in float64: in float32 the tail of a large vocabulary would round away.
    logits = logits.double() / config.temperature
    if 0 < config.top_k < logits.shape[-1]:
        kth = logits.topk(config.top_k, -1).values[:, -1:]
        logits = logits.masked_fill(logits < kth, -torch.inf)
    probs = logits.softmax(-1)
    if config.top_p < 1:
        ordered, order = probs.sort(dim=-1, descending=True, stable=True)
        # A token stays while the mass before it is below p, so the likeliest one always stays.
        outside = ordered.cumsum(-1) - ordered >= config.top_p
        probs = probs.masked_fill(outside.gather(-1, order.argsort(-1)), 0)
    cumulative = probs.cumsum(-1)
    chosen = torch.searchsorted(cumulative, uniforms[:, None].to(probs) * cumulative[:, -1:], right=True)
    # Rounding may push the draw one past the last token that has any probability.
    last = (probs > 0).double().mul(torch.arange(probs.shape[-1], device=probs.device)).argmax(-1, keepdim=True)
    return torch.minimum(chosen, last)[:, 0]
