"""`paligemma-jax evaluate`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from paligemma_jax.commands.options import (
    Boxes,
    BoxFlags,
    File,
    Grammar,
    ModelFlags,
    ModelOptions,
    dumps,
    flag,
    require_file,
)
from paligemma_jax.commands.recipe_options import RecipeFlags, RecipeOptions

if TYPE_CHECKING:
    from paligemma_jax.evaluation.evaluate import Evaluation
    from paligemma_jax.inference.options import DecodingOptions
    from paligemma_jax.inference.views import BoxOptions
    from paligemma_jax.metrics.cases import Case

TINY = "tiny"  # the recipe of the embedded checkpoint: held-out digits
Folder = Annotated[str | None, flag("DIR", "the data's name with -evaluation")]
Metrics = Annotated[tuple[str, ...], flag("NAME [NAME ...]", "the recipe's")]
Tokens = Annotated[int | None, flag("N", "the recipe's, or 128")]
Width = Annotated[int | None, flag("N", "the recipe's, or 1")]


def evaluate(
    data: File = None,
    metric: Metrics = (),
    output: Folder = None,
    source: ModelFlags = ModelOptions(),
    task: RecipeFlags = RecipeOptions(),
    detection: Boxes = BoxFlags(),
    grammar: Grammar = None,
    max_new_tokens: Tokens = None,
    batch_size: int = 16,
    beams: Width = None,
    answers: File = None,
    against: File = None,
    by: str = "type",
    cases: int = 12,
    bootstrap: int = 1000,
    resume: bool = False,
    json: bool = False,
) -> None:
    """Answer a data set, compute metrics, and write a report.

    Example: paligemma-jax evaluate --data val.jsonl --metric vqa

    Args:
        data: Rows, JSONL: image (a path relative to the file, or a list of paths), prefix, and the
            reference: answers (a list of strings) or suffix; for boxes and masks also boxes
            (left, top, right, bottom in pixels) with labels, and mask (an image file).
        metric: vqa exact_match relaxed_accuracy anls tallyqa rsvqa pope mmvp_pairs cider bleu
            rouge_l characters sentences cer ser ler teds s_teds coco (AP, AP50, AP75) word_f1
            box_calibration box_accuracy box_iou mask_iou; one or several.
        output: Directory for answers.jsonl, scores.jsonl, result.json, report.html and report.md.
        grammar: Grammar that answers follow, as for generate: boxes:cat,dog, choices:yes,no, ...
        max_new_tokens: Maximum length of an answer in tokens.
        batch_size: Rows per batch.
        beams: Beam search of this width; 1 is greedy decoding.
        answers: Evaluate these answers instead of running the model: JSONL of rows with answer
            (with prediction, if the rows of --data have an answer), or the --output of predict or
            evaluate.
        against: Another run on the same rows to compare with: its --output or answers.jsonl.
        by: Field of a row that names the kind of question; the report has a table by kind.
        cases: Number of cases per section of the report.
        bootstrap: Number of bootstrap resamplings for the intervals.
        resume: Continue with the answers in --output.
        json: Print result.json instead of a summary.
    """
    from paligemma_jax.evaluation import html
    from paligemma_jax.evaluation.evaluate import evaluate
    from paligemma_jax.grammars.parse import parse_grammar
    from paligemma_jax.inference.options import DecodingOptions
    from paligemma_jax.inference.sampling import Beam, Greedy
    from paligemma_jax.metrics.registry import metric_names
    from paligemma_jax.processing.mask_codec import NO_CODEC, load_codec

    # All checks come before the model is loaded.
    if task.recipe == TINY:
        given = {"--data": data, "--metric": metric, "--answers": answers, "--against": against}
        given |= {"--split": task.split, "--size": task.size, "--resolution": task.resolution}
        given |= {"--grammar": grammar, "--max-new-tokens": max_new_tokens, "--beams": beams}
        given |= {"--by": by != "type", "--cases": cases != 12, "--bootstrap": bootstrap != 1000}
        return _evaluate_tiny(source, output, detection, batch_size, resume, json, given)
    if data is None:
        raise ValueError(f"--data is missing: the rows to answer, or --recipe {TINY}")
    metric, max_new_tokens, beams = task.fill(metric, max_new_tokens, beams)
    names, path = metric_names(metric), Path(data)
    folder = Path(output or f"{path.stem}-evaluation")
    for name, value, least in (
        ("cases", cases, 0),
        ("bootstrap", bootstrap, 1),
        ("beams", beams, 1),
    ):
        if value < least:
            raise ValueError(f"--{name} must be at least {least}, got {value}")
    other_cases = _read_run(path, Path(against)) if against else []
    codec = source.resolve().codec_file if "mask_iou" in names else None
    if answers:
        own_cases = _read_run(path, Path(answers))
        folder.mkdir(parents=True, exist_ok=True)
    else:
        require_file("--data", data)
        if "mask_iou" in names and codec is None:
            raise ValueError(NO_CODEC)
        strategy = Beam(beams) if beams > 1 else Greedy()
        allowed = parse_grammar(grammar) if grammar else None
        options = DecodingOptions(max_new_tokens, strategy, allowed=allowed)
        job = (path, folder, options, detection.options(), batch_size, names, resume)
        own_cases = _answer(source, *job)
    about = {"model": answers or source.model, "data": data, "by": by}
    if task.recipe:
        about["recipe"] = task.recipe
    if against:
        about["against"] = against
    evaluation = evaluate(
        own_cases,
        names,
        by=by,
        samples=bootstrap,
        codec=load_codec(codec) if codec else None,
        against=other_cases,
        about=about,
        published=task.published(None if answers else source.resolve().config),
    )
    evaluation.save(folder)
    html.save(evaluation, folder, cases)
    print(dumps(evaluation.json()) if json else _summary(evaluation, folder))


def _evaluate_tiny(
    source: ModelOptions,
    output: str | None,
    detection: BoxFlags,
    batch_size: int,
    resume: bool,
    json: bool,
    given: Mapping[str, object],
) -> None:
    """Evaluate on held-out digits. `given` has the flags that do not apply."""
    from paligemma_jax.tiny.evaluate import evaluate_tiny, format_table

    for name, value in given.items():
        if value:
            raise ValueError(f"--recipe {TINY} makes its own data: leave out {name}")
    folder = Path(output or f"{TINY}-evaluation")
    evaluations = evaluate_tiny(
        source.load(),
        folder,
        boxes=detection.options(),
        batch_size=batch_size,
        settings=source.settings(),
        resume=resume,
    )
    if json:
        print(dumps({task: evaluation.json() for task, evaluation in evaluations.items()}))
    else:
        print(f"{format_table(evaluations)}\nreports: {folder}")


def _answer(
    source: ModelOptions,
    data: Path,
    folder: Path,
    options: DecodingOptions,
    boxes: BoxOptions,
    batch_size: int,
    metrics: Sequence[str],
    resume: bool,
) -> list[Case]:
    from paligemma_jax.evaluation.cases import collect
    from paligemma_jax.inference.offline import predict
    from paligemma_jax.metrics.registry import METRICS

    _, processes = source.process_part()
    if processes > 1:
        raise ValueError(
            f"evaluate runs in one process, got {processes}: run predict in all of them, then "
            "evaluate --answers on its --output in one"
        )
    predict(
        source.load(),
        data,
        folder,
        options,
        boxes=boxes,
        batch_size=batch_size,
        pieces=any(METRICS[name].compares != "texts" for name in metrics),
        resume=resume,
        settings=source.settings(),
    )
    return collect(data, folder)


def _read_run(data: Path, run: Path) -> list[Case]:
    """Read the --output of evaluate or predict, or a file of answers."""
    from paligemma_jax.evaluation.cases import collect, load_answers

    return collect(data, run) if run.is_dir() else load_answers(run, data)


def _summary(evaluation: Evaluation, folder: Path) -> str:
    from paligemma_jax.evaluation.report import format_interval, format_value
    from paligemma_jax.metrics.registry import METRICS

    lines = []
    for name, interval in evaluation.intervals.items():
        ends = format_interval(name, interval)
        line = f"{METRICS[name].title}: {format_value(name, interval.value)} (95 %: {ends})"
        change = evaluation.differences.get(name)
        if change:
            value = format_value(name, change.value, sign=True)
            ends = format_interval(name, change, sign=True)
            other = evaluation.about["against"]
            line += f"; {value} against {other} ({ends}, p {change.p:.3f})"
        lines.append(line)
    if evaluation.published:
        lines.append(f"{evaluation.published.title}:")
        for result in evaluation.published.results:
            lines.append(f"  {METRICS[result.metric].title}, {result.split}: {result}")
        lines += [f"  {evaluation.published.note}"] if evaluation.published.note else []
    failed = f", {evaluation.failed} failed" if evaluation.failed else ""
    lines.append(f"{len(evaluation.cases)} cases{failed}: {folder / 'report.html'}")
    return "\n".join(lines)
