"""Figures of the student's own text, and its samples beside the start's and the teacher's."""

from collections.abc import Sequence

from jaxkd.report import charts
from jaxkd.report.charts import Line, figure
from jaxkd.report.records import Row, value_of
from jaxkd.report.text import escape, table

_CHARTS = (
    ("KL(student || teacher) on the student's own text", "nats", {"reverse_kl": "reverse KL"}),
    ("KL(teacher || student) on the student's own text", "nats", {"forward_kl": "forward KL"}),
    ("Entropy on the student's own text", "nats", {"student_entropy": "student", "teacher_entropy": "teacher"}),
    ("Shared top 16", "", {"overlap": "tokens in both", "teacher_mass": "teacher's mass on the student's"}),
    ("Distinct n-grams", "", {"distinct_1": "1 token", "distinct_2": "2 tokens", "distinct_3": "3 tokens"}),
    ("Tokens of a text", "tokens", {"tokens": "mean"}),
    ("Texts that end", "", {"ended": "share"}),
    ("Importance ratio", "", {"importance_ratio": "forward pass over sampler, at temperature 1"}),
)


def page(diagnostics: Sequence[Row], samples: Sequence[Row]) -> str:
    """The section's HTML, nothing where no sample was written."""
    drawn = []
    for title, unit, keys in _CHARTS:
        lines = [
            Line(name, [value_of(row, "step") for row in diagnostics], [value_of(row, key) for row in diagnostics], i)
            for i, (key, name) in enumerate(keys.items())
            if any(key in row for row in diagnostics)
        ]
        drawn += [figure(title, lines, unit=unit, zero=True)] if lines else []
    return (charts.grid(drawn) if drawn else "") + texts(samples)


def texts(samples: Sequence[Row]) -> str:
    """A table of prompts: the student's text at the start and now, and the teacher's."""
    students = [row for row in samples if row.get("author") == "student"]
    if not students:
        return ""
    first, last = (extreme(int(row["step"]) for row in students) for extreme in (min, max))

    def cell(row: Row | None) -> str:
        return "" if row is None else f'<p class="sample">{escape(row["text"])}{"" if row["ended"] else " …"}</p>'

    def of(row: Row, author: str, step: int) -> Row | None:
        same = lambda other: all(other[key] == row[key] for key in ("domain", "row"))
        return next((r for r in samples if r["author"] == author and r["step"] == step and same(r)), None)

    has_teacher = any(row["author"] == "teacher" for row in samples)
    head = ["prompt", f"student, step {first}", *([f"student, step {last}"] if last > first else [])]
    rows = []
    for row in (row for row in students if row["step"] == last):
        cells = [f'<p class="sample"><b>{escape(row["domain"])}</b> {escape(row["prompt"])}</p>']
        cells += [cell(of(row, "student", step)) for step in dict.fromkeys((first, last))]
        rows.append([*cells, *([cell(of(row, "teacher", 0))] if has_teacher else [])])
    note = '<p class="note">Prompts of validation rows; … is where a text met its limit.</p>'
    return table([*head, *(["teacher"] if has_teacher else [])], rows) + note
