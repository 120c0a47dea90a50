"""`paligemma-jax predict`."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from paligemma_jax.commands.options import (
    Decoded,
    DecodingFlags,
    ModelFlags,
    ModelOptions,
    dumps,
    require_file,
)


def predict(
    data: str,
    output: str,
    source: ModelFlags = ModelOptions(),
    max_new_tokens: int = 128,
    decoding: Decoded = DecodingFlags(),
    batch_size: int = 16,
    score: bool = False,
    resume: bool = False,
    json: bool = False,
) -> None:
    """Answer a whole data set; a stopped run continues with --resume.

    Example: paligemma-jax predict --data in.jsonl --output out

    Args:
        data: Rows to answer: JSONL with image (a path, or a list of them; relative to the file) and prefix. Other fields come along.
        output: A folder for answers.jsonl, the same rows in the same order with "answer", and errors.jsonl, those that have none and why. Several
            processes write a part each (answers-00000-of-00004.jsonl, ...).
        max_new_tokens: The longest answer, in tokens.
        batch_size: Rows at a time.
        score: Add the log-probability of each answer as "score".
        resume: Go on with what is in --output: nothing is answered or written twice.
        json: Print what was done as one JSON object instead of a line of text.
    """
    require_file("--data", data)
    from paligemma_jax.inference.offline import predict

    options: Any = dict(batch_size=batch_size, score=score, resume=resume, settings=source.settings(), part=source.process_part())
    options |= decoding.options() | {"seed": decoding.seed}
    done = predict(source.load(), data, output, max_new_tokens, **options)
    told = f"{done.answered} rows answered, {done.failed} failed; {done.rows_s:.1f} rows/s, {done.tokens / done.seconds:.0f} tokens/s: {done.answers}"
    print(dumps(asdict(done)) if json else told)
    if done.failed and not done.answered:
        raise ValueError(f"no row could be answered: {done.errors} says why")
