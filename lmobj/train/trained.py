"""A finished or stopped run, opened again to evaluate it or to use its model.

run = open_run(config)
run.evaluate("test")["bits_per_byte"]
run.continue_text(["Once upon"], SamplingConfig(top_p=0.9))[0][0].text
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lmobj.data import Tokenizer
from lmobj.errors import UserError
from lmobj.evaluate import (
    Answers,
    Continuation,
    DecodingConfig,
    FewShot,
    Filling,
    Infilling,
    Shot,
    UnmaskingConfig,
    answer_queries,
    continue_text,
    fill_text,
    infill_text,
)
from lmobj.objectives import MaskedDiffusion
from lmobj.train import distributed
from lmobj.train.assemble import Assembly, Experiment, assemble
from lmobj.train.checkpoint import Checkpoints
from lmobj.train.evaluation import Evaluation
from lmobj.train.infilling import infilling_order
from lmobj.train.initial import restored_state
from lmobj.train.run_folder import RunFolder, check_same_run
from lmobj.train.sharding import MeshConfig
from lmobj.train.split_report import SplitReport, examine
from lmobj.train.step import State
from lmobj.train.writing import TargetWriter, check_goes_on, writes_targets

__all__ = ["TrainedRun", "on_one_device", "open_run"]


@dataclass(frozen=True)
class TrainedRun:
    """The parts of a run, with the state of one of its checkpoints."""

    assembly: Assembly
    state: State

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer that the model reads and writes."""
        return self.assembly.dataset.tokenizer

    @property
    def model(self) -> Any:
        """The trained model, on one device."""
        if "model" not in self.assembly.program.graphs:
            roles = ", ".join(self.assembly.program.graphs)
            raise UserError(
                f"this run trained the models {roles}; text can be written by a run that trained one `model`."
            )
        return self.assembly.model(self.state)

    def evaluate(self, split: str = "validation") -> dict[str, float]:
        """The metrics over a whole split, as at the end of training."""
        return Evaluation(self.assembly, split)(self.state)

    def examine(self, split: str = "validation", *, quiet: bool = True) -> tuple[dict[str, float], SplitReport | None]:
        """The same metrics, and of a task's run what is told of the split beside them, with a bar unless `quiet`."""
        return examine(self.assembly, self.state, split, quiet=quiet)

    def continue_text(
        self, prompts: Sequence[str], settings: DecodingConfig | UnmaskingConfig
    ) -> list[list[Continuation]]:
        """Continues each prompt; for every prompt the samples or beams.

        A model of pairs of texts writes the second text of each, of which the prompt is the first; and an encoder with
        a decoder the target for it.
        """
        self._check_decoding(settings)
        if self.writer is not None:
            assert not isinstance(settings, UnmaskingConfig)
            return self.writer.write_texts(prompts, settings)
        check_goes_on(self.assembly.objective)
        suffix = self.assembly.spec.suffix if self.writes_second_texts else ()
        return continue_text(self.model, self.tokenizer, prompts, settings, suffix=suffix)

    @functools.cached_property
    def writer(self) -> TargetWriter | None:
        """The model as it writes targets for inputs; None where it is no encoder with a decoder."""
        return TargetWriter(self.assembly, self.model) if writes_targets(self.assembly.objective) else None

    @property
    def writes_second_texts(self) -> bool:
        """Whether the model writes one text for another, which it does not go on with."""
        return self.assembly.spec.two_texts or writes_targets(self.assembly.objective)

    @property
    def unmasks(self) -> bool:
        """Whether the model was trained by masked diffusion: it writes by unmasking, and a text has a bound."""
        return isinstance(self.assembly.config.objective, MaskedDiffusion)

    def answer(
        self,
        task: FewShot,
        examples: Sequence[Shot],
        queries: Sequence[str],
        settings: DecodingConfig | UnmaskingConfig,
        *,
        shots: int | None = None,
    ) -> Answers:
        """Answers each query after examples of its task; see `lmobj.evaluate.answer_queries`."""
        self._check_decoding(settings)
        check_goes_on(self.assembly.objective)
        return answer_queries(self.model, self.tokenizer, task, examples, queries, settings, shots=shots)

    def fill_text(self, text: str, k: int = 5) -> tuple[str, list[Filling]]:
        """The text with each [MASK] filled, and the k best guesses for each; or of span corruption with the spans that
        sentinels stand for, and those of the k best fillings."""
        objective = self.assembly.objective
        if self.writer is not None and self.writer.fills_spans:
            return self.writer.fill(text, k)
        if not objective.fills_masks:
            raise UserError(
                f"the objective of this run is {getattr(objective, 'name', type(objective).__name__)}, which does not "
                "teach a model to fill masks; accepted: a run of a masked language model, such as "
                "objective.name=masked_lm, of span corruption by an encoder with a decoder, or one that learned to "
                "fill in the middle of a text, such as objective.name=fill_in_middle."
            )
        return fill_text(self.model, self.tokenizer, text, k, framed=not self.unmasks)

    def _check_decoding(self, settings: DecodingConfig | UnmaskingConfig) -> None:
        if isinstance(settings, UnmaskingConfig) == self.unmasks:
            return
        objective = self.assembly.objective
        how = "whose model writes by unmasking" if self.unmasks else "which does not teach a model to unmask texts"
        accepted = "UnmaskingConfig" if self.unmasks else "SamplingConfig, BeamConfig"
        raise UserError(
            f"the settings are {type(settings).__name__}, and the objective of this run is "
            f"{getattr(objective, 'name', type(objective).__name__)}, {how}; accepted: {accepted}."
        )

    @property
    def fills_middles(self) -> bool:
        """Whether the model learned to write what stands in the middle of a text."""
        return infilling_order(self.assembly.objective, self.assembly.config.data) is not None

    def infill_text(self, text: str, settings: DecodingConfig) -> list[Infilling]:
        """What stands in the place of <fim_middle>; see `lmobj.evaluate.infill_text`."""
        order = infilling_order(self.assembly.objective, self.assembly.config.data)
        if order is None:
            raise UserError(
                "this run did not teach its model to fill in the middle of a text; accepted: a run with "
                "objective.name=fill_in_middle or with data.fill_in_middle."
            )
        return infill_text(self.model, self.tokenizer, text, settings, order=order)


def open_run(config: Experiment, *, best: bool = False, quiet: bool = False) -> TrainedRun:
    """Opens the run in `config.run_dir` at its newest whole checkpoint.

    Args:
      config: the run's own config; where it runs (mesh, cache) may differ.
      best: take the best checkpoint, by `train.best`, instead of the newest.
      quiet: no progress bars.

    Raises:
      UserError: the folder has no checkpoint, or the config or the data are not those that it was made with.
    """
    with distributed.agreed("run folder"):
        folder = RunFolder(config.run_dir)
        folder.check_exists()
        best_of = config.train.best
        checkpoints = Checkpoints(folder.checkpoints, keep=config.train.keep, best=best_of.name, mode=best_of.mode)
    with checkpoints:
        with distributed.agreed("checkpoints"):
            if checkpoints.latest_step is None:
                raise UserError(
                    f"{str(folder)!r} has no checkpoint yet; continue the run with `{folder.resume_command}`."
                )
        run = assemble(config, quiet=quiet)
        with distributed.agreed("run of the checkpoint"):
            step = checkpoints.best_step if best else None
            stored = checkpoints.metadata(step)
            if stored is not None:  # before the arrays are compared: it names the setting, not the array
                check_same_run(stored, run.identity)
        restored = restored_state(run, checkpoints, step)
    return TrainedRun(run, restored.state)


def on_one_device(config: Any) -> Any:
    """The same experiment on a mesh of one device, which is all that generation needs, wherever it was trained."""
    return dataclasses.replace(config, train=dataclasses.replace(config.train, mesh=MeshConfig(data=1)))
