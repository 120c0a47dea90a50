"""Answers as OpenAI's API returns them, with boxes and masks as fields of their own."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from paligemma_jax.data.shapes import runs_of
from paligemma_jax.inference.answer import Answer
from paligemma_jax.inference.chosen import TopTokens
from paligemma_jax.inference.predictor import Predictor
from paligemma_jax.inference.streaming import StreamedToken
from paligemma_jax.processing.locations import Detection
from paligemma_jax.processing.tokenizer import Tokenizer
from paligemma_jax.serving.chat import Question
from paligemma_jax.serving.errors import JsonObject


@dataclass(frozen=True)
class Reply:
    """What all parts of one reply have in common."""

    id: str
    created: int  # seconds since 1970
    model: str
    question: Question
    predictor: Predictor
    logprobs: bool

    def completion(self, answers: Sequence[Answer]) -> JsonObject:
        """The reply in one piece."""
        choices = [
            dict(
                index=n,
                message=dict(
                    role="assistant", content=answer.text, refusal=None, **self._detections(answer)
                ),
                logprobs=self._logprobs(_tokens(answer, self._tokenizer))
                if self.logprobs
                else None,
                finish_reason=self._finish_reason(answer),
            )
            for n, answer in enumerate(answers)
        ]
        usage = self._usage(answers)
        return self._object("chat.completion", choices) | {"usage": usage, "paligemma": self._note}

    def begin(self) -> list[JsonObject]:
        """The first chunk of each answer of a stream."""
        delta = dict(role="assistant", content="", refusal=None)
        return [self._chunk(n, delta) for n in range(len(self.question.seeds))]

    def chunk(self, index: int, tokens: Sequence[StreamedToken]) -> JsonObject | None:
        """New tokens of an answer; None if there is nothing to send."""
        text, logprobs = "".join(token.text for token in tokens), self._logprobs(tokens)
        if not text and not (logprobs and logprobs["content"]):
            return None
        return self._chunk(index, dict(content=text), logprobs)

    def end(self, index: int, answer: Answer) -> JsonObject:
        """The last chunk of an answer."""
        reason = self._finish_reason(answer)
        return self._chunk(index, self._detections(answer), finish_reason=reason)

    def usage_chunk(self, answers: Sequence[Answer]) -> JsonObject:
        """The chunk after the last answer, if the usage is asked for."""
        chunk = self._object("chat.completion.chunk", [])
        return chunk | {"usage": self._usage(answers), "paligemma": self._note}

    @property
    def _tokenizer(self) -> Tokenizer:
        return self.predictor.processor.tokenizer

    @property
    def _note(self) -> JsonObject:
        """What the model read."""
        question = self.question
        return dict(
            prompt=question.text,
            images=len(question.images),
            unread_messages=question.unread,
            seeds=question.seeds,
        )

    def _object(self, kind: str, choices: list[JsonObject]) -> JsonObject:
        return dict(
            id=self.id, object=kind, created=self.created, model=self.model, choices=choices
        )

    def _chunk(
        self,
        index: int,
        delta: JsonObject,
        logprobs: JsonObject | None = None,
        finish_reason: str | None = None,
    ) -> JsonObject:
        choice = dict(index=index, delta=delta, logprobs=logprobs, finish_reason=finish_reason)
        return self._object("chat.completion.chunk", [choice])

    def _usage(self, answers: Sequence[Answer]) -> JsonObject:
        prompt = len(self.question.prompt)
        completion = sum(len(answer.tokens) for answer in answers)
        return dict(
            prompt_tokens=prompt, completion_tokens=completion, total_tokens=prompt + completion
        )

    def _finish_reason(self, answer: Answer) -> str:
        is_cut = len(answer.tokens) == self.question.options.max_new_tokens
        ended = answer.tokens[-1] in self.predictor.config.eos_token_ids
        # A stop text that the last possible token completes ends the answer, too.
        stopped = answer.text != self.predictor.processor.decode(answer.tokens)
        return "stop" if ended or stopped or not is_cut else "length"

    def _detections(self, answer: Answer) -> JsonObject:
        """Boxes in pixels and masks of an answer about one picture, if it has any."""
        if len(self.question.images) != 1 or "<loc" not in answer.text:
            return {}
        detections = self.predictor.detections(answer, self.question.images[0])
        return {"detections": [detection_json(detection) for detection in detections]}

    def _logprobs(self, tokens: Iterable[StreamedToken]) -> JsonObject | None:
        if not self.logprobs:
            return None
        eos = self.predictor.config.eos_token_ids
        content = [self._token(token) for token in tokens if token.id not in eos]
        return dict(content=content, refusal=None)

    def _token(self, token: StreamedToken) -> JsonObject:
        top = [] if token.top is None else _pairs(token.top, self._tokenizer)
        likely = [_logprob(text, value) for text, value in top]
        return _logprob(token.text, token.log_probability) | {"top_logprobs": likely}


def event(value: JsonObject | str) -> str:
    """A server-sent event."""
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return f"data: {text}\n\n"


def detection_json(detection: Detection) -> JsonObject:
    """A detection: its box is left, top, right, bottom in pixels, and its mask, if it has one, the
    runs of COCO's annotations."""
    found: JsonObject = dict(
        label=detection.label, box=[float(x) for x in detection.box], score=detection.score
    )
    if detection.mask is not None:
        runs = runs_of(detection.mask)
        found["mask"] = dict(size=list(runs.size), counts=runs.counts)
    return found


def _tokens(answer: Answer, tokenizer: Tokenizer) -> Iterator[StreamedToken]:
    """The tokens of a complete answer, each with its text."""
    for n, (text, value) in enumerate(answer.pieces(tokenizer)):
        top = answer.top
        here = None if top is None else TopTokens(top.ids[n], top.log_probabilities[n])
        yield StreamedToken(answer.tokens[n], text, value, here)


def _pairs(top: TopTokens, tokenizer: Tokenizer) -> list[tuple[str, float]]:
    values = np.asarray(top.log_probabilities).tolist()
    ids = np.asarray(top.ids).tolist()
    return [(tokenizer.decode([i]), value) for i, value in zip(ids, values, strict=True)]


def _logprob(text: str, value: float) -> dict[str, Any]:  # Any: JSON
    # JSON has no infinity, the value of a token that is not allowed: OpenAI's API has -9999.
    return dict(token=text, logprob=max(float(value), -9999.0), bytes=list(text.encode()))
