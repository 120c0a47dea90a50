"""Continuous batching against batches: the table and the picture of docs/generation.md.

    python -m tools.engine_table
    python -m tools.engine_table --requests 64 --models tiny --rows 16 --picture occupancy.png

The lengths of answers are chosen, and eos is forbidden. The engine gets each as `max_new_tokens`. A
batch runs to the longest of its answers, as it does where the others end at eos. Both take turns in
one process; the first run of each compiles and is not counted.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import jax
import numpy as np
import tyro
from PIL import Image

from paligemma_jax import Greedy, Predictor, load
from paligemma_jax.checkpoints.source import TINY
from paligemma_jax.checkpoints.synthetic import random_model
from paligemma_jax.inference.answer import Answer, Detokenizer
from paligemma_jax.inference.batching import run_batches
from paligemma_jax.inference.engine import Engine
from paligemma_jax.inference.generate import generate
from paligemma_jax.inference.options import DecodingOptions
from paligemma_jax.processing.processor import EncodedPrompt, Inputs, round_up

TASKS = ("ocr", "caption en", "detect 3", "segment 2", "answer en how many digits?")
SHORTEST, LONGEST, EQUAL = 8, 80, 32  # tokens of an answer
SHARED = 8  # prompts about one picture


@dataclass(frozen=True)
class Workload:
    """Requests to a model: prompts, and the length of the answer to each."""

    name: str
    predictor: Predictor
    prompts: list[EncodedPrompt]
    lengths: np.ndarray

    @property
    def prompt_slots(self) -> int:
        return round_up(max(map(len, self.prompts)))


@dataclass
class Run:
    """Answers by number, and when each was in a row, in seconds from the start."""

    answers: dict[int, list[int]] = field(default_factory=dict)
    starts: dict[int, float] = field(default_factory=dict)
    ends: dict[int, float] = field(default_factory=dict)
    origin: float = field(default_factory=time.perf_counter)

    def now(self) -> float:
        return time.perf_counter() - self.origin

    def occupancy(self) -> tuple[np.ndarray, np.ndarray]:
        """Times, and the number of occupied rows from each on."""
        times = np.array([*self.starts.values(), *self.ends.values()])
        changes = np.repeat([1, -1], [len(self.starts), len(self.ends)])
        order = np.argsort(times, kind="stable")
        return times[order], np.cumsum(changes[order])


def run_engine(work: Workload, rows: int, listens: bool = False) -> Run:
    """Answer the requests by an engine. It decodes longer pieces if nobody listens to tokens, and
    then it is not known when a request came to its row."""
    run, slots = Run(), work.prompt_slots + LONGEST
    with Engine(work.predictor.model, work.predictor.processor, rows, slots) as engine:
        for i, (prompt, length) in enumerate(zip(work.prompts, work.lengths.tolist(), strict=True)):

            def listen(_: object, i: int = i) -> None:
                run.starts.setdefault(i, run.now())

            options = DecodingOptions(length, min_new_tokens=length)
            engine.submit(prompt, options, listener=listen if listens else None)
        for answers in engine.answers():
            run.ends |= dict.fromkeys(answers, run.now())
            run.answers |= {i: answer.tokens for i, answer in answers.items()}
    return run


def run_in_batches(work: Workload, rows: int) -> Run:
    """Answer the requests in batches. A row is taken to leave in proportion to its length."""
    run, slots = Run(), work.prompt_slots + round_up(LONGEST)
    model, processor = work.predictor.model, work.predictor.processor
    detokenizer = Detokenizer(processor.tokenizer, model.config.eos_token_ids, ())

    def answer(
        inputs: Inputs, features: jax.Array | None, numbers: np.ndarray
    ) -> tuple[list[Answer]]:
        longest, start = int(work.lengths[numbers].max()), run.now()
        options = DecodingOptions(longest, min_new_tokens=longest)
        generated = generate(model, inputs, options, slots=slots, features=features)
        for i in numbers.tolist():
            run.starts[i] = start
            run.ends[i] = start + (run.now() - start) * float(work.lengths[i] / longest)
        return (detokenizer.answers(generated, Greedy()),)

    batches = run_batches(model, processor, work.prompts, answer, rows, progress=False)
    for batch in batches:
        for i, result in batch.items():
            if isinstance(result, ValueError):
                raise result
            run.answers[i] = result[0].tokens[: work.lengths[i]]
    return run


def measure(work: Workload, rows: int, repeats: int) -> np.ndarray:
    """Seconds [repeats, 2, 2] of (batches, engine), taking turns: by the clock, and of this
    process on all cores."""
    ways: Sequence[Callable[[Workload, int], Run]] = (run_in_batches, run_engine)
    seconds, runs = [], []
    for repeat in range(-1, repeats):
        part = work if repeat >= 0 else replace(work, prompts=work.prompts[: 4 * rows])
        part = replace(part, lengths=work.lengths[: len(part.prompts)])
        runs, times = [], []
        for way in ways:
            start = time.perf_counter(), time.process_time()
            runs.append(way(part, rows))
            times.append((time.perf_counter() - start[0], time.process_time() - start[1]))
        if repeat >= 0:
            seconds.append(times)
    for run in runs:
        lengths = [len(run.answers[i]) for i in range(len(work.prompts))]
        if lengths != work.lengths.tolist():
            raise RuntimeError("answers do not have the lengths that were asked for")
    return np.array(seconds)


def make_predictor(name: str) -> Predictor:
    """`tiny`; or `small`, random weights with the tokenizer of tiny: a decoder eight times as large
    behind pictures of 16 patches, so that decoding takes most of the time."""
    tiny = load("tiny")
    if name == "tiny":
        return tiny
    if name != "small":
        raise ValueError(f"--models must be tiny or small, got {name}")
    vision = replace(tiny.config.vision, image_size=56)
    decoder = replace(
        tiny.config.decoder,
        hidden_size=256,
        num_hidden_layers=8,
        head_dim=64,
        intermediate_size=1024,
    )
    model = random_model(replace(tiny.config, vision=vision, decoder=decoder))
    processor = replace(tiny.processor, image_size=56, image_tokens=vision.num_patches)
    return replace(tiny, model=model, processor=processor)


def workloads(predictor: Predictor, requests: int) -> list[Workload]:
    """With lengths that differ tenfold or are equal, one picture for each prompt or for 8."""
    rng = np.random.default_rng(0)
    photo = np.asarray(Image.open(TINY.parent / "digits.jpg").resize((224, 224)))
    pictures = [np.roll(photo, i, (0, 1)) for i in range(requests)]
    tasks = [TASKS[i % len(TASKS)] for i in range(requests)]
    tenfold = np.exp(rng.uniform(np.log(SHORTEST), np.log(LONGEST + 1), requests)).astype(int)
    encode = predictor.processor.encode
    distinct = encode(pictures, tasks)
    shared = encode([pictures[i // SHARED] for i in range(requests)], tasks)
    return [
        Workload(f"{lengths_name} | {pictures_name}", predictor, prompts, lengths)
        for lengths_name, lengths in (
            (f"{SHORTEST} to {LONGEST}", tenfold),
            (f"{EQUAL}", np.full(requests, EQUAL)),
        )
        for pictures_name, prompts in (("distinct", distinct), ("shared", shared))
    ]


def spread(values: Sequence[float], form: str) -> str:
    """The median, and in brackets the least and the most."""
    least, median, most = (format(f(values), form) for f in (min, np.median, max))
    return f"{median} ({least}-{most})"


def draw(work: Workload, rows: int, path: str) -> None:
    """Save a picture of the occupied rows over time, both ways on the same axis."""
    from matplotlib.figure import Figure

    runs = run_in_batches(work, rows), run_engine(work, rows, listens=True)
    figure = Figure(figsize=(8, 3.6), layout="constrained")
    end = max(max(run.ends.values()) for run in runs)
    names = "batches", "engine"
    for axes, name, run in zip(figure.subplots(2, 1, sharex=True), names, runs, strict=True):
        times, occupied = run.occupancy()
        axes.fill_between(times, occupied, step="post", linewidth=0)
        busy = float(np.sum(occupied[:-1] * np.diff(times)) / (rows * times[-1]))
        axes.set(xlim=(0, end), ylim=(0, rows), ylabel="rows with a request")
        axes.set_title(f"{name}: {times[-1]:.1f} s, {busy:.0%} occupied", loc="left", fontsize=10)
        axes.spines[["top", "right"]].set_visible(False)
    figure.axes[-1].set_xlabel(f"seconds, {len(work.prompts)} requests")
    figure.savefig(path, dpi=100)


def main(
    requests: int = 1000,
    models: tuple[str, ...] = ("tiny", "small"),
    rows: tuple[int, ...] = (16, 32, 64),
    repeats: int = 3,
    picture: str | None = None,
) -> None:
    """Print the table.

    Args:
        requests: Number of requests.
        models: `tiny` and `small`.
        rows: Numbers of rows.
        repeats: Number of pairs of runs.
        picture: File for a picture of the occupied rows, for the first line of the table.
    """
    print(
        "| model | tokens | pictures | rows | batches: rows/s | engine: rows/s | ratio | CPU time |"
    )
    print("|" + 8 * " --- |", flush=True)
    for name in models:
        for work in workloads(make_predictor(name), requests):
            for count in rows:
                seconds = measure(work, count, repeats)
                speeds = requests / seconds[..., 0]
                both = " | ".join(spread(speeds[:, i].tolist(), ".0f") for i in range(2))
                ratios = seconds[:, 0] / seconds[:, 1]
                ratio = " | ".join(spread(ratios[:, i].tolist(), ".2f") for i in range(2))
                print(f"| {name} | {work.name} | {count} | {both} | {ratio} |", flush=True)
                if picture:
                    draw(work, count, picture)
                    picture = None


if __name__ == "__main__":
    tyro.cli(main)
