"""Before anything is trained: every arm put together, its steps decided, and all of it checked."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from flax import nnx

from lmobj.bench._compare import check_comparable, check_same_data, differing_data
from lmobj.bench._config import Benchmark, experiments
from lmobj.bench._folder import check_folder, stored_plans, write_benchmark
from lmobj.bench._labelled import ProbeData, labelled_texts
from lmobj.bench._picture import UNITS
from lmobj.bench._plan import ArmPlan, plan_arm
from lmobj.bench._probe import check_probe, require_sklearn
from lmobj.bench._reading import Reading
from lmobj.config import Experiment
from lmobj.errors import UserError
from lmobj.train.assemble import Assembly, assemble, design
from lmobj.train.summary import check_samples

__all__ = ["Prepared", "Say", "prepare"]

Say = Callable[[str], None]
_UNDECIDED = 10**9


@dataclass(frozen=True)
class Prepared:
    """What is known of a benchmark when its first run begins. Runs assemble their own parts, with steps and seed."""

    benchmark: Benchmark
    folder: Path
    bases: dict[str, Experiment]
    """Each arm's experiment, before its steps, seed and folder are known."""
    plans: dict[str, ArmPlan]
    texts: ProbeData | None
    """The probe's."""

    def experiment(self, arm: str, seed: int) -> Experiment:
        """The run of an arm with a seed, in a folder of its own."""
        name, run = f"{self.benchmark.name}-{arm}", self.folder / "arms" / arm / f"seed_{seed}"
        return self.plans[arm].experiment(self.bases[arm], name=name, run=str(run), seed=seed)


def prepare(benchmark: Benchmark, folder: Path, say: Say, *, quiet: bool) -> Prepared:
    """Puts the arms together and plans and checks them, or goes on with the plans of a benchmark that was begun.

    Raises:
      UserError: what cannot work in any arm. Then the folder is empty, and may be begun again with other settings.
    """
    check_folder(folder, benchmark)
    bases = experiments(benchmark)
    say(f"Preparing {len(bases)} arms of {benchmark.name}.")
    arms = {arm: _assembled(arm, base, quiet) for arm, base in bases.items()}
    check_same_data(arms)
    check_comparable(arms, benchmark.metrics)
    for difference in differing_data(arms):
        say(f"The arms read different data: {difference}.")
    texts = _probe_texts(benchmark, arms)
    fingerprints = {arm: parts.dataset.fingerprint for arm, parts in arms.items()}
    digest = None if texts is None else texts.digest
    plans = stored_plans(folder, fingerprints, digest)
    if plans is None:
        _check_probes(benchmark, arms, texts)
        plans = {arm: dataclasses.replace(_planned(benchmark, arm, arms[arm], say), probe=digest) for arm in arms}
    prepared = Prepared(benchmark, folder, bases, plans, texts)
    write_benchmark(folder, benchmark, plans)
    _tell(prepared, say)
    return prepared


def _assembled(arm: str, base: Experiment, quiet: bool) -> Assembly:
    """The parts of an arm's run, with more steps than any schedule asks for: the budget will decide how many."""
    undecided = dataclasses.replace(base, train=dataclasses.replace(base.train, steps=_UNDECIDED))
    with _named(f"arm {arm}"):
        parts = assemble(undecided, quiet=quiet)
        check_samples(parts)
    return parts


def _probe_texts(benchmark: Benchmark, arms: Mapping[str, Assembly]) -> ProbeData | None:
    """The probe's texts, which must be the same whichever arm's data they are made from."""
    if benchmark.probe is None:
        return None
    require_sklearn()
    datasets = {parts.dataset.fingerprint: parts.dataset for parts in arms.values()}
    first, *others = [labelled_texts(benchmark.probe, dataset) for dataset in datasets.values()]
    if any(other.digest != first.digest for other in others):
        raise UserError(
            f"probe.name is {benchmark.probe.name}, which makes its texts from the data of each arm, and the arms read "
            f"different data ({'; '.join(differing_data(arms))}); accepted: a probe on files, or arms with the same "
            "data."
        )
    return first


def _check_probes(benchmark: Benchmark, arms: Mapping[str, Assembly], texts: ProbeData | None) -> None:
    """Refuses a probe whose texts some arm's model cannot read."""
    if benchmark.probe is None or texts is None:
        return
    for arm, parts in arms.items():
        with _named(f"arm {arm}"):
            model = nnx.merge(parts.program.graphs["model"], parts.abstract_params["model"])
            check_probe(benchmark.probe, texts, model, Reading.of(parts))


def _planned(benchmark: Benchmark, arm: str, parts: Assembly, say: Say) -> ArmPlan:
    """The plan of an arm, whose settings allow as many steps as it has."""
    say(f"Compiling {arm} to count what a step takes.")
    plan = plan_arm(arm, parts, benchmark.budget)
    base: Experiment = parts.config  # type: ignore[assignment]
    with _named(f"arm {arm}, for {plan.steps} steps of which budget.{benchmark.budget.kind} pays"):
        run = plan.experiment(base, name=base.name, run=str(base.run_dir), seed=benchmark.seeds[0])
        design(run, parts.vocab, mesh=parts.mesh)
    return plan


def _tell(prepared: Prepared, say: Say) -> None:
    budget = prepared.benchmark.budget
    say(f"Budget per run: {budget.amount:.4g} {UNITS[budget.kind]}.")
    for arm, plan in prepared.plans.items():
        timed = "" if plan.seconds_per_step is None else f", {plan.seconds_per_step:.4f} s measured"
        say(
            f"  {arm}: {plan.steps:,} steps of {plan.tokens_per_step:,} tokens, {plan.flops_per_step:.3e} FLOPs each "
            f"({plan.formula_flops_per_step:.3e} by formula){timed}; {plan.parameters:,} parameters"
        )


@contextlib.contextmanager
def _named(what: str) -> Iterator[None]:
    """What is refused says of what."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{what}: {error}") from None
