"""Prints docs/api.md from the docstrings of jaxkd's public names:  python docs/api.py > docs/api.md"""

import inspect

import jaxkd

HEADINGS = {
    "core.types": "Types",
    "losses.distill": "A loss for a loop of one's own",
    "losses.divergences": "Divergences",
    "kernels.api": "Kernels",
    "losses.features": "Terms over features",
    "losses.objective": "Objectives",
    "data.load_model": "Models and text",
    "teachers.base": "Teachers",
    "train.state": "The step",
}


def signature(name: str, value: object) -> str:
    """`name(arguments)`, or the name alone for a class whose fields its docstring lists."""
    if inspect.isclass(value):
        fields = getattr(value, "_fields", None) or tuple(getattr(value, "__dataclass_fields__", ()))
        return f"{name}({', '.join(fields)})"
    parameters = []
    for parameter in inspect.signature(value).parameters.values():
        parameter = parameter.replace(annotation=inspect.Parameter.empty)  # which would hide the names
        if " at 0x" in repr(parameter.default):
            parameter = parameter.replace(default=...)
        parameters.append(parameter)
    return f"{name}{inspect.Signature(parameters)}"


def page() -> str:
    """The whole page as Markdown."""
    lines = [
        "# The public names",
        "",
        "`import jaxkd as kd`. Made from the docstrings by `python docs/api.py > docs/api.md`.",
    ]
    for module, names in jaxkd._PUBLIC.items():
        lines += ["", f"## {HEADINGS[module]}"] if module in HEADINGS else []
        for name in names:
            value = getattr(jaxkd, name)
            lines += ["", f"### `kd.{signature(name, value)}`", "", "```text", inspect.getdoc(value) or "", "```"]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(page(), end="")
