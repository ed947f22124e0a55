"""Search spaces over keys of params.yaml, written as Hydra's sweeps."""

from collections.abc import Callable, Iterable
from math import isclose
from operator import attrgetter
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser, create_functions
from hydra.core.override_parser.types import IntervalSweep, Override, RangeSweep
from hydra.errors import HydraException
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution

from pipeline.core.config import Config
from pipeline.core.errors import UserError, first_line

SECTIONS = ("prepare", "train", "weights")  # of the stages that models come from, after download and before evaluate
CHANGES_IMAGES = ("prepare.views", "prepare.excluded_files", "prepare.max_quarantined")
SYNTAX = "KEY=A,B  KEY=interval(LOW,HIGH)  KEY=log(LOW,HIGH)  KEY=range(START,STOP,STEP)"


def parse_search_space(
    expressions: Iterable[str], config: Config, apply: Callable[[str, str], Config]
) -> tuple[dict[str, BaseDistribution], dict[str, Any]]:
    """Parse a search space such as `demo.train.lr=log(1e-4,1e-2)` or `demo.train.optimizer=adamw,sgd`.

    Args:
        expressions: as in Hydra's sweeps; `log(LOW,HIGH)` is short for `tag(log, interval(LOW,HIGH))`.
        config: the present configuration, in whose active profile the keys must be.
        apply: returns the configuration in which a key has a value, both as texts, or raises a UserError.

    Returns:
        The distribution of each key, and the present value of each key whose distribution has it. Choices are texts,
        as `dvc exp run -S` takes them.

    Raises:
        UserError: an expression is none, or a key or one of its values is refused.
    """
    functions = create_functions()
    functions.register("log", _log_interval)
    parser, space, present = OverridesParser(functions), dict[str, BaseDistribution](), dict[str, Any]()
    for expression in expressions:
        try:
            override = parser.parse_override(expression)
            texts = _values(override)
        except (HydraException, ValueError) as error:
            raise UserError(f"{expression}: {first_line(error)}; write one of {SYNTAX}") from None
        key, sweep = override.key_or_group, override.value()
        section = key.removeprefix(f"{config.profile}.")
        if key in space:
            raise UserError(f"{key}: given twice; give it once")
        if section == key or section.partition(".")[0] not in SECTIONS or section in CHANGES_IMAGES:
            raise UserError(
                f"{key}: not in {', '.join(f'{config.profile}.{name}' for name in SECTIONS)}, or changes the images "
                "by which trials are compared; leave it out"
            )
        try:
            checked = [texts[0], texts[-1]] if isinstance(sweep, IntervalSweep | RangeSweep) else texts
            values = {text: attrgetter(section)(apply(key, text).active) for text in checked}
            value = attrgetter(section)(config.active)
        except AttributeError:
            raise UserError(f"{key}: part of a list; give whole lists, such as KEY=[1,1],[1,2]") from None
        if isinstance(sweep, IntervalSweep | RangeSweep):
            low, high = values[texts[0]], values[texts[-1]]
            try:
                space[key] = _distribution(sweep, low, high)
            except ValueError as error:
                raise UserError(f"{expression}: {first_line(error).rstrip('.')}") from None
            grid = [value] if isinstance(sweep, IntervalSweep) else [float(text) for text in texts]
            if type(value) is type(low) and low <= value <= high and any(isclose(value, number) for number in grid):
                present[key] = value
        else:
            space[key] = CategoricalDistribution(texts)
            if same := [text for text in texts if values[text] == value]:
                present[key] = same[0]
    return space, present


def _log_interval(start: int | float, end: int | float) -> IntervalSweep:  # noqa: PYI041  # Hydra checks the types
    return IntervalSweep(tags={"log"}, start=start, end=end)


def _values(override: Override) -> list[str]:
    """Return the choices, or the values of a range, or the ends of an interval.

    Raises:
        ValueError: there are none.
    """
    sweep = override.value()
    if isinstance(sweep, IntervalSweep):
        return [str(sweep.start), str(sweep.end)]
    if isinstance(sweep, RangeSweep) and not sweep.step:
        raise ValueError("the step is 0")
    texts = list(override.sweep_string_iterator()) if override.is_sweep_override() else []
    if not texts:
        raise ValueError("no values to choose from")
    return texts


def _distribution(sweep: IntervalSweep | RangeSweep, low: object, high: object) -> BaseDistribution:
    """Return the distribution between two values, which have the type of the key."""
    step = sweep.step if isinstance(sweep, RangeSweep) else None
    log = "log" in sweep.tags
    if type(low) is int and type(high) is int:
        return IntDistribution(low, high, log=log, step=int(step or 1))
    if type(low) is float and type(high) is float:
        # Sums of steps are not exact, and a value just below the last one would remove it.
        return FloatDistribution(low, round(high, 12) if step else high, log=log, step=step)
    raise ValueError(f"no numbers ({low!r}); list its values: KEY=A,B")
