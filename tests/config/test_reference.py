"""docs/config.md is what the schema renders to."""

from harness import REPOSITORY

from jaxkd.config import reference


def test_the_page_is_current():
    page = (REPOSITORY / "docs" / "config.md").read_text(encoding="utf-8")
    assert page == reference.render(), "run python -m jaxkd.config.reference > docs/config.md"
    assert all(f"`{key}`" in page for key in ("run.mesh.model", "objective.NAME.weight", "teacher.members.NAME.path"))
