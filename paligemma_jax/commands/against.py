"""`paligemma-jax parity --against` a file of logits or another program."""

from __future__ import annotations

import sys

from paligemma_jax.commands.options import dumps


def compare_with_file(
    model: str, file: str, numerics: str | None, html: str | None, json: bool
) -> None:
    """Compare with logits in a file."""
    from paligemma_jax.parity.engines import against_file
    from paligemma_jax.parity.engines.pages import write_file_page

    report = against_file.compare_with_file(model, file, numerics)
    print(dumps(against_file.as_dict(report)) if json else against_file.format_file_report(report))
    if html:
        write_file_page(report, html)
    if report.diverges:
        fail(against_file.file_verdict(report))


def compare_with_engine(
    case: tuple, engine: str, dtype: str, new: int, python: str | None, html: str | None, json: bool
) -> None:
    """Compare with another program. `case` has the arguments of `load_parity_case`."""
    from paligemma_jax.parity.case import load_parity_case
    from paligemma_jax.parity.engines import report as text
    from paligemma_jax.parity.engines.against import compare_with_engine
    from paligemma_jax.parity.engines.environment import parse_engine
    from paligemma_jax.parity.engines.pages import write_engine_page

    parse_engine(engine)  # before anything is loaded
    report = compare_with_engine(load_parity_case(*case), engine, dtype, new, python)
    print(dumps(text.as_dict(report)) if json else text.format_engine_report(report))
    if html:
        write_engine_page(report, case[0], html)
    if report.first_divergence:
        fail(text.engine_verdict(report))


def fail(line: str) -> None:
    """Print a line on stderr and exit with 1."""
    print(f"paligemma-jax: {line}", file=sys.stderr)
    raise SystemExit(1)
