"""The bodies of requests, as OpenAI's API defines them.

A field that is not listed is refused, so that no option is ignored that would change an answer.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

MAX_SEED = 2**31 - 1

Number = Annotated[float, Meta(ge=0, le=100)]
Fraction = Annotated[float, Meta(ge=0, le=1)]
Count = Annotated[int, Meta(ge=0, lt=2**20)]
Limit = Annotated[int, Meta(ge=1, lt=2**20)]
Boxed = Annotated[int, Meta(ge=0, le=256)]  # boxes, each of which is states of an automaton
Label = Annotated[str, Meta(min_length=1, max_length=1000)]
Labels = Annotated[list[Label], Meta(min_length=1, max_length=256)]
StopText = Annotated[str, Meta(min_length=1, max_length=100)]


class _Strict(msgspec.Struct, forbid_unknown_fields=True, omit_defaults=True):
    pass


class TextPart(_Strict, tag_field="type", tag="text"):
    text: str


class ImageUrl(_Strict):
    url: str
    detail: str | None = None  # of other models; every picture is resized to the checkpoint's size


class ImagePart(_Strict, tag_field="type", tag="image_url"):
    image_url: ImageUrl


Part = TextPart | ImagePart


class Message(_Strict):
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[Part] | None = None
    name: str | None = None
    refusal: str | None = None


class AnyText(_Strict, tag_field="type", tag="text"):
    pass


class AnyJson(_Strict, tag_field="type", tag="json_object"):
    pass


class JsonSchema(_Strict):
    schema: dict[str, Any] = {}  # Any: a JSON schema
    name: str | None = None
    description: str | None = None
    strict: bool | None = None  # answers always match


class SchemaFormat(_Strict, tag_field="type", tag="json_schema"):
    json_schema: JsonSchema


class RegexFormat(_Strict, tag_field="type", tag="regex"):
    pattern: str


class ChoicesFormat(_Strict, tag_field="type", tag="choices"):
    choices: Labels


class BoxesFormat(_Strict, tag_field="type", tag="boxes"):
    labels: Labels
    least: Boxed = 0
    most: Annotated[int, Meta(ge=1, le=256)] | None = None


class MasksFormat(_Strict, tag_field="type", tag="masks"):
    labels: Labels
    least: Boxed = 0
    most: Annotated[int, Meta(ge=1, le=256)] | None = None


ResponseFormat = (
    AnyText | AnyJson | SchemaFormat | RegexFormat | ChoicesFormat | BoxesFormat | MasksFormat
)


class StreamOptions(_Strict):
    include_usage: bool = False
    include_obfuscation: bool | None = None


class ChatRequest(_Strict):
    """The body of /v1/chat/completions."""

    messages: Annotated[list[Message], Meta(min_length=1, max_length=1000)]
    model: str
    n: Limit | None = None
    seed: Annotated[int, Meta(ge=-(2**31), le=MAX_SEED)] | None = None
    temperature: Number | None = None
    top_p: Fraction | None = None
    max_tokens: Limit | None = None
    max_completion_tokens: Limit | None = None  # the newer name
    stop: StopText | Annotated[list[StopText], Meta(max_length=16)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Meta(ge=0, le=20)] | None = None
    response_format: ResponseFormat | None = None
    # Not of OpenAI, but of other servers with this API.
    top_k: Count | None = None
    min_p: Fraction | None = None
    min_tokens: Count | None = None
    # Only the values that change nothing.
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    repetition_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    # About the account, not the answer.
    user: str | None = None
    store: bool | None = None
    metadata: dict[str, Any] | None = None  # Any: the client's own
    service_tier: str | None = None


class EmbeddingImage(_Strict):
    image_url: ImageUrl


EmbeddingInput = str | EmbeddingImage


class EmbeddingRequest(_Strict):
    """The body of /v1/embeddings."""

    model: str
    input: str | Annotated[list[str | EmbeddingImage], Meta(min_length=1, max_length=256)]
    encoding_format: Literal["float", "base64"] = "float"
    user: str | None = None
