"""What each path of the API does: a request is checked and becomes work for the one thread that owns the model."""

import base64
import binascii
import re
import secrets
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vilg.errors import UserError
from vilg.inference.caption import answer_codes, writing_sampling
from vilg.inference.generate import draw_images
from vilg.inference.load import Bundle
from vilg.inference.pictures import png_bytes
from vilg.inference.rerank import rerank_scores
from vilg.inference.sampling import changed_sampling
from vilg.inference.serve.errors import invalid
from vilg.inference.serve.requests import AnswersRequest, CaptionsRequest, ImagesRequest
from vilg.inference.serve.worker import Job, Progress
from vilg.inference.texts import Fitted
from vilg.tokens.vqgan.images import BadImage, decode_image

Work = Callable[[Job], dict[str, Any]]
_FIELD = re.compile(r"(\w+)=")  # how the sampler's own errors begin


@dataclass(frozen=True)
class Limits:
    """What a server grants one request. batch: rows decoded together; candidates: drawn at most; megabytes: of a body;
    timeout: seconds from its first byte to the end of the answer; waiting: requests beside the one at work."""

    batch: int = 64
    candidates: int = 64
    megabytes: float = 20.0
    timeout: float = 300.0
    waiting: int = 16


def plan_images(bundle: Bundle, request: ImagesRequest, limits: Limits) -> Work:
    """Work that draws pictures and keeps the best. Raises ApiError."""
    candidates = request.n if request.candidates is None else request.candidates
    if not request.n <= candidates <= limits.candidates:
        param = "n" if request.candidates is None else "candidates"
        raise invalid(
            f"{param}={candidates}: draw between n={request.n} and {limits.candidates} candidates a request", param=param
        )
    size = "{1}x{0}".format(*bundle.image_size)
    if request.size not in (None, "auto", size):
        raise invalid(f"size={request.size}: this model draws {size}", param="size")
    given = {name: getattr(request, name) for name in ("guidance", "guidance_start", "temperature", "top_k", "top_p")}
    with _mistakes_of():
        sampling = changed_sampling(bundle.sampling, given)
    with _mistakes_of("prompt"):
        cut = bundle.segment.prompt(request.prompt, truncate=request.truncate).facts("drawn")
    seed = _seed(request.seed)

    def work(job: Job) -> dict[str, Any]:
        drawing = _Drawing(bundle, job, candidates, request.partial_images if request.stream else 0)
        images, codes = draw_images(
            bundle, [request.prompt], num=candidates, seed=seed, sampling=sampling, batch_rows=limits.batch,
            truncate=request.truncate, progress=drawing.finish, on_step=drawing.step,
        )  # fmt: skip
        scores = rerank_scores(bundle, [request.prompt], codes, batch=limits.batch)[0]
        data = []
        for candidate in np.argsort(-scores, kind="stable")[: request.n].tolist():
            score = round(float(scores[candidate]), 6)
            facts = {"prompt": request.prompt, "seed": seed, "candidate": candidate, "score": score} | cut | asdict(sampling)
            png = png_bytes(images[0, candidate], facts)
            data.append({"b64_json": base64.b64encode(png).decode(), "candidate": candidate, "score": score})
        return {
            "created": int(time.time()), "model": bundle.name, "data": data, "size": size, "output_format": "png",
            "seed": seed, "sampling": asdict(sampling), **cut,
        }  # fmt: skip

    return work


def plan_caption(bundle: Bundle, request: CaptionsRequest, limits: Limits) -> Work:
    """Work that writes a caption. Raises ApiError."""
    return _plan_text(bundle, request, None, "caption")


def plan_answer(bundle: Bundle, request: AnswersRequest, limits: Limits) -> Work:
    """Work that answers a question. Raises ApiError."""
    with _mistakes_of("question"):
        question = bundle.segment.question(request.question, truncate=request.truncate)
    return _plan_text(bundle, request, question, "answer")


def _plan_text(bundle: Bundle, request: CaptionsRequest, question: Fitted | None, name: str) -> Work:
    with _mistakes_of():
        how = dict(num_beams=request.num_beams, length_penalty=request.length_penalty)
        sampling = writing_sampling({"temperature": request.temperature}, **how)
    image = _read_image(request.image, bundle.image_size[0])
    seed = _seed(request.seed)

    def work(job: Job) -> dict[str, Any]:
        job.report(Progress(total=1))
        codes = bundle.encode_images(image[None])
        texts = answer_codes(
            bundle.model, bundle.spec, bundle.text, codes, [question.ids if question else []],
            language=request.language, sampling=sampling, seed=seed, **how,
        )  # fmt: skip
        cut = question.facts("asked") if question else {}
        return {"created": int(time.time()), "model": bundle.name, name: texts[0], "seed": seed, **cut}

    return work


@dataclass
class _Drawing:
    """Follows a drawing slot by slot: stops it when the job is to stop, reports, and shows it half done."""

    bundle: Bundle
    job: Job
    candidates: int
    previews: int
    finished: int = 0
    _shown: Progress = field(default_factory=Progress)

    def finish(self, count: int) -> None:
        self.finished += count

    def step(self, slots: int, codes: Tensor) -> None:
        """After `slots` slots of codes int64 [rows, N]."""
        if codes.is_cuda:  # kernels are started far ahead: without waiting, all slots would seem done at once
            torch.cuda.current_stream(codes.device).synchronize()
        self.job.check()
        spec = self.bundle.spec
        if self._is_due(slots):
            self._shown = Progress(previews=self._pictures(slots, codes), first=self.finished)
        done = self.finished * spec.image_slots + slots * len(codes)
        self.job.report(replace(self._shown, done=done, total=self.candidates * spec.image_slots))

    def _is_due(self, slots: int) -> bool:
        rows, columns = self.bundle.spec.grid
        due = {-(-rows * number // (self.previews + 1)) for number in range(1, self.previews + 1)} - {rows}
        return slots % columns == 0 and slots // columns in due

    def _pictures(self, slots: int, codes: Tensor) -> tuple[bytes, ...]:
        """The rows drawn so far; below them the last one goes on, so that the decoder has something to look at."""
        rows, columns = self.bundle.spec.grid
        filled = codes.clone().view(-1, rows, columns)
        done = slots // columns
        filled[:, done:] = filled[:, done - 1 : done]
        height = self.bundle.image_size[0] * done // rows
        return tuple(png_bytes(image[:height], {}) for image in self.bundle.decode_images(filled.flatten(1)))


def _seed(given: int | None) -> int:
    return secrets.randbelow(2**32) if given is None else given


@contextmanager
def _mistakes_of(param: str | None = None) -> Iterator[None]:
    """A UserError becomes an error of the request; without `param` the field that its message begins with."""
    try:
        yield
    except UserError as error:
        named = _FIELD.match(str(error))
        raise invalid(str(error), param=param or (named[1] if named else None)) from None


def _read_image(given: str | bytes, size: int) -> np.ndarray:
    """uint8 [size, size, 3] of base64, a data URL or a file's bytes."""
    if isinstance(given, str):
        text = given.partition(",")[2] if given.startswith("data:") else given
        try:
            given = base64.b64decode("".join(text.split()), validate=True)
        except (binascii.Error, ValueError):
            raise invalid("image: neither base64 nor a data URL with base64", param="image") from None
    try:
        return decode_image(given, size)
    except BadImage as error:
        raise invalid(f"image: {error}", param="image") from None
