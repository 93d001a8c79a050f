"""What a recipe says per domain: the rule that mixes them, and the weight of each teacher in them."""

from collections.abc import Mapping, Sequence

import numpy as np

from jaxkd.config.objective import call, scalar, signal_spec
from jaxkd.config.schema import DataBlock, Member, TeacherBlock, nearest
from jaxkd.core import schedules
from jaxkd.core.types import Head
from jaxkd.data import rules
from jaxkd.teachers import ensemble


def mixture_rule(data: DataBlock, teacher: TeacherBlock) -> rules.Rule:
    """The rule that `data.mixture` spells: a call such as "ddk(alpha=0.5)", or fixed weights "code=2,math=1".

    Raises:
        ValueError: for an unknown rule or domain, or a rule that needs per-token losses this teacher does not give.
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
            raise ValueError(
                f"data.mixture '{text}' must be a rule, such as ddk(alpha=0.5), or weights such as code=2,math=1"
            ) from None
        if name.strip() not in weights:
            raise ValueError(f"data.mixture names no domain '{name.strip()}': {nearest(name, names)}")
        weights[name.strip()] = value
    return list(weights.values())


def teacher_weights(members: Mapping[str, Member], names: Sequence[str], steps: int) -> ensemble.Weigh:
    """The weight of each of several teachers in a row, by the step and the row's domain.

    Raises:
        ValueError: for an unknown domain, a weight that is negative or not finite, or a domain in which all weights
            are 0 at some step.
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
                    f"teacher.members.{name} weighs {weights[bad][0]:g} in the domain '{domain}': a weight must be "
                    "finite and not negative"
                )
            total += weights
        if not total.all():
            raise ValueError(
                f"all teachers of the domain '{domain}' have weight 0 at step {int(np.argmin(total))} of {steps}: "
                "give one of them a weight that stays above 0"
            )
    return weigh
