"""Image tokenizers of others, tensor by tensor: each format as a table of renamings into ours, and what it leaves out.

    taming         taming-transformers and latent-diffusion `VQModel`: Lightning files with `state_dict`
    taming-gumbel  taming-transformers `GumbelVQ`: codes are chosen by logits
    llamagen       LlamaGen's `VQModel`: `model`, and `ema` if it was kept; codes of unit length
    diffusers      diffusers' `VQModel`: config.json and safetensors

All are one architecture (see `taming.py`) under other names. What a format leaves to a configuration file that does not
lie in it is read off the tensors' shapes.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from vilg.errors import UserError
from vilg.tokens.vqgan.config import ImageTokenizerConfig, TamingConfig

_BESIDE_THE_CODEBOOK = (
    (r"quant_conv\.(.*)", r"encoder.quant_conv.\1"),
    (r"post_quant_conv\.(.*)", r"decoder.post_quant_conv.\1"),
)
_NEAREST = ((r"quantize\.embedding\.weight", "codebook.vectors"),)
_TAMING = (*_BESIDE_THE_CODEBOOK, (r"((?:en|de)coder\..*)", r"\1"))
_MIDDLE = {"0": "block_1", "1": "attn_1", "2": "block_2"}
_ATTENTION = {
    "group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out",
    "query": "q", "key": "k", "value": "v", "proj_attn": "proj_out",
}  # fmt: skip


@dataclass(frozen=True)
class Format:
    """How one kind of file differs from ours. renamings: (whole old name, new name); left_out: old names that are not
    part of the network, with the reason; legacy_beta: whether its training loss weighed the codebook's term instead of
    the commitment, which matters to nothing that is done with it here, and is noted."""

    renamings: tuple[tuple[str, str], ...]
    lookup: str
    legacy_beta: bool | None
    left_out: tuple[tuple[str, str], ...] = ()


FORMATS = {
    "taming": Format(
        (*_NEAREST, *_TAMING), "euclidean", True, ((r"loss\..*", "discriminator and perceptual loss of the training"),)
    ),
    "taming-gumbel": Format(
        ((r"quantize\.embed\.weight", "codebook.vectors"), (r"quantize\.proj\.(.*)", r"codebook.logits.\1"), *_TAMING),
        "gumbel", None, ((r"loss\..*", "discriminator and perceptual loss of the training"),),
    ),
    "llamagen": Format(
        (
            *_NEAREST, *_BESIDE_THE_CODEBOOK,
            (r"encoder\.conv_blocks\.(\d+)\.res\.(.*)", r"encoder.down.\1.block.\2"),
            (r"encoder\.conv_blocks\.(\d+)\.((?:attn|downsample)\..*)", r"encoder.down.\1.\2"),
            (r"decoder\.conv_blocks\.(\d+)\.res\.(.*)", r"decoder.up.-\1.block.\2"),
            (r"decoder\.conv_blocks\.(\d+)\.((?:attn|upsample)\..*)", r"decoder.up.-\1.\2"),
            (r"((?:en|de)coder\.)mid\.(\d)\.(.*)", r"\1mid.<\2>.\3"),
            (r"((?:en|de)coder\.(?:conv_in|conv_out|norm_out)\..*)", r"\1"),
        ),
        "cosine", False, ((r"quantize\.codebook_used", "a statistic of the training"),),
    ),
    "diffusers": Format(
        (
            *_NEAREST, *_BESIDE_THE_CODEBOOK,
            (r"encoder\.down_blocks\.(\d+)\.resnets\.(.*)", r"encoder.down.\1.block.\2"),
            (r"encoder\.down_blocks\.(\d+)\.attentions\.(.*)", r"encoder.down.\1.attn.\2"),
            (r"encoder\.down_blocks\.(\d+)\.downsamplers\.0\.(.*)", r"encoder.down.\1.downsample.\2"),
            (r"decoder\.up_blocks\.(\d+)\.resnets\.(.*)", r"decoder.up.-\1.block.\2"),
            (r"decoder\.up_blocks\.(\d+)\.attentions\.(.*)", r"decoder.up.-\1.attn.\2"),
            (r"decoder\.up_blocks\.(\d+)\.upsamplers\.0\.(.*)", r"decoder.up.-\1.upsample.\2"),
            (r"((?:en|de)coder\.)mid_block\.resnets\.0\.(.*)", r"\1mid.block_1.\2"),
            (r"((?:en|de)coder\.)mid_block\.resnets\.1\.(.*)", r"\1mid.block_2.\2"),
            (r"((?:en|de)coder\.)mid_block\.attentions\.0\.(.*)", r"\1mid.attn_1.\2"),
            (r"((?:en|de)coder\.)conv_norm_out\.(.*)", r"\1norm_out.\2"),
            (r"((?:en|de)coder\.(?:conv_in|conv_out)\..*)", r"\1"),
        ),
        "euclidean", True,
    ),
}  # fmt: skip


def renamed(tensors: Mapping[str, Tensor], name: str) -> tuple[dict[str, Tensor], dict[str, list[str]]]:
    """Tensors (fp32) of format `name` under our names, and {reason: their names} of those left out.

    Raises UserError naming every tensor that the format does not know: nothing is dropped silently.
    """
    form = FORMATS[name]
    ours: dict[str, Tensor] = {}
    left_out: dict[str, list[str]] = {}
    unknown = []
    for theirs, tensor in tensors.items():
        if reason := next((why for pattern, why in form.left_out if re.fullmatch(pattern, theirs)), None):
            left_out.setdefault(reason, []).append(theirs)
        elif new := next((m.expand(to) for old, to in form.renamings if (m := re.fullmatch(old, theirs))), None):
            ours[new] = tensor.float()
        else:
            unknown.append(theirs)
    if unknown:
        more = f" and {len(unknown) - 6} more" if len(unknown) > 6 else ""
        raise UserError(f"not tensors of the format {name}: {', '.join(unknown[:6])}{more}")
    levels = 1 + max((int(m[1]) for key in ours if (m := re.match(r"encoder\.down\.(\d+)\.", key))), default=0)
    return {_final(key, levels): _shaped(key, tensor) for key, tensor in ours.items()}, left_out


def _final(key: str, levels: int) -> str:
    """Decoder levels counted from the finest, the middle's numbers as names, diffusers' words for parts of a block."""
    key = re.sub(r"^decoder\.up\.-(\d+)", lambda m: f"decoder.up.{levels - 1 - int(m[1])}", key)
    key = re.sub(r"mid\.<(\d)>", lambda m: f"mid.{_MIDDLE.get(m[1], m[1])}", key)
    key = re.sub(r"(attn(?:\.\d+|_1)\.)(.+)\.(weight|bias)$", lambda m: f"{m[1]}{_ATTENTION.get(m[2], m[2])}.{m[3]}", key)
    return key.replace(".conv_shortcut.", ".nin_shortcut.")


def _shaped(key: str, tensor: Tensor) -> Tensor:
    """Attention as 1x1 convolutions (diffusers: linear), the logits as a linear map (taming: a 1x1 convolution)."""
    if re.search(r"attn(?:\.\d+|_1)\.(?!norm|group_norm).+\.weight$", key) and tensor.ndim == 2:
        return tensor[:, :, None, None]
    if key == "codebook.logits.weight" and tensor.shape[2:] == (1, 1):
        return tensor[:, :, 0, 0]
    return tensor


def shape_of(tensors: Mapping[str, Tensor], *, image_size: int, lookup: str, groups: int) -> ImageTokenizerConfig:
    """The configuration of a network, from its tensors under our names. Raises UserError if they do not fit together."""

    def size(name: str, dim: int = 0) -> int:
        if name not in tensors:
            raise UserError(f"{name} is missing: not a whole image tokenizer of this format")
        return tensors[name].shape[dim]

    def count(pattern: str) -> int:
        return 1 + max((int(m[1]) for name in tensors if (m := re.match(pattern, name))), default=-1)

    ch, levels = size("encoder.conv_in.weight"), count(r"encoder\.down\.(\d+)\.")
    widths = [size(f"encoder.down.{level}.block.0.conv1.weight") for level in range(levels)]
    if any(width % ch for width in widths):
        raise UserError(f"levels of {widths} channels are not multiples of the first layer's {ch}: not VQGAN's shape")
    attention = [level for level in range(levels) if f"encoder.down.{level}.attn.0.norm.weight" in tensors]
    try:
        return ImageTokenizerConfig(
            architecture="taming",
            image_size=image_size,
            factor=2 ** (levels - 1),
            num_codes=size("codebook.vectors"),
            code_dim=size("codebook.vectors", 1),
            lookup=lookup,
            taming=TamingConfig(
                ch=ch,
                ch_mult=tuple(width // ch for width in widths),
                num_res_blocks=count(r"encoder\.down\.0\.block\.(\d+)\."),
                attn_resolutions=tuple(image_size >> level for level in attention),
                z_channels=size("encoder.conv_out.weight"),
                groups=groups,
            ),
        )
    except ValueError as error:
        raise UserError(str(error)) from error


def unit_length(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same with code vectors of length 1, as a cosine codebook holds them (LlamaGen normalises at every look-up)."""
    return {**tensors, "codebook.vectors": F.normalize(tensors["codebook.vectors"], dim=-1)}
