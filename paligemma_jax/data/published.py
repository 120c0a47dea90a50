"""Data sets in the form in which they are published -> our rows.

A row has image, prefix, suffix (the answer that most people gave), answers (all of them), id, and type where the data set tells kinds of questions;
for RefCOCO also boxes (left, top, right, bottom in pixels) and the file of the mask.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from paligemma_jax.processing.mask_codec import MaskCodec

JsonRow = dict[str, Any]


@dataclass(frozen=True)
class PublishedFiles:
    """What a converter is given."""

    files: Sequence[Path]
    images: Path
    prompt: str  # with {} for the question
    split: str | None  # where a file holds several
    output: Path  # the JSONL to come; masks go beside it
    codec: MaskCodec | None = None  # to say masks with

    @cached_property
    def contents(self) -> list[Any]:
        """Of all JSON files. ValueError for one that is none."""
        return [_json(path) for path in self.files if path.suffix != ".p"]

    def part(self, key: str) -> list[Any]:
        """The list called `key` of the file that has it."""
        for content in self.contents:
            if isinstance(content, dict) and isinstance(content.get(key), list):
                return content[key]
        raise ValueError(f"none of {', '.join(map(str, self.files))} has {key!r}: give the files as they are published")

    def wants(self, split: str) -> bool:
        return self.split in (None, split)


def make_row(given: PublishedFiles, image: str | Path, question: str, answers: Iterable[str], **more: Any) -> JsonRow:
    answers = list(answers)
    said = Counter(answers).most_common(1)
    row: JsonRow = {"image": str(given.images / image), "prefix": given.prompt.format(question)}
    return row | ({"suffix": said[0][0], "answers": answers} if said else {}) | {key: value for key, value in more.items() if value is not None}


def textvqa(given: PublishedFiles) -> Iterator[JsonRow]:
    """TextVQA_0.5.1_val.json; the pictures of train and val are in train_images."""
    for item in given.part("data"):
        yield make_row(given, f"{item['image_id']}.jpg", item["question"], item.get("answers", ()), id=item["question_id"])


def vqav2(given: PublishedFiles) -> Iterator[JsonRow]:
    """v2_OpenEnded_mscoco_val2014_questions.json and v2_mscoco_val2014_annotations.json (not for test), pictures in val2014."""
    known = {item["question_id"]: item for item in (given.part("annotations") if len(given.files) > 1 else ())}
    (subset,) = [content["data_subtype"].replace("test-dev", "test") for content in given.contents if "questions" in content]
    for item in given.part("questions"):
        people = known.get(item["question_id"], {})
        answers = [answer["answer"] for answer in people.get("answers", ())]
        more = dict(id=item["question_id"], type=people.get("answer_type"), question_type=people.get("question_type"))
        yield make_row(given, f"COCO_{subset}_{item['image_id']:012}.jpg", item["question"], answers, **more)


def docci(given: PublishedFiles) -> Iterator[JsonRow]:
    """docci_descriptions.jsonlines, pictures in images; splits train, test, qual_dev, qual_test."""
    for path in given.files:
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            try:
                item = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{path}: line {number} is not JSON ({error})") from None
            if given.wants(item["split"]):
                yield make_row(given, item["image_file"], "", [item["description"]], id=item["example_id"])


def chartqa(given: PublishedFiles) -> Iterator[JsonRow]:
    """test_human.json and test_augmented.json, pictures in png; the files' kinds are the types."""
    for path, content in zip(given.files, given.contents):
        for number, item in enumerate(content):
            kind = path.stem.rpartition("_")[2]
            yield make_row(given, item["imgname"], item["query"], [str(item["label"])], id=f"{path.stem}/{number}", type=kind)


def docvqa(given: PublishedFiles) -> Iterator[JsonRow]:
    """val_v1.0_withQT.json, its pictures' paths (documents/....png) below the folder."""
    for item in given.part("data"):
        types = ", ".join(item.get("question_types", ())) or None
        yield make_row(given, item["image"], item["question"], item.get("answers", ()), id=item["questionId"], type=types)


def coco_captions(given: PublishedFiles) -> Iterator[JsonRow]:
    """captions_val2014.json, or Karpathy's dataset_coco.json, which big_vision's splits are: train, restval, val, test."""
    content = given.contents[0]
    if "annotations" not in content:
        for item in content["images"]:
            if given.wants(item["split"]):
                said = [sentence["raw"].strip() for sentence in item["sentences"]]
                yield make_row(given, Path(item.get("filepath", "")) / item["filename"], "", said, id=item["cocoid"])
        return
    captions: dict[int, list[str]] = {}
    for item in content["annotations"]:
        captions.setdefault(item["image_id"], []).append(item["caption"].strip())
    for item in content["images"]:
        yield make_row(given, item["file_name"], "", captions.get(item["id"], ()), id=item["id"])


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not JSON ({error})") from None
