"""The transformer of an export folder for Hugging Face `transformers`: needs torch and transformers, nothing else.

It draws pictures for texts and writes texts for pictures, both with `generate()`. One row of `input_ids` is

    text -> image     text ... [begin of image]  ->  image codes in raster order
    image -> text     image codes ... question ... [begin of text]  ->  text [end of text]

in one space of ids: text pieces 0 .. Vt-1 (1 begin, 2 end, 3 padding), image code z at Vt + z, begin of image at Vt +
Vi. Rows are padded on the left with 3. What stands before the begin token is the source: it sees all of itself. What
follows sees the source and its own past. Between two image positions the pattern of the layer (row, column, conv
window) decides as well. All of this follows from the ids, so `attention_mask` and `position_ids` decide nothing.

Legend: B rows, L positions, C hidden, H heads, D head dim, T text slots, N = rows * columns image slots.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import DynamicCache, GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from .pictures_vilg import ImageTokenizer, load_image_tokenizer

BEGIN_OF_TEXT, END_OF_TEXT, PAD = 1, 2, 3
# All settings of a model that the trainer knows; a newer one may compute something that this file does not. The reconstructor
# of end-to-end training is one that it leaves alone: it decodes by the codebook.
SETTINGS = {
    "num_layers", "hidden_size", "num_heads", "ffn_multiple", "attention", "row_style", "conv_size", "norm", "qk_norm",
    "sandwich_norm", "embedding_gradient", "dropout", "init_std", "reconstructor",
}  # fmt: skip


class VilgConfig(PretrainedConfig):
    """`config.json`. model: shape of the transformer; sequence: text slots, grid (rows, columns), vocabularies."""

    model_type = "vilg"
    model: dict | None = None
    sequence: dict | None = None

    def __post_init__(self, **kwargs):
        self.model, self.sequence = self.model or {}, self.sequence or {}
        if unknown := sorted(set(self.model) - SETTINGS):
            raise ValueError(f"config.json: model holds {', '.join(unknown)}, which this modeling file does not know")
        self.num_hidden_layers = self.model.get("num_layers", 0)
        self.hidden_size = self.model.get("hidden_size", 0)
        self.num_attention_heads = self.model.get("num_heads", 1)
        # Text pieces, image codes, begin of image.
        self.vocab_size = self.sequence.get("text_vocab_size", 0) + self.sequence.get("image_vocab_size", 0) + 1
        super().__post_init__(**kwargs)

    @property
    def patterns(self) -> list[str]:
        """Pattern of each layer: conv in the last, column in every fourth from the second, row in the others."""
        count = self.num_hidden_layers
        if self.model["attention"] == "dense":
            return ["dense"] * count
        row = "row_wrap" if self.model["row_style"] == "wrap" else "row"
        return ["conv" if i == count else "column" if i % 4 == 2 else row for i in range(1, count + 1)]


class Norm(nn.Module):
    """LayerNorm or RMSNorm (no bias) over the last dimension."""

    def __init__(self, channels: int, kind: str, *, bias: bool = True):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(channels))
        self.bias = nn.Parameter(torch.empty(channels)) if bias and kind == "layernorm" else None
        self.kind = kind

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "rmsnorm":
            return F.rms_norm(x, self.weight.shape, self.weight, 1e-5)
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, 1e-5)


class Attention(nn.Module):
    """Pre-norm attention branch without its residual."""

    def __init__(self, shape: dict, pattern: str, layer: int):
        super().__init__()
        hidden = shape["hidden_size"]
        self.head_dim, self.pattern, self.layer = hidden // shape["num_heads"], pattern, layer
        self.norm = Norm(hidden, shape["norm"])
        self.qkv = nn.Linear(hidden, 3 * hidden)
        normalised = shape["qk_norm"]
        self.q_norm = Norm(self.head_dim, shape["norm"], bias=False) if normalised else nn.Identity()
        self.k_norm = Norm(self.head_dim, shape["norm"], bias=False) if normalised else nn.Identity()
        self.out = nn.Linear(hidden, hidden)
        self.post_norm = Norm(hidden, shape["norm"]) if shape["sandwich_norm"] else nn.Identity()

    def forward(self, hidden: Tensor, masks: dict[str, Tensor], cache) -> Tensor:
        qkv = self.qkv(self.norm(hidden)).unflatten(-1, (-1, 3, self.head_dim))  # [B, L, H, 3, D]
        q, k, v = (x.transpose(1, 2) for x in qkv.unbind(3))
        q, k = self.q_norm(q), self.k_norm(k)
        mask = masks[self.pattern][:, None]
        if cache is not None:
            k, v = cache.update(k, v, self.layer)
            # A static cache returns its whole length; what is not yet written is seen by nobody.
            mask = F.pad(mask, (0, k.shape[2] - mask.shape[3]))
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.post_norm(self.out(mixed.transpose(1, 2).flatten(2)))


class FeedForward(nn.Module):
    """Pre-norm feed-forward branch without its residual, exact GELU."""

    def __init__(self, shape: dict):
        super().__init__()
        hidden, wide = shape["hidden_size"], shape["ffn_multiple"] * shape["hidden_size"]
        self.norm = Norm(hidden, shape["norm"])
        self.up, self.down = nn.Linear(hidden, wide), nn.Linear(wide, hidden)
        self.post_norm = Norm(hidden, shape["norm"]) if shape["sandwich_norm"] else nn.Identity()

    def forward(self, hidden: Tensor) -> Tensor:
        return self.post_norm(self.down(F.gelu(self.up(self.norm(hidden)))))


class Block(nn.Module):
    """x + attention(x), then x + ffn(x)."""

    def __init__(self, shape: dict, pattern: str, layer: int):
        super().__init__()
        self.attention, self.ffn = Attention(shape, pattern, layer), FeedForward(shape)

    def forward(self, hidden: Tensor, masks: dict[str, Tensor], cache) -> Tensor:
        hidden = hidden + self.attention(hidden, masks, cache)
        return hidden + self.ffn(hidden)


class Embed(nn.Module):
    """Token, position and segment vectors."""

    def __init__(self, hidden: int, sequence: dict):
        super().__init__()
        self.sequence = sequence
        self.text_table = nn.Embedding(sequence["text_vocab_size"], hidden)
        self.image_table = nn.Embedding(sequence["image_vocab_size"], hidden)
        self.text_position = nn.Parameter(torch.empty(sequence["text_slots"], hidden))
        self.image_row = nn.Parameter(torch.empty(sequence["grid"][0], hidden))
        self.image_column = nn.Parameter(torch.empty(sequence["grid"][1], hidden))
        self.begin_of_image = nn.Parameter(torch.empty(hidden))
        self.segment = nn.Parameter(torch.empty(4, hidden))

    def forward(self, ids: Tensor, slots: Tensor, target: Tensor) -> Tensor:
        """Ids, canonical slots (text 0 .. T-1, image T ..) and target flags, all [B, L] -> [B, L, C]."""
        first_code, codes = self.sequence["text_vocab_size"], self.sequence["image_vocab_size"]
        image, columns = ids >= first_code, self.sequence["grid"][1]
        text = self.text_table(ids.masked_fill(image, PAD)) + self.text_position[slots.masked_fill(image, 0)]
        place = (slots - self.sequence["text_slots"]).masked_fill(~image, 0)
        code = (ids - first_code).masked_fill(~image, 0)
        drawn = torch.where(
            (code == codes)[..., None], self.begin_of_image, self.image_table(code.masked_fill(code == codes, 0))
        )
        drawn = drawn + (self.image_row[place // columns] + self.image_column[place % columns])
        return torch.where(image[..., None], drawn, text) + self.segment[2 * image.long() + target.long()]


class Heads(nn.Module):
    """Final norm and one output head for each segment."""

    def __init__(self, shape: dict, sequence: dict):
        super().__init__()
        self.norm = Norm(shape["hidden_size"], shape["norm"])
        self.text_head = nn.Linear(shape["hidden_size"], sequence["text_vocab_size"], bias=False)
        self.image_head = nn.Linear(shape["hidden_size"], sequence["image_vocab_size"], bias=False)

    def forward(self, hidden: Tensor, image: Tensor, vocab_size: int) -> Tensor:
        """[B, L, C], which positions are image [B, L] -> logits [B, L, V]; ids of the other segment are all but
        impossible (a finite number, as guidance takes differences)."""
        hidden = self.norm(hidden)
        logits = hidden.new_full((*image.shape, vocab_size), torch.finfo(hidden.dtype).min)
        first_code, codes = self.text_head.out_features, self.image_head.out_features
        logits[..., :first_code][~image] = self.text_head(hidden[~image])
        logits[..., first_code : first_code + codes][image] = self.image_head(hidden[image])
        return logits


class VilgForCausalLM(PreTrainedModel, GenerationMixin):
    """Weights have the names of the trainer's model. For inference: no dropout, no loss."""

    config_class = VilgConfig
    base_model_prefix = ""
    _supports_sdpa = True
    _no_split_modules = ["Block"]

    def __init__(self, config: VilgConfig):
        super().__init__(config)
        shape, sequence = config.model, config.sequence
        blocks = [Block(shape, pattern, layer) for layer, pattern in enumerate(config.patterns)]
        self.layers = nn.ModuleList(
            [Embed(shape["hidden_size"], sequence), *blocks, Heads(shape, sequence)]
        )
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        for parameter in module.parameters(recurse=False):
            parameter.data.normal_(0.0, self.config.model["init_std"])

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, past_key_values=None,
        use_cache: bool | None = None, logits_to_keep: int = 0, **kwargs,
    ) -> CausalLMOutputWithPast:
        """input_ids int64 [B, L], with a cache those after what it holds -> logits [B, L or logits_to_keep, V]."""
        cache = past_key_values
        if cache is None and use_cache:
            cache = DynamicCache(config=self.config)
        past = int(cache.get_seq_length()) if cache is not None else 0
        ids = torch.cat([cache.vilg_ids[:, :past], input_ids], 1) if past else input_ids
        if cache is not None:
            cache.vilg_ids = ids
        if not past:
            self._check_padding(input_ids, attention_mask)
        slots, image, target = self._roles(ids)
        roles = (slots, image, target)
        masks = {pattern: self._visible(pattern, ids, *roles, past) for pattern in {*self.config.patterns}}
        hidden = self.layers[0](input_ids, slots[:, past:], target[:, past:])
        for block in self.layers[1:-1]:
            hidden = block(hidden, masks, cache)
        keep = slice(-logits_to_keep, None) if logits_to_keep else slice(None)
        logits = self.layers[-1](hidden[:, keep], image[:, past:][:, keep], self.config.vocab_size)
        return CausalLMOutputWithPast(logits=logits, past_key_values=cache)

    def _roles(self, ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Of ids [B, L]: canonical slots, whether a position is image, whether it is target."""
        spec = self.config.sequence
        image = ids >= spec["text_vocab_size"]
        begins = (ids == BEGIN_OF_TEXT) | (ids == self.config.vocab_size - 1)
        text_slots = (~image & (ids != PAD)).cumsum(1) - 1
        slots = torch.where(image, spec["text_slots"] + image.cumsum(1) - 1, text_slots)
        return slots.clamp(0), image, begins.cumsum(1) > 0

    def _visible(self, pattern: str, ids: Tensor, slots: Tensor, image: Tensor, target: Tensor, past: int) -> Tensor:
        """bool [B, L - past, L]: what the new positions see."""
        spec, columns = self.config.sequence, self.config.sequence["grid"][1]
        query, key = (slots[:, past:, None], slots[:, None])
        both_image = image[:, past:, None] & image[:, None]
        seen = target[:, past:, None] & (key <= query) | ~target[:, None]
        query, key = query - spec["text_slots"], key - spec["text_slots"]
        rows, across = (query // columns - key // columns).abs(), (query % columns - key % columns).abs()
        half = self.config.model["conv_size"] // 2
        joined = {
            "row": rows == 0,
            "row_wrap": (query - key).abs() <= columns,
            "column": across == 0,
            "conv": (rows <= half) & (across <= half),
            "dense": rows >= 0,
        }[pattern]
        seen = seen & (joined | ~both_image) & (ids != PAD)[:, None]
        # Padding sees itself, as a softmax over nothing is not a number; nobody sees padding.
        itself = torch.eye(ids.shape[1], dtype=torch.bool, device=ids.device)[past:]
        return seen | itself

    @staticmethod
    def _check_padding(ids: Tensor, mask: Tensor | None) -> None:
        if mask is not None and mask.shape == ids.shape and not torch.equal(mask == 0, ids == PAD):
            raise ValueError(f"attention_mask must be 0 where input_ids is {PAD} (padding) and 1 elsewhere")

    def _room(self, ids: Tensor) -> tuple[bool, int]:
        """Whether rows [B, L] ask for pictures, and how many ids may follow. Raises ValueError for other rows."""
        slots, image, target = self._roles(ids)
        spec, begin_of_image = self.config.sequence, self.config.vocab_size - 1
        num_codes = spec["grid"][0] * spec["grid"][1]
        drawing = ids[:, -1] == begin_of_image
        asked = "rows end with the begin token of what is to follow; use draw_inputs() or caption_inputs()"
        if not (drawing.all() or (ids[:, -1] == BEGIN_OF_TEXT).all()):
            raise ValueError(f"{asked}; one call draws pictures or writes texts, not both")
        if target.sum(1).max() > 1 or bool((image.sum(1) != (1 if drawing.all() else num_codes)).any()):
            raise ValueError(f"{asked}; image -> text needs exactly {num_codes} codes, text -> image none")
        longest = int((~image & (ids != PAD)).sum(1).max())
        if longest > spec["text_slots"]:
            raise ValueError(f"a text fills {longest} slots, but the model has {spec['text_slots']}; shorten it")
        return bool(drawing.all()), num_codes if drawing.all() else spec["text_slots"] - longest + 1

    def generate(self, inputs=None, generation_config=None, **kwargs):
        """As ever, for rows of `draw_inputs` or `caption_inputs`. Pictures are drawn with the settings of
        generation_config.json, texts written greedily, unless the call says otherwise; both as long as they can be."""
        ids = kwargs["input_ids"] if inputs is None else inputs
        drawing, room = self._room(ids)
        if not drawing and generation_config is None:
            # The values that mean "not set" to transformers.
            greedy = dict(do_sample=False, guidance_scale=1.0, temperature=1.0, top_k=50, top_p=1.0)
            kwargs = {**greedy, **kwargs}
        longest = kwargs.get("max_new_tokens") or (kwargs.get("max_length") or ids.shape[1] + room) - ids.shape[1]
        if longest > room:
            raise ValueError(f"max_new_tokens={longest}, but only {room} ids can follow")
        if kwargs.get("max_length") is None:
            kwargs["max_new_tokens"] = longest
        return super().generate(inputs, generation_config=generation_config, **kwargs)

    def draw_inputs(self, tokenizer, prompts: list[str]) -> dict[str, Tensor]:
        """Rows for `generate` that ask for a picture of each prompt."""
        return self._padded([tokenizer(text)["input_ids"] + [self.config.vocab_size - 1] for text in prompts])

    def caption_inputs(self, codes: Tensor, tokenizer=None, questions: list[str] | None = None) -> dict[str, Tensor]:
        """Rows for `generate` that ask for a caption, or an answer, for pictures; codes int64 [B, rows, columns]."""
        pictures = (codes.flatten(1) + self.config.sequence["text_vocab_size"]).tolist()
        texts = [tokenizer(text)["input_ids"] for text in questions] if questions else [[]] * len(pictures)
        return self._padded([[*codes, *text, BEGIN_OF_TEXT] for codes, text in zip(pictures, texts, strict=True)])

    def drawn_codes(self, output_ids: Tensor) -> Tensor:
        """Codes int64 [B, rows, columns] in what `generate` returned for `draw_inputs`."""
        rows, columns = self.config.sequence["grid"]
        return (output_ids[:, -rows * columns :] - self.config.sequence["text_vocab_size"]).view(-1, rows, columns)

    def written_texts(self, tokenizer, output_ids: Tensor) -> list[str]:
        """The texts in what `generate` returned for `caption_inputs`."""
        rows = [row[row.index(BEGIN_OF_TEXT) + 1 :] for row in output_ids.tolist()]
        return tokenizer.batch_decode([[i for i in row if i > PAD] for row in rows])

    @property
    def image_tokenizer(self) -> ImageTokenizer:
        """Codes <-> pixels; read from the export folder at its first use, on the CPU."""
        if "_image_tokenizer" not in self.__dict__:
            # Not through nn.Module: the tokenizer's weights are none of this model's.
            self.__dict__["_image_tokenizer"] = load_image_tokenizer(self.config._name_or_path)
        return self.__dict__["_image_tokenizer"]

    def _padded(self, rows: list[list[int]]) -> dict[str, Tensor]:
        width = max(map(len, rows))
        ids = torch.tensor([[PAD] * (width - len(row)) + row for row in rows], device=self.device)
        return {"input_ids": ids, "attention_mask": (ids != PAD).long()}
