"""Answer a data set of any size: JSONL in, the same rows with their answers out, in order.

A run that was stopped can be resumed.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path

import jax

from convert.typed_json import JsonObject, decode
from paligemma_jax.data.jsonl import answer_field, read_lines
from paligemma_jax.data.progress import progress_bar
from paligemma_jax.data.rows import make_example
from paligemma_jax.inference.answer import Answer
from paligemma_jax.inference.offline_files import OutputFiles, Record
from paligemma_jax.inference.options import DecodingOptions, check_seeds
from paligemma_jax.inference.predictor import Predictor
from paligemma_jax.inference.views import BoxOptions
from paligemma_jax.processing.processor import EncodedPrompt

WINDOW = 16  # batches whose rows are read together, sorted by length and written in order


@dataclass(frozen=True)
class OfflineResult:
    """Counts of one part over all its runs; tokens, seconds and rows_s of the last run only."""

    answers: str  # path of the file
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
    options: DecodingOptions = DecodingOptions(),
    *,
    batch_size: int = 16,
    score: bool = False,
    pieces: bool = False,
    boxes: BoxOptions = BoxOptions(),
    seed: int = 0,
    resume: bool = False,
    part: tuple[int, int] | None = None,
    settings: Mapping[str, object] = {},
    progress: bool | None = None,
) -> OfflineResult:
    """Answer the rows {"image", "prefix", ...} of a JSONL file of any size in constant memory.

    The folder `output` gets answers.jsonl, the rows with an "answer" in the order of `data`, and
    errors.jsonl, with {"line", "error", "row"} for each row that cannot be answered. No field of a
    row is overwritten: to a row with an "answer" of its own, a "prediction" is added.

    Args:
        data: Image paths are relative to it. Other fields are copied to the output.
        score: Add the log-probability of each answer as "score", or "prediction_score".
        pieces: Add the text and log-probability of each token as "pieces", or "prediction_pieces",
            from which `parse_detections` computes the scores of boxes.
        boxes: Views of each image, and duplicates, of boxes in the answers.
        seed: Random seed. The line number of each row is added to it, so that samples do not depend
            on parts or batches.
        resume: Continue the run in `output`. A killed run loses at most one batch; no row is
            written twice or left out.
        part: (n, m) to answer only the n-th of m equal parts, into answers-0000n-of-0000m.jsonl;
            `cat answers-*` has all of them in order. By default the part of this process among
            those of jax.distributed. Parts share only the folder.
        settings: Further settings that must not change on resume, such as the model's name.
        progress: Whether to report progress; see `progress_bar`.

    Raises:
        ValueError: The file, the folder or an option cannot be used.
    """
    data = Path(data)
    number, parts = part or (jax.process_index(), jax.process_count())
    if not 1 <= batch_size < 2**31:
        raise ValueError(f"batch_size must be at least 1 and below 2**31, got {batch_size}")
    files = OutputFiles(Path(output), number, parts)
    rows = sum(1 for _ in read_lines(data))
    check_seeds([seed, seed + rows], 2)
    about = dict(data=str(data.resolve()), rows=rows, parts=parts)
    about |= dict(score=score, pieces=pieces, seed=seed)
    about |= options.settings() | (asdict(boxes) if boxes.changes else {})
    files.begin({**settings, **about}, resume)

    fields = ["answer"] + ["score"] * score + ["pieces"] * pieces
    job = _Job(predictor, files, data.parent, options, boxes, batch_size, seed, fields)
    first, last = rows * number // parts, rows * (number + 1) // parts
    start, answered, tokens = time.perf_counter(), files.answered, 0
    with progress_bar(
        desc=f"part {number}" if parts > 1 else None,
        total=last - first,
        show=progress,
        initial=files.answered + len(files.failed),
    ) as bar:
        remaining = files.remaining(islice(read_lines(data), first, last))
        while window := dict(islice(remaining, WINDOW * batch_size)):
            bar.update(len(window.keys() & files.waiting.keys()))
            for batch in job.answer(window):
                bar.update(len(batch))
                tokens += sum(len(answer.tokens) for answer in batch)
                rate = tokens / (time.perf_counter() - start)
                bar.set_postfix(tokens_s=f"{rate:.0f}", failed=len(files.failed), refresh=False)
            files.commit(window)
    files.finish()
    seconds = time.perf_counter() - start
    return OfflineResult(
        str(files.answers),
        str(files.errors),
        files.answered,
        len(files.failed),
        tokens,
        seconds,
        rows_s=(files.answered - answered) / seconds,
    )


@dataclass(frozen=True)
class _Job:
    predictor: Predictor
    files: OutputFiles
    folder: Path  # base of relative image paths
    options: DecodingOptions
    boxes: BoxOptions
    batch_size: int
    seed: int
    fields: Sequence[str]  # of the rows to write, named as in ANSWER_FIELDS

    def answer(self, window: dict[int, bytes]) -> Iterator[list[Answer]]:
        """Answer the lines of a window that are not pending, and add each batch to the files."""
        rows: dict[int, JsonObject] = {}
        prompts: dict[int, EncodedPrompt] = {}
        for line, text in window.items():
            if line in self.files.waiting:
                continue
            row: object = text.decode(errors="replace")
            try:
                row = rows[line] = decode(text)
                prompts[line] = self._encode(rows[line], line)
            except ValueError as error:
                self.files.add([{"line": line, "error": str(error), "row": row}])
        if not prompts:
            return
        lines = list(prompts)
        batches = self.predictor.batches(
            list(prompts.values()),
            self.options,
            seeds=[self.seed + line for line in lines],
            batch_size=self.batch_size,
            progress=False,
            boxes=self.boxes,
        )
        for batch in batches:
            answers = {lines[i]: answer for i, answer in batch.items()}
            self.files.add(self._record(line, rows[line], a) for line, a in answers.items())
            yield list(answers.values())

    def _encode(self, row: JsonObject, line: int) -> EncodedPrompt:
        example = make_example(row, line, self.folder, requires_suffix=False)
        for name in self.fields:
            answer_field(row, name)  # raises an error if there is none
        (prompt,) = self.predictor.processor.encode([list(example.images)], [example.prefix])
        tokens, new = len(prompt.prompt), self.options.max_new_tokens
        context = self.predictor.processor.context
        if tokens + new > context:
            raise ValueError(
                f"{tokens} tokens of images and prefix plus {new} new tokens exceed the context of "
                f"{context}"
            )
        return prompt

    def _record(self, line: int, row: JsonObject, answer: Answer) -> Record:
        if answer.error:
            return {"line": line, "error": answer.error, "row": row}
        values: dict[str, object] = {"answer": answer.text, "score": answer.score}
        if "pieces" in self.fields:
            pieces = answer.pieces(self.predictor.processor.tokenizer)
            values["pieces"] = [[text, round(value, 6)] for text, value in pieces]
        return {
            "line": line,
            "row": row | {answer_field(row, name): values[name] for name in self.fields},
        }
