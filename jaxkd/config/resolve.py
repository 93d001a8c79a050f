"""From strings and schedules of a recipe to functions: the objective's terms, the mixture's rule, teachers' weights."""

import ast
import importlib
import math
from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np

from jaxkd.config.schema import DataBlock, Member, Schedule, TeacherBlock, Term, nearest
from jaxkd.core import schedules
from jaxkd.core.types import Batch, Divergence, Head, Sampled, Scalar, TopK
from jaxkd.data import rules
from jaxkd.kernels.api import refusal, unstored
from jaxkd.losses import divergences, features, objective, token_weights
from jaxkd.losses.feature_term import FeatureTerm, TokenWeights
from jaxkd.models import transformer
from jaxkd.models.transformer import Config
from jaxkd.teachers import ensemble

_METRICS = [
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
]


def scalar(spec: float | Schedule, steps: int, where: str) -> Scalar:
    """A function of the step for a `Schedule`, a number unchanged; `where` is the key, for messages."""
    if not isinstance(spec, Schedule):
        return spec
    if spec.schedule not in schedules.__all__:
        raise ValueError(f"unknown {where}.schedule '{spec.schedule}': {nearest(spec.schedule, schedules.__all__)}")
    return getattr(schedules, spec.schedule)(spec.peak, steps, spec.warmup, spec.end)


def call(text: str, module: ModuleType, where: str, kind: type = object) -> Any:
    """The result of a call written as text: "reverse_kl", "hidden_mse(layers={2: 4})", "my_package.my_module:my_kl()".

    `text` is parsed, never evaluated: a function in `module.__all__`, or MODULE:FUNCTION of an importable one, with
    literals as arguments; it must return a `kind`. `where` is the config key, which ValueErrors name.
    """
    head, parenthesis, rest = text.partition("(")
    source, _, head = head.rpartition(":")
    try:
        node = ast.parse(head + parenthesis + rest, mode="eval").body
        if isinstance(node, ast.Call):
            name, arguments = ast.unparse(node.func), [ast.literal_eval(a) for a in node.args]
            options = {str(k.arg): ast.literal_eval(k.value) for k in node.keywords}
        else:
            name, arguments, options = ast.unparse(node), [], {}
    except (SyntaxError, ValueError):
        raise ValueError(f"{where} must be a name or a call with literals, got '{text}'") from None
    try:
        module = importlib.import_module(source) if source else module
    except ModuleNotFoundError as error:
        raise ValueError(f"{where}: no module '{error.name}'; the folder of '{source}' must be on PYTHONPATH") from None
    except Exception as error:
        raise ValueError(f"{where}: importing '{source}' failed: {type(error).__name__}: {error}") from None
    public = [n for n in vars(module) if not n.startswith("_")] if source else module.__all__
    if name not in public:
        raise ValueError(f"unknown {where} '{source + ':' if source else ''}{name}': {nearest(name, public)}")
    try:
        result = getattr(module, name)(*arguments, **options)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where}: {error}") from None
    if not isinstance(result, kind):
        raise ValueError(f"{where}: '{text}' must return a {kind.__name__}, got {type(result).__name__}")
    return result


class SignalSpec(NamedTuple):
    """What a teacher's signal holds; the default is a single online teacher."""

    kind: type = Head  # or TopK, Sampled; Batch for text
    entries: int = 0  # K or draws per token
    tails: tuple[float, ...] = (1.0,)  # temperatures with a stored tail
    layers: bool = True  # whether hidden states of every layer are available


def signal_spec(t: TeacherBlock) -> SignalSpec:
    """The kind of signal that a teacher block describes."""
    kind = {"top_k": TopK, "sampled": Sampled, "token": Batch}.get(t.signal, Head)
    return SignalSpec(kind, t.entries, t.temperatures, layers=t.signal == "head" and not t.members)


def terms(
    block: Mapping[str, Term], steps: int, models: Mapping[str, Config], teacher: TeacherBlock
) -> dict[str, tuple[Scalar, objective.Vocab | FeatureTerm]]:
    """Terms by name for `losses.objective.objective`, from the recipe's block.

    `models` has "student" and "teacher", whose layers features name. ValueError with the key of a term that is
    inconsistent, or that the teacher's signal or these models cannot serve.
    """
    signal = signal_spec(teacher)
    result: dict[str, tuple[Scalar, objective.Vocab | FeatureTerm]] = {}
    for name, term in block.items():
        where = f"objective.{name}"
        _check(where, term)
        weight = scalar(term.weight, steps, f"{where}.weight")
        by_token = _token_weights(f"{where}.token_weights", term.token_weights, signal)
        if term.divergence:
            divergence = call(term.divergence, divergences, f"{where}.divergence", Divergence)
            temperature = scalar(term.temperature, steps, f"{where}.temperature")
            if (reason := _refusal(divergence, term, signal)) is not None:
                raise ValueError(
                    f"{where}.divergence '{term.divergence}' cannot be learned from this teacher: {reason}"
                )
            if divergence.normaliser and temperature != 1:
                raise ValueError(f"{where}.temperature must be 1: '{term.divergence}' takes the untempered logits")
            result[name] = (weight, objective.match(divergence, temperature, term.standardize, by_token))
        else:
            feature = call(term.feature, features, f"{where}.feature", FeatureTerm)
            for side, taps in (("student", feature.student_taps), ("teacher", feature.teacher_taps)):
                _check_layers(f"{where}.feature", side, taps, models[side].layers)
            if feature.uses_teacher and signal.kind is not Head:
                raise ValueError(
                    f"{where}.feature '{term.feature}' needs hidden states: take teacher.signal 'head' or 'hidden'"
                )
            if feature.teacher_taps and not signal.layers:
                raise ValueError(
                    f"{where}.feature needs the teacher's {', '.join(feature.teacher_taps)}, and this one has only "
                    "its last hidden states: take a single online teacher, or -1 for its layer"
                )
            result[name] = (weight, feature._replace(token_weights=by_token))
    return result


def _token_weights(where: str, text: str, signal: SignalSpec) -> TokenWeights | None:
    if not text:
        return None
    weights = call(text, token_weights, where, TokenWeights)
    for divergence in weights.measured:
        if (reason := _refusal(divergence, Term(1.0), signal)) is not None:
            raise ValueError(f"{where} '{text}' cannot be measured with this teacher: {reason}")
    return weights


def _refusal(divergence: Divergence, term: Term, signal: SignalSpec) -> str | None:
    """Why a term cannot learn from this signal, or None."""
    if signal.kind is Batch:
        if divergence.uses_teacher:
            return "text has no distribution to match; use next_token()"
        return refusal(divergence, Head, term.standardize)
    if (reason := refusal(divergence, signal.kind, term.standardize)) is not None:
        return reason
    if not divergence.uses_teacher or signal.kind is Head:
        return None
    temperature = None if isinstance(term.temperature, Schedule) else term.temperature
    return unstored(divergence, signal.kind, temperature, signal.entries, signal.tails)


def _check(where: str, term: Term) -> None:
    if "/" in where:
        raise ValueError(f"{where} cannot contain /, which separates metric and domain: choose another name")
    if where.removeprefix("objective.") in _METRICS:
        raise ValueError(f"{where} is the name of a metric: choose another name")
    if bool(term.divergence) == bool(term.feature):
        given = f"both '{term.divergence}' and '{term.feature}'" if term.divergence else "neither"
        raise ValueError(f"{where} must have a divergence or a feature, got {given}")
    for key, changed in (("temperature", term.temperature != 1), ("standardize", term.standardize)):
        if term.feature and changed:
            raise ValueError(f"{where}.{key} is for divergences, not for the feature '{term.feature}'")
    for key, scale in (("weight", term.weight), ("temperature", term.temperature)):
        lowest = min(scale.peak, scale.end) if isinstance(scale, Schedule) else scale
        if not math.isfinite(lowest):
            raise ValueError(f"{where}.{key} must be a finite number, got {lowest}")
        if lowest < 0 or (key == "temperature" and lowest == 0):
            rule = "be above 0" if key == "temperature" else "not be negative"
            raise ValueError(f"{where}.{key} must {rule}, got {lowest}")


def _check_layers(where: str, side: str, taps: Sequence[str], layers: int) -> None:
    for tap in taps:
        try:
            transformer.tap_layer(tap, layers)
        except ValueError:
            layer = tap.rpartition("_")[2]
            raise ValueError(f"{where} names layer {layer} of the {side}, which has layers 1 to {layers}") from None


def mixture_rule(data: DataBlock, teacher: TeacherBlock) -> rules.Rule:
    """The rule that `data.mixture` spells: a call such as "ddk(alpha=0.5)", or fixed weights "code=2,math=1".

    ValueError for an unknown rule or domain, or a rule that needs per-token losses this teacher does not give.
    """
    text, names = data.mixture, tuple(data.domains)
    if "=" in text.partition("(")[0]:
        return rules.fixed(_fixed_weights(text, names))
    rule = call(text, rules, "data.mixture")
    if not isinstance(rule, rules.Rule):
        try:
            rule = rule(names)
        except ValueError as error:
            raise ValueError(f"data.mixture: {error}") from None
    if rule.group_dro and (signal_spec(teacher).kind is not Head or teacher.is_self):
        kind = "is the student itself" if teacher.is_self else f"gives '{teacher.signal}'"
        raise ValueError(
            f"data.mixture '{text}' compares the student's loss on each token with the teacher's, and this teacher "
            f"{kind}: use another teacher, with teacher.signal 'head' or 'hidden'"
        )
    return rule


def _fixed_weights(text: str, names: Sequence[str]) -> list[float]:
    weights = dict.fromkeys(names, 0.0)
    for part in text.split(","):
        name, _, weight = part.partition("=")
        try:
            value = float(weight)
        except ValueError:
            raise ValueError(f"data.mixture '{text}' must be a rule or weights such as code=2,math=1") from None
        if name.strip() not in weights:
            raise ValueError(f"data.mixture names no domain '{name.strip()}': {nearest(name, names)}")
        weights[name.strip()] = value
    return list(weights.values())


def teacher_weights(members: Mapping[str, Member], names: Sequence[str], steps: int) -> ensemble.Weigh:
    """The weight of each of several teachers in a row, by the step and the row's domain.

    ValueError for an unknown domain, a weight that is negative or not finite, or a domain without a teacher at a step.
    """
    scalars = [scalar(m.weight, steps, f"teacher.members.{name}.weight") for name, m in members.items()]
    weigh = ensemble.shares(scalars, [m.domains for m in members.values()], names)
    # The last evaluation is at step `steps`.
    per_step = [np.broadcast_to(schedules.value(s, np.arange(steps + 1)), steps + 1) for s in scalars]
    for domain in names:
        total = np.zeros(steps + 1)
        for (name, member), weights in zip(members.items(), per_step, strict=True):
            weights = weights * (member.domains.get(domain, 0.0) if member.domains else 1.0)
            if (bad := ~(np.isfinite(weights) & (weights >= 0))).any():
                raise ValueError(
                    f"teacher.members.{name} weighs {weights[bad][0]:g} in '{domain}': must be finite and at least 0"
                )
            total += weights
        if not total.all():
            step = int(np.argmin(total))
            raise ValueError(f"all teachers of '{domain}' have weight 0 at step {step} of {steps}: keep one above 0")
    return weigh
