"""`paligemma-jax scoreboard`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import tyro

from paligemma_jax.commands.options import File, dumps, flag, require_parent

Folder = Annotated[str, tyro.conf.Positional, flag("DIR")]


def scoreboard(folder: Folder, html: File = None, json: bool = False) -> None:
    """Put all evaluations of a directory beside the published results of their tasks.

    Example: paligemma-jax scoreboard evaluations --html board.html

    Args:
        folder: Directory that contains the --output of `evaluate --recipe`, once or more often,
            at any depth.
        html: HTML file to write, with a picture and a table of all results.
        json: Print the board as one JSON object.
    """
    from paligemma_jax.evaluation import scoreboard_html
    from paligemma_jax.evaluation.scoreboard import read_board

    require_parent("--html", html)
    board = read_board(Path(folder))
    if html:
        Path(html).write_text(
            scoreboard_html.html(board, f"Scoreboard of {folder}"), encoding="utf-8"
        )
    print(dumps(board.json()) if json else scoreboard_html.text(board))
