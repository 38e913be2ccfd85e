"""How probable a run of masked diffusion finds held-out text: the bound of many noised copies of each document.

found = held_out_bound(open_run(config), "test", samples=64)
found["nll"], found["nll_error"], found["bits_per_byte"]

`lmobj eval` without it, as training does, hides some of each document once; the two estimate the same bound.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from lmobj.data import progress_bar
from lmobj.errors import UserError
from lmobj.evaluate import ScoredText, bits_per_byte, diffusion_bounds
from lmobj.train.trained import TrainedRun

__all__ = ["held_out_bound"]


class _Text(NamedTuple):
    row: ScoredText
    num_bytes: int
    """UTF-8 bytes of what is scored; 0 where rows do not tell."""


def held_out_bound(trained: TrainedRun, split: str, *, samples: int, quiet: bool = False) -> dict[str, float]:
    """The bound over all documents of a split, as its rows cut them: of second texts where the objective noises those.

    Args:
      trained: a run of masked diffusion.
      split: train, validation or test.
      samples: noised copies of each document, at least 2.
      quiet: no progress bar.

    Returns:
      `nll`, nats per token, and its standard deviation `nll_error`; `perplexity`; `bits_per_byte` where rows tell the
      bytes of tokens; `tokens`, `documents` and `samples`.

    Raises:
      UserError: another objective, a split without text, or as for `diffusion_bounds`.
    """
    if not trained.unmasks:
        objective = trained.assembly.objective
        raise UserError(
            f"the objective of this run is {getattr(objective, 'name', type(objective).__name__)}, whose likelihoods "
            "have no bound by noised copies; accepted: a run of masked_diffusion."
        )
    texts = list(_texts(trained, split))
    (mask_id,) = trained.tokenizer.vocabulary.require("masked diffusion", "mask")
    with progress_bar(quiet) as progress:
        bar = progress.add_task("estimating", total=len(texts))
        bounds = diffusion_bounds(
            trained.model,
            [text.row for text in texts],
            mask_id=mask_id,
            samples=samples,
            done=lambda count: progress.update(bar, completed=count),
        )
    tokens, total = sum(len(text.row.tokens) - text.row.start for text in texts), float(bounds.nats.sum())
    num_bytes = sum(text.num_bytes for text in texts)
    return {
        "nll": total / tokens,
        "nll_error": float(np.sqrt(np.sum(bounds.errors**2))) / tokens,
        "perplexity": math.exp(min(total / tokens, 700.0)),
        **({"bits_per_byte": bits_per_byte(total, num_bytes)} if num_bytes else {}),
        "tokens": tokens,
        "documents": len(texts),
        "samples": samples,
    }


def _texts(trained: TrainedRun, split: Any) -> Iterator[_Text]:
    """The documents of a split, each as its segment of a row holds it."""
    run = trained.assembly
    for batch in run.dataset.batches(run.spec, split=split, batch_size=run.config.train.batch_size):
        for number, segments in enumerate(batch["segment_ids"]):
            for segment in range(1, int(segments.max()) + 1):
                here = segments == segment
                start = int(np.argmax(batch["token_types"][number, here] == 1)) if run.spec.two_texts else 0
                num_bytes = int(batch["token_bytes"][number, here].sum()) if "token_bytes" in batch else 0
                yield _Text(ScoredText(batch["tokens"][number, here], start), num_bytes)
