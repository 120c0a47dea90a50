"""`paligemma-jax evaluate`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from paligemma_jax.commands.options import File, ModelFlags, ModelOptions, dumps, require_file

if TYPE_CHECKING:
    from paligemma_jax.evaluation.cases import Case

Folder = Annotated[str | None, tyro.conf.arg(metavar="DIR", help_behavior_hint="(default: the data's name with -evaluation)")]
Metrics = Annotated[tuple[str, ...], tyro.conf.arg(metavar="NAME [NAME ...]")]


def evaluate(
    data: str,
    metric: Metrics,
    output: Folder = None,
    source: ModelFlags = ModelOptions(),
    max_new_tokens: int = 128,
    batch_size: int = 16,
    beams: int = 1,
    answers: File = None,
    against: File = None,
    by: str = "type",
    cases: int = 12,
    bootstrap: int = 1000,
    resume: bool = False,
    json: bool = False,
) -> None:
    """Answer a data set and measure the answers, in a report to look at.

    Example: paligemma-jax evaluate --data val.jsonl --metric vqa

    Args:
        data: Rows: JSONL with image (relative to the file), prefix, and what is right: answers (a list of texts) or suffix; boxes (left, top, right,
            bottom in pixels) with labels, and mask (a file), or else what suffix says of them.
        metric: vqa exact_match relaxed_accuracy anls tallyqa rsvqa pope cider bleu characters sentences coco (AP, AP50, AP75) box_accuracy box_iou
            mask_iou; several at once.
        output: A folder for answers.jsonl, scores.jsonl, result.json, report.html and report.md.
        max_new_tokens: The longest answer, in tokens.
        batch_size: Rows at a time.
        beams: Beam search instead of greedy answers.
        answers: Measure these rows, which somebody answered already (JSONL with answer, as predict writes it, or the folder of a run), instead of
            asking the model.
        against: Another run on the same rows, its folder or its answers.jsonl, to compare with, case by case.
        by: The field of a row that tells its kind.
        cases: How many cases the report shows of each sort.
        bootstrap: Resamplings for the intervals.
        resume: Go on with the answers that are in --output.
        json: Print result.json instead of a few lines.
    """
    from paligemma_jax.checkpoints import source
    from paligemma_jax.evaluation import cases as read
    from paligemma_jax.processing.mask_codec import NO_CODEC

    names, folder = read.metric_names(metric), Path(output or f"{Path(data).stem}-evaluation")  # first, so that a wrong name is told at once
    path, about = Path(data), {"model": source.model, "data": data}
    if cases < 0 or bootstrap < 1 or beams < 1:
        raise ValueError(f"--cases {cases}, --bootstrap {bootstrap}, --beams {beams}: --cases is at least 0, the others 1")
    others = _run(path, Path(against)) if against else []
    if answers:
        own, about["model"] = _run(path, Path(answers)), answers
        folder.mkdir(parents=True, exist_ok=True)
    else:
        require_file("--data", data)
        from paligemma_jax.checkpoints.source import resolve

        if "mask_iou" in names and resolve(source.model).codec_file is None:
            raise ValueError(NO_CODEC)
        options: Any = dict(batch_size=batch_size, resume=resume, pieces=bool(read.POINTING & set(names)), settings=source.settings())
        own = _answer(source, path, folder, max_new_tokens, beams, options)
    _report(own, others, names, folder, source, about | {"by": by} | ({"against": against} if against else {}), (cases, bootstrap), json)


def _answer(source: ModelOptions, data: Path, folder: Path, new: int, beams: int, options: dict[str, Any]) -> list[Case]:
    from paligemma_jax.evaluation.cases import collect
    from paligemma_jax.inference.offline import predict
    from paligemma_jax.inference.sampling import Beam, Greedy

    if (of := source.process_part()[1]) > 1:
        raise ValueError(f"evaluate answers in one process, not {of}: predict in all of them, then evaluate --answers their --output in one")
    predict(source.load(), data, folder, new, Beam(beams) if beams > 1 else Greedy(), **options)
    return collect(data, folder)


def _run(data: Path, other: Path) -> list[Case]:
    """The cases of another run: a folder of evaluate or predict, or a file of answers."""
    from paligemma_jax.evaluation.cases import collect, load

    return collect(data, other) if other.is_dir() else load(other, data)


def _report(
    own: list[Case], others: list[Case], names: list[str], folder: Path, source: ModelOptions, about: dict[str, str], shown: tuple[int, int], json: bool
) -> None:
    from paligemma_jax.checkpoints.source import resolve
    from paligemma_jax.evaluation import report
    from paligemma_jax.evaluation.evaluate import evaluate
    from paligemma_jax.processing.mask_codec import load_codec

    file = resolve(source.model).codec_file if "mask_iou" in names else None
    found = evaluate(own, names, by=about["by"], samples=shown[1], codec=load_codec(file) if file else None, against=others, about=about)
    found.save(folder)
    report.save(found, folder, shown[0])
    if json:
        print(dumps(found.json()))
        return
    for name, one in found.figures.items():
        change = found.differences.get(name)
        told = f"{report.title(name)}: {report.figure(name, one.value)} (95 %: {report.spread(name, one)})"
        if change:
            told += f"; {report.figure(name, change.value, True)} ({report.spread(name, change, True)}, p {change.p:.3f}) against {about['against']}"
        print(told)
    print(f"{len(own)} cases{f', {found.failed} failed' if found.failed else ''}: {folder / 'report.html'}")
