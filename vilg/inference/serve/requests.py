"""What clients may ask: one model a path, checked with pydantic; a field that is not known is an error."""

from collections.abc import Mapping
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from vilg.config.marked import did_you_mean
from vilg.inference.caption import MOST_BEAMS, Language
from vilg.inference.serve.errors import ApiError, invalid

LARGEST_SEED = 2**63 - 1


class _Request(BaseModel):
    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    model: str | None = Field(default=None, description="name of the model served; may be left out")
    seed: int | None = Field(default=None, ge=0, le=LARGEST_SEED, description="drawn by the server where left out")
    temperature: float | None = Field(default=None, description="0 is greedy; the model's own setting where left out")
    stream: bool = Field(default=False, description="answer with server-sent events that show the progress")


class ImagesRequest(_Request):
    """`/v1/images/generations`: OpenAI's fields that mean something here, and ours."""

    prompt: str = Field(description="what the picture shows")
    truncate: bool = Field(default=False, description="cut a prompt that does not fit, instead of an error")
    n: int = Field(default=1, ge=1, description="pictures returned, the best first")
    candidates: int | None = Field(default=None, ge=1, description="pictures drawn to choose the n from; n if left out")
    size: str | None = Field(default=None, description="'auto' or the model's own size, 256x256 say")
    response_format: Literal["b64_json"] = Field(default="b64_json", description="PNG in base64")
    partial_images: int = Field(default=0, ge=0, le=8, description="while streaming, half-drawn pictures shown so often")
    guidance: float | None = Field(default=None, description="classifier-free guidance; 1 is none")
    guidance_start: float | None = Field(default=None, description="guidance of the first slot, moving to guidance at the last")
    top_k: int | None = Field(default=None, description="codes kept when sampling; 0 keeps all")
    top_p: float | None = Field(default=None, description="probability mass kept when sampling; 1 keeps all")


class CaptionsRequest(_Request):
    """`/v1/captions`."""

    image: str | bytes = Field(description="JPEG, PNG or WebP in base64 or as a data URL; in a form, the file itself")
    language: Language | None = Field(default=None, description="the text's script, zh or en")
    num_beams: int = Field(default=1, ge=1, le=MOST_BEAMS, description="above 1: beam search in place of sampling")
    length_penalty: float = Field(default=1.0, description="exponent of the length in beam search")


class AnswersRequest(CaptionsRequest):
    """`/v1/answers`."""

    question: str = Field(description="what to ask about the picture")
    truncate: bool = Field(default=False, description="cut a question that does not fit, instead of an error")


R = TypeVar("R", bound=_Request)


def read_request(kind: type[R], fields: Any) -> R:
    """Raises ApiError naming the first field that is wrong."""
    if not isinstance(fields, Mapping):
        raise invalid(f"the body should be one JSON object, not a {type(fields).__name__}")
    try:
        return kind.model_validate(fields)
    except ValidationError as error:
        # An unknown field first: a misspelt one is often why another is missing.
        first = min(error.errors(include_url=False), key=lambda each: each["type"] != "extra_forbidden")
        param = str(first["loc"][0]) if first["loc"] else None
        if first["type"] == "extra_forbidden":
            hint = did_you_mean(str(param), kind.model_fields) or f"; the fields are {', '.join(kind.model_fields)}"
            raise ApiError(400, "unknown_parameter", f"{param}: unknown field{hint}", param=param) from None
        if first["type"] == "missing":
            meaning = kind.model_fields[str(param)].description
            raise ApiError(400, "missing_required_parameter", f"{param} is missing: {meaning}", param=param) from None
        raise invalid(f"{param}: {first['msg']}", param=param) from None
