"""Evaluations of a transferred model on data that it was not trained on; and the mixture."""

from __future__ import annotations

from paligemma_jax.data.recipes.recipe import Recipe, Source

LOW = (224, 448)

ZERO_SHOT = {
    "nocaps": Recipe(
        about="captions of novel objects (NoCaps)",
        zero_shot_from="coco-captions",
        prompt="caption en",
        resolutions=LOW,
        metrics=("cider",),
        beams=2,
        sources=(Source("prompt, model, decoding", "report 1, B.8", "big_vision cococap"),),
    ),
    "xm3600": Recipe(
        about="captions in 36 languages (Crossmodal-3600)",
        zero_shot_from="coco-35l",
        prompt="caption {}",
        preprocessing="each image resized to a square; {} is the code of the language, which is "
        "also the type of the row",
        resolutions=LOW,
        metrics=("cider",),
        sources=(Source("prompt, model, longest answer", "report 1, B.10", "big_vision coco35l"),),
    ),
    "xgqa": Recipe(
        about="questions in eight languages, answered in English (xGQA)",
        zero_shot_from="gqa",
        prompt="answer en {}",
        preprocessing="each image resized to a square; the type of a row is its language",
        resolutions=LOW,
        metrics=("exact_match",),
        sources=(Source("prompt, model, longest answer", "report 1, B.13", "big_vision gqa"),),
    ),
    "marvl": Recipe(
        about="whether a sentence in one of five languages is true of two photos (MaRVL)",
        zero_shot_from="nlvr2",
        prompt="answer en {}",
        images=2,
        preprocessing="each image resized to a square; the type of a row is its language",
        resolutions=LOW,
        metrics=("exact_match",),
        new_tokens=64,
        sources=(Source("prompt, model, longest answer", "report 1, B.19", "big_vision nlvr2"),),
    ),
    "countbenchqa": Recipe(
        about="counting questions with counts from 2 to 10 (CountBenchQA)",
        zero_shot_from="tallyqa",
        prompt="answer en {}",
        resolutions=LOW,
        metrics=("tallyqa",),
        sources=(Source("prompt, model, metric", "report 1, B.30", "big_vision tallyqa"),),
    ),
    "pope": Recipe(
        about="whether an object is in the image (POPE)",
        zero_shot_from="vqav2",
        prompt="answer en {}",
        resolutions=LOW,
        metrics=("pope",),
        new_tokens=48,
        sources=(
            Source("model", "report 1, B.37", "big_vision README"),
            Source("prompt", "report 1, B.37; big_vision's pope leaves the prefix to its caller"),
            Source("longest answer", "big_vision pope"),
        ),
    ),
    "mmvp": Recipe(
        about="pairs of images that CLIP confuses (MMVP)",
        zero_shot_from="vqav2",
        prompt="answer en {}",
        resolutions=LOW,
        metrics=("mmvp_pairs",),
        sources=(
            Source("model", "report 1, B.36", "big_vision README"),
            Source("prompt", "report 1, B.36"),
        ),
    ),
    "objaverse": Recipe(
        about="the class of a 3D object from eight views (Objaverse-LVIS)",
        zero_shot_from="vqav2",
        prompt="answer en {}",
        preprocessing="each view by itself, with four questions; the answers are combined by "
        "their scores (appendix G of report 1)",
        resolutions=LOW,
        metrics=("sentence_similarity",),
        missing_metrics=("sentence_similarity",),
        sources=(
            Source("model", "report 1, B.38", "big_vision README"),
            Source("prompt", "report 1, B.38"),
        ),
    ),
    "mixture": Recipe(
        about="27 of these tasks in one model of the first PaliGemma",
        preprocessing="the prompt of each row starts with the name of its task; all tasks weigh "
        "the same. The report does not list the 27 tasks: it leaves out those with several images",
        resolutions=(224,),
        metrics=(),
        epochs=10,
        learning_rate={"3b": 1e-5},
        new_tokens=None,
        sources=(
            Source("number of tasks, epochs", "report 1, appendix H"),
            Source("training", "report 1, 6.2: learning rate and batch size of most transfers"),
        ),
    ),
}
