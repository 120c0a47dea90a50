"""From a chat to a prompt of PaliGemma.

PaliGemma was not trained on dialogues: it reads pictures and one prompt. So the last message, which
must be the user's, is the prompt: its pictures in their order, then its texts joined by spaces.
Earlier turns of user and assistant are not read; the reply says how many there were. Instructions
of the system are refused, since a prompt with other text in front is one that the model was not
trained on.
"""

from __future__ import annotations

import secrets
from dataclasses import dataclass

from paligemma_jax.grammars.grammar import Boxes, Choices, Grammar, Masks
from paligemma_jax.inference.options import DecodingOptions
from paligemma_jax.inference.predictor import Predictor
from paligemma_jax.inference.row_allowed import row_automaton
from paligemma_jax.inference.sampling import Greedy, Sample
from paligemma_jax.processing.processor import EncodedPrompt, round_up
from paligemma_jax.serving.errors import ApiError
from paligemma_jax.serving.limits import ChatLimits, PictureLimits
from paligemma_jax.serving.pictures import open_picture
from paligemma_jax.serving.schema import (
    MAX_SEED,
    AnyText,
    BoxesFormat,
    ChatRequest,
    ChoicesFormat,
    ImagePart,
    MasksFormat,
    Message,
    ResponseFormat,
    TextPart,
)

DEFAULT_TOKENS = 128  # of an answer
MIN_TEMPERATURE = 1e-6  # lower ones choose the most likely token
NEUTRAL = dict(frequency_penalty=0, presence_penalty=0, repetition_penalty=1, logit_bias={})


@dataclass(frozen=True)
class Question:
    """A chat as the engine answers it."""

    text: str  # the prompt
    images: list[bytes]
    prompt: EncodedPrompt
    options: DecodingOptions
    seeds: list[int]  # one for each of n answers
    unread: int  # earlier messages


def read_chat(
    request: ChatRequest,
    predictor: Predictor,
    limits: ChatLimits,
    pictures: PictureLimits,
    allow_urls: bool,
    top: int,
    slots: int,
) -> Question:
    """Turn a request into a prompt and options. Opens its pictures and compiles its grammar, which
    may take seconds.

    Args:
        top: Number of most likely tokens that the engine keeps.
        slots: Number of tokens of a row of the engine.

    Raises:
        ApiError: A field is not supported, or beyond a limit.
        ValueError: A picture or an option cannot be used.
    """
    _check_fields(request, top)
    *earlier, last = request.messages
    if any(message.role in ("system", "developer") for message in request.messages):
        raise ApiError(
            400,
            "messages must not contain system instructions, which PaliGemma was not trained on: "
            "put them into the user's prompt",
            param="messages",
        )
    if last.role != "user":
        raise ApiError(
            400, f"the last message must be the user's, got {last.role!r}", param="messages"
        )
    texts, urls = _parts(last)
    if len(urls) > pictures.images:
        raise ApiError(
            400,
            f"the last message must have at most {pictures.images} pictures, got {len(urls)}",
            param="messages",
        )
    text = " ".join(texts)
    if len(text) > limits.characters:
        raise ApiError(
            400,
            f"the prompt must be at most {limits.characters} characters, got {len(text)}",
            param="messages",
        )
    images = [
        open_picture(url, f"picture {n}" if len(urls) > 1 else "the picture", pictures, allow_urls)
        for n, url in enumerate(urls, 1)
    ]
    processor = predictor.processor
    (prompt,) = processor.encode([images] if images else None, text)
    count = _count(request, limits)
    options = _options(request, limits, len(prompt), slots)
    # A large grammar takes seconds to compile: here, where no other request waits for it.
    row_automaton(options, predictor.config, processor.tokenizer)
    return Question(text, images, prompt, options, _seeds(request.seed, count), len(earlier))


def _check_fields(request: ChatRequest, top: int) -> None:
    """Raise ApiError for options that the engine does not have."""
    for name, neutral in NEUTRAL.items():
        value = getattr(request, name)
        if value is not None and value != neutral:
            raise ApiError(
                400, f"{name} is not supported: it must be {neutral}, got {value}", param=name
            )
    if request.top_logprobs and not request.logprobs:
        raise ApiError(400, "top_logprobs requires logprobs", param="top_logprobs")
    if (request.top_logprobs or 0) > top:
        raise ApiError(
            400,
            f"top_logprobs must be at most {top}, the limit of this server (its flag "
            f"--top-logprobs), got {request.top_logprobs}",
            param="top_logprobs",
        )
    if request.stream_options is not None and not request.stream:
        raise ApiError(400, "stream_options requires stream", param="stream_options")


def _parts(message: Message) -> tuple[list[str], list[str]]:
    """The texts and the URLs of pictures in a message."""
    content = message.content or []
    parts = [TextPart(content)] if isinstance(content, str) else content
    texts = [part.text for part in parts if isinstance(part, TextPart)]
    urls = [part.image_url.url for part in parts if isinstance(part, ImagePart)]
    if not parts:
        raise ApiError(400, "the last message must contain text or a picture", param="messages")
    return texts, urls


def _count(request: ChatRequest, limits: ChatLimits) -> int:
    count = request.n or 1
    if count > limits.choices:
        raise ApiError(400, f"n must be at most {limits.choices}, got {count}", param="n")
    return count


def _seeds(seed: int | None, count: int) -> list[int]:
    first = secrets.randbelow(MAX_SEED) if seed is None else seed
    return [(first + n + 2**31) % 2**32 - 2**31 for n in range(count)]


def _options(request: ChatRequest, limits: ChatLimits, prompt: int, slots: int) -> DecodingOptions:
    tokens = request.max_completion_tokens or request.max_tokens
    if tokens is not None and tokens > limits.new_tokens:
        raise ApiError(
            400, f"max_tokens must be at most {limits.new_tokens}, got {tokens}", param="max_tokens"
        )
    room = slots - round_up(prompt)
    if room < (tokens or 1):
        raise ApiError(
            400,
            f"the prompt has {prompt} tokens, which leaves {max(room, 0)} of the {slots} slots of "
            f"a row for the answer, got max_tokens {tokens or 1}",
            "context_length_exceeded",
            "messages",
        )
    stops = [request.stop] if isinstance(request.stop, str) else request.stop or []
    return DecodingOptions(
        max_new_tokens=tokens or min(DEFAULT_TOKENS, limits.new_tokens, room),
        sampler=_sampler(request),
        min_new_tokens=request.min_tokens or 0,
        stop=tuple(stops),
        allowed=_grammar(request.response_format),
        top_log_probabilities=request.top_logprobs or 0,
    )


def _sampler(request: ChatRequest) -> Greedy | Sample:
    """Greedy unless a temperature is given, as everywhere in this project."""
    if (request.temperature or 0) < MIN_TEMPERATURE or request.top_p == 0:
        return Greedy()
    top_p = None if request.top_p == 1 else request.top_p
    return Sample(float(request.temperature or 0), request.top_k or None, top_p, request.min_p)


def _grammar(form: ResponseFormat | None) -> Grammar | None:
    match form:
        case None | AnyText():
            return None
        case ChoicesFormat(choices=choices):
            return Choices(tuple(choices))
        case BoxesFormat(labels=labels, least=least, most=most):
            return Boxes(tuple(labels), least, most)
        case MasksFormat(labels=labels, least=least, most=most):
            return Masks(tuple(labels), least, most)
    kind = form.__struct_config__.tag
    raise ApiError(
        400,
        f"response_format must be text, choices, boxes or masks on this server, got {kind}",
        param="response_format",
    )
