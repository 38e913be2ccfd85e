"""What a run's model writes under several decodings, beside held-out text: the `generation` section of a config."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx

from lmobj.errors import UserError
from lmobj.evaluate import (
    Continuation,
    GenerationConfig,
    TextFigures,
    compare_decodings,
    continuation_log_probs,
    passages,
    text_figures,
)
from lmobj.models import CachedModel
from lmobj.train.assemble import Assembly

__all__ = ["HELD_OUT", "check_generation", "ending", "figure_rows", "figure_text", "generation_study"]

HELD_OUT = "held-out text"
"""The name of the row that one compares with."""

_HEADER = ("", "perplexity", "distinct-1", "distinct-2", "distinct-3", "repeated-4", "self-BLEU", "tokens")


def check_generation(run: Assembly, config: GenerationConfig) -> None:
    """Refuses, before any training, texts that the trained model could not write.

    Raises:
      UserError: naming the key.
    """
    objective = run.objective
    graph = run.program.graphs.get("model")
    model = None if graph is None else nnx.merge(graph, run.abstract_params["model"])
    if not isinstance(model, CachedModel) or not objective.causal or objective.task is not None:
        raise UserError(
            f"generation is set, and the objective {getattr(objective, 'name', type(objective).__name__)} with the "
            f"model {getattr(run.builder, 'name', type(run.builder).__name__)} trains none that writes text "
            "token by token; accepted: a causal model that generates, such as causal_lm of a decoder or gru, or no "
            "such section."
        )
    for prompt in _prompts(run, config):
        key = "generation.prompts" if config.prompts else "sample"
        length = len(run.dataset.tokenizer.encode(prompt))
        if length == 0:
            raise UserError(f"{key} has the prompt {prompt!r}; accepted: texts of at least one character.")
        total = length + len(ending(run)) + config.max_tokens
        try:
            jax.eval_shape(lambda total=total: model.init_cache(1, total))
        except ValueError as error:
            raise UserError(
                f"generation.max_tokens is {config.max_tokens}, for which the model has no room after the prompt "
                f"{prompt!r:.60} of {key}: {error}"
            ) from None


def generation_study(run: Assembly, model: Any, config: GenerationConfig, *, step: int) -> dict[str, Any]:
    """Texts and their figures, in JSON.

    Held-out text is given as passages: as many tokens as the median prompt are read, and the `config.max_tokens` that
    follow them stand for a text. There are as many as texts of one decoding, where there is enough of it.

    Returns:
      `step`, `prompts`, `samples`, `max_tokens`; `decodings`: a list of `name`, `figures` (`TextFigures`) and `texts`,
      each with `prompt`, `text`, `tokens` and `log_probability`; `reference`, the same of held-out text, or None.
    """
    tokenizer, prompts = run.dataset.tokenizer, _prompts(run, config)
    found = compare_decodings(model, tokenizer, prompts, config, suffix=ending(run))
    decodings = [
        {"name": name, "figures": figures._asdict(), "texts": list(_texts(prompts, written))}
        for name, (written, figures) in found.items()
    ]
    return {
        "step": step,
        "prompts": list(prompts),
        "samples": config.samples,
        "max_tokens": config.max_tokens,
        "decodings": decodings,
        "reference": _reference(run, model, config),
    }


def figure_text(study: dict[str, Any]) -> str:
    """The figures of a study as a table in plain text."""
    header, rows = figure_rows(study)
    widest = max(len(row[0]) for row in rows)
    return "\n".join(f"{name:>{widest}}" + "".join(f"{cell:>12}" for cell in cells) for name, *cells in (header, *rows))


def figure_rows(study: dict[str, Any]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """The figures of a study as a header and rows of text, held-out text first."""
    rows = [study["reference"]] if study["reference"] else []
    return _HEADER, [_shown(row["name"], TextFigures(**row["figures"])) for row in (*rows, *study["decodings"])]


def _shown(name: str, figures: TextFigures) -> tuple[str, ...]:
    shares = [figures.distinct_1, figures.distinct_2, figures.distinct_3, figures.repeated_4, figures.self_bleu]
    return (
        name,
        f"{figures.perplexity:.4g}",
        *("-" if share is None else f"{share:.3f}" for share in shares),
        f"{figures.tokens:.1f}",
    )


def _prompts(run: Assembly, config: GenerationConfig) -> tuple[str, ...]:
    prompts = config.prompts or run.config.sample
    if not prompts:
        raise UserError("generation.prompts is empty, and so is sample; accepted: texts to continue in one of the two.")
    return prompts


def ending(run: Assembly) -> tuple[int, ...]:
    """What ends the first of two texts, where the model learned to write the second."""
    return run.spec.suffix if run.spec.two_texts else ()


def _texts(prompts: Sequence[str], written: Sequence[Sequence[Continuation]]) -> Iterator[dict[str, Any]]:
    for prompt, samples in zip(prompts, written, strict=True):
        for one in samples:
            yield _text(prompt, one.text, one.tokens, one.log_probs)


def _text(prompt: str, text: str, tokens: Any, log_probs: Any) -> dict[str, Any]:
    total = float(np.sum(log_probs, dtype=np.float64))
    return {"prompt": prompt, "text": text, "tokens": np.asarray(tokens).tolist(), "log_probability": total}


def _reference(run: Assembly, model: Any, config: GenerationConfig) -> dict[str, Any] | None:
    """Passages of held-out text; None where there are fewer than prompts, or where rows are pairs of texts."""
    if run.spec.two_texts:
        return None
    tokenizer, spec, prompts = run.dataset.tokenizer, run.spec, _prompts(run, config)
    before, after = np.array(spec.prefix, np.int32), np.array(spec.suffix, np.int32)
    documents = (np.concatenate([before, text, after]) for text in run.dataset.documents("validation"))
    read = int(np.median([len(tokenizer.encode(prompt)) for prompt in prompts]))
    rows = passages(documents, len(prompts) * config.samples, read=read, length=config.max_tokens)
    sets = [rows[i : i + len(prompts)] for i in range(0, len(rows) - len(prompts) + 1, len(prompts))]
    if not sets:
        return None
    rows = [row for one in sets for row in one]
    log_probs = continuation_log_probs(model, rows)
    figures = text_figures([[row.tokens[row.start :] for row in one] for one in sets], log_probs)
    texts = [
        _text(tokenizer.decode(ids[:start]), tokenizer.decode(ids[start:]), ids[start:], values)
        for (ids, start), values in zip(rows, log_probs, strict=True)
    ]
    return {"name": HELD_OUT, "figures": figures._asdict(), "texts": texts}
