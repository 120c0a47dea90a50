"""Recipes of captions, and of captions and questions about videos."""

from __future__ import annotations

from paligemma_jax.data.recipes.recipe import Recipe, Source, rates, transfer_sources

CAPTION = "caption en"
LOW = (224, 448)
FRAMES = "16 frames, each resized to a square, as the images of a row"
FROZEN = "image encoder and projector"


def _video_sources(config: str, frames: str | None = None) -> tuple[Source, ...]:
    confirmed = f"big_vision {config}" if frames is None else frames
    return (
        *transfer_sources(config, rates_confirmed=False),
        Source("frames", "report 1, 3.2.4", confirmed),
    )


CAPTIONS = {
    "coco-captions": Recipe(
        about="captions (COCO)",
        prompt=CAPTION,
        resolutions=LOW,
        metrics=("cider",),
        epochs=5,
        learning_rate=rates(3, 0.6, 0.6),
        sources=transfer_sources("cococap"),
        weight_decay=1e-6,
        beams=2,
        answers=5,
    ),
    "coco-35l": Recipe(
        about="captions in 35 languages (COCO-35L)",
        prompt="caption {}",
        preprocessing="each image resized to a square; {} is the code of the language, which is "
        "also the type of the row",
        resolutions=LOW,
        metrics=("cider",),
        epochs=25,
        weight_decay=1e-6,
        learning_rate=rates(3, 0.6, 0.3),
        sources=transfer_sources("coco35l"),
        answers=35
        * 5,  # of an image, in all languages; an epoch of the reports has each image once
    ),
    "textcaps": Recipe(
        about="captions that include text in the image (TextCaps)",
        prompt=CAPTION,
        preprocessing="each image resized to a square (training: a random crop of 7/8); answers in "
        "lower case",
        resolutions=LOW,
        metrics=("cider",),
        epochs=5,
        weight_decay=1e-6,
        learning_rate=rates(1, 1, 0.3),
        sources=transfer_sources("textcaps"),
        beams=3,
        answers=5,
    ),
    "scicap": Recipe(
        about="captions of scientific figures (SciCap, first sentence)",
        prompt=CAPTION,
        resolutions=LOW,
        metrics=("cider",),
        epochs=80,
        dropout=0.1,
        label_smoothing=0.1,
        learning_rate=rates(30, 30, 30),
        sources=transfer_sources("scicap"),
        new_tokens=96,
    ),
    "screen2words": Recipe(
        about="summaries of screens of phones (Screen2Words)",
        prompt=CAPTION,
        resolutions=LOW,
        metrics=("cider",),
        epochs=10,
        dropout=0.3,
        label_smoothing=0.2,
        learning_rate=rates(6, 1, 1),
        sources=transfer_sources("screen2words"),
        new_tokens=24,
        answers=5,
    ),
    "widgetcap": Recipe(
        about="what an element of a screen does (Widget Captioning)",
        prompt=CAPTION,
        preprocessing="each image resized to a square, with a red box drawn around the element",
        resolutions=LOW,
        metrics=("cider",),
        epochs=4,
        batch_size=64,
        weight_decay=3e-7,
        dropout=0.1,
        label_smoothing=0.1,
        learning_rate=rates(3, 1, 0.6),
        sources=transfer_sources("widgetcap"),
    ),
    "docci": Recipe(
        about="long, fine-grained captions (DOCCI)",
        prompt=CAPTION,
        resolutions=(448,),
        metrics=("characters", "sentences", "cider"),
        missing_metrics=("non_entailment",),
        new_tokens=512,
        epochs=10,
        learning_rate=rates(10, 3, 1),
        sources=(
            Source(
                "training",
                "chosen here: B.5 of report 2 gives no figures and refers to 3.2.4 of report 1, "
                "which tries 1 to 100 epochs and 3e-6 to 3e-5; this is the middle of each range, "
                "with lower rates for larger models, as 4.1.2 of report 2 advises",
            ),
            Source("prompt", "chosen here: the prompt for captions"),
            Source(
                "longest answer",
                "chosen here: section 4.6 of report 2 has 192 for its human evaluation",
            ),
        ),
    ),
    "msrvtt-cap": Recipe(
        about="captions of short videos (MSR-VTT)",
        prompt=CAPTION,
        images=16,
        preprocessing=FRAMES,
        resolutions=(224,),
        metrics=("cider",),
        epochs=20,
        batch_size=128,
        learning_rate=rates(10, 1),
        sources=_video_sources("msrvtt_cap"),
        frozen=FROZEN,
        answers=20,
    ),
    "msrvtt-qa": Recipe(
        about="questions about short videos (MSR-VTT)",
        prompt="answer en {}",
        images=16,
        preprocessing=FRAMES,
        resolutions=(224,),
        metrics=("exact_match",),
        epochs=1,
        batch_size=128,
        learning_rate=rates(6, 3),
        sources=_video_sources("msrvtt_qa"),
        frozen=FROZEN,
        new_tokens=64,
    ),
    "msvd-qa": Recipe(
        about="questions about short segments of videos (MSVD)",
        prompt="answer en {}",
        images=16,
        preprocessing=FRAMES,
        resolutions=(224,),
        metrics=("exact_match",),
        epochs=1,
        batch_size=128,
        weight_decay=3e-7,
        learning_rate=rates(3, 1),
        sources=_video_sources("msvd_qa", ""),  # big_vision's configuration reads 8 frames
        new_tokens=64,
    ),
    "activitynet-cap": Recipe(
        about="captions of segments of videos (ActivityNet)",
        prompt=CAPTION,
        images=16,
        preprocessing=FRAMES,
        resolutions=(224,),
        metrics=("cider",),
        epochs=1,
        batch_size=128,
        weight_decay=1e-6,
        learning_rate=rates(3, 3),  # 3b: 1e-5 did equally well
        sources=_video_sources("activitynet_cap"),
        frozen=FROZEN,
        new_tokens=64,
    ),
    "activitynet-qa": Recipe(
        about="questions about videos (ActivityNet)",
        prompt="answer en {}",
        images=16,
        preprocessing=FRAMES,
        resolutions=(224,),
        metrics=("exact_match",),
        epochs=1,
        batch_size=128,
        weight_decay=1e-6,
        learning_rate=rates(6, 6),
        sources=_video_sources("activitynet_qa"),
        new_tokens=64,
    ),
    "vatex": Recipe(
        about="captions of videos (VATEX)",
        prompt=CAPTION,
        images=16,
        preprocessing=FRAMES,
        resolutions=(224,),
        metrics=("cider",),
        epochs=10,
        batch_size=128,
        weight_decay=3e-7,
        learning_rate=rates(3, 3),
        sources=_video_sources("vatex_cap"),
        new_tokens=64,
        answers=10,
    ),
}
