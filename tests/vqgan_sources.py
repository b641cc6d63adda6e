"""VQGANs as others write and compute them: random networks in their formats, and a plain reference of what they do.

Nothing of `vilg` is used here. The reference follows the published code of taming-transformers and LlamaGen (the same
network under two sets of names); that of diffusers is diffusers itself.
"""

import sys
import types
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F


@dataclass(frozen=True)
class Shape:
    """One network; attention: levels that have it, from the finest."""

    ch: int = 32
    mult: tuple = (1, 2, 2)
    blocks: int = 2
    attention: tuple = (1,)
    z: int = 16
    dim: int = 8
    codes: int = 64


class Names:
    """Where taming-transformers keeps each part."""

    def level(self, side, level, levels):
        return f"{side}.{'down' if side == 'encoder' else 'up'}.{level}"

    def block(self, level, number):
        return f"{level}.block.{number}"

    def mid(self, side, number):
        return f"{side}.mid.{('block_1', 'attn_1', 'block_2')[number]}"


class LlamaGenNames(Names):
    def level(self, side, level, levels):
        return f"{side}.conv_blocks.{level if side == 'encoder' else levels - 1 - level}"

    def block(self, level, number):
        return f"{level}.res.{number}"

    def mid(self, side, number):
        return f"{side}.mid.{number}"


def random_network(shape, names, *, seed=0, gumbel=False):
    """A state dict with signals of about unit size everywhere, so that codes differ."""
    random, found = torch.Generator().manual_seed(seed), {}

    def conv(name, inputs, outputs, kernel=3):
        std = (inputs * kernel * kernel) ** -0.5
        found[f"{name}.weight"] = torch.randn(outputs, inputs, kernel, kernel, generator=random) * std
        found[f"{name}.bias"] = torch.randn(outputs, generator=random) * 0.1

    def norm(name, width):
        found[f"{name}.weight"] = 1 + torch.randn(width, generator=random) * 0.1
        found[f"{name}.bias"] = torch.randn(width, generator=random) * 0.1

    def block(name, inputs, outputs):
        norm(f"{name}.norm1", inputs)
        conv(f"{name}.conv1", inputs, outputs)
        norm(f"{name}.norm2", outputs)
        conv(f"{name}.conv2", outputs, outputs)
        if inputs != outputs:
            conv(f"{name}.nin_shortcut", inputs, outputs, 1)

    def attention(name, width):
        norm(f"{name}.norm", width)
        for part in ("q", "k", "v", "proj_out"):
            conv(f"{name}.{part}", width, width, 1)

    widths, levels = [shape.ch * m for m in shape.mult], len(shape.mult)
    for side, blocks in (("encoder", shape.blocks), ("decoder", shape.blocks + 1)):
        conv(f"{side}.conv_in", *((3, shape.ch) if side == "encoder" else (shape.z, widths[-1])))
        width = shape.ch if side == "encoder" else widths[-1]
        order = range(levels) if side == "encoder" else reversed(range(levels))
        for level in order:
            place = names.level(side, level, levels)
            for number in range(blocks):
                block(names.block(place, number), width, widths[level])
                width = widths[level]
                if level in shape.attention:
                    attention(f"{place}.attn.{number}", width)
            if side == "encoder" and level < levels - 1:
                conv(f"{place}.downsample.conv", width, width)
            if side == "decoder" and level > 0:
                conv(f"{place}.upsample.conv", width, width)
        middle = widths[-1]
        block(names.mid(side, 0), middle, middle)
        attention(names.mid(side, 1), middle)
        block(names.mid(side, 2), middle, middle)
        norm(f"{side}.norm_out", width)
        conv(f"{side}.conv_out", width, shape.z if side == "encoder" else 3)
    conv("quant_conv", shape.z, shape.dim, 1)
    conv("post_quant_conv", shape.dim, shape.z, 1)
    if gumbel:
        conv("quantize.proj", shape.dim, shape.codes, 1)
        found["quantize.embed.weight"] = torch.randn(shape.codes, shape.dim, generator=random)
    else:
        found["quantize.embedding.weight"] = torch.randn(shape.codes, shape.dim, generator=random) * 0.6
    return found


class Reference:
    """The network of a state dict, layer after layer."""

    def __init__(self, tensors, shape, names):
        self.t, self.shape, self.names = tensors, shape, names

    def conv(self, name, x, **options):
        return F.conv2d(x, self.t[f"{name}.weight"], self.t[f"{name}.bias"], **options)

    def swished(self, name, x):
        x = F.group_norm(x, 32, self.t[f"{name}.weight"], self.t[f"{name}.bias"], eps=1e-6)
        return x * torch.sigmoid(x)

    def block(self, name, x):
        hidden = self.conv(f"{name}.conv1", self.swished(f"{name}.norm1", x), padding=1)
        hidden = self.conv(f"{name}.conv2", self.swished(f"{name}.norm2", hidden), padding=1)
        return (self.conv(f"{name}.nin_shortcut", x) if f"{name}.nin_shortcut.weight" in self.t else x) + hidden

    def attention(self, name, x):
        b, c, h, w = x.shape
        normed = F.group_norm(x, 32, self.t[f"{name}.norm.weight"], self.t[f"{name}.norm.bias"], eps=1e-6)
        q, k, v = (self.conv(f"{name}.{part}", normed).reshape(b, c, h * w) for part in "qkv")
        weights = torch.softmax(torch.bmm(q.permute(0, 2, 1), k) * c**-0.5, dim=2)
        return x + self.conv(f"{name}.proj_out", torch.bmm(v, weights.permute(0, 2, 1)).reshape(b, c, h, w))

    def middle(self, side, x):
        x = self.attention(self.names.mid(side, 1), self.block(self.names.mid(side, 0), x))
        return self.block(self.names.mid(side, 2), x)

    def level(self, side, level, blocks, x):
        place = self.names.level(side, level, len(self.shape.mult))
        for number in range(blocks):
            x = self.block(self.names.block(place, number), x)
            if level in self.shape.attention:
                x = self.attention(f"{place}.attn.{number}", x)
        return place, x

    def encode(self, x):
        """Images -> what the quantizer sees."""
        x, last = self.conv("encoder.conv_in", x, padding=1), len(self.shape.mult) - 1
        for level in range(last + 1):
            place, x = self.level("encoder", level, self.shape.blocks, x)
            if level < last:
                x = self.conv(f"{place}.downsample.conv", F.pad(x, (0, 1, 0, 1)), stride=2)
        x = self.swished("encoder.norm_out", self.middle("encoder", x))
        return self.conv("quant_conv", self.conv("encoder.conv_out", x, padding=1))

    def decode(self, vectors):
        x = self.middle("decoder", self.conv("decoder.conv_in", self.conv("post_quant_conv", vectors), padding=1))
        for level in reversed(range(len(self.shape.mult))):
            place, x = self.level("decoder", level, self.shape.blocks + 1, x)
            if level:
                x = self.conv(f"{place}.upsample.conv", x.repeat_interleave(2, 2).repeat_interleave(2, 3), padding=1)
        return self.conv("decoder.conv_out", self.swished("decoder.norm_out", x), padding=1)

    def codes(self, images, rule):
        """rule: distance (taming), normalised (LlamaGen) or logits (Gumbel, without noise)."""
        hidden = self.encode(images)
        if rule == "logits":
            return self.conv("quantize.proj", hidden).argmax(1)
        b, d, h, w = hidden.shape
        flat, table = hidden.permute(0, 2, 3, 1).reshape(-1, d), self.t["quantize.embedding.weight"]
        if rule == "normalised":
            flat, table = F.normalize(flat, dim=-1), F.normalize(table, dim=-1)
        distance = flat.square().sum(1, keepdim=True) + table.square().sum(1) - 2 * flat @ table.T
        return distance.argmin(1).reshape(b, h, w)

    def pixels(self, codes, rule):
        table = self.t["quantize.embed.weight" if rule == "logits" else "quantize.embedding.weight"]
        table = F.normalize(table, dim=-1) if rule == "normalised" else table
        return self.decode(table[codes].permute(0, 3, 1, 2))


@contextmanager
def absent_class(path, *bases):
    """A class of a package that is not installed, for as long as a file is written."""
    module, name = path.rsplit(".", 1)
    parts = module.split(".")
    packages = [".".join(parts[: n + 1]) for n in range(len(parts))]
    made = [package for package in packages if package not in sys.modules]
    for package in made:
        sys.modules[package] = types.ModuleType(package)
    there = type(name, bases or (object,), {"__module__": module, "__qualname__": name})
    setattr(sys.modules[module], name, there)
    try:
        yield there
    finally:
        for package in made:
            del sys.modules[package]


def write_lightning(path, tensors):
    """As PyTorch Lightning 1.x writes a checkpoint of taming: callbacks keyed by class, hyperparameters of a dict class,
    omegaconf nodes, and the state of training losses among the weights."""
    with (
        absent_class("pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint") as callback,
        absent_class("pytorch_lightning.utilities.parsing.AttributeDict", dict) as attributes,
        absent_class("omegaconf.listconfig.ListConfig") as listed,
    ):
        node = listed()
        node.__dict__.update(_content=[128], _metadata={"ref_type": int, "optional": True})
        losses = {
            "loss.discriminator.main.0.weight": torch.zeros(4, 3, 4, 4),
            "loss.perceptual_loss.lin0.model.1.weight": torch.zeros(1, 64, 1, 1),
        }
        checkpoint = {
            "epoch": 3,
            "global_step": 1200,
            "pytorch-lightning_version": "1.0.8",
            "state_dict": {**tensors, **losses},
            "callbacks": {callback: {"best_model_score": torch.tensor(0.3), "best_model_path": "epoch=3.ckpt"}},
            "optimizer_states": [{"state": {0: {"step": 5, "exp_avg": torch.zeros(2)}}, "param_groups": []}],
            "lr_schedulers": [],
            "hyper_parameters": attributes(ch_mult=node, embed_dim=8),
        }
        torch.save(checkpoint, path)
