"""Recipes of the tasks that the report of PaliGemma 2 adds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from paligemma_jax.data.recipes.recipe import Recipe, Source

PAD = "each image padded with white to a square"


def _one_rate(rate: float) -> Mapping[str, float]:
    """The report gives one learning rate for all sizes that it tried."""
    return {"3b": rate, "10b": rate}


TEXT_DETECTION = Recipe(
    about="words of photos and their boxes (ICDAR'15)",
    prompt="ocr",
    preprocessing="each image resized to a square; the answer has each word with its box. Trained "
    "on ICDAR'15, Total-Text, MLT17, MLT19, HierText, TextOCR and IntelOCR together",
    resolutions=(896,),
    metrics=("word_f1",),
    steps=15_000,
    label_smoothing=0.1,
    weight_decay=None,
    dropout=None,
    learning_rate=_one_rate(1e-5),
    new_tokens=2048,
    sources=(
        Source("training, longest answer", "report 2, B.1"),
        Source("prompt", "chosen here: the report does not give it"),
    ),
)
TABLE = Recipe(
    about="tables of scientific articles as HTML (PubTabNet)",
    prompt="table",
    preprocessing=f"{PAD}; the answer is HTML, and td has the attribute "
    'coords="<locXMIN><locYMAX><locXMAX><locYMAX>" for the box of its text',
    resolutions=(896,),
    metrics=("teds", "s_teds"),
    missing_metrics=("grits_top", "grits_con"),
    steps=15_000,
    weight_decay=None,
    dropout=None,
    learning_rate=_one_rate(1e-4),
    new_tokens=4096,
    sources=(
        Source("training, longest answer, preprocessing", "report 2, B.1 and B.2"),
        Source("prompt", "chosen here: the report does not give it"),
    ),
)
MOLECULES = Recipe(
    about="SMILES of drawings of molecules (PubChem; evaluated on ChemDraw)",
    prompt="molecule",
    preprocessing=PAD,
    resolutions=(224, 448),
    metrics=("exact_match",),
    steps=30_000,
    label_smoothing=0.1,
    weight_decay=None,
    dropout=None,
    learning_rate=_one_rate(1e-4),
    new_tokens=256,
    sources=(
        Source("training, longest answer, preprocessing", "report 2, B.3"),
        Source("prompt", "chosen here: the report does not give it"),
    ),
)
DETECTION = Recipe(
    about="boxes of 80 classes (COCO detection)",
    prompt="detect all classes\\n",
    preprocessing="each image resized to a square; the answer has all boxes in random order, then "
    "noise boxes up to the longest answer, whose coordinates have no loss. Here: finetune "
    "--box-order random --noise-boxes N; evaluate --grammar boxes:LABELS --confidence label",
    metrics=("coco",),
    epochs=50,
    batch_size=None,
    weight_decay=None,
    dropout=None,
    label_smoothing=None,
    new_tokens=None,
    sources=(Source("prompt, epochs, noise boxes", "report 2, appendix C"),),
)

NEW_TASKS = {
    "icdar15": TEXT_DETECTION,
    "total-text": replace(TEXT_DETECTION, about="words of photos and their boxes (Total-Text)"),
    "pubtabnet": TABLE,
    "fintabnet": replace(TABLE, about="tables of financial reports as HTML (FinTabNet)"),
    "molecules": MOLECULES,
    "grandstaff": replace(
        MOLECULES,
        about="**kern transcriptions of piano scores (GrandStaff)",
        prompt="score",
        resolutions=(224, 448, 896),
        metrics=("cer", "ser", "ler"),
        new_tokens=1024,
        sources=(
            Source("training, longest answer, preprocessing", "report 2, B.3 and B.4"),
            Source("prompt", "chosen here: the report does not give it"),
        ),
    ),
    "mimic-cxr": Recipe(
        about="findings and impression of chest X-rays (MIMIC-CXR)",
        prompt="{}",
        preprocessing="each image resized to a square; {} is the indication. Mentions of earlier "
        "X-rays are removed from the reports",
        resolutions=(448, 896),
        metrics=("cider", "bleu", "rouge_l"),
        missing_metrics=("radgraph_f1",),
        epochs=8,
        batch_size=None,
        learning_rate={"3b": 5e-6},
        new_tokens=None,
        sources=(
            Source("epochs, learning rate (at 448 pixels), decoding, prompt", "report 2, B.7"),
            Source("preprocessing", "report 2, 4.8"),
        ),
    ),
    "coco-detection": DETECTION,
    "doclaynet": replace(DETECTION, about="boxes of the parts of pages (DocLayNet)"),
}
