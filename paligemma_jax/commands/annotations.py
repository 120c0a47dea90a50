"""`paligemma-jax annotations`."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated, Literal

import tyro

from paligemma_jax.commands.options import File, dumps, flag

Format = Annotated[Literal["coco", "yolo", "voc", "labelme"], tyro.conf.Positional, flag("FORMAT")]
Labels = Annotated[tuple[str, ...], flag("LABEL [LABEL ...]", "those of its image")]
Files = Annotated[tuple[str, ...], flag("FILE [FILE ...]")]


def convert_annotations(
    name: Format,
    files: Files,
    output: str,
    images: str = ".",
    task: Literal["detect", "segment"] = "detect",
    labels: Labels = (),
    codec: File = None,
    json: bool = False,
) -> None:
    """Convert annotated boxes and masks to rows to fine-tune and evaluate on.

    Example: paligemma-jax annotations voc --files Annotations --output train.jsonl

    Args:
        name: coco (instances_*.json, with polygons or RLE), yolo, voc (Pascal VOC) or labelme.
        files: Files or directories of annotations; for yolo the directory of labels, and data.yaml
            or classes.txt.
        output: JSONL file to write. A picture of five rows is written beside it, to check.
        images: Directory of the images.
        task: Write rows of boxes (detect) or of boxes and masks (segment).
        labels: Labels that each row asks for, in this order. Objects with other labels are
            dropped; images without these labels get a row with an empty answer.
        codec: Mask codec (vae-oid.npz) to encode masks with; required by --task segment.
        json: Print a summary as one JSON object instead of a line of text.
    """
    from paligemma_jax.data.annotations import convert

    result = convert(name, files, images, output, task, codec, labels)
    if json:
        print(dumps({**asdict(result), "picture": str(result.picture)}))
        return
    dropped = [f"{count} objects {reason} dropped" for reason, count in result.dropped.items()]
    if result.empty_images:
        dropped.append(f"{result.empty_images} images without objects left out")
    print(
        f"{result.rows} rows with {result.objects} objects"
        f"{''.join(f'; {text}' for text in dropped)}: {output}; check {result.picture}"
    )
