"""`python -m paligemma_jax.tiny --output DIR`."""

import tyro

from paligemma_jax.errors import report_errors
from paligemma_jax.tiny.recipe import make_tiny

report_errors(lambda: tyro.cli(make_tiny, prog="python -m paligemma_jax.tiny"))
