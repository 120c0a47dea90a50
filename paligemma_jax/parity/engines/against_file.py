"""Compare this model with logits that another program saved in a file."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from pathlib import Path

import jax
import numpy as np

from paligemma_jax.checkpoints.load import load_model
from paligemma_jax.checkpoints.source import resolve
from paligemma_jax.inference.scoring import forward
from paligemma_jax.parity.compare import Error, measure_error
from paligemma_jax.parity.engines.report import logits_limit
from paligemma_jax.parity.engines.sample import read_sample


@dataclass(frozen=True)
class FileReport:
    """The distance of this model's logits from those of a file, at valid tokens."""

    model: str
    file: str
    numerics: str
    dtype: str
    error: Error
    limit: float  # of the relative error
    equal_tokens: float  # fraction of tokens with the same largest logit
    by_token: np.ndarray  # relative errors float64[B, T]; NaN at pads
    valid: np.ndarray  # bool[B, T]

    @property
    def diverges(self) -> bool:
        return not self.error.relative <= self.limit

    @property
    def first_divergence(self) -> tuple[int, int] | None:
        """Row and token of the first error over the limit, if the file diverges."""
        if not self.diverges:
            return None
        over = ~(self.by_token <= self.limit) & self.valid
        row, token = np.argwhere(over)[0]
        return int(row), int(token)


def compare_with_file(model: str, file: str, numerics: str | None = None) -> FileReport:
    """Compute the logits of a file's inputs, in the dtype of its logits.

    Args:
        model: The checkpoint that the logits were computed from.
        file: As for `identify`.
        numerics: The profile, by default the checkpoint's.

    Raises:
        ValueError: The file is damaged, or does not fit the checkpoint.
    """
    source = resolve(model)
    sample = read_sample(Path(file), source.config)
    loaded = load_model(source, sample.dtype, numerics)
    with jax.default_matmul_precision("highest"):
        logits = np.asarray(forward(loaded, sample.inputs), np.float32)
    valid, expected = sample.inputs.valid, sample.logits
    logits = logits[..., : expected.shape[-1]]
    difference = np.linalg.norm((logits - expected).astype(np.float64), axis=-1)
    with np.errstate(divide="ignore", invalid="ignore"):
        by_token = difference / np.linalg.norm(expected.astype(np.float64), axis=-1)
    same = logits[valid].argmax(axis=-1) == expected[valid].argmax(axis=-1)
    return FileReport(
        model=model,
        file=file,
        numerics=loaded.config.numerics,
        dtype=sample.dtype,
        error=measure_error(logits[valid], expected[valid]),
        limit=logits_limit(loaded.config, sample.dtype),
        equal_tokens=float(same.mean()),
        by_token=np.where(valid, by_token, math.nan),
        valid=valid,
    )


def format_file_report(report: FileReport) -> str:
    """The report as text."""
    tokens = f"{report.equal_tokens:.2%} of {report.valid.sum():,} tokens"
    return "\n".join(
        [
            f"against {report.file}, {report.dtype}, with the numerics of {report.numerics}",
            "",
            f"relative error      {report.error.relative:.1e}, limit {report.limit:.1e}",
            f"largest difference  {report.error.max:.1e}",
            f"same largest logit  {tokens}",
            "",
            file_verdict(report),
        ]
    )


def file_verdict(report: FileReport) -> str:
    """The result in one sentence."""
    if report.first_divergence is None:
        return f"{report.file}: the logits are within tolerance of the profile {report.numerics}"
    row, token = report.first_divergence
    return (
        f"{report.file}: the logits diverge from row {row}, token {token} on; "
        "--identify names the program that computed them"
    )


def as_dict(report: FileReport) -> dict:
    """Plain data, for --json."""
    values = asdict(report)
    del values["by_token"], values["valid"]
    return values | {"first_divergence": report.first_divergence, "verdict": file_verdict(report)}
