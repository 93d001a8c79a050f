"""A recipe's objective block made into terms: what its strings and schedules mean."""

import ast
import math
from collections.abc import Mapping
from types import ModuleType
from typing import Any, NamedTuple

from jaxkd.config.schema import Schedule, Term, nearest
from jaxkd.core import schedules
from jaxkd.core.types import Batch, Divergence, Head, Scalar
from jaxkd.kernels.api import refusal, unstored
from jaxkd.losses import divergences, features, objective
from jaxkd.losses.feature_term import FeatureTerm
from jaxkd.models import transformer
from jaxkd.models.transformer import Config

_RESERVED = (
    "loss",
    "step",
    "lr",
    "tokens",
    "tokens_per_s",
    "step_s",
    "grad_norm",
    "param_norm",
    "share",
    "rule_s",
    "excess",
    "weight",
)


def scalar(spec: float | Schedule, steps: int, where: str) -> Scalar:
    """A number as it is, a `Schedule` as a function of the step.

    Raises:
        ValueError: for a schedule that `jaxkd/core/schedules.py` does not have.
    """
    if not isinstance(spec, Schedule):
        return spec
    if spec.schedule not in schedules.__all__:
        raise ValueError(f"unknown {where}.schedule '{spec.schedule}': {nearest(spec.schedule, schedules.__all__)}")
    return getattr(schedules, spec.schedule)(spec.peak, steps, spec.warmup, spec.end)


def call(text: str, module: ModuleType, where: str) -> Any:
    """What a name or a call spells, such as "reverse_kl" or "hidden_mse(layers={2: 4})".

    Args:
        text: the name of a public function of `module`, with literals as arguments.
        module: with `__all__`.
        where: the config's key, for messages.

    Raises:
        ValueError: for another name, arguments that are not literals, or that the function does not take.
    """
    try:
        node = ast.parse(text, mode="eval").body
        if isinstance(node, ast.Call):
            name, arguments = ast.unparse(node.func), [ast.literal_eval(a) for a in node.args]
            options = {str(k.arg): ast.literal_eval(k.value) for k in node.keywords}
        else:
            name, arguments, options = ast.unparse(node), [], {}
    except (SyntaxError, ValueError):
        raise ValueError(f"{where} must be a name or a call with literals, got '{text}'") from None
    if name not in module.__all__:
        raise ValueError(f"unknown {where} '{name}': {nearest(name, module.__all__)}")
    try:
        return getattr(module, name)(*arguments, **options)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where}: {error}") from None


class SignalSpec(NamedTuple):
    """What kind of signal a teacher gives."""

    kind: type = Head  # Head, TopK, Sampled; Batch where it is text
    entries: int = 0
    tails: tuple[float, ...] = (1.0,)
    layers: bool = True  # whether it has features of every layer


FULL = SignalSpec()
"""A live teacher."""


def build(
    block: Mapping[str, Term], steps: int, models: Mapping[str, Config], told: SignalSpec = FULL
) -> dict[str, tuple[Scalar, objective.Vocab | FeatureTerm]]:
    """What `objectives.total` takes.

    Args:
        block: the recipe's terms by name.
        steps: of the run, for schedules.
        models: "student" and "teacher", whose layers features must name.
        told: what the teacher tells.

    Raises:
        ValueError: for a term that does not fit itself or the models; the message names it.
    """
    terms: dict[str, tuple[Scalar, objective.Vocab | FeatureTerm]] = {}
    for name, term in block.items():
        where = f"objective.{name}"
        _check(where, term)
        weight = scalar(term.weight, steps, f"{where}.weight")
        if term.divergence:
            divergence = call(term.divergence, divergences, f"{where}.divergence")
            temperature = scalar(term.temperature, steps, f"{where}.temperature")
            if (reason := _refusal(divergence, term, told)) is not None:
                raise ValueError(
                    f"{where}.divergence: '{term.divergence}' cannot be learned from this teacher: {reason}"
                )
            if divergence.normaliser and temperature != 1:
                raise ValueError(f"{where}.temperature must be 1: '{term.divergence}' is about the logits as they are")
            terms[name] = (weight, objective.match(divergence, temperature, term.standardize))
        else:
            field = call(term.feature, features, f"{where}.feature")
            _check_layers(where, field, models)
            if field.uses_teacher and told.kind is not Head:
                raise ValueError(
                    f"{where}.feature: '{term.feature}' needs hidden states, and this teacher's signal has none: "
                    "take teacher.signal 'head' or 'hidden'"
                )
            if field.teacher_taps and not told.layers:
                raise ValueError(
                    f"{where}.feature needs the teacher's {', '.join(field.teacher_taps)}, and this teacher has "
                    "its last hidden states alone: take a live teacher, or -1 for its layer"
                )
            terms[name] = (weight, field)
    return terms


def _refusal(divergence: Divergence, term: Term, told: SignalSpec) -> str | None:
    """Why a term cannot learn from this teacher, or None when it can."""
    if told.kind is Batch:
        if divergence.uses_teacher:
            return "the teacher's own text has no distribution to match; use next_token()"
        return refusal(divergence, Head, term.standardize)
    if (reason := refusal(divergence, told.kind, term.standardize)) is not None:
        return reason
    if not divergence.uses_teacher or told.kind is Head:
        return None
    temperature = None if isinstance(term.temperature, Schedule) else term.temperature
    return unstored(divergence, told.kind, temperature, told.entries, told.tails)


def _check(where: str, term: Term) -> None:
    if "/" in where:
        raise ValueError(f"{where} cannot have a / in its name: metrics of a domain are called so; take another name")
    if where.removeprefix("objective.") in _RESERVED:
        raise ValueError(f"{where} cannot be called so: metrics of that name exist; take another name")
    if bool(term.divergence) == bool(term.feature):
        given = f"both '{term.divergence}' and '{term.feature}'" if term.divergence else "neither"
        raise ValueError(f"{where} must have either a divergence or a feature, got {given}")
    if term.feature and term.temperature != 1:
        raise ValueError(f"{where}.temperature is for divergences: leave it out of the feature '{term.feature}'")
    if term.feature and term.standardize:
        raise ValueError(f"{where}.standardize is for divergences: leave it out of the feature '{term.feature}'")
    low = {
        key: min(v.peak, v.end) if isinstance(v, Schedule) else v
        for key, v in (("weight", term.weight), ("temperature", term.temperature))
    }
    for key, value in low.items():
        if not math.isfinite(value):
            raise ValueError(f"{where}.{key} must be a finite number, got {value}")
    if low["weight"] < 0:
        raise ValueError(f"{where}.weight must not be negative, got {low['weight']}")
    if low["temperature"] <= 0:
        raise ValueError(f"{where}.temperature must be above 0, got {low['temperature']}")


def _check_layers(where: str, field: FeatureTerm, models: Mapping[str, Config]) -> None:
    for side, taps in (("student", field.student_taps), ("teacher", field.teacher_taps)):
        for tap in taps:
            try:
                transformer.tap_layer(tap, models[side].layers)
            except ValueError:
                layer = tap.rpartition("_")[2]
                raise ValueError(
                    f"{where}.feature names layer {layer} of the {side}, which has layers 1 to {models[side].layers}"
                ) from None
