"""The recipe: every setting of a run, one pydantic model per section.

A field has a type, a default where one is sensible, and one sentence with unit and effect. Rules that join several
fields live in `check.py`, reading and error positions in `load.py`. Unknown keys are refused everywhere.
"""

import re
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, PlainValidator
from pydantic_core import PydanticCustomError

PositiveInt = Annotated[int, Field(gt=0)]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
BelowOne = Annotated[float, Field(ge=0.0, lt=1.0)]


def _path_or_url(value: object) -> Path | str:
    if isinstance(value, str):
        return value if re.match(r"[a-z][a-z0-9+.-]*://", value) else Path(value)
    if not isinstance(value, Path):
        raise PydanticCustomError("path_type", "should be a path")
    return value


Place = Annotated[Path | str, PlainValidator(_path_or_url)]  # a str is a URL


class Section(BaseModel):
    """Base of all sections: unknown keys are errors, values are frozen after loading."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, protected_namespaces=())


class AdversarialConfig(Section):
    """A discriminator that looks at patches of decoded and of real images (VQGAN, 2012.09841, section 3.1)."""

    weight: float = Field(0.0, ge=0, description="Weight of the adversarial loss beside the pixel losses; 0: none.")
    start_step: int = Field(1000, ge=0, description="Step at which the discriminator begins to learn and to count.")
    ramp_steps: int = Field(
        500, ge=0, description="Steps from start_step over which the weight grows linearly from 0; the discriminator learns."
    )
    adaptive: bool = Field(
        True, description="Scale its gradient to the norm of the pixel losses' (2012.09841, equation 7)."
    )
    lr: float = Field(1e-4, gt=0, description="Peak learning rate of the discriminator; follows the run's schedule.")
    grad_clip: float = Field(
        1.0, gt=0, description="Largest gradient norm of the discriminator; r1_every times that in a step with a penalty."
    )
    r1_weight: float = Field(
        1.0, ge=0, description="Half of this times the squared gradient at real images (R1, 1801.04406); 0: none."
    )
    r1_every: PositiveInt = Field(
        16, description="Steps between two such penalties, each counted so many times (lazy regularisation, 1912.04958)."
    )
    width: PositiveInt = Field(64, description="Channels of the discriminator's first layer.")
    layers: PositiveInt = Field(3, description="Layers of the discriminator that halve the sides.")


class JointQuantizerConfig(Section):
    """The image tokenizer learns beside the model, whose codes are then those of the batch's images: they move."""

    lr: float = Field(
        5e-6,
        gt=0,
        description="Peak learning rate of the tokenizer's encoder and decoder; follows the run's schedule. By default a "
        "twentieth of the reconstructor's.",
    )
    grad_clip: float = Field(1.0, gt=0, description="Largest gradient norm of encoder and decoder together.")
    decay: BelowOne = Field(0.99, description="Share of the code vectors' moving average kept per step.")
    commitment: float = Field(0.25, ge=0, description="Weight of pulling the encoder's output to its code.")
    stop_step: int = Field(
        0, ge=0, description="Last step in which the tokenizer learns; from then on codes stay what they are; 0: never."
    )


class ReconstructorConfig(Section):
    """End-to-end training: pixels from the last layer's hidden states of the image slots (2112.15283, section 3.1.3)."""

    mapping_width: int = Field(
        0, ge=0, description="Hidden width of the mapping network from states to the decoder's input; 0: hidden_size."
    )
    stop_gradient: bool = Field(False, description="Train mapping and decoder alone; the transformer learns nothing of it.")
    weight: float = Field(
        1.0, gt=0, description="Weight of the reconstruction beside the generation loss (section 5: equal weights)."
    )
    ramp_steps: int = Field(1000, ge=0, description="Steps over which that weight grows linearly from 0.")
    balance: bool = Field(
        True,
        description="Scale the reconstruction's gradient at the hidden states to `weight` times the generation's norm there.",
    )
    largest_balance: float = Field(10.0, gt=0, description="The most that `balance` enlarges that gradient.")
    lr: float = Field(1e-4, gt=0, description="Peak learning rate of mapping and decoder; follows the run's schedule.")
    betas: tuple[BelowOne, BelowOne] = Field(
        (0.5, 0.9), description="Adam's decay of the moments, for all that learns beside the model (taming: 0.5, 0.9)."
    )
    grad_clip: float = Field(1.0, gt=0, description="Largest gradient norm of mapping and decoder together.")
    ema: BelowOne = Field(
        0.999, description="Decay per step of the moving average of mapping and decoder, which exports hold; 0: none."
    )
    l1: float = Field(1.0, ge=0, description="Weight of the mean absolute error of pixels in [-1, 1].")
    mse: float = Field(1.0, ge=0, description="Weight of the mean squared error of pixels.")
    perceptual: float = Field(1.0, ge=0, description="Weight of the perceptual loss; 0: none.")
    perceptual_weights: Path | None = Field(
        None, description="File or folder of LPIPS weights (VGG); without: an edge loss at several scales."
    )
    adversarial: AdversarialConfig = AdversarialConfig()
    joint_quantizer: JointQuantizerConfig | None = Field(
        None, description="Training of the image tokenizer beside the model; without this section it is frozen."
    )


class ModelConfig(Section):
    """Shape of the transformer (ERNIE-ViLG, arXiv 2112.15283, section 4.1: 48 layers, 4096, 64 heads)."""

    num_layers: PositiveInt = Field(description="Transformer blocks.")
    hidden_size: PositiveInt = Field(description="Width of the residual stream.")
    num_heads: PositiveInt = Field(description="Attention heads; hidden_size must be a multiple of it.")
    ffn_multiple: PositiveInt = Field(4, description="Width of the feed-forward layer as a multiple of hidden_size.")
    attention: Literal["sparse", "dense"] = Field(
        "sparse", description="sparse: the paper's row / column / conv schedule; dense: all image slots in every layer."
    )
    row_style: Literal["strict", "wrap"] = Field(
        "strict", description="Row layers see the same row (strict) or the previous W raster slots (wrap, as DALL-E)."
    )
    conv_size: PositiveInt = Field(11, description="Side of the square conv window in image slots; odd.")
    norm: Literal["layernorm", "rmsnorm"] = Field("layernorm", description="Normalisation before each sub-layer.")
    qk_norm: bool = Field(False, description="Normalise queries and keys per head (Chameleon, 2405.09818).")
    sandwich_norm: bool = Field(
        False, description="Normalise also the output of every residual branch (CogView, 2105.13290)."
    )
    embedding_gradient: Fraction = Field(
        1.0, description="Factor of the token tables' gradient (CogView, GLM-130B: 0.1); 1 leaves it as it is."
    )
    dropout: BelowOne = Field(0.0, description="Probability of dropping a residual branch's output entries.")
    init_std: float = Field(0.02, gt=0, description="Standard deviation of the weights at the start.")
    reconstructor: ReconstructorConfig | None = Field(
        None, description="End-to-end training of generator and image decoder; without this section: two stages."
    )


class TokensConfig(Section):
    """The two tokenizers and the canonical sequence's size."""

    text_model: Path = Field(description="SentencePiece .model file.")
    image_model: Path = Field(description="Folder of the image tokenizer (config.json + model.safetensors).")
    text_slots: PositiveInt = Field(description="T, slots of the text segment; a target caption has at most T - 1.")
    grid: tuple[PositiveInt, PositiveInt] = Field(description="[H, W] of the image segment, in tokens.")
    text_vocab_size: PositiveInt = Field(description="Rows of the text table; at least the SentencePiece vocabulary.")
    image_vocab_size: PositiveInt = Field(description="Codes of the image tokenizer.")


class BlendPart(Section):
    """A further data set of a run."""

    path: Place = Field(description="Folder or URL of token shards, as data.train.")
    weight: float = Field(gt=0, description="Samples of it for every sample of data.train.")


class DataConfig(Section):
    """Where token shards lie and how pairs become sequences."""

    train: Place = Field(description="Folder of token shards with manifest.json, or its URL (s3://, gs://, http://).")
    blend: tuple[BlendPart, ...] = Field((), description="Further data sets, mixed in by weight; data.train has 1.")
    directions: Literal["both", "alternate", "answer"] = Field(
        "alternate",
        description="both: each pair gives two sequences (the paper); alternate: a seeded coin per pair; answer: picture "
        "and question are source, the answer is target.",
    )
    text_to_image_fraction: Fraction = Field(0.5, description="Share of text -> image when directions is alternate.")
    caption_dropout: Fraction = Field(
        0.1, description="Share of text -> image samples whose caption is emptied, for classifier-free guidance."
    )
    cache_dir: Path | None = Field(
        None,
        description="Folder on the node's own disk, shared by its ranks: what is read from URLs, and indices of shards "
        "in a folder that cannot be written.",
    )
    cache_gib: float = Field(20.0, gt=0, description="GiB that data.cache_dir may take on a node, without indices.")
    workers: int = Field(0, ge=0, description="Reader processes per rank; 0 reads in the training process.")
    read_timeout: float = Field(
        60.0, ge=0, description="Seconds without a sample before a stalled read is tried again, four times; 0: wait."
    )
    max_bad_fraction: Fraction = Field(0.001, description="Share of unreadable samples above which the run stops.")

    @property
    def drawn_share(self) -> float:
        """Share of text -> image among the sequences."""
        return {"both": 0.5, "alternate": self.text_to_image_fraction, "answer": 0.0}[self.directions]


class BatchConfig(Section):
    """Sizes in pairs (samples), before directions are applied."""

    global_size: PositiveInt = Field(description="Pairs per optimizer step over all ranks.")
    micro_size: PositiveInt = Field(description="Pairs per forward pass on one rank.")


class LossConfig(Section):
    """How the two directions add up (paper eq. 3-5)."""

    text_weight: float = Field(1.0, ge=0, description="Weight of the image -> text loss.")
    image_weight: float = Field(1.0, ge=0, description="Weight of the text -> image loss.")
    z_loss: float = Field(
        0.0,
        ge=0,
        description="Coefficient of log^2 Z per target token, which keeps logits from drifting (Chameleon: 1e-5).",
    )
    reduction: Literal["mean", "sum"] = Field(
        "mean",
        description="mean: per target token and direction, over the global batch; sum: the paper's plain sum per pair.",
    )


Recompute = Literal["none", "selective", "full"]


class ParallelConfig(Section):
    """How ranks are laid out; the data size follows from the number of processes."""

    engine: Literal["deepspeed", "torch"] = Field(
        "deepspeed", description="deepspeed: ZeRO by the file below; torch: one process, no DeepSpeed (reference)."
    )
    deepspeed: Path = Field(Path("ds_configs/zero1.json"), description="DeepSpeed JSON file; owns the ZeRO stage.")
    tensor: PositiveInt = Field(1, description="Tensor-parallel ranks.")
    pipeline: PositiveInt = Field(1, description="Pipeline stages.")
    sequence: bool = Field(
        False, description="Split norms, dropout and residuals along the slots over the tensor ranks (2205.05198)."
    )
    recompute: Recompute = Field(
        "none",
        description="What is computed again in the backward instead of kept: selective: each layer's attention branch; "
        "full: whole layers.",
    )
    compile: bool = Field(
        False,
        description="Fuse norms, GELU, biases and residuals by torch.compile; the first step takes a minute longer, and "
        "16-bit numbers are rounded elsewhere.",
    )
    recompute_every: PositiveInt = Field(
        1, description="With recompute full: 1 recomputes every layer, n every n-th; the others keep their activations."
    )


class OptimizerConfig(Section):
    """AdamW; norms, biases and embeddings are not decayed."""

    lr: float = Field(gt=0, description="Peak learning rate.")
    betas: tuple[BelowOne, BelowOne] = Field((0.9, 0.95), description="Decay of the two moments.")
    eps: float = Field(1e-8, gt=0, description="Added to the root of the second moment.")
    weight_decay: float = Field(0.04, ge=0, description="Decoupled decay of matrices (CogView: 0.04).")
    grad_clip: float = Field(1.0, gt=0, description="Largest global gradient norm.")


class ScheduleConfig(Section):
    """Learning rate over optimizer steps: linear warm-up, then cosine."""

    steps: PositiveInt = Field(description="Optimizer steps of the run.")
    warmup_steps: int = Field(0, ge=0, description="Steps of linear warm-up.")
    min_lr_ratio: Fraction = Field(0.1, description="Last learning rate as a share of the peak.")


class GuardsConfig(Section):
    """When a run protects itself."""

    max_nonfinite_steps: int = Field(
        10,
        ge=0,
        description="Consecutive steps with a non-finite loss or gradient, all skipped, before the run stops.",
    )
    spike_action: Literal["off", "log", "skip", "rollback"] = Field(
        "log",
        description="A loss above the limit is reported (log), its step is left out (skip), or the run goes back to its "
        "last checkpoint and past all samples since then (rollback).",
    )
    spike_window: int = Field(
        128, ge=8, description="Steps whose losses give the limit; nothing is judged before half of them are done."
    )
    spike_threshold: float = Field(
        10.0, gt=0, description="The limit: this many robust standard deviations over the window's median loss."
    )
    max_spikes: int = Field(
        3, ge=0, description="Spikes skipped in a row, or rollbacks to one checkpoint, before the run stops."
    )
    hang_timeout: float = Field(
        1200.0,
        ge=0,
        le=1800,
        description="Seconds without a finished step after which every rank leaves its stacks and ends (exit code 75); 0: "
        "never. The start, checkpoints, evaluations and sample sheets have a limit of their own. Without this watch a GPU's "
        "collectives give up after 1800, ranks that wait for another's host after 1800 more than pause_timeout.",
    )
    pause_timeout: float = Field(
        7200.0,
        ge=0,
        description="Seconds that the start, a checkpoint, an evaluation or a sample sheet may take before that is a hang; "
        "0: without end. Only watched if hang_timeout is not 0.",
    )
    straggler_percent: float = Field(
        30.0,
        ge=0,
        description="The slowest rank is named if its forward passes, or its wait for data as a share of the step, are so "
        "many percent over the median in two console lines running; 0: never.",
    )
    recompute_every: int = Field(
        0,
        ge=0,
        description="Steps between checks for silent data corruption: one micro-batch's logits are computed twice and "
        "must have the same bits (two forward passes); 0: none.",
    )


class CheckpointConfig(Section):
    """When to save and what to keep."""

    every_steps: PositiveInt = Field(description="Steps between checkpoints; also saved: before step 1, at the end.")
    keep_last: PositiveInt = Field(2, description="Newest checkpoints kept; older ones are deleted.")
    keep_every: int = Field(
        0, ge=0, description="Checkpoints whose step is a multiple of this are never deleted; 0: all are, in time."
    )
    asynchronous: bool = Field(
        True,
        description="Write in the background from a copy in host memory (a rank's files once more); false stops training "
        "until the files are on the disk. Both stop for the first and the last checkpoint of a start.",
    )


class LoggingConfig(Section):
    """What is written while training."""

    every_steps: PositiveInt = Field(10, description="Steps between console lines.")
    tensorboard: bool = Field(True, description="Write TensorBoard scalars beside the JSONL.")
    heartbeat_seconds: float = Field(
        10.0, ge=0, description="Least seconds between two writings of logs/heartbeat.json; 0 writes none."
    )
    wandb: Literal["off", "offline", "online"] = Field(
        "off", description="Weights & Biases: offline keeps its files in logs/; needs the package wandb."
    )
    wandb_project: str = Field("vilg", description="Project there.")
    prometheus: Path | None = Field(
        None, description="Folder of a node exporter's textfile collector, where <name>.prom is kept up to date."
    )


class EvaluationConfig(Section):
    """Losses of held-out pairs during training: always the same pairs, in every direction that is trained."""

    every_steps: int = Field(0, ge=0, description="Steps between two evaluations, and after the last step; 0: none.")
    data: Place | None = Field(None, description="Folder or URL of token shards that are not trained on.")
    pairs: int = Field(
        512, ge=0, description="Pairs of them that are evaluated, drawn once and for all runs alike; 0: all. Each rank keeps "
        "its share in memory.",
    )


class SamplesConfig(Section):
    """Fixed-prompt sample sheets during training."""

    every_steps: int = Field(0, ge=0, description="Steps between sheets; 0 draws none.")
    prompts: tuple[str, ...] = Field((), description="Prompts drawn on every sheet.")
    guidance: float = Field(1.0, ge=0, description="Classifier-free guidance scale; 1 is none.")
    temperature: float = Field(1.0, ge=0, description="Sampling temperature; 0 is greedy.")
    top_k: int = Field(0, ge=0, description="Codes kept when sampling; 0 keeps all.")


class Recipe(Section):
    """A whole run."""

    name: str = Field(description="Name of the run, shown in logs and exports.")
    seed: int = Field(0, ge=0, lt=2**63, description="Everything random derives from this.")
    run_dir: Path = Field(description="Folder that the run owns: config, checkpoints, logs, samples.")
    init_from: Path | None = Field(
        None,
        description="Export folder whose weights a new run starts from (fine-tuning); without it they are drawn at random.",
    )
    precision: Literal["fp32", "bf16", "fp16"] = Field(
        "bf16", description="Type of weights and activations in the step."
    )
    model: ModelConfig
    tokens: TokensConfig
    data: DataConfig
    batch: BatchConfig
    loss: LossConfig = LossConfig()
    parallel: ParallelConfig = ParallelConfig()
    optimizer: OptimizerConfig
    schedule: ScheduleConfig
    guards: GuardsConfig = GuardsConfig()
    checkpoint: CheckpointConfig
    logging: LoggingConfig = LoggingConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    samples: SamplesConfig = SamplesConfig()
