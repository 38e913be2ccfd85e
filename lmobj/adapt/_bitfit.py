"""BitFit: only biases are trained.

Ben Zaken et al. 2022, "BitFit: Simple Parameter-efficient Fine-tuning for Transformer-based Masked Language-models",
section 3: all biases, of linear maps, norms and heads; or those of queries and of the first half of the feed-forward
part alone (`targets: [query, up]`), which do nearly as well.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from flax import nnx

from lmobj.adapt._adapted import is_named
from lmobj.adapt._marks import variables
from lmobj.errors import UserError

__all__ = ["BitFit"]


@dataclass(frozen=True)
class BitFit:
    """Training of the model's own biases."""

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    name: Literal["bitfit"] = "bitfit"
    """Biases alone (BitFit)."""
    targets: tuple[str, ...] | None = None
    """Modules whose biases are trained, by name; null: all."""

    def adapt(self, model: nnx.Module, rngs: nnx.Rngs) -> None:
        """Marks the biases of a model, in place."""
        biases = {path.removesuffix("/bias"): bias for path, bias in variables(model) if path.endswith("bias")}
        for target in [None] if self.targets is None else self.targets:
            chosen = [path for path in biases if target is None or is_named(path, target)]
            if not chosen:
                names = sorted({path.rsplit("/", 1)[-1] for path in biases})
                asked = "null" if target is None else repr(target)
                raise UserError(
                    f"adapter.targets has {asked}, and {type(model).__name__} has no such biases; those that have some "
                    f"are {', '.join(names) or 'none'}."
                )
            for path in chosen:
                biases[path].set_metadata(trainable=True)
