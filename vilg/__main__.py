"""The command line: one table from command to function, in the order from data to export.

Functions are imported when their command runs, so that `vilg --help` needs no torch.
"""

import importlib
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from vilg.config.marked import did_you_mean
from vilg.errors import UserError

INTERRUPTED = 130  # 128 + SIGINT, as shells say it


@dataclass(frozen=True)
class Command:
    """A command of one or two words; `target` is "module:function" with the signature main(argv) -> int | None."""

    words: str
    target: str
    help: str


GROUPS: dict[str, tuple[Command, ...]] = {
    "Start": (
        Command("demo", "vilg.demo.run:main", "the whole way on a small data set: train, draw, caption, score"),
        Command("env", "vilg.tools.env:main", "versions, devices and the optimized parts found on this machine"),
    ),
    "1. Data": (
        Command("demo-data", "vilg.demo.generate_data:main", "write the demo's image-text pairs as raw shards"),
        Command("data ingest", "vilg.data.ingest:main", "filter raw image-text pairs into shards"),
        Command("tokenizer train-text", "vilg.tokens.text:main", "train the SentencePiece tokenizer on captions"),
        Command("tokenizer train-image", "vilg.tokens.vqgan.train:main", "train the image tokenizer (VQGAN)"),
        Command("tokenizer import", "vilg.tokens.vqgan.import_command:main", "take over a VQGAN that others trained"),
        Command("data tokenize", "vilg.data.tokenize:main", "encode pairs into token shards"),
        Command("data lint", "vilg.data.lint:main", "check token shards against their manifest"),
        Command("data index", "vilg.data.index_command:main", "make the indices that token shards lack, in parallel"),
    ),
    "2. Training": (
        Command("plan", "vilg.tools.plan:main", "parameters, memory and work of a recipe, without running it"),
        Command("preflight", "vilg.tools.preflight:main", "check recipe, machine and data before a long run"),
        Command("submit", "vilg.tools.submit:main", "check a recipe and hand it to SLURM as a batch job"),
        Command("train", "vilg.train.loop:main", "train a recipe, or continue its run; under torchrun, srun or alone"),
        Command("inspect", "vilg.checkpoint.inspect:main", "what a run or a checkpoint holds"),
        Command("monitor", "vilg.tools.monitor:main", "draw the logs of one or several runs as charts and one page"),
    ),
    "3. Export and use": (
        Command("export", "vilg.checkpoint.export:main", "turn a checkpoint into one folder of safetensors"),
        Command("generate", "vilg.inference.draw_command:generate_main", "draw pictures for prompts"),
        Command("caption", "vilg.inference.write_command:caption_main", "write captions for pictures"),
        Command("answer", "vilg.inference.write_command:answer_main", "answer questions about pictures"),
        Command("serve", "vilg.inference.serve.command:main", "a page and an HTTP API for all three, on this machine"),
        Command("eval caption", "vilg.evaluate.captions:main", "BLEU, METEOR, ROUGE-L, CIDEr of captions"),
        Command("eval fid", "vilg.evaluate.fid:main", "FID and Inception Score of pictures, rFID of an image tokenizer"),
        Command("eval vqa", "vilg.evaluate.vqa:main", "exact match of answers to questions about pictures"),
        Command("eval clip", "vilg.evaluate.clip:main", "how well drawn pictures fit their prompts, by a CLIP model"),
        Command("eval rating-sheet", "vilg.evaluate.rating.sheet:main", "blinded sheets on which people rate what models made"),
        Command("eval rating-tally", "vilg.evaluate.rating.tally:main", "means, intervals and agreement of filled sheets"),
        Command("eval scenes", "vilg.demo.evaluate:main", "score an export on the demo's scenes, both directions"),
    ),
}
# What people look for as a command and find elsewhere.
NO_COMMAND = {
    "import": "an export folder goes back into training by `vilg train RECIPE --init_from=FOLDER`, an image tokenizer that "
    "others trained comes in by `vilg tokenizer import`",
}
COMMANDS: dict[str, Command] = {c.words: c for commands in GROUPS.values() for c in commands}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the exit code: 0, what the command returned, a UserError's (2 for a mistake, 75 for what another
    start may find mended), 130 when interrupted."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(help_text())
        return 0
    if argv[0] == "--version":
        from vilg import __version__

        print(f"vilg {__version__}")
        return 0
    try:
        command, rest = _find(argv)
        return _function(command)(rest) or 0
    except UserError as error:
        sys.stdout.flush()
        print(f"vilg: error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("vilg: interrupted", file=sys.stderr)
        return INTERRUPTED


def help_text() -> str:
    """The overview that `vilg --help` prints."""
    width = max(map(len, COMMANDS))
    lines = [
        "vilg: one transformer that writes and draws (text -> image and image -> text with the same weights)",
        "",
        "usage: vilg COMMAND [options]        vilg COMMAND --help shows the options",
    ]
    for title, commands in GROUPS.items():
        lines += ["", title, *(f"  {c.words:<{width}}  {c.help}" for c in commands)]
    return "\n".join(lines)


def _find(argv: list[str]) -> tuple[Command, list[str]]:
    """The command that the first one or two words name, and the arguments behind it."""
    for count in (2, 1):
        command = COMMANDS.get(" ".join(argv[:count]))
        if command and len(argv) >= count:
            return command, argv[count:]
    if argv[0] in NO_COMMAND:
        raise UserError(f"there is no command '{argv[0]}': {NO_COMMAND[argv[0]]}")
    family = [words for words in COMMANDS if words.split()[0] == argv[0]]
    if family and (len(argv) == 1 or argv[1].startswith("-")):
        raise UserError(f"'{argv[0]}' needs one word more: {', '.join(family)}")
    two_words = bool(family) or any(did_you_mean(argv[0], [w.split()[0]]) for w in COMMANDS if " " in w)
    given = " ".join(argv[:2]) if two_words and len(argv) > 1 and not argv[1].startswith("-") else argv[0]
    hint = did_you_mean(given, COMMANDS) or did_you_mean(argv[0], COMMANDS)
    raise UserError(f"there is no command '{given}'{hint or '; vilg --help lists them'}")


def _function(command: Command) -> Callable[[list[str]], int | None]:
    module, name = command.target.split(":")
    return getattr(importlib.import_module(module), name)


if __name__ == "__main__":
    sys.exit(main())
