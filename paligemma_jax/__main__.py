"""`python -m paligemma_jax` runs the command `paligemma-jax`."""

from paligemma_jax.cli import main

if __name__ == "__main__":
    main()
