"""docs/config.md, rendered from the schema: `python -m jaxkd.config.reference > docs/config.md`."""

import dataclasses
import typing
from collections.abc import Iterator, Mapping
from typing import Any

from jaxkd.config.schema import Experiment, Schedule, block_of, entry_of

_TYPES = {
    str: "text",
    int: "integer",
    float: "number",
    bool: "true or false",
    Any: "value",
    Schedule: "[schedule](#a-schedule)",
}
_INTRO = """\
# Every key of a recipe

Rendered from `jaxkd/config/schema.py` by `python -m jaxkd.config.reference`.

A recipe is a Python file with `get_config()` or `get_config(argument)`, given as `--config FILE` or `--config
FILE:ARGUMENT`. It returns a `ConfigDict` of the keys below that differ from their defaults; the workdir's `config.json`
holds all of them. Any key can be set on the command line, whether or not the recipe states it:

```
--config.run.steps=500                                      a number
--config.teacher.path=models/Llama-3.1-8B                   text, without quotes
--config.student.frozen                                     a boolean: the same as =true
--config.student.layers=3                                   a sequence: 3, or 0,3,5, or (0, 3, 5)
--config.optim.clip=None                                    the default again
--config.objective.kd.weight="{'schedule': 'linear', 'peak': 1.0}"   a block
--config.objective.hid.weight=0.1 --config.objective.hid.feature="hidden_mse(layers={2: 4})"   a new term
--config.data.domains.en.wiki=data/wiki                     a new domain, `en.wiki`
--config.data.domains.code=                                 removes a domain; the same for terms and members
```

`--config.KEY VALUE` works too. NAME stands for a name of your choice. `MODULE:CALL` is a function of your own in an
importable module, such as `my_package.my_module:my_kl(beta=0.5)`: put its folder on PYTHONPATH. Arguments are literals.
"""


def render() -> str:
    """The page: a table of keys for each block."""
    blocks = (line for name, kind in typing.get_type_hints(Experiment).items() for line in _sections(name, kind))
    return "\n".join([_INTRO, *blocks, *_section("A schedule", "", Schedule)])


def _sections(prefix: str, kind: Any) -> Iterator[str]:
    """The table of a block, then those of the blocks in it."""
    if (entry := entry_of(kind)) is not None:
        prefix, kind = f"{prefix}.NAME", entry
    kind = block_of(kind)
    yield from _section(f"`{prefix}`", prefix + ".", kind)
    for name, inner in typing.get_type_hints(kind).items():
        if block_of(entry_of(inner) or inner) not in (None, Schedule):
            yield from _sections(f"{prefix}.{name}", inner)


def _section(title: str, prefix: str, kind: Any) -> Iterator[str]:
    yield f"## {title}\n\n{kind.__doc__}\n"
    yield "| key | type | default | meaning |\n|---|---|---|---|"
    hints = typing.get_type_hints(kind, include_extras=True)
    for field in dataclasses.fields(kind):
        hint = hints[field.name]
        base, meaning = typing.get_args(hint) if hasattr(hint, "__metadata__") else (hint, hint.__doc__.splitlines()[0])
        yield f"| `{prefix}{field.name}` | {_type(base)} | {_default(field)} | {meaning} |"
    yield ""


def _type(kind: Any) -> str:
    arguments = typing.get_args(kind)
    if typing.get_origin(kind) is tuple:
        return f"{_TYPES[arguments[0]]}s"
    if typing.get_origin(kind) is Mapping:
        return f"{_type(arguments[1])} by name"
    return " or ".join(map(_type, arguments)) if arguments else _TYPES.get(kind, "a block")


def _default(field: dataclasses.Field) -> str:
    if field.default is dataclasses.MISSING:
        return "required" if field.default_factory is dataclasses.MISSING else "none"
    if dataclasses.is_dataclass(field.default):
        return ""
    text = ", ".join(map(str, field.default)) if isinstance(field.default, tuple) else str(field.default)
    text = text.lower() if isinstance(field.default, bool) else text
    return f"`{text}`" if text else "empty"


if __name__ == "__main__":
    print(render(), end="")
