"""The same step in PyTorch with Hugging Face Transformers: the same sizes, rates, dtype and batches, taken its own way.

Inputs are corrupted in advance and attention and heads are Transformers' defaults: SDPA where the family has it, the
vocabulary head on every position. The optimizer is PyTorch's fused AdamW with the experiment's weight decay and
clipping, at a constant rate, whatever optimizer the experiment names. Weights are lmobj's where it can write them.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lmobj.batch import Vocabulary
from lmobj.config import Experiment
from lmobj.errors import UserError
from lmobj.interop import bart, bert, electra, gpt2, t5, xlnet
from lmobj.models import DecoderConfig, ElectraConfig, EncoderConfig, EncoderDecoderConfig, XLNetConfig
from lmobj.objectives import CausalLM, Context, Example, MaskedLM, PermutationLM, ReplacedTokenDetection, step_keys
from lmobj.speed._ours import Pending
from lmobj.train import TrainConfig
from lmobj.train.assemble import Design

__all__ = ["Theirs", "check_peer"]

_RATE = 1e-4
_ACCEPTED = (
    "accepted with --peer transformers: causal_lm on a decoder like GPT-2 or LLaMA, masked_lm on an encoder like BERT, "
    "replaced_token_detection on electra, permutation_lm on xlnet, an encoder_decoder like T5 or BART; or no --peer"
)


class _Peer(NamedTuple):
    """A family in Transformers.

    settings: of each model, by the name of its class.
    tensors: lmobj's weights by their names, for each model; None where lmobj cannot write them.
    inputs: a batch as the step takes it, from lmobj's.
    step: (models, inputs, memory) -> (loss, memory).
    memory: what the first step gets.
    """

    settings: dict[str, dict[str, Any]]
    tensors: Callable[[Mapping[str, Any]], Sequence[Mapping[str, Any]]] | None
    inputs: Callable[[Mapping[str, Any]], dict[str, np.ndarray]]
    step: Callable[[Any, dict[str, Any], Any], tuple[Any, Any]]
    memory: Callable[[], Any] = lambda: None
    arranged: Callable[[Any], None] = lambda models: None
    """Ties what new models share, and parts what they do not."""


def check_peer(experiment: Experiment, *, devices: int = 1) -> None:
    """Refuses what Transformers cannot do the same of, and where it is not installed.

    Raises:
      UserError: naming the setting, or the package.
    """
    missing = [name for name in ("torch", "transformers") if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(
            f"--peer transformers needs {' and '.join(missing)}, not installed here; run `pip install "
            f"{' '.join(missing)}` (for a GPU, PyTorch's build for it), or leave --peer out."
        )
    if devices > 1:
        raise UserError(
            f"--peer transformers runs on one device and train.mesh has {devices}; accepted: train.mesh.data=1 and no "
            "other axis, or no --peer."
        )
    if experiment.model.param_dtype != "float32" or experiment.model.dtype not in ("float32", "bfloat16"):
        raise UserError(
            f"model.param_dtype is {experiment.model.param_dtype} and model.dtype is {experiment.model.dtype}; "
            "accepted with --peer: parameters in float32, and a dtype of float32 or bfloat16."
        )
    _peer(experiment, Vocabulary(experiment.data.tokenizer.trained_size, cls=1, sep=2, mask=3), None)


class Theirs:
    """A plain PyTorch loop on the same kind of device."""

    compile_seconds: float | None = None
    planned_bytes: int | None = None

    def __init__(
        self,
        design: Design,
        batches: Sequence[Mapping[str, Any]],
        weights: Mapping[str, Any] | None,
        *,
        compiled: bool,
    ) -> None:
        import torch
        import transformers

        self._device = _device()
        self._held = 0
        if self._device == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            self._held = torch.cuda.memory_allocated()  # what contenders before it hold is not its own
        experiment: Any = design.config
        peer = _peer(experiment, design.vocab, design)
        torch.manual_seed(0)
        models = torch.nn.ModuleList()
        for name, settings in peer.settings.items():
            kind = getattr(transformers, name)
            models.append(kind(kind.config_class(**settings)))
        peer.arranged(models)
        if weights is not None and peer.tensors is not None:
            for model, tensors in zip(models, peer.tensors(weights["model"]), strict=True):
                _load(model, tensors)
        models.to(self._device).train()
        self.queues = self._device != "cpu"
        self.attention = str(models[0].config._attn_implementation)
        train = experiment.train
        self._parameters = list(models.parameters())
        self._optimizer = torch.optim.AdamW(
            [
                {"params": [p for p in self._parameters if p.ndim > 1], "weight_decay": train.optimizer.weight_decay},
                {"params": [p for p in self._parameters if p.ndim == 1], "weight_decay": 0.0},
            ],
            lr=_RATE,
            fused=True,
        )
        self._clip = train.optimizer.clip_norm
        self._parts = train.accumulate
        self._half = experiment.model.dtype == "bfloat16"
        step = peer.step
        self._forward: Any = (torch.compile if compiled else _as_it_is)(lambda *given: step(models, *given))
        self._batches = [
            {name: torch.from_numpy(x).to(self._device) for name, x in peer.inputs(batch).items()} for batch in batches
        ]
        self._memory = _to_device(peer.memory(), self._device)
        self._done = 0

    def step(self) -> Pending:
        """Starts the next step, on the next batch."""
        import torch

        batch = self._batches[self._done % len(self._batches)]
        losses = []
        for part in range(self._parts):
            inputs = {name: x[part :: self._parts] for name, x in batch.items()} if self._parts > 1 else batch
            with torch.autocast(self._device, dtype=torch.bfloat16, enabled=self._half):
                loss, memory = self._forward(inputs, self._memory)
            (loss / self._parts).backward()
            losses.append(loss.detach())
        if self._parts == 1:
            self._memory = memory
        if self._clip is not None:
            torch.nn.utils.clip_grad_norm_(self._parameters, self._clip)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        self._done += 1
        if self._device == "cpu":
            return Pending(lambda: None, lambda: _mean(losses))
        done = torch.cuda.Event()
        done.record()
        return Pending(done.synchronize, lambda: _mean(losses))

    def peak_bytes(self) -> int | None:
        """What PyTorch's allocator had in use for it."""
        if self._device == "cpu":
            return None
        import torch

        return int(torch.cuda.max_memory_allocated()) - self._held


def _as_it_is(function: Any) -> Any:
    return function


def _mean(losses: list[Any]) -> float:
    return float(sum(loss.item() for loss in losses) / len(losses))


def _device() -> str:
    """PyTorch's name of jax's device."""
    import torch

    platform = jax.default_backend()
    if platform == "cpu":
        return "cpu"
    if platform != "gpu" or not torch.cuda.is_available():
        raise UserError(
            f"--peer transformers would run on this machine's {platform}, which PyTorch {torch.__version__} does not "
            "reach; accepted: a CPU, or an NVIDIA GPU with PyTorch's build for it."
        )
    return "cuda"


def _to_device(memory: Any, device: str) -> Any:
    return None if memory is None else [x.to(device) for x in memory]


def _load(model: Any, tensors: Mapping[str, Any]) -> None:
    """Gives a model lmobj's weights; what it has beside them must be tied to one of them."""
    import torch

    found = model.load_state_dict({name: torch.from_numpy(np.array(x)) for name, x in tensors.items()}, strict=False)
    storages = {name: x.data_ptr() for name, x in model.state_dict(keep_vars=True).items()}
    known = {storages[name] for name in tensors if name in storages}
    strange = [name for name in found.missing_keys if storages[name] not in known] + found.unexpected_keys
    if strange:
        raise ValueError(f"Theirs: weights that do not fit {type(model).__name__}: {', '.join(strange)}")


def _peer(experiment: Experiment, vocab: Vocabulary, design: Design | None) -> _Peer:
    """The peer of an experiment. Without a design its settings alone are made, which refuses what has no peer."""
    model, objective = experiment.model, experiment.objective
    try:
        match model, objective:
            case DecoderConfig(), CausalLM(loss_on="all"):
                return _decoder(model, vocab)
            case EncoderConfig(), MaskedLM():
                return _encoder(model, vocab, design)
            case ElectraConfig(), ReplacedTokenDetection():
                return _electra(model, vocab, design)
            case EncoderDecoderConfig(), _:
                return _encoder_decoder(model, vocab, design)
            case XLNetConfig(), PermutationLM():
                return _xlnet(model, vocab, objective, design, experiment.train)
    except UserError as error:
        raise UserError(f"model.name is {model.name}, which has no peer like this one: {error} {_ACCEPTED}.") from None
    raise UserError(
        f"model.name is {model.name} and objective.name is {objective.name}, which have no peer in Transformers; "
        f"{_ACCEPTED}."
    )


# --- families -----------------------------------------------------------------------------------------------------


def _decoder(model: DecoderConfig, vocab: Vocabulary) -> _Peer:
    def inputs(batch: Mapping[str, Any]) -> dict[str, np.ndarray]:
        tokens = batch["tokens"].astype(np.int64)
        return {"input_ids": tokens, "labels": tokens}

    if model.positions == "rotary":
        return _Peer({"LlamaForCausalLM": _llama(model, vocab)}, None, inputs, _one_model)
    settings = gpt2.config_to_hf(model, vocab)
    return _Peer(
        {"GPT2LMHeadModel": settings},
        lambda params: [gpt2.from_lmobj(params, model, vocab.size)],
        inputs,
        _one_model,
    )


def _llama(model: DecoderConfig, vocab: Vocabulary) -> dict[str, Any]:
    """The settings of Transformers' LLaMA; refuses what it does not have."""
    only = {
        "norm": "rmsnorm", "pre_norm": True, "activation": "swiglu", "bias": False, "moe": None, "window": None,
        "soft_cap": None, "attention_soft_cap": None, "dropout": 0.0, "embedding_dropout": 0.0,
    }  # fmt: skip
    for name, accepted in only.items():
        found = getattr(model, name)
        if found != accepted:
            raise UserError(f"model.{name} is {found!r}; in llama the only one accepted is {accepted!r}.")
    spec = model._block_spec()
    return {
        "vocab_size": vocab.size,
        "num_hidden_layers": model.layers,
        "hidden_size": model.width,
        "num_attention_heads": model.heads,
        "num_key_value_heads": spec.kv_heads,
        "intermediate_size": spec.mlp_width,
        "max_position_embeddings": model.max_length,
        "rope_theta": model.rope_base,
        "rms_norm_eps": model.norm_eps,
        "attention_dropout": model.attention_dropout,
        "initializer_range": model.init_std,
        "tie_word_embeddings": model.tie_embeddings,
    }


def _encoder(model: EncoderConfig, vocab: Vocabulary, design: Design | None) -> _Peer:
    def inputs(batch: Mapping[str, Any]) -> dict[str, np.ndarray]:
        assert design is not None
        example = _corrupted(design, batch)
        return {"input_ids": np.asarray(example.inputs, np.int64), "labels": _labels(example)}

    return _Peer(
        {"BertForMaskedLM": bert.config_to_hf(model, vocab)},
        lambda params: [bert.from_lmobj(params, model, vocab.size)],
        inputs,
        _one_model,
    )


def _electra(model: ElectraConfig, vocab: Vocabulary, design: Design | None) -> _Peer:
    generator, discriminator = electra.config_to_hf(model, vocab)
    if model.sharing not in ("embeddings", "none"):
        raise UserError(f"model.sharing is {model.sharing!r}; in electra those accepted are 'embeddings' and 'none'.")
    coefficients = None if design is None else design.coefficients(0)

    def inputs(batch: Mapping[str, Any]) -> dict[str, np.ndarray]:
        assert design is not None
        example = _corrupted(design, batch)
        return {
            "input_ids": np.asarray(example.inputs, np.int64),
            "labels": _labels(example),
            "original": batch["tokens"].astype(np.int64),
            "slots": np.asarray(example.predict, np.int64),
        }

    def step(models: Any, batch: dict[str, Any], memory: Any) -> tuple[Any, Any]:
        import torch

        assert coefficients is not None
        generated = models[0](input_ids=batch["input_ids"], labels=batch["labels"])
        rows = torch.arange(batch["slots"].shape[0], device=batch["slots"].device)[:, None]
        with torch.no_grad():
            logits = generated.logits[rows, batch["slots"]].float()
            sampled = (logits - torch.empty_like(logits).exponential_().log()).argmax(-1)
            corrupted = batch["original"].clone()
            corrupted[rows, batch["slots"]] = sampled
            corrupted = torch.where(batch["labels"] == -100, batch["original"], corrupted)
            replaced = (corrupted != batch["original"]).float()
        told = models[1](input_ids=corrupted, labels=replaced)
        return coefficients["mlm"] * generated.loss + coefficients["disc"] * told.loss, None

    def arranged(models: Any) -> None:
        if model.sharing == "embeddings":
            models[1].electra.embeddings = models[0].electra.embeddings

    return _Peer(
        {"ElectraForMaskedLM": generator, "ElectraForPreTraining": discriminator},
        lambda params: electra.from_lmobj(params, model, vocab.size),
        inputs,
        step,
        arranged=arranged,
    )


def _encoder_decoder(model: EncoderDecoderConfig, vocab: Vocabulary, design: Design | None) -> _Peer:
    """BART where positions are learned, else T5."""
    family, name = (bart, "Bart") if model.positions == "learned" else (t5, "T5")

    def inputs(batch: Mapping[str, Any]) -> dict[str, np.ndarray]:
        assert design is not None
        example = _corrupted(design, batch)
        assert example.mask.segment_ids is not None
        weighed = np.asarray(example.weights) > 0
        return {
            "input_ids": np.asarray(example.inputs, np.int64),
            "attention_mask": np.asarray(example.mask.segment_ids > 0, np.int64),
            "decoder_input_ids": np.asarray(example.decoder_inputs, np.int64),
            "labels": np.where(weighed, np.asarray(example.targets), -100).astype(np.int64),
        }

    def arranged(models: Any) -> None:
        import torch

        if not model.tie_embeddings:  # Transformers 5 ties the tables of new models all the same
            models[0].lm_head.weight = torch.nn.Parameter(models[0].lm_head.weight.detach().clone())

    return _Peer(
        {f"{name}ForConditionalGeneration": family.config_to_hf(model, vocab)},
        lambda params: [family.from_lmobj(params, model, vocab.size)],
        inputs,
        _one_model,
        arranged=arranged,
    )


def _xlnet(
    model: XLNetConfig, vocab: Vocabulary, objective: PermutationLM, design: Design | None, train: TrainConfig
) -> _Peer:
    rows = train.batch_size
    settings = xlnet.config_to_hf(model, vocab) | {"bi_data": objective.bidirectional, "use_mems_train": True}
    if objective.bidirectional and rows % 2:
        raise UserError(f"train.batch_size is {rows}; in xlnet with rows of both directions it must be even.")
    if train.accumulate > 1:
        raise UserError(f"train.accumulate is {train.accumulate}; with the memory of xlnet the only one accepted is 1.")
    if design is not None:
        settings["reuse_len"] = design.spec.reuse

    def inputs(batch: Mapping[str, Any]) -> dict[str, np.ndarray]:
        assert design is not None
        example = _corrupted(design, batch)
        mask = example.mask
        assert mask.query_rank is not None
        assert mask.key_rank is not None
        chosen = np.asarray(example.weights) > 0
        mapping = np.zeros((*chosen.shape, batch["tokens"].shape[1]), np.float32)
        where, slots = np.nonzero(chosen)
        mapping[where, slots, np.asarray(example.predict)[where, slots]] = 1
        unseen = np.asarray(mask.query_rank)[:, :, None] <= np.asarray(mask.key_rank)[:, None]
        return {
            "input_ids": batch["tokens"].astype(np.int64),
            "token_type_ids": batch["token_types"].astype(np.int64),
            "perm_mask": unseen.astype(np.float32),
            "target_mapping": mapping,
            "labels": np.where(chosen, np.asarray(example.targets), -100).astype(np.int64),
        }

    def step(models: Any, batch: dict[str, Any], memory: Any) -> tuple[Any, Any]:
        told = models[0](**batch, mems=memory, use_mems=memory is not None)
        return told.loss, told.mems

    def memory() -> Any:
        import torch

        if not model.memory_length:
            return None
        return [torch.zeros(model.memory_length, rows, model.width) for _ in range(model.layers)]

    return _Peer(
        {"XLNetLMHeadModel": settings},
        lambda params: [xlnet.from_lmobj(params, model, vocab.size)],
        inputs,
        step,
        memory,
    )


def _one_model(models: Any, batch: dict[str, Any], memory: Any) -> tuple[Any, Any]:
    return models[0](**batch).loss, None


def _corrupted(design: Design, batch: Mapping[str, Any]) -> Example:
    """The batch as the objective corrupts it at step 0."""
    arrays = {name: jnp.asarray(x) for name, x in batch.items()}
    keys, model_keys = step_keys(design.program.key, arrays["row_ids"], 0)
    return design.objective.corrupt(keys, arrays, Context(model_keys, 0, design.vocab))


def _labels(example: Example) -> np.ndarray:
    """Targets in their places; -100 where nothing is predicted."""
    labels = np.full(example.inputs.shape, -100, np.int64)
    rows, slots = np.nonzero(np.asarray(example.weights))
    labels[rows, np.asarray(example.predict)[rows, slots]] = np.asarray(example.targets)[rows, slots]
    return labels
