from support.finetuning import data  # noqa: F401, a fixture
