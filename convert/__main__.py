"""`python -m convert`: the same command as `paligemma-jax convert`."""

import sys

from paligemma_jax.cli import main

if __name__ == "__main__":
    main(["convert", *sys.argv[1:]])
