"""The page of published tasks has the recipes of the program."""

from paligemma_jax.data.recipes import RECIPES
from tools.published_tasks import PAGE, fill


def test_the_tables_of_the_page_are_those_of_the_recipes():
    page = PAGE.read_text()
    assert fill(page) == page, "run python -m tools.published_tasks"
    assert all(f"\n| `{name}` |" in page for name in RECIPES)
