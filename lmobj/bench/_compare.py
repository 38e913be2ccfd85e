"""Which metrics may stand beside each other in a table: those that mean the same in every arm."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from lmobj import _yaml
from lmobj.errors import UserError
from lmobj.train.assemble import Assembly

__all__ = ["check_comparable", "check_same_data", "differing_data"]

_SAME_MEANING = ("bits_per_byte", "top5_accuracy")
"""Evaluation metrics that mean the same for all objectives that are judged by them: bits of the whole text per byte of
it, which only left-to-right models have; hits among five guesses for the same masked words."""

_FREE_OF_DATA = ("data.length", "data.cache", "data.workers")
"""Settings of the data that do not change what text is read, or how it is tokenised."""


def check_comparable(arms: Mapping[str, Assembly], metrics: Sequence[str]) -> None:
    """Refuses metrics that would rank the arms by numbers of different kinds.

    A loss is a number about the task that the objective sets itself: a masked LM's is over words with both sides in
    view, a discriminator's over a choice of two. Each can be made smaller by setting an easier task. So losses and
    accuracies are compared between arms of one objective, on the same text, only. Longer rows show more of the text
    before a word, so that every metric is compared on rows of one length; and the loss is the sum of an objective's
    terms, weighted alike.

    Raises:
      UserError: naming the arms, in what they differ, and what is accepted.
    """
    for metric in metrics:
        kind, _, name = metric.partition("/")
        if kind == "perf":
            continue
        _check_task(arms, metric, shared=kind == "eval" and name in _SAME_MEANING)
        _check_same(arms, metric, "data.length", {arm: _flat(run)["data.length"] for arm, run in arms.items()})
        _check_same(arms, metric, "the layout of rows", {arm: run.spec.layout for arm, run in arms.items()})
        if name == "loss":
            _check_same(arms, metric, "train.coefficients", {arm: _coefficients(run) for arm, run in arms.items()})
        if len({run.dataset.fingerprint for run in arms.values()}) > 1:
            raise UserError(
                f"metrics has {metric}, and the arms read different data ({'; '.join(differing_data(arms))}); "
                "accepted: arms with the same data.source, data.clean, data.tokenizer and shares, or a probe on files."
            )


def _check_task(arms: Mapping[str, Assembly], metric: str, *, shared: bool) -> None:
    """Refuses arms that do not all measure the metric, or if it is not `shared` by objectives, have different ones."""
    name = metric.partition("/")[2]
    without = [arm for arm, run in arms.items() if run.objective.judged_by != name]
    if shared and without:
        raise UserError(
            f"metrics has {metric}, which {_named(arms, without)} {_verb(without)} not measured by; accepted: "
            f"{metric} where every arm is (this benchmark's arms: {_named(arms, list(arms))}), or a probe."
        )
    if not shared and any(run.objective != next(iter(arms.values())).objective for run in arms.values()):
        raise UserError(
            f"metrics has {metric}, and the arms have different objectives: {_named(arms, list(arms))}; losses and "
            "accuracies of different tasks cannot be ranked against each other. Accepted: a probe, which scores "
            "all of them on one task; perf/...; eval/bits_per_byte among causal objectives only; "
            "eval/top5_accuracy among masked ones only."
        )


def _check_same(arms: Mapping[str, Assembly], metric: str, key: str, values: Mapping[str, object]) -> None:
    """Refuses arms that differ in a setting on which the metric depends."""
    first, *others = values.values()
    if any(other != first for other in others):
        raise UserError(
            f"metrics has {metric}, which depends on {key}, and that is "
            f"{', '.join(f'{_yaml.show(values[arm])} in {arm}' for arm in arms)}; accepted: one {key} for all arms, "
            "or a probe."
        )


def _coefficients(run: Assembly) -> dict[str, object]:
    """Every term's coefficient, or its schedule's settings."""
    given: Mapping[str, object] = run.identity["config"]["train"]["coefficients"]
    return {**run.program.objective.coefficients, **given}


def check_same_data(arms: Mapping[str, Assembly]) -> None:
    """Asserts that arms with the same settings of data read the same tokens.

    Raises:
      UserError: the settings agree and the data does not: files changed meanwhile.
    """
    seen: dict[str, str] = {}
    for arm, run in arms.items():
        settings = str({key: value for key, value in _flat(run).items() if key not in _FREE_OF_DATA})
        other = seen.setdefault(settings, arm)
        if arms[other].dataset.fingerprint != run.dataset.fingerprint:
            raise UserError(
                f"the arms {other} and {arm} have the same data settings, and their data has the fingerprints "
                f"{arms[other].dataset.fingerprint} and {run.dataset.fingerprint}: files changed while they were read. "
                "Accepted: files that stay as they are; start the benchmark again."
            )


def differing_data(arms: Mapping[str, Assembly]) -> list[str]:
    """The settings of data in which arms differ from the first, as `key: value in arm, value in arm`."""
    flat = {arm: _flat(run) for arm, run in arms.items()}
    keys = sorted({key for values in flat.values() for key in values} - set(_FREE_OF_DATA))
    return [
        f"{key}: " + ", ".join(f"{values.get(key)!r} in {arm}" for arm, values in flat.items())
        for key in keys
        if len({repr(values.get(key)) for values in flat.values()}) > 1
    ]


def _flat(run: Assembly) -> dict[str, object]:
    """Dotted key -> value of the settings of data."""

    def walk(values: Mapping[str, object], prefix: str) -> dict[str, object]:
        found: dict[str, object] = {}
        for key, value in values.items():
            found |= walk(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
        return found

    return walk(run.identity["config"]["data"], "data.")


def _named(arms: Mapping[str, Assembly], names: Sequence[str]) -> str:
    return ", ".join(f"{name} ({getattr(arms[name].objective, 'name', '')})" for name in names)


def _verb(names: Sequence[str]) -> str:
    return "is" if len(names) == 1 else "are"
