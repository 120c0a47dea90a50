"""`paligemma-jax parity`."""

from __future__ import annotations

import sys
from typing import Annotated, Literal

import tyro

from paligemma_jax.commands.options import Depth, File, Name, Numerics, dumps, require_parent

Images = Annotated[tuple[str, ...], tyro.conf.arg(metavar="FILE [FILE ...]", help_behavior_hint="(default: embedded)")]
Texts = Annotated[tuple[str, ...], tyro.conf.arg(metavar="TEXT [TEXT ...]", help_behavior_hint="(default: embedded)")]


def parity(
    model: Name = "tiny",
    dtype: Literal["float32", "bfloat16"] = "float32",
    numerics: Numerics = None,
    image: Images = (),
    prompt: Texts = (),
    suffix: Texts = (),
    new: int = 16,
    gradients: bool = False,
    depth: Depth = None,
    html: File = None,
    json: bool = False,
) -> None:
    """Compare with transformers, stage by stage, on the same inputs.

    Example: paligemma-jax parity --html parity.html

    Exit code 1 if a stage is beyond its tolerance: the first one is told.

    Args:
        model: tiny (embedded), a checkpoint as for generate, or a preset (3b-224, 10b-448, 28b-896, pg1-3b-224, ...) with random weights.
        dtype: float32, or bfloat16: then errors against float32 are compared, ours with transformers' own.
        numerics: transformers or big_vision; for the latter transformers is adapted, and what cannot be is told.
        image: Image files, one for each prompt, or one for all of them.
        prompt: What to ask.
        suffix: What the model is to say, one for each prompt.
        new: Greedy tokens to compare; 0 leaves them out, and with them all that needs this model whole in memory.
        gradients: Compare the gradient of every parameter too; both models have to fit into memory.
        depth: Of a preset, only so many layers in each tower.
        html: Write a report with pictures to this file.
        json: Print one JSON object instead of the table.
    """
    require_parent("--html", html)
    from paligemma_jax.parity import html as pages
    from paligemma_jax.parity import report as text
    from paligemma_jax.parity.run import ParityConfig, run

    report = run(ParityConfig(model, dtype, numerics, image, prompt, suffix, new, gradients, depth))
    print(dumps(text.as_dict(report)) if json else text.table(report))
    if html:
        pages.write_html(report, html)
    if report.first is not None:
        print(f"paligemma-jax: {text.verdict(report).splitlines()[0]}", file=sys.stderr)
        raise SystemExit(1)
