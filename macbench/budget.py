"""``budget=0.1``: every method gets the knob that makes it read a tenth of full attention's bytes, by its own closed form.

The budget is rho_bytes over the decode steps that a run is expected to make: so many visible tokens, so many of them generated, in the mean.
A method answers with a copy of itself, or with the floor that keeps it above.
"""

from dataclasses import fields, replace

import pandas as pd
from omegaconf import DictConfig

from macbench import cli
from macbench.counting import Shape
from macbench.errors import ConfigError
from macbench.methods.base import Method, label
from macbench.settings import Variant, budgets
from macbench.summary import headline
from macbench.tasks.base import Task, count

# A measured rho_bytes farther than this share from the budget is said.
TOLERANCE = 0.1
# Examples of each subtask whose prompts say how long prompts are. Not as many as the run has: raising limit must not move a budget.
PROBES = 5


def expected(task: Task, expect: int | None, question_in_prefill: bool) -> tuple[int, float]:
    """Visible tokens and generated ones among them (a decoded question's, too), means over all decode steps.

    Of an example with P prefilled tokens, step i of n sees P + i tokens, i of them generated. n follows from ``expect`` new tokens, or, without,
    from the example's limit, if texts are known to reach it. Where they may end at any time, the mean of i is between those of a text that ends
    at once and of one that never does: the middle of the two is never farther off than a quarter of the limit.
    """
    steps = seen = generated = 0.0
    for subtask in task.subtasks:
        for index in range(count(task, subtask, PROBES)):
            example = task.example(subtask, index)
            asked = 0 if question_in_prefill else example.question
            most = asked + min(expect or example.max_new_tokens, example.max_new_tokens) - (not asked)
            least = most if expect or example.ignore_eos or getattr(task, "reaches_limit", False) else asked + 1
            n, mean = (least + most) / 2, ((least + 1) / 2 + (most + 1) / 2) / 2
            steps, generated = steps + n, generated + n * mean
            seen += n * (len(example.input_ids) - asked + mean)
    return (round(seen / steps), generated / steps) if steps else (len(example.input_ids), 0.0)


def fit(cfg: DictConfig, variants: list[Variant], tokens: int, shape: Shape, generated: float = 1) -> tuple[list[Variant], list[str]]:
    """Every variant at every budget of ``cfg`` that it can reach, and a line about each one that it cannot, naming its floor.

    ``tokens``, ``generated``: see ``expected``.

    Methods without a knob run once, as they are, and so do methods of ``compare`` that reach none of the budgets. If the method itself
    reaches none, that is a ConfigError.
    """
    fitted, notes = [], []
    for variant in variants:
        if not has_knob(variant.method):
            fitted.append(variant)
            continue
        own, floors = [], []
        for budget in budgets(cfg):
            try:
                own.append(_at(variant, budget, tokens, shape, generated))
            except ConfigError as error:
                said = error.allowed.removeprefix(variant.name).lstrip().replace(f" for {label(variant.method)}", "", 1)  # it is named in front
                name = f"{variant.name}{f' at {budget:g}' if len(budgets(cfg)) > 1 else ''} "
                floors.append(said if f"apply to {label(variant.method)}" in said else name + said)
        if not own and variant.name == cfg.method.name:
            raise ConfigError("budget", cfg.budget, "; ".join(floors))
        notes += [f"budget={cfg.budget}: {floor}{'' if own else '; it runs as it is'}" for floor in floors]
        fitted += own or [variant]
    chosen = _given(cfg)
    for variant in fitted:
        if variant.name == cfg.method.name and (twice := sorted(chosen & set(variant.knobs))):
            raise ConfigError("budget", variant.budget, f"chooses method.{twice[0]} itself; give one of the two")
    return fitted, notes


def has_knob(method: Method) -> bool:
    return type(method).fit is not Method.fit


def untouched(variants: list[Variant]) -> str | None:
    """A line for the user about methods that a budget does not apply to."""
    names = dict.fromkeys(v.name for v in variants if not has_knob(v.method))
    return f"budget does not apply to {', '.join(names)}, without a knob for it" if names else None


def misses(table: pd.DataFrame, variants: list[Variant]) -> list[str]:
    """A line for every variant whose measured rho_bytes is off its budget."""
    measured = {(row.method, row.variant): row.rho_bytes for row in headline(table).itertuples()}
    lines = []
    for v in variants:
        found = measured.get((v.name, v.label))
        if v.budget is not None and pd.notna(found) and abs(found / v.budget - 1) > TOLERANCE:
            cause = "texts of other lengths than expected and dense fallbacks count as they come; expect=N says how long texts are"
            lines.append(f"{v.name} ({v.label}) has a measured rho_bytes of {found:.4f}, wanted {v.budget:g}: {cause}")
    return lines


def _at(variant: Variant, budget: float, *at) -> Variant:
    method = variant.method.fit(budget, *at)
    after = _hyper(method)
    # A knob is what a budget moves. Where it moves to the value that was there before, another budget gives it away.
    others = [_hyper(m) for m in (variant.method, _or_none(variant.method, 1.0, *at)) if m]
    knobs = {name: value for name, value in after.items() if any(value != other[name] for other in others)}
    label = " ".join(filter(None, [variant.label, f"budget={budget:g}", *(f"{name}={_short(value)}" for name, value in knobs.items())]))
    return replace(variant, label=label, method=method, budget=budget, knobs=knobs)


def _or_none(method: Method, *at) -> Method | None:
    try:
        return method.fit(*at)
    except ConfigError:
        return None


def _hyper(method: Method) -> dict:
    """Hyper-parameters by name."""
    return {field.name: getattr(method, field.name) for field in fields(method)}


def _short(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _given(cfg: DictConfig) -> set[str]:
    """Knobs of the method that the user chose: those of the grid, and those that are not what the option's file says."""
    own = cli.load_option("method", cfg.method.name) if cfg.method.name in cli.options("method") else {}
    return set(cfg.grid) | {key for key, value in cfg.method.items() if key not in own or own[key] != value}
