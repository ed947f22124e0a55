"""Search spaces over keys of params.yaml, written as Hydra's sweeps, which `dvc exp run --queue` takes too."""

from collections.abc import Callable, Iterable
from operator import attrgetter
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser, create_functions
from hydra.core.override_parser.types import IntervalSweep, Override, RangeSweep
from hydra.errors import HydraException
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution

from pipeline.core.config import Config
from pipeline.core.errors import UserError, first_line

SECTIONS = ("prepare", "train", "weights")  # what else there is changes no model, or the images that validate it
EXAMPLES = "KEY=A,B  KEY=interval(LOW,HIGH)  KEY=log(LOW,HIGH)  KEY=range(START,STOP,STEP)"


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
            key, sweep = str(override.key_or_group), override.value()
        except HydraException as error:
            raise UserError(f"{expression}: {first_line(error)}; write one of {EXAMPLES}") from None
        section = key.removeprefix(f"{config.profile}.")
        if key in space:
            raise UserError(f"{key}: given twice; give it once")
        if section == key or section.partition(".")[0] not in SECTIONS:
            raise UserError(
                f"{key}: not in {', '.join(f'{config.profile}.{name}' for name in SECTIONS)}; other keys change no "
                "model, or change the images by which trials are compared"
            )
        texts = _values(override)
        values = {text: attrgetter(section)(apply(key, text).active) for text in texts}
        value = attrgetter(section)(config.active)
        if isinstance(sweep, IntervalSweep | RangeSweep):
            low, high = values[texts[0]], values[texts[-1]]
            try:
                space[key] = _distribution(sweep, low, high)
            except ValueError as error:
                raise UserError(f"{expression}: {first_line(error).rstrip('.')}") from None
            if low <= value <= high:
                present[key] = value
        else:
            space[key] = CategoricalDistribution(texts)
            if same := [text for text in texts if values[text] == value]:
                present[key] = same[0]
    return space, present


def _log_interval(start: float, end: float) -> IntervalSweep:
    return IntervalSweep(tags={"log"}, start=start, end=end)


def _values(override: Override) -> list[str]:
    """Return the choices, or the values of a range, or the ends of an interval."""
    sweep = override.value()
    if isinstance(sweep, IntervalSweep):
        return [str(sweep.start), str(sweep.end)]
    if override.is_sweep_override():
        return list(override.sweep_string_iterator())
    return [override.get_value_element_as_str()]


def _distribution(sweep: IntervalSweep | RangeSweep, low: object, high: object) -> BaseDistribution:
    """Return the distribution between two values, which have the type of the key."""
    step = sweep.step if isinstance(sweep, RangeSweep) else None
    log = "log" in sweep.tags
    if type(low) is int and type(high) is int:
        return IntDistribution(low, high, log=log, step=int(step or 1))
    if type(low) is float and type(high) is float:
        return FloatDistribution(low, high, log=log, step=step)
    raise ValueError(f"no numbers ({low!r}); list its values: KEY=A,B")
