"""Convert published data sets from their original files to rows.

A row has image, prefix, suffix (the most frequent answer), answers (all of them), id, and type
where the data set has kinds of questions. RefCOCO's rows are in `refcoco`.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from paligemma_jax.data.jsonl import DataRow, read_jsonl
from paligemma_jax.processing.mask_codec import MaskCodec

# Unchecked JSON of a published file. `convert` reports its KeyErrors and TypeErrors.
Published = Any


@dataclass(frozen=True)
class PublishedFiles:
    """The files of a data set, and how to convert them."""

    files: Sequence[Path]
    images: Path  # directory
    prompt: str  # with {} for the question
    split: str | None  # the split to convert, of a file that has several
    output: Path  # the JSONL to write; masks are written beside it
    codec: MaskCodec | None = None  # encodes masks as <seg> tokens

    @cached_property
    def contents(self) -> list[Published]:
        """The contents of all JSON files."""
        return [_read_json(path) for path in self.files if path.suffix != ".p"]

    def items(self, key: str) -> list[Published]:
        """The list named `key`, from the file that contains it."""
        for content in self.contents:
            if isinstance(content, dict) and isinstance(content.get(key), list):
                return content[key]
        names = ", ".join(map(str, self.files))
        raise ValueError(f"none of {names} has {key!r}: pass the original files")

    def includes(self, split: str) -> bool:
        """Whether to convert the rows of a split."""
        return self.split in (None, split)

    def row(
        self, image: str | Path, question: str, answers: Iterable[str], **fields: object
    ) -> DataRow:
        """A row with the answers, if any, and those fields that are not None."""
        row = {"image": str(self.images / image), "prefix": self.prompt.format(question)}
        answers = list(answers)
        if answers:
            row |= {"suffix": Counter(answers).most_common(1)[0][0], "answers": answers}
        row |= {name: value for name, value in fields.items() if value is not None}
        return row  # type: ignore[return-value]


def textvqa(source: PublishedFiles) -> Iterator[DataRow]:
    """TextVQA_0.5.1_val.json; the images of train and val are in train_images."""
    for item in source.items("data"):
        image, answers = f"{item['image_id']}.jpg", item.get("answers", ())
        yield source.row(image, item["question"], answers, id=item["question_id"])


def vqav2(source: PublishedFiles) -> Iterator[DataRow]:
    """v2_OpenEnded_mscoco_val2014_questions.json and, except for test,
    v2_mscoco_val2014_annotations.json; images in val2014."""
    annotations = source.items("annotations") if len(source.files) > 1 else []
    by_question = {item["question_id"]: item for item in annotations}
    (subset,) = [content["data_subtype"] for content in source.contents if "questions" in content]
    subset = subset.replace("test-dev", "test")
    for item in source.items("questions"):
        annotation = by_question.get(item["question_id"], {})
        yield source.row(
            f"COCO_{subset}_{item['image_id']:012}.jpg",
            item["question"],
            [answer["answer"] for answer in annotation.get("answers", ())],
            id=item["question_id"],
            type=annotation.get("answer_type"),
            question_type=annotation.get("question_type"),
        )


def docci(source: PublishedFiles) -> Iterator[DataRow]:
    """docci_descriptions.jsonlines, images in images; splits train, test, qual_dev, qual_test."""
    for path in source.files:
        item: Published
        for _, item in read_jsonl(path):
            if source.includes(item["split"]):
                description = [item["description"]]
                yield source.row(item["image_file"], "", description, id=item["example_id"])


def chartqa(source: PublishedFiles) -> Iterator[DataRow]:
    """test_human.json and test_augmented.json, images in png; the type of a row is its file."""
    for path, content in zip(source.files, source.contents, strict=True):
        kind = path.stem.rpartition("_")[2]
        for number, item in enumerate(content):
            about = dict(id=f"{path.stem}/{number}", type=kind)
            yield source.row(item["imgname"], item["query"], [str(item["label"])], **about)


def docvqa(source: PublishedFiles) -> Iterator[DataRow]:
    """val_v1.0_withQT.json; image paths (documents/....png) are relative to the directory."""
    for item in source.items("data"):
        about = dict(id=item["questionId"], type=", ".join(item.get("question_types", ())) or None)
        yield source.row(item["image"], item["question"], item.get("answers", ()), **about)


def coco_captions(source: PublishedFiles) -> Iterator[DataRow]:
    """captions_val2014.json, or Karpathy's dataset_coco.json with the splits that big_vision
    uses: train, restval, val, test."""
    content = source.contents[0]
    if "annotations" not in content:
        for item in content["images"]:
            if source.includes(item["split"]):
                image = Path(item.get("filepath", "")) / item["filename"]
                sentences = [sentence["raw"].strip() for sentence in item["sentences"]]
                yield source.row(image, "", sentences, id=item["cocoid"])
        return
    captions: dict[int, list[str]] = {}
    for item in content["annotations"]:
        captions.setdefault(item["image_id"], []).append(item["caption"].strip())
    for item in content["images"]:
        yield source.row(item["file_name"], "", captions.get(item["id"], ()), id=item["id"])


def _read_json(path: Path) -> Published:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not JSON ({error})") from None
