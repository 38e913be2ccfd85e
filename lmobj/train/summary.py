"""What a finished run leaves for people: baselines, samples, and the report."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from lmobj import masks
from lmobj.errors import UserError
from lmobj.evaluate import (
    InfillingOrder,
    SamplingConfig,
    UnmaskingConfig,
    check_reads_rows,
    continue_text,
    fill_masks,
    fill_text,
    infill_text,
    infilling_tokens,
    masked_tokens,
)
from lmobj.models import CachedModel
from lmobj.objectives import MaskedDiffusion
from lmobj.train import distributed
from lmobj.train.assemble import Assembly
from lmobj.train.evaluation import Evaluation
from lmobj.train.generation import check_generation, ending, figure_text, generation_study
from lmobj.train.infilling import has_hole, infilling_order
from lmobj.train.report import write_report
from lmobj.train.run_folder import RunFolder
from lmobj.train.split_report import examine, reported_splits
from lmobj.train.step import State
from lmobj.train.tracking import Tracker
from lmobj.train.writing import TargetWriter, check_goes_on, check_writing, score_line, writes_targets

__all__ = ["check_samples", "summarise"]

_SAMPLING = SamplingConfig(max_new_tokens=80, temperature=0.8, top_p=0.95)
"""How prompts are continued; by fewer tokens where the model has no room for so many."""
_UNMASKING = UnmaskingConfig(temperature=0.8, order="random")
"""How a model of masked diffusion continues them; up to the length of the rows that it was trained on."""


def check_samples(run: Assembly) -> None:
    """Refuses, before any training, prompts that the trained model could not continue or fill.

    Raises:
      UserError: naming the prompt.
    """
    if run.config.generation is not None:
        check_generation(run, run.config.generation)
    check_writing(run)
    if "model" not in run.program.graphs:
        return
    graph, tokenizer = run.program.graphs["model"], run.dataset.tokenizer

    def use(prompt: str, params: Any) -> None:
        model = nnx.merge(graph, params)
        check_goes_on(run.objective)
        if not prompt:
            raise UserError("it is empty; accepted: a text of at least one character.")
        if writes_targets(run.objective):
            TargetWriter(run, model).check(prompt)
        elif _writes(run, model, prompt):
            _check_room(run, model, _read_length(run, prompt) + 1)
        else:
            check_reads_rows(model)
            tokens, where = masked_tokens(tokenizer, prompt, framed=not _unmasks(run))
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
    """The config's prompts, continued by models that generate and filled by models that fill masks, spans or middles;
    or what an encoder with a decoder writes for them."""
    prompts = run.config.sample
    if writes_targets(run.objective):
        writer = TargetWriter(run, model)
        if writer.fills_spans:
            texts = {prompt: writer.fill(prompt)[0] for prompt in prompts}
        else:
            targets = writer.write_texts(prompts, writer.decoding)
            texts = {prompt: one[0].text for prompt, one in zip(prompts, targets, strict=True)}
    else:
        texts = _continued_or_filled(run, model, prompts)
    return [{"step": step, "prompt": prompt, "text": texts[prompt]} for prompt in prompts]


def _continued_or_filled(run: Assembly, model: Any, prompts: Sequence[str]) -> dict[str, str]:
    """The text of each prompt, by a model that reads and writes one row."""
    tokenizer = run.dataset.tokenizer
    written = [prompt for prompt in prompts if _writes(run, model, prompt)]
    framed = not _unmasks(run)
    texts = {
        prompt: fill_text(model, tokenizer, prompt, framed=framed)[0] for prompt in prompts if prompt not in written
    }
    if written:
        room = _room(run, model, max(_read_length(run, prompt) for prompt in written))
        sampling = dataclasses.replace(_SAMPLING, max_new_tokens=room)
        settings = dataclasses.replace(_UNMASKING, max_new_tokens=room) if _unmasks(run) else sampling
        orders = {prompt: _order(run, prompt) for prompt in written}
        continued = [prompt for prompt, order in orders.items() if order is None]
        found = continue_text(model, tokenizer, continued, settings, suffix=ending(run)) if continued else []
        between = "\n" if run.spec.two_texts else ""
        texts |= {prompt: prompt + between + one[0].text for prompt, one in zip(continued, found, strict=True)}
        texts |= {
            prompt: infill_text(model, tokenizer, prompt, sampling, order=order)[0].text
            for prompt, order in orders.items()
            if order is not None
        }
    return texts


def _order(run: Assembly, prompt: str) -> InfillingOrder | None:
    """The order in which the model is asked to fill in the middle of a prompt; None: it goes on after it."""
    order = infilling_order(run.objective, run.config.data)
    return order if has_hole(prompt, run.dataset.tokenizer) else None


def _read_length(run: Assembly, prompt: str) -> int:
    """Tokens that a model which writes reads of a prompt, and of what comes between."""
    tokenizer, order = run.dataset.tokenizer, _order(run, prompt)
    if order is None:
        return len(tokenizer.encode(prompt)) + len(ending(run))
    return len(infilling_tokens(tokenizer, prompt, order)[0])


def _unmasks(run: Assembly) -> bool:
    """Whether the model is one of masked diffusion, which does both: it fills masks and writes by unmasking."""
    return isinstance(run.config.objective, MaskedDiffusion)


def _writes(run: Assembly, model: Any, prompt: str) -> bool:
    """Whether the model writes on from a prompt: one that could, and was not taught to fill masks instead."""
    if _unmasks(run):
        tokenizer = run.dataset.tokenizer
        (mask_id,) = tokenizer.vocabulary.require("masked diffusion", "mask")
        return tokenizer.piece(mask_id) not in prompt
    objective = run.objective
    return isinstance(model, CachedModel) and (objective.causal or not objective.fills_masks)


def _check_room(run: Assembly, model: Any, length: int) -> None:
    """Raises ValueError where the model has no room for a text of `length` tokens."""
    if not _unmasks(run):
        model.init_cache(1, length)
    elif length > run.spec.length:
        raise UserError(
            f"data.length is {run.spec.length}, and with a new token it has {length}; accepted: shorter prompts."
        )
    else:
        tokens = jnp.zeros((1, length), jnp.int32)
        model.hidden(tokens, mask=masks.bidirectional().packed(tokens + 1))


def _room(run: Assembly, model: Any, length: int) -> int:
    """New tokens that the model has room for after a prompt of `length`, up to those of `_SAMPLING`."""

    def accepted(total: int) -> bool:
        try:
            jax.eval_shape(lambda: _check_room(run, model, total))
        except ValueError:
            return False
        return True

    return next(n for n in range(_SAMPLING.max_new_tokens, 0, -1) if n == 1 or accepted(length + n))
