"""Settings of the image tokenizer: the network (saved with the weights) and how it is trained.

`vilg tokenizer train-image --config FILE.yaml --set model.num_codes=256` reads them here.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, get_args

from pydantic import Field, ValidationError, model_serializer, model_validator

from vilg.config.marked import Place, did_you_mean, dotted, read_file, read_value, write_yaml
from vilg.config.schema import AdversarialConfig, BelowOne, Fraction, PositiveInt, Section
from vilg.errors import UserError


class TamingConfig(Section):
    """Shape of VQGAN's encoder and decoder, in the words of taming-transformers' `ddconfig`; factor = 2^(levels - 1)."""

    ch: PositiveInt = Field(128, description="Channels of the finest level; a multiple of groups.")
    ch_mult: tuple[PositiveInt, ...] = Field(
        (1, 1, 2, 4), description="Channels of each level, from the finest, as multiples of ch."
    )
    num_res_blocks: PositiveInt = Field(2, description="Residual blocks a level of the encoder; the decoder has one more.")
    attn_resolutions: tuple[PositiveInt, ...] = Field(
        (), description="Sides in pixels of the levels with attention, for images of image_size; the middle always has it."
    )
    z_channels: PositiveInt = Field(256, description="Channels between encoder or decoder and the 1x1 map to code_dim.")
    groups: PositiveInt = Field(32, description="Groups of the group normalisations (taming: 32).")

    @model_validator(mode="after")
    def _groups_fit(self):
        if self.ch % self.groups:
            raise ValueError(f"ch={self.ch} is not a multiple of groups={self.groups}")
        return self


_PLAIN_FIELDS = ("encoder_width", "encoder_blocks", "decoder_width", "decoder_blocks")  # not of the taming architecture


class ImageTokenizerConfig(Section):
    """Shape of the network; lies in `config.json` beside the weights. Only the fields of its architecture are written."""

    architecture: Literal["patch", "taming", "dvae"] = Field(
        "patch",
        description="patch: every code sees its own factor x factor pixels only, the decoder sees neighbours too; "
        "taming: VQGAN's; dvae: plain convolutions.",
    )
    image_size: PositiveInt = Field(
        32, description="Side in pixels of the square images trained on; a multiple of factor."
    )
    factor: PositiveInt = Field(4, description="Pixels per code along each side.")
    num_codes: PositiveInt = Field(512, description="Size of the codebook; at most 65536, as token shards hold uint16.")
    code_dim: PositiveInt = Field(32, description="Width of a code vector.")
    lookup: Literal["cosine", "euclidean", "gumbel"] = Field(
        "euclidean", description="Nearest code by distance or by angle, or the largest of num_codes logits."
    )
    encoder_width: PositiveInt = Field(96, description="Channels of the encoder.")
    encoder_blocks: PositiveInt = Field(1, description="Residual blocks in the encoder.")
    decoder_width: PositiveInt = Field(96, description="Channels of the decoder.")
    decoder_blocks: PositiveInt = Field(2, description="Residual blocks of 3x3 convolutions in the decoder.")
    taming: TamingConfig | None = Field(None, description="Shape of the taming architecture, which needs this section.")

    @model_serializer(mode="wrap")
    def _own_fields(self, write):
        left_out = _PLAIN_FIELDS if self.taming else ("taming",)
        return {name: value for name, value in write(self).items() if name not in left_out}

    @model_validator(mode="after")
    def _architecture_fits(self):
        if (self.architecture == "taming") != (self.taming is not None):
            raise ValueError(
                f"architecture={self.architecture}: the section taming belongs to architecture=taming, which needs it"
            )
        if self.taming:
            given = sorted(self.model_fields_set.intersection(_PLAIN_FIELDS))
            if given:
                raise ValueError(
                    f"{', '.join(given)}: not of architecture=taming; use taming.ch and taming.num_res_blocks"
                )
            if self.factor != 2 ** (len(self.taming.ch_mult) - 1):
                raise ValueError(
                    f"factor={self.factor} is not 2^(levels - 1) with the {len(self.taming.ch_mult)} levels of "
                    "taming.ch_mult"
                )
            sides = [self.image_size >> level for level in range(len(self.taming.ch_mult))]
            for side in self.taming.attn_resolutions:
                if side not in sides:
                    raise ValueError(
                        f"taming.attn_resolutions: no level has {side} pixels a side; the levels have {sides}"
                    )
        if self.architecture == "dvae" and (self.factor < 2 or self.factor & (self.factor - 1)):
            raise ValueError(f"factor={self.factor}: architecture=dvae halves the sides; use 2, 4, 8 or 16")
        return self

    @model_validator(mode="after")
    def _sizes_fit(self):
        if self.image_size % self.factor:
            raise ValueError(f"image_size={self.image_size} is not a multiple of factor={self.factor}")
        if self.num_codes > 65536:
            raise ValueError(f"num_codes={self.num_codes} is over 65536, the most that uint16 token shards can hold")
        return self


class QuantizerConfig(Section):
    """How the codebook learns: a moving average of the vectors that fall to each code, never a gradient; with
    `lookup: gumbel`, to which only the last five belong, by gradients through a relaxed choice."""

    decay: Fraction = Field(0.95, description="Share of the moving average kept per step.")
    dead_below: float = Field(
        1.0,
        ge=0,
        description="A code with a moving average of fewer vectors per step is replaced by a random one of the batch.",
    )
    commitment: float = Field(0.25, ge=0, description="Weight of pulling the encoder's output to its code.")
    kmeans_steps: PositiveInt = Field(8, description="k-means iterations on the first batch, where the codes start.")
    temperature: float = Field(1.0, gt=0, description="Of the relaxed choice at the start.")
    last_temperature: float = Field(0.0625, gt=0, description="At the end; falls geometrically (DALL-E: 1/16).")
    straight_through: bool = Field(True, description="The decoder sees the chosen code alone; false: the relaxed mixture.")
    kl_weight: float = Field(
        5e-4, ge=0, description="Weight of the divergence of the choice from all codes alike (taming: 5e-4, later 1e-8)."
    )
    diversity: float = Field(
        1.0, ge=0, description="Weight of the same divergence of the batch's mean choice: no code is left out (2006.11477)."
    )


class ReconstructionLossConfig(Section):
    """Weights of the terms of `losses.reconstruction_loss`, on pixels in [-1, 1], and of what is added to it."""

    l1: float = Field(1.0, ge=0, description="Weight of the mean absolute error.")
    gradient: float = Field(
        0.5, ge=0, description="Weight of the mean absolute error of the differences of neighbours."
    )
    mse: float = Field(2.0, ge=0, description="Weight of the mean squared error.")
    perceptual: float = Field(0.0, ge=0, description="Weight of the perceptual loss.")
    perceptual_weights: Path | None = Field(
        None, description="File or folder with VGG16 and LPIPS weights; without, edges at three scales are compared."
    )
    adversarial: AdversarialConfig = AdversarialConfig()


class TrainConfig(Section):
    """AdamW with linear warm-up and cosine to zero."""

    steps: PositiveInt = Field(1600, description="Optimizer steps.")
    batch_size: PositiveInt = Field(32, description="Images per step over all processes; a multiple of their number.")
    lr: float = Field(4e-3, gt=0, description="Peak learning rate.")
    warmup_steps: int = Field(50, ge=0, description="Steps of linear warm-up.")
    weight_decay: float = Field(1e-4, ge=0, description="Decoupled weight decay of matrices.")
    grad_clip: float = Field(1.0, gt=0, description="Largest global gradient norm.")
    ema: BelowOne = Field(
        0.0, description="Decay per step of the moving average of the weights, which is then what is saved; 0: none."
    )
    held_back: PositiveInt = Field(
        512, description="Images kept out of training for the final figures; at most a tenth."
    )
    memory_mib: PositiveInt = Field(
        2048,
        description="Decoded images of a process are held in memory up to this; larger data is read shard by shard.",
    )
    max_bad_fraction: Fraction = Field(0.01, description="Share of unreadable images above which training stops.")
    log_every: PositiveInt = Field(50, description="Steps between log lines.")
    sheet_every: int = Field(0, ge=0, description="Steps between reconstruction sheets; 0 draws one at the end only.")


class ImageTokenizerRecipe(Section):
    """Everything that decides what comes out of a training."""

    seed: int = Field(
        0, ge=0, description="Initial weights, order of the images and renewal of codes derive from this."
    )
    model: ImageTokenizerConfig = ImageTokenizerConfig()
    quantizer: QuantizerConfig = QuantizerConfig()
    loss: ReconstructionLossConfig = ReconstructionLossConfig()
    train: TrainConfig = TrainConfig()


def load_tokenizer_recipe(path: Path | None = None, overrides: Sequence[str] = ()) -> ImageTokenizerRecipe:
    """Read a YAML recipe (defaults without one), then apply overrides like `train.lr=1e-3`.

    Raises UserError listing all problems as `file:line:column: key: message`.
    """
    marked = read_file(path, what="image tokenizer recipe") if path else None
    values = (marked.value if marked else None) or {}
    if not isinstance(values, dict):
        raise UserError(f"{path}: an image tokenizer recipe is a mapping, like 'model: {{num_codes: 256}}'")
    problems = list(marked.problems) if marked else []
    given: dict[tuple, Place] = {}
    for override in overrides:
        key, equals, text = override.partition("=")
        keys = tuple(key.split("."))
        if not equals or not all(keys):
            raise UserError(f"'{override}' is no setting; write key=value, for example --set train.lr=1e-3")
        given[keys] = Place(f"--set {override}")
        section = values
        for part in keys[:-1]:
            section = section.setdefault(part, {})
            if not isinstance(section, dict):
                raise UserError(f"--set {override}: '{part}' is a value, it has no keys")
        section[keys[-1]] = read_value(text)
    try:
        recipe = ImageTokenizerRecipe.model_validate_json(json.dumps(values), strict=True)
    except ValidationError as error:
        for details in error.errors():
            keys = tuple(details["loc"])
            place = given.get(keys) or (marked.place(keys) if marked else "--set")
            problems.append((place, f"{dotted(keys) or 'recipe'}: {_explain(keys, details)}"))
    if problems:
        raise UserError("\n".join(f"{place}: {message}" for place, message in problems))
    return recipe


def dump_tokenizer_recipe(recipe: ImageTokenizerRecipe) -> str:
    """YAML with every default written out, which `load_tokenizer_recipe` reads back as the same recipe."""
    return write_yaml(recipe.model_dump(mode="json"))


def _explain(keys: tuple, details: dict) -> str:
    if details["type"] == "extra_forbidden":
        section = ImageTokenizerRecipe
        for part in keys[:-1]:
            kind = section.model_fields[part].annotation
            section = next((t for t in get_args(kind) if t is not type(None)), kind)  # of an optional section
        valid = list(section.model_fields)
        return "unknown key" + (did_you_mean(str(keys[-1]), valid) or f"; valid here: {', '.join(valid)}")
    message = details["msg"].removeprefix("Value error, ").replace("Input should", "should")
    return message if details["type"] == "value_error" else f"{message}; found {details['input']!r}"
