"""What a finished run leaves for people: baselines, samples, and the report."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, TypeGuard

import jax
import jax.numpy as jnp
from flax import nnx

from lmobj.errors import UserError
from lmobj.evaluate import SamplingConfig, continue_text, fill_masks, fill_text, masked_tokens, sentinels_in
from lmobj.models import CachedModel
from lmobj.train import distributed
from lmobj.train.assemble import Assembly
from lmobj.train.evaluation import Evaluation
from lmobj.train.generation import check_generation, figure_text, generation_study
from lmobj.train.report import write_report
from lmobj.train.run_folder import RunFolder
from lmobj.train.split_report import examine, reported_splits
from lmobj.train.step import State
from lmobj.train.tracking import Tracker
from lmobj.train.writing import TargetWriter, check_goes_on, check_scored, score_line, writes_targets

__all__ = ["check_samples", "summarise"]

_SAMPLING = SamplingConfig(max_new_tokens=80, temperature=0.8, top_p=0.95)
"""How prompts are continued; by fewer tokens where the model has no room for so many."""


def check_samples(run: Assembly) -> None:
    """Refuses, before any training, prompts that the trained model could not continue or fill.

    Raises:
      UserError: naming the prompt.
    """
    if run.config.generation is not None:
        check_generation(run, run.config.generation)
    check_scored(run)
    if "model" not in run.program.graphs:
        return
    graph, tokenizer = run.program.graphs["model"], run.dataset.tokenizer

    def use(prompt: str, params: Any) -> None:
        model = nnx.merge(graph, params)
        check_goes_on(run.objective)
        if writes_targets(run.objective):
            if run.objective.fills_spans:
                sentinels_in(tokenizer, prompt)
            elif not prompt:
                raise UserError("it is empty; accepted: a text of at least one character.")
        elif _writes(run, model):
            length = len(tokenizer.encode(prompt))
            if length == 0:
                raise UserError("it is empty; accepted: a text of at least one character.")
            model.init_cache(1, length + 1)
        else:
            tokens, where = masked_tokens(tokenizer, prompt)
            fill_masks(model, jnp.asarray(tokens), jnp.asarray(where), k=1)

    for prompt in run.config.sample:
        try:
            jax.eval_shape(functools.partial(use, prompt), run.abstract_params["model"])
        except UserError as error:
            raise UserError(f"sample has the prompt {prompt!r}, which the model cannot use: {error}") from None


def summarise(run: Assembly, state: State, evaluation: Evaluation, folder: RunFolder, tracker: Tracker) -> None:
    """Writes baselines.json, samples.json, of a task eval/, where it is asked for generation.json, and report.html.

    Prints the figures, one sample and the report's path.
    """
    told = [examine(run, state, split)[1] for split in reported_splits(run)]
    asked, study = run.config.generation, None
    used = bool(run.config.sample) or asked is not None
    model = run.model(state) if used and "model" in run.program.graphs else None
    if not distributed.is_first():  # the parameters came from every process; the rest is the first one's
        return
    baselines = evaluation.baselines()
    samples = _samples(run, model, step=int(state.step)) if run.config.sample and model is not None else []
    folder.write_json("baselines.json", baselines)
    folder.write_json("samples.json", samples)
    if asked is not None:
        study = generation_study(run, model, asked, step=int(state.step))
        folder.write_json("generation.json", study)
    for sample in samples:
        tracker.text(int(state.step), "sample", sample["text"])
    for one in filter(None, told):
        one.write(folder)
        if one.task == "sequence_to_sequence":
            tracker.note(f"{one.split}: {score_line(one.figures)}.")
    report = write_report(folder.path)

    figure = run.objective.judged_by
    for name, values in baselines.items():
        tracker.note(f"{name:>10}  {figure} {values[figure]:.4f}")
    best = tracker.last(f"best/{figure}")
    reached = tracker.last(f"eval/{figure}") if best is None else best
    if reached is not None:
        tracker.note(f"{'this model':>10}  {figure} {reached:.4f}")
    if study is not None:
        tracker.note("\n" + figure_text(study))
    for sample in samples[:1]:
        tracker.note(f"\n{sample['prompt']}\n-> {sample['text']}\n")
    tracker.note(f"Report: {folder}/{report.name}")


def _samples(run: Assembly, model: Any, *, step: int) -> list[dict[str, Any]]:
    """The config's prompts, continued by models that generate and filled by models that fill masks or spans; or what an
    encoder with a decoder writes for them."""
    prompts, tokenizer = run.config.sample, run.dataset.tokenizer
    if writes_targets(run.objective):
        writer = TargetWriter(run, model)
        if writer.fills_spans:
            texts = [writer.fill(prompt)[0] for prompt in prompts]
        else:
            texts = [one[0].text for one in writer.write_texts(prompts, writer.decoding)]
    elif _writes(run, model):
        longest = max(len(tokenizer.encode(prompt)) for prompt in prompts)
        settings = dataclasses.replace(_SAMPLING, max_new_tokens=_room(model, longest))
        texts = [
            prompt + one[0].text
            for prompt, one in zip(prompts, continue_text(model, tokenizer, prompts, settings), strict=True)
        ]
    else:
        texts = [fill_text(model, tokenizer, prompt)[0] for prompt in prompts]
    return [{"step": step, "prompt": prompt, "text": text} for prompt, text in zip(prompts, texts, strict=True)]


def _writes(run: Assembly, model: Any) -> TypeGuard[CachedModel]:
    """Whether the model writes on from a prompt: one that could, and was not taught to fill masks instead."""
    objective = run.objective
    return isinstance(model, CachedModel) and (objective.causal or not objective.fills_masks)


def _room(model: CachedModel, length: int) -> int:
    """New tokens that the model has room for after a prompt of `length`, up to those of `_SAMPLING`."""

    def accepted(total: int) -> bool:
        try:
            jax.eval_shape(lambda: model.init_cache(1, total))
        except ValueError:
            return False
        return True

    return next(n for n in range(_SAMPLING.max_new_tokens, 0, -1) if n == 1 or accepted(length + n))
