"""Prompts and questions on their way into the text segment: what fits, and what is left of one that is cut."""

from collections.abc import Sequence
from dataclasses import dataclass

from vilg.errors import UserError
from vilg.tokens.text import TextTokenizer


@dataclass(frozen=True)
class Fitted:
    """A text as the model gets it. ids: its tokens; whole: how many it has uncut; text: what they say, None if uncut."""

    ids: list[int]
    whole: int
    text: str | None = None

    def facts(self, verb: str) -> dict[str, object]:
        """What files say of a text that was cut (nothing of another one); verb: drawn or asked."""
        return {} if self.text is None else {"truncated": True, f"{verb}_text": self.text}


@dataclass(frozen=True)
class TextSegment:
    """The text slots of a model, and the tokenizer that fills them."""

    tokenizer: TextTokenizer
    slots: int

    def prompt(self, given: str, *, truncate: bool = False) -> Fitted:
        """A prompt may fill the segment. Raises UserError if it is empty or, without `truncate`, too long."""
        return self._fit("prompt", given, self.slots, truncate, wanted="what the picture should show")

    def question(self, given: str, *, truncate: bool = False) -> Fitted:
        """A question leaves two slots: the answer begins and has one token or more. Raises UserError likewise."""
        return self._fit("question", given, self.slots - 2, truncate, wanted="what to ask")

    def _fit(self, kind: str, given: str, most: int, truncate: bool, *, wanted: str) -> Fitted:
        ids = self.tokenizer.encode(given)
        if not ids:
            raise UserError(f"{kind} {given!r} is empty; write {wanted}")
        if len(ids) <= most:
            return Fitted(ids, len(ids))
        if not truncate:
            raise UserError(
                f"{kind} {given!r} has {len(ids)} tokens, but the text segment has room for {most}; shorten it, or have "
                'it cut: --truncate, or of the API "truncate": true'
            )
        return Fitted(ids[:most], len(ids), self.tokenizer.decode(ids[:most]))


def cut_note(kind: str, fitted: Sequence[Fitted]) -> str | None:
    """One line on the texts that were cut; None if none was."""
    cut = [each for each in fitted if each.text is not None]
    if not cut:
        return None
    first = cut[0]
    return (
        f"note: {len(cut)} of {len(fitted)} {kind}s cut (--truncate); the first from {first.whole} to {len(first.ids)} "
        f"tokens, which leaves {first.text!r}"
    )
