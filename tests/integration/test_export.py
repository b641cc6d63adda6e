"""Out of a checkpoint into an export folder, and out of that into a training again, under several layouts."""

import errno
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.distributed.helpers import run_distributed
from tests.distributed.resume_support import Job, Layout, latest, train_jobs
from tests.golden.make import DEBUG_RECIPE, make_data
from vilg.__main__ import main as vilg
from vilg.checkpoint import export as export_module
from vilg.checkpoint import stream
from vilg.checkpoint.export import export
from vilg.checkpoint.from_export import fill_from_export
from vilg.checkpoint.probes import compute_probes, largest_difference, load_probes
from vilg.checkpoint.reader import Weights, open_weights
from vilg.checkpoint.stream import load_when_used
from vilg.config import load_recipe
from vilg.errors import UserError
from vilg.inference.load import empty_model, load_model, read_description
from vilg.inference.weights import FolderWeights
from vilg.model.vilg import Vilg
from vilg.parallel import layout
from vilg.parallel.grid import Grid
from vilg.tokens.text import train_text_tokenizer
from vilg.train.changes import compare

SHORT = {
    "model.qk_norm": "true",  # as the large recipes: both norms' weights are used in one kernel
    "schedule.steps": 2,
    "schedule.warmup_steps": 1,
    "checkpoint.every_steps": 2,
    "logging.tensorboard": "false",
}
# In this order in one process group: DeepSpeed keeps the model-parallel groups of the engine before.
MOVED = [Layout(data=2, zero=3), Layout(tensor=2, zero=1), Layout(pipeline=2, zero=1)]


@pytest.fixture(scope="module")
def data(session_tmp) -> dict:
    folder = session_tmp / "export-data"
    folder.mkdir()
    return {**make_data(folder), **SHORT}


@pytest.fixture(scope="module")
def trained(data, session_tmp) -> Path:
    """A run of two steps in one process, fp32."""
    run = session_tmp / "export-run"
    job = Job({**data, **Layout(engine="torch").overrides(), "precision": "fp32", "run_dir": run})
    assert run_distributed(1, train_jobs, ([job],), init=False) == [[None]]
    return run


@pytest.fixture(scope="module")
def exported(trained, session_tmp) -> Path:
    return export(trained, session_tmp / "exported", shard_bytes=400_000).folder


@pytest.fixture(scope="module")
def moved(data, exported, session_tmp) -> dict[str, Path]:
    """Runs of two steps on two ranks that start from the export, by layout."""
    runs = {layout.name: session_tmp / f"moved-{layout.name}" for layout in MOVED}
    jobs = [
        Job({**data, **layout.overrides(), "precision": "fp32", "init_from": exported, "run_dir": runs[layout.name]})
        for layout in MOVED
    ]
    assert run_distributed(2, train_jobs, (jobs,), init=False) == [[None] * len(jobs)] * 2
    return runs


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


def test_an_export_holds_the_checkpoint_in_files_of_the_size_asked_for(trained, exported, tmp_path):
    weights, found = open_weights(latest(trained)), tensors_of(exported)
    assert set(found) == set(weights.names)
    assert all(torch.equal(found[name], weights.read(name, kind="master")) for name in found)
    files = sorted(exported.glob("*.safetensors"))
    assert len(files) > 1 and [p.name for p in files][0] == f"model-00001-of-{len(files):05d}.safetensors"
    assert all(path.stat().st_size < 400_000 + 10_000 for path in files)
    done = export(trained, tmp_path / "half", dtype="bf16")
    assert done.difference is not None and done.difference > 0
    assert all(torch.equal(tensor, found[name].bfloat16()) for name, tensor in tensors_of(done.folder).items())


def test_verification_needs_no_weights_in_memory_and_finds_our_logits(trained, exported):
    model, read = empty_model(exported, read_description(exported)), []
    load_when_used(model, FolderWeights(exported), torch.float32, read.append)
    stored = load_probes(latest(trained))
    assert largest_difference(stored, compute_probes(model, stored.inputs, device="cpu")) < 1e-5
    assert all(parameter.is_meta for parameter in model.parameters())
    assert sum(read) == sum(t.nbytes for t in tensors_of(exported).values())
    assert largest_difference(stored, compute_probes(load_model(exported).model, stored.inputs)) < 1e-5


@pytest.mark.parametrize("name", [layout.name for layout in MOVED])
def test_a_run_on_any_layout_starts_from_an_export_and_can_be_exported_again(moved, exported, name, tmp_path):
    start, found = open_weights(moved[name] / "checkpoints" / "step_00000000"), tensors_of(exported)
    assert all(torch.equal(start.read(n, kind="master"), tensor) for n, tensor in found.items())
    assert start.optimizer_steps == 0
    done = export(moved[name], tmp_path / "again", dtype="fp32")
    end, again = open_weights(latest(moved[name])), tensors_of(done.folder)
    assert done.step == 2 and end.optimizer_steps > 0
    assert all(torch.equal(end.read(n, kind="master"), tensor) for n, tensor in again.items())
    assert not torch.equal(again["layers.1.ffn.up.weight"], found["layers.1.ffn.up.weight"])


def test_a_rank_reads_the_part_that_the_layout_table_gives_it(exported):
    weights, whole = FolderWeights(exported), tensors_of(exported)
    for name, tensor in whole.items():
        for rank in range(2):
            part = layout.shard(name, tensor, rank=rank, size=2)
            assert torch.equal(weights.read(name, rank=rank, size=2), part), name


def test_an_export_that_does_not_fit_the_recipe_is_refused_naming_both_values(data, exported):
    overrides = {"model.hidden_size": 128, "tokens.text_slots": 12, "model.dropout": 0.5}
    recipe = load_recipe(DEBUG_RECIPE, [f"{k}={v}" for k, v in {**data, **overrides, "run_dir": "x"}.items()])
    description = read_description(exported)
    spec = replace(description.spec, text_slots=12)
    hashes = {**description.tokenizers, "image": "f" * 64}
    given = dict(config=recipe.model, spec=spec, grid=Grid.single())
    with pytest.raises(UserError) as error:
        fill_from_export(Vilg(recipe.model, spec), exported, tokenizers=hashes, **given)
    message = str(error.value)
    assert "model.hidden_size is 128 in the recipe, 64 in the export" in message
    assert "tokens.text_slots is 12 in the recipe, 16 in the export" in message
    assert f"hash ffffffffffff, the export was trained with {description.tokenizers['image'][:12]}" in message
    assert "dropout" not in message


def test_a_run_goes_on_when_its_start_has_moved(data):
    def recipe(*more: str):
        return load_recipe(DEBUG_RECIPE, [*(f"{k}={v}" for k, v in data.items()), "run_dir=x", *more])

    [note] = compare(recipe("init_from=elsewhere"), recipe(), Path("run"))
    assert "init_from" in note and "only a new run reads it" in note


def test_a_damaged_export_is_no_start(data, exported, tmp_path):
    folder = shutil.copytree(exported, tmp_path / "cut")
    last = sorted(folder.glob("*.safetensors"))[-1]
    last.write_bytes(last.read_bytes()[:-100])
    description = read_description(folder)
    model = Vilg(description.shape, description.spec)
    given = dict(config=description.shape, spec=description.spec, tokenizers=description.tokenizers, grid=Grid.single())
    with pytest.raises(UserError, match=last.name):
        fill_from_export(model, folder, **given)


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1000])


@pytest.mark.parametrize(
    ("harm", "message"),
    [(Path.unlink, "model.safetensors: is missing"), (_cut, "model.safetensors: has .* instead of")],
)
def test_a_checkpoint_that_is_not_whole_is_not_exported(trained, tmp_path, harm, message):
    checkpoint = shutil.copytree(latest(trained), tmp_path / "checkpoint")
    harm(checkpoint / "model.safetensors")
    with pytest.raises(UserError, match=message):
        export(checkpoint, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]


def _flip_a_low_bit(path: Path) -> None:
    """In a weight of a text piece that the probes do not use."""
    content = bytearray(path.read_bytes())
    length = int.from_bytes(content[:8], "little")
    table = json.loads(content[8 : 8 + length])["layers.0.text_table.weight"]
    content[8 + length + table["data_offsets"][0]] ^= 1  # piece 0, <unk>
    path.write_bytes(content)


def test_damage_that_the_probes_do_not_touch_is_found_by_the_checksum(trained, tmp_path):
    checkpoint = shutil.copytree(latest(trained), tmp_path / "checkpoint")
    _flip_a_low_bit(checkpoint / "model.safetensors")
    with pytest.raises(UserError, match="checkpoint/model.safetensors: its bytes changed since it was written"):
        export(checkpoint, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]
    assert export(checkpoint, tmp_path / "out", verify=False).difference is None


def test_inspect_says_one_thing_of_a_checkpoint_with_a_changed_byte(trained, tmp_path, capsys):
    run = shutil.copytree(trained, tmp_path / "run")
    _flip_a_low_bit(latest(run) / "model.safetensors")
    assert vilg(["inspect", str(run)]) == 0  # names and sizes are right
    capsys.readouterr()
    assert vilg(["inspect", str(run), "--verify"]) == 1
    printed = capsys.readouterr().out
    assert f"{latest(run).name}  NOT WHOLE" in printed and "not whole: " in printed and "bytes changed" in printed


def test_every_file_that_an_export_reads_is_compared_whatever_the_layout(moved, tmp_path):
    for name, run in moved.items():
        checkpoint = shutil.copytree(latest(run), tmp_path / name)
        opened = set()
        weights = open_weights(checkpoint, on_open=lambda folder, state, file: opened.add(file))
        assert [weights.read(parameter, kind="master") for parameter in weights.names] and opened
        path = checkpoint / max(opened)
        content = path.read_bytes()
        path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))  # of the zip's end, which torch does not miss
        with pytest.raises(UserError, match=f"{path.name}: its bytes changed"):
            export(checkpoint, tmp_path / "out")


def _other_text(folder: Path) -> dict:
    train_text_tokenizer(["a dog"], folder / "other.model", vocab_size=290)
    return {"text_model": folder / "other.model"}


def _other_image(folder: Path, exported: Path) -> dict:
    from vilg.tokens.vqgan import ImageTokenizer

    image = ImageTokenizer.load(exported / "image_tokenizer")
    image.codebook.vectors.add_(1)
    image.save(folder / "other")
    return {"image_model": folder / "other"}


def test_an_export_that_gives_other_logits_is_not_kept(trained, tmp_path, monkeypatch):
    honest, spoiled = Weights.pieces, "layers.1.attention.qkv.weight"

    def rolled(self, name, *, kind):
        found = list(honest(self, name, kind=kind))
        return [piece.roll(64) for piece in found] if name == spoiled else found

    monkeypatch.setattr(Weights, "pieces", rolled)
    with pytest.raises(UserError, match="gives other logits than the trainer stored"):
        export(trained, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
    assert export(trained, tmp_path / "out", verify=False).difference is None


def test_other_tokenizers_than_those_of_the_run_are_refused(trained, exported, tmp_path):
    for wrong, option in ((_other_text(tmp_path), "--text-model"), (_other_image(tmp_path, exported), "--image-model")):
        with pytest.raises(UserError, match=f"has hash .* trained with .* {option}"):
            export(trained, tmp_path / "out", **wrong)
    assert not (tmp_path / "out").exists()


def test_a_full_disk_is_named_before_and_while_writing(trained, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(export_module.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 9, 1))
        with pytest.raises(UserError, match="need 0.00 GB, but 0.00 GB are free"):
            export(trained, tmp_path / "out")
    written, honest = [], stream._write

    def full(file, data):
        written.append(honest(file, data))
        if len(written) > 5:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(stream, "_write", full)
    with pytest.raises(UserError, match="No space left on device; nothing was left there"):
        export(trained, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_only_an_export_is_replaced_and_only_when_asked(trained, exported, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("dear")
    for overwrite in (False, True):
        with pytest.raises(UserError, match="exists already|holds no export"):
            export(trained, tmp_path / "mine", overwrite=overwrite)
    assert (tmp_path / "mine" / "letter.txt").read_text() == "dear"
    old = shutil.copytree(exported, tmp_path / "old")
    export(trained, old, dtype="fp16", overwrite=True)
    assert json.loads((old / "config.json").read_text())["dtype"] == "float16"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine", "old"]
    old.rename(tmp_path / ".old.replaced")  # a crash where names cannot be exchanged
    with pytest.raises(UserError, match="old exists already"):
        export(trained, old)
    assert read_description(old) and sorted(path.name for path in tmp_path.iterdir()) == ["mine", "old"]


def test_options_that_mean_nothing_are_refused(trained, tmp_path, capsys):
    with pytest.raises(UserError, match="int8.*fp32, bf16, fp16"):
        export(trained, tmp_path / "out", dtype="int8")
    for options, message in ((["--ema"], "holds no moving average"), (["--shard-size", "5TB"], "5GB or 500MB")):
        assert vilg(["export", str(trained), "--out", str(tmp_path / "out"), *options]) == 2
        assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
