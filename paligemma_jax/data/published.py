"""Convert published data sets from their original files to rows.

A row has image, prefix, suffix (the most frequent answer), answers (all of them), id, and type
where the data set has kinds of questions. RefCOCO's rows are in `refcoco`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from msgspec import Struct

from convert.typed_json import load_json
from paligemma_jax.data.annotated import DATA_LIMIT
from paligemma_jax.data.jsonl import DataRow, read_jsonl
from paligemma_jax.processing.mask_codec import MaskCodec

Content = TypeVar("Content")


@dataclass(frozen=True)
class PublishedFiles:
    """The files of a data set, and how to convert them."""

    files: Sequence[Path]
    images: Path  # directory
    prompt: str  # with {} for the question
    split: str | None  # the split to convert, of a file that has several
    output: Path  # the JSONL to write; masks are written beside it
    codec: MaskCodec | None = None  # encodes masks as <seg> tokens

    def load(self, kind: type[Content]) -> list[tuple[Path, Content]]:
        """Decode all JSON files as `kind`.

        Raises:
            ValueError: A file is not of this type, or there are none.
        """
        files = [path for path in self.files if path.suffix != ".p"]
        if not files:
            raise ValueError("--files must include a JSON file")
        return [(path, load_json(path, kind, DATA_LIMIT)) for path in files]

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


class TextVqaItem(Struct):
    image_id: str | int
    question: str
    question_id: int | str
    answers: list[str] = []


class TextVqaFile(Struct):
    data: list[TextVqaItem]


def textvqa(source: PublishedFiles) -> Iterator[DataRow]:
    """TextVQA_0.5.1_val.json; the images of train and val are in train_images."""
    for _, content in source.load(TextVqaFile):
        for item in content.data:
            image = f"{item.image_id}.jpg"
            yield source.row(image, item.question, item.answers, id=item.question_id)


class VqaQuestion(Struct):
    image_id: int
    question: str
    question_id: int


class VqaAnswer(Struct):
    answer: str


class VqaAnnotation(Struct):
    question_id: int
    answers: list[VqaAnswer] = []
    answer_type: str | None = None
    question_type: str | None = None


class VqaFile(Struct):
    """Questions with their subset, or annotations."""

    data_subtype: str = ""
    questions: list[VqaQuestion] = []
    annotations: list[VqaAnnotation] = []


def vqav2(source: PublishedFiles) -> Iterator[DataRow]:
    """v2_OpenEnded_mscoco_val2014_questions.json and, except for test,
    v2_mscoco_val2014_annotations.json; images in val2014."""
    contents = [content for _, content in source.load(VqaFile)]
    annotations = {item.question_id: item for content in contents for item in content.annotations}
    for content in contents:
        subset = content.data_subtype.replace("test-dev", "test")
        for item in content.questions:
            annotation = annotations.get(item.question_id, VqaAnnotation(item.question_id))
            yield source.row(
                f"COCO_{subset}_{item.image_id:012}.jpg",
                item.question,
                [answer.answer for answer in annotation.answers],
                id=item.question_id,
                type=annotation.answer_type,
                question_type=annotation.question_type,
            )


class DocciItem(Struct):
    example_id: str
    split: str
    image_file: str
    description: str


def docci(source: PublishedFiles) -> Iterator[DataRow]:
    """docci_descriptions.jsonlines, images in images; splits train, test, qual_dev, qual_test."""
    for path in source.files:
        for _, item in read_jsonl(path, DocciItem):
            if source.includes(item.split):
                yield source.row(item.image_file, "", [item.description], id=item.example_id)


class ChartQaItem(Struct):
    imgname: str
    query: str
    label: str | int | float


def chartqa(source: PublishedFiles) -> Iterator[DataRow]:
    """test_human.json and test_augmented.json, images in png; the type of a row is its file."""
    for path, content in source.load(list[ChartQaItem]):
        kind = path.stem.rpartition("_")[2]
        for number, item in enumerate(content):
            about = dict(id=f"{path.stem}/{number}", type=kind)
            yield source.row(item.imgname, item.query, [str(item.label)], **about)


class DocVqaItem(Struct):
    questionId: int
    question: str
    image: str
    answers: list[str] = []
    question_types: list[str] | None = None


class DocVqaFile(Struct):
    data: list[DocVqaItem]


def docvqa(source: PublishedFiles) -> Iterator[DataRow]:
    """val_v1.0_withQT.json; image paths (documents/....png) are relative to the directory."""
    for _, content in source.load(DocVqaFile):
        for item in content.data:
            about = dict(id=item.questionId, type=", ".join(item.question_types or ()) or None)
            yield source.row(item.image, item.question, item.answers, **about)


class Sentence(Struct):
    raw: str


class CaptionedImage(Struct):
    """An image of COCO, or of Karpathy's file with its captions."""

    id: int | None = None
    file_name: str = ""
    cocoid: int | None = None
    filename: str = ""
    filepath: str = ""
    split: str = ""
    sentences: list[Sentence] = []


class Caption(Struct):
    image_id: int
    caption: str


class CaptionFile(Struct):
    images: list[CaptionedImage]
    annotations: list[Caption] | None = None


def coco_captions(source: PublishedFiles) -> Iterator[DataRow]:
    """captions_val2014.json, or Karpathy's dataset_coco.json with the splits that big_vision
    uses: train, restval, val, test."""
    for _, content in source.load(CaptionFile):
        if content.annotations is None:
            for item in content.images:
                if source.includes(item.split):
                    sentences = [sentence.raw.strip() for sentence in item.sentences]
                    image = Path(item.filepath, item.filename)
                    yield source.row(image, "", sentences, id=item.cocoid)
            continue
        captions: dict[int | None, list[str]] = {}
        for item in content.annotations:
            captions.setdefault(item.image_id, []).append(item.caption.strip())
        for item in content.images:
            yield source.row(item.file_name, "", captions.get(item.id, ()), id=item.id)
