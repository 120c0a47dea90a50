from paligemma_jax.cli import main

main()
