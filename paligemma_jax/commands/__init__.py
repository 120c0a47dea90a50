"""The subcommands of `paligemma-jax`, one per file, and their shared options."""
