"""WORKDIR/student: what export and evaluation need of a run once its teacher, caches and first weights are gone."""

import dataclasses
import glob
import os
import sys
from pathlib import Path
from typing import Any

from jax.sharding import Mesh

from jaxkd.config.schema import SELF, Experiment, experiment, from_mapping, plain
from jaxkd.data import tokenize
from jaxkd.models.transformer import Config
from jaxkd.run.open_models import Models, open_models, student_model, teacher_models, teacher_sources
from jaxkd.run.workdir import saved_experiment
from jaxkd.runtime import files

_FOLDER, _RECORD, _DATA = "student", "jaxkd.json", "data"
_PATHS = ("path", "cache", "source", "validation", "directory", "tokenizer")  # keys of a recipe that hold paths
_WORDS = ("", "random", "teacher", "bytes", SELF)  # values of them that are not paths


def save(workdir: Path, models: Models) -> None:
    """Write the student's config and tokenizers, and from which directory the recipe's relative paths start."""
    folder, own = workdir / _FOLDER, models.student.tokenizer or models.tokenizer
    own.save(folder)
    if own.fingerprint != models.tokenizer.fingerprint:
        models.tokenizer.save(folder / _DATA)
    config = dataclasses.asdict(models.student.config)
    files.write_json(folder / _RECORD, {"config": config, "vocab": models.vocab, "directory": os.getcwd()})


def located_experiment(workdir: Path) -> Experiment:
    """A run's experiment, its relative paths made absolute where they exist, without caches that are gone."""
    e, record = saved_experiment(workdir), _record(workdir)
    return experiment(_located(plain(e), Path(record["directory"]))) if record else e


def _located(values: Any, directory: Path, key: str = "") -> Any:
    if isinstance(values, dict):
        inner = lambda name: "source" if key == "domains" else name
        return {name: _located(value, directory, inner(name)) for name, value in values.items()}
    if not isinstance(values, str) or key not in _PATHS or values in _WORDS:
        return values
    path, mark, field = values.partition("::")
    if key == "directory" or glob.glob(str(directory / path)):
        return str(directory / path) + mark + field
    return "" if key == "cache" and not Path(path).expanduser().exists() else values


def open_run(e: Experiment, workdir: Path, mesh: Mesh, with_teachers: bool = True) -> tuple[Models, str]:
    """A run's models, and why its teacher cannot be opened, "" where it can.

    `Models.teachers` is empty where it cannot, and where it is not wanted. The original files are opened for a frozen
    student, which is in no checkpoint, and for a run of an older jaxkd.
    """
    if e.student.frozen or not (record := _record(workdir)):
        return open_models(e, mesh, {}), ""
    config, folder = from_mapping(Config, record["config"], "config"), workdir / _FOLDER
    own = tokenize.from_directory(folder)
    data = tokenize.from_directory(folder / _DATA) if (folder / _DATA).is_dir() else own
    columns, vocab = config.vocab_multiple, record["vocab"]
    student = student_model(e, (None, config), mesh, columns, cut=False)._replace(tokenizer=own)
    if e.teacher.is_self:
        return Models(student, {"teacher": student}, data, vocab, is_self=True), ""
    try:
        sources = teacher_sources(e, {}) if with_teachers else {}
    except FileNotFoundError as error:
        return Models(student, {}, data, vocab), str(error)
    return Models(student, teacher_models(e, sources, mesh, columns), data, vocab), ""


def _record(workdir: Path) -> dict[str, Any]:
    """{} for a run of an older jaxkd, and where the record is torn: `train` writes it again."""
    try:
        return files.read_json(workdir / _FOLDER / _RECORD)
    except FileNotFoundError:
        return {}
    except files.Torn as error:
        print(f"jaxkd: {error}: the run's original files are opened", file=sys.stderr)
        return {}
