"""Answers to data sets of any size: rows of JSONL in, the same rows with their answers out, in order; what was stopped goes on where it stood."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import jax
from tqdm import tqdm

from paligemma_jax.data.rows import make_example
from paligemma_jax.inference import generate, pointing
from paligemma_jax.inference.answer import Answer
from paligemma_jax.inference.offline_files import OutputFiles
from paligemma_jax.inference.predictor import Predictor, check_seeds, check_stops
from paligemma_jax.inference.sampling import Greedy, Strategy
from paligemma_jax.processing.processor import EncodedPrompt

WINDOW = 16  # batches whose rows are read together, sorted by length, and put back in order


@dataclass(frozen=True)
class OfflineResult:
    """What came of a part of the rows, in all runs so far; of this run alone, the tokens and seconds."""

    answers: str  # the file
    errors: str
    answered: int
    failed: int
    tokens: int
    seconds: float
    rows_s: float


def predict(
    predictor: Predictor,
    data: str | Path,
    output: str | Path,
    max_new_tokens: int = 128,
    sampler: Strategy = Greedy(),
    *,
    batch_size: int = 16,
    score: bool = False,
    pieces: bool = False,
    seed: int = 0,
    resume: bool = False,
    part: tuple[int, int] | None = None,
    settings: Mapping[str, Any] = {},
    progress: bool | None = None,
    **options: Any,
) -> OfflineResult:
    """Answers the rows {"image", "prefix", ...} of the JSONL file `data`, image paths relative to it, into the folder `output`.

    answers.jsonl: every row as it is, with "answer" and, if `score`, the log-probability of that as "score", in the order of `data`; if `pieces`,
    the text of each of its tokens with the log-probability of that as "pieces", from which boxes get their scores (`processing.locations.parse`).
    errors.jsonl: {"line", "error", "row"} of the rows that cannot be answered. Memory does not grow with the number of rows.

    Args:
        resume: go on with what is in `output`: of a run that was killed at most one batch is lost, no row is written twice, none left out.
        part: (n, of), only the n-th of so many runs of rows, into answers-0000n-of-0000m.jsonl: `cat answers-*` has them in order. By default
            this process's of all those of jax.distributed. Parts share nothing but the folder.
        settings: what else must be the same to go on, as the name of the model.
        seed: added to the number of its line it is a row's seed, so that a sample does not depend on parts or batches.
        options: of `Predictor.batches`.

    ValueError if the file, the folder or the options cannot be used.
    """
    data, (number, of) = Path(data), part or (jax.process_index(), jax.process_count())
    if not data.is_file():
        raise ValueError(f"{data}: no such file; give JSONL with image and prefix on each line")
    if max_new_tokens < 1 or batch_size < 1:
        raise ValueError(f"--max-new-tokens {max_new_tokens}, --batch-size {batch_size}: both are at least 1")
    generate.check_lengths(0, max_new_tokens, options.get("min_new_tokens", 0), max_new_tokens)  # here, before anything is written
    check_stops(options.get("stop"))
    files, rows = OutputFiles(Path(output), number, of), sum(1 for _ in _rows(data))
    check_seeds([seed, seed + rows], 2)
    own = range(rows * number // of, rows * (number + 1) // of)
    about = {"data": str(data.resolve()), "rows": rows, "parts": of, "max_new_tokens": max_new_tokens, "score": score, "pieces": pieces, "seed": seed}
    files.begin({**settings, **about, "sampler": repr(sampler), "options": repr(options)}, resume)

    def tell(answer: Answer) -> dict[str, Any]:
        said = [[text, round(value, 6)] for text, value in pointing.pieces(predictor.processor.tokenizer, answer)] if pieces else []
        return {"answer": answer.text} | ({"score": answer.score} if score else {}) | ({"pieces": said} if pieces else {})

    run = dict(max_new_tokens=max_new_tokens, sampler=sampler, batch_size=batch_size, progress=False, **options)
    start, before, tokens = time.perf_counter(), files.answered, 0
    with tqdm(total=len(own), desc=f"part {number}" if of > 1 else None, unit="row", disable=None if progress is None else not progress) as bar:
        bar.update(files.answered + len(files.failed))
        to_come = files.to_come(islice(_rows(data), own.start, own.stop))
        while window := dict(islice(to_come, WINDOW * batch_size)):
            bar.update(sum(line in files.waits for line in window))
            for batch in _window(predictor, files, window, data.parent, tell, seed, run):
                bar.update(len(batch))
                tokens += sum(len(answer.tokens) for answer in batch)
                bar.set_postfix(tokens_s=f"{tokens / (time.perf_counter() - start):.0f}", failed=len(files.failed), refresh=False)
            files.settle(window)
    files.finish()
    seconds = time.perf_counter() - start
    rate = (files.answered - before) / seconds
    return OfflineResult(str(files.answers), str(files.errors), files.answered, len(files.failed), tokens, seconds, rate)


def _window(
    predictor: Predictor,
    files: OutputFiles,
    window: dict[int, bytes],
    folder: Path,
    tell: Callable[[Answer], dict[str, Any]],
    seed: int,
    run: dict[str, Any],
) -> Iterator[list[Answer]]:
    """Answers what of a window (line -> text) is not pending yet; a batch is written, as `tell` has it, when it is given out."""
    asked: dict[int, tuple[Any, EncodedPrompt]] = {}
    for line, text in window.items():
        if line not in files.waits:
            row: Any = text.decode(errors="replace")
            try:
                row = json.loads(text)
                asked[line] = row, _ask(predictor, row, line, folder, run["max_new_tokens"])
            except (ValueError, RecursionError) as error:
                reason = f"not JSON ({error})" if isinstance(error, json.JSONDecodeError) else str(error)
                files.note([{"line": line, "error": reason, "row": row}])
    if not asked:
        return
    lines = list(asked)
    for batch in predictor.batches([row for _, row in asked.values()], seeds=[seed + line for line in lines], **run):
        files.note(_record(lines[i], asked[lines[i]][0], answer, tell) for i, answer in batch.items())
        yield list(batch.values())


def _ask(predictor: Predictor, row: Any, line: int, folder: Path, new: int) -> EncodedPrompt:
    example = make_example(row, line, folder, learns=False)
    (asked,) = predictor.processor.rows([list(example.images)], [example.prefix])
    if (tokens := len(asked.prompt)) + new > predictor.processor.context:
        raise ValueError(f"{tokens} tokens of images and prefix and {new} new ones are more than the context of {predictor.processor.context}")
    return asked


def _record(line: int, row: dict[str, Any], answer: Answer, tell: Callable[[Answer], dict[str, Any]]) -> dict[str, Any]:
    if answer.error:
        return {"line": line, "error": answer.error, "row": row}
    return {"line": line, "row": row | tell(answer)}


def _rows(data: Path) -> Iterator[tuple[int, bytes]]:
    """The lines that are not empty, with their numbers from 1."""
    with data.open("rb") as lines:
        yield from ((number, line) for number, line in enumerate(lines, 1) if line.strip())
