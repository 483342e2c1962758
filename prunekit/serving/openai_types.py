"""Requests, answers and errors in the form of OpenAI's Images API, with the usual extensions of diffusion servers."""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from PIL import Image
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, create_model

from prunekit.runtime.errors import UserError, nearest
from prunekit.serving.limits import MOST_SEED, Limits

SIZE = r"^(auto|[1-9][0-9]{0,4}x[1-9][0-9]{0,4})$"
SHOWN = 80  # characters of a wrong value that an error shows


def _only(kind: type) -> BeforeValidator:
    """Return a validator that refuses values of another type; in Python, 0.0 equals False, and False equals 0."""

    def check(value: Any) -> Any:
        if value is not None and type(value) is not kind:
            raise ValueError(f"must be of the type {kind.__name__}")
        return value

    return BeforeValidator(check)


class GenerationRequest(BaseModel):
    """The body of `POST /v1/images/generations`; `request_model` adds the fields whose bounds are settings."""

    model_config = ConfigDict(extra="forbid", strict=True)

    prompt: str
    n: int | None = None
    negative_prompt: str | None = None
    num_inference_steps: int | None = None
    guidance_scale: float | None = None
    seed: Annotated[
        int | None,
        Field(ge=0, le=MOST_SEED, description="of the first image's noise, the next has the next seed; null: random"),
    ] = None
    size: Annotated[str | None, Field(pattern=SIZE, description="WIDTHxHEIGHT in pixels; auto: the model's own")] = None
    model: Annotated[str | None, Field(description="a name that /v1/models lists")] = None
    response_format: Annotated[
        Literal["b64_json"] | None, Field(description="the server stores no files, so it has no url")
    ] = None
    output_format: Literal["png", "jpeg", "webp"] | None = None
    output_compression: Annotated[int | None, Field(ge=0, le=100, description="quality of jpeg and webp")] = None
    background: Literal["auto", "opaque"] | None = None
    stream: Annotated[
        Literal[False] | None, _only(bool), Field(description="images are sent when they are finished")
    ] = None
    partial_images: Annotated[Literal[0] | None, _only(int), Field(description="as stream")] = None
    quality: Annotated[str | None, Field(max_length=16, description="ignored: say num_inference_steps")] = None
    style: Annotated[str | None, Field(max_length=16, description="ignored")] = None
    moderation: Annotated[str | None, Field(max_length=16, description="ignored: nothing is filtered")] = None
    user: Annotated[str | None, Field(max_length=256, description="ignored")] = None
    safety_identifier: Annotated[str | None, Field(max_length=256, description="ignored")] = None

    def pixels(self, own: tuple[int, int], multiple: int, limits: Limits) -> tuple[int, int]:
        """Return the requested size in pixels, (height, width).

        own: the model's default size. multiple: sides must be multiples of it.

        Raises:
            UserError: the model cannot draw the size, or the limits do not allow it.

        """
        if self.size in (None, "auto"):
            return own
        width, height = map(int, re.findall("[0-9]+", self.size or ""))
        if width % multiple or height % multiple:
            near = [max(1, round(side / multiple)) * multiple for side in (width, height)]
            raise UserError(f"size={self.size}: sides are multiples of {multiple}, such as {near[0]}x{near[1]}")
        most = own[0] * own[1] if limits.pixels is None else limits.pixels
        if width * height > most:
            raise UserError(f"size={self.size}: {width * height:,} pixels; at most {most:,} are allowed")
        return height, width


def request_model(limits: Limits) -> type[GenerationRequest]:
    """Return a class of requests whose fields have the limits as bounds, so that the OpenAPI schema states them."""
    fields: dict[str, Any] = {
        "prompt": Annotated[str, Field(min_length=1, max_length=limits.letters)],
        "negative_prompt": (Annotated[str | None, Field(max_length=limits.letters)], None),
        "n": (Annotated[int | None, Field(ge=1, le=limits.images, description="images of the prompt")], None),
        "num_inference_steps": (Annotated[int | None, Field(ge=1, le=limits.steps)], None),
        "guidance_scale": (
            Annotated[float | None, Field(ge=0, le=limits.guidance, allow_inf_nan=False)],
            None,
        ),
    }
    return create_model("ImageGenerationRequest", __base__=GenerationRequest, **fields)


class ImageData(BaseModel):
    """One image. prunekit adds the index of the expert that drew it, its exact MACs, and the seed that repeats it."""

    b64_json: str
    expert: int
    macs: int
    seed: int


class ImagesResponse(BaseModel):
    """The answer; `usage` is left out, since no tokens are generated: `macs` says what an image cost."""

    created: int
    data: list[ImageData]
    background: Literal["opaque"] = "opaque"
    output_format: Literal["png", "jpeg", "webp"]
    size: str


class Model(BaseModel):
    """A model that is served."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "prunekit"


class ModelList(BaseModel):
    """All models that are served: one."""

    object: Literal["list"] = "list"
    data: list[Model]


class Error(BaseModel):
    """A description of an error; param: the request's field that caused it, or null."""

    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorResponse(BaseModel):
    """The answer to a request that failed."""

    error: Error


def fault_of(errors: Sequence[Mapping[str, Any]]) -> tuple[str, str | None]:
    """Return the first of pydantic's errors as one line, and the request's field that it is about, or None."""
    first = errors[0]
    place = [str(part) for part in first["loc"] if part != "body"]
    field = place[0] if place and first["type"] != "json_invalid" else None
    if first["type"] == "json_invalid":
        return f"the body is not JSON: {first.get('ctx', {}).get('error', first['msg'])}", None
    if field is None:
        return "the body must be a JSON object, sent as application/json", None
    if first["type"] == "extra_forbidden":
        return f"unknown field {field!r}{nearest(field, GenerationRequest.model_fields)}", field
    if first["type"] == "missing":
        return f"field {field!r} is missing", field
    message, given = first["msg"], repr(first.get("input"))
    return f"{field}={given[:SHOWN]}: {message[0].lower()}{message[1:]}", field


def encoded(image: Image.Image, output_format: str, quality: int | None) -> str:
    """Return an image as base64 text; quality: of jpeg and webp, 0 to 100; None: 100."""
    buffer = io.BytesIO()
    options = {} if output_format == "png" else {"quality": 100 if quality is None else quality}
    image.save(buffer, format=output_format, **options)
    return base64.b64encode(buffer.getvalue()).decode("ascii")
