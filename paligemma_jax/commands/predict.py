"""`paligemma-jax predict`."""

from __future__ import annotations

from dataclasses import asdict

from paligemma_jax.commands.options import (
    Boxes,
    BoxFlags,
    Decoding,
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
    decoding: Decoding = DecodingFlags(),
    boxes: Boxes = BoxFlags(),
    batch_size: int = 16,
    score: bool = False,
    resume: bool = False,
    json: bool = False,
) -> None:
    """Answer a data set of any size. A stopped run continues with --resume.

    Example: paligemma-jax predict --data in.jsonl --output out

    Args:
        data: JSONL file whose rows have image (a path, or a list of them, relative to the file)
            and prefix. Other fields are copied to the output.
        output: Output directory. Gets answers.jsonl, the same rows in the same order with
            "answer", and errors.jsonl, the rows without an answer and why. Rows that have an
            "answer" themselves keep it and get a "prediction" instead. With several processes, each
            writes a part (answers-00000-of-00004.jsonl, ...).
        batch_size: Maximum number of rows in a batch.
        score: Add the log-probability of each answer as "score" (or "prediction_score").
        resume: Continue the run in --output. No row is answered or written twice.
        json: Print a summary as one JSON object instead of a line of text.
    """
    require_file("--data", data)
    from paligemma_jax.inference import offline

    options = decoding.options()
    part = source.process_part()
    result = offline.predict(
        source.load(),
        data,
        output,
        options,
        batch_size=batch_size,
        score=score,
        boxes=boxes.options(),
        seed=decoding.seed,
        resume=resume,
        part=part,
        settings=source.settings(),
    )
    if json:
        print(dumps(asdict(result)))
    else:
        rate = result.tokens / result.seconds
        print(
            f"{result.answered} rows answered, {result.failed} failed; "
            f"{result.rows_s:.1f} rows/s, {rate:.0f} tokens/s: {result.answers}"
        )
    if result.failed and not result.answered:
        raise ValueError(f"no row could be answered; the reasons are in {result.errors}")
