"""A plan as text for the console."""

import os

from jaxkd.models.transformer import parameter_count
from jaxkd.planning.plan import Plan
from jaxkd.report.text import number


def lines(p: Plan) -> list[str]:
    """The whole plan, a line a fact; the last lines are the verdict."""
    e, m, f = p.job.experiment, p.memory, p.flops
    mesh = " x ".join(f"{name}={n}" for name, n in p.job.mesh.shape.items() if n > 1 or name in ("data", "model"))
    tera = lambda flops: digits(flops / 1e12)
    # Flags change the compiled program, and a launcher sets some.
    flags = os.environ.get("LIBTPU_INIT_ARGS", "").split()
    launcher = f"none; with a launcher's: bash launch/host.sh --chip {p.topology.generation.name} -- plan ..."
    path = lambda name: "the student's EMA" if p.job.models.is_self else e.teacher.models[name].path
    models = [(name, model, path(name)) for name, model in p.job.models.teachers.items()]
    text = [
        f"slice     {p.topology.sentence()}",
        f"flags     {f'{len(flags)} in LIBTPU_INIT_ARGS' if flags else launcher}",
        f"mesh      {mesh}",
        *(f"          {note}" for note in p.job.models.notes),
        *(
            f"{name:9} {path}, {number(parameter_count(model.config))} parameters"
            for name, model, path in [*models, ("student", p.job.models.student, e.student.path)]
        ),
        f"batch     {e.data.batch} x {e.data.length} = {p.tokens:,} tokens, micro-batches: {e.optim.micro_batches}, "
        f"remat: {e.run.remat}",
        f"memory    {binary(m.peak)} of {binary(m.limit)} a device: parameters {binary(m.params)}, optimizer "
        f"{binary(m.optimizer)}, teacher {binary(m.teacher)}, temporary {binary(m.temp)}",
        f"compute   {tera(f.model)} TFLOP a step: teacher {tera(f.teacher)}, student {tera(f.student)}; in addition "
        f"{tera(f.recomputed)} for rematerialisation and {tera(f.masked)} masked by attention",
    ]
    if p.estimate is None:
        state = m.params + m.optimizer + m.teacher
        alone = f", parameters, optimizer and teacher alone are {binary(state)}" if state > m.limit else ""
        text.append(f"verdict   DOES NOT FIT: {binary(m.peak - m.limit)} too much{alone}")
        return [*text, "          --suggest compiles other meshes, micro-batches, remat and teacher.sharding"]
    return [*text, *_time(p), "verdict   fits"]


def _time(p: Plan) -> list[str]:
    """What the program exchanges and moves, and the times that follow."""
    t, rates, text = p.estimate, p.rates(), []
    assert t is not None
    largest = max((c.bytes * c.count for c in p.collectives), default=0)
    for c in p.collectives:
        if c.bytes * c.count * 100 >= largest:
            where = "in a loop" if c.in_loop else "once a step"
            overlap = "overlapped" if c.overlapped else "exposed"
            text.append(f"exchange  {c.op} over {c.axis}: {binary(c.bytes)} x {c.count:,}, {where}, {overlap}")
    network = f", dcn {digits(t.network)}" if p.topology.slices > 1 else ""
    text += [
        f"traffic   {digits(rates['hbm_gb'])} GB a step between a device and its HBM",
        f"time      at least {digits(t.step_s)} s a step, bound by {t.bound}: compute {digits(t.compute)}, hbm "
        f"{digits(t.memory)}, ici {digits(t.links)}{network}, exposed {digits(t.exposed)}",
    ]
    if p.topology.slices > 1 and p.topology.chip.dcn is None:
        text.append(f"          without the network: its rate for {p.topology.generation.name} is not published")
    text.append(f"speed     at most {rates['tokens_per_s']:,.0f} tokens/s, MFU {rates['mfu']:.1%}")
    teacher = p.job.experiment.teacher
    if teacher.signal == "token" and not teacher.cache:
        text.append("          without the rollout before each step, whose memory is counted and whose time is not")
    cost = f"{duration(3600 * rates['hours'])}, {duration(3600 * rates['chip_hours'], 'chip-')}"
    return [*text, f"run       {p.job.experiment.run.steps:,} steps: at least {cost}"]


def binary(size: float) -> str:
    """Bytes with the unit that leaves one to three digits before the point."""
    for unit in ("B", "KiB", "MiB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1024
    return f"{size:.2f} GiB"


def digits(value: float) -> str:
    """Three significant digits, and all before the point."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def duration(seconds: float, unit: str = "") -> str:
    """In the largest unit of which it is at least 1, from hours to microseconds; `unit` precedes it: chip-hours."""
    units = ((3600.0, "hours"), (60.0, "minutes"), (1.0, "seconds"), (1e-3, "milliseconds"), (1e-6, "microseconds"))
    size, name = next((u for u in units if seconds >= u[0]), units[-1])
    return f"{digits(seconds / size)} {unit}{name}"
