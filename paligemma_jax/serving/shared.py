"""A predictor whose streams are decoded together with the requests of a server."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from paligemma_jax.inference.options import DecodingOptions
from paligemma_jax.inference.predictor import Predictor
from paligemma_jax.inference.streaming import StreamedToken
from paligemma_jax.processing.image import ImageSource
from paligemma_jax.serving.worker import Worker


@dataclass(frozen=True)
class SharedPredictor(Predictor):
    """A `Predictor` of the model that `worker` runs. Everything but `stream` and `stream_tokens` is
    computed beside it."""

    worker: Worker | None = None

    @classmethod
    def of(cls, predictor: Predictor, worker: Worker) -> SharedPredictor:
        return cls(predictor.model, predictor.processor, predictor.codec_file, worker)

    def _stream(
        self,
        image: ImageSource | Sequence[ImageSource] | None,
        prompt: str,
        options: DecodingOptions,
        seed: int,
    ) -> Iterator[list[StreamedToken]]:
        assert self.worker is not None
        return self.worker.stream(self._encode_one(image, prompt), options, seed)
