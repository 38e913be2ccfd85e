"""Tensors as Hugging Face's models have them, by names and shapes written out here and nowhere derived."""

from __future__ import annotations

import numpy as np

WIDTH, HEADS, LAYERS, INNER, VOCAB, LENGTH = 12, 3, 2, 20, 37, 16

GPT2_SETTINGS = {
    "model_type": "gpt2",
    "vocab_size": VOCAB,
    "n_embd": WIDTH,
    "n_head": HEADS,
    "n_layer": LAYERS,
    "n_inner": INNER,
    "n_positions": LENGTH,
    "bos_token_id": 3,
    "eos_token_id": 4,
    "resid_pdrop": 0.25,
}
GPT2_BLOCK = {
    "ln_1.weight": (WIDTH,),
    "ln_1.bias": (WIDTH,),
    "attn.c_attn.weight": (WIDTH, 3 * WIDTH),
    "attn.c_attn.bias": (3 * WIDTH,),
    "attn.c_proj.weight": (WIDTH, WIDTH),
    "attn.c_proj.bias": (WIDTH,),
    "ln_2.weight": (WIDTH,),
    "ln_2.bias": (WIDTH,),
    "mlp.c_fc.weight": (WIDTH, INNER),
    "mlp.c_fc.bias": (INNER,),
    "mlp.c_proj.weight": (INNER, WIDTH),
    "mlp.c_proj.bias": (WIDTH,),
}
GPT2_SHAPES = {
    "transformer.wte.weight": (VOCAB, WIDTH),
    "transformer.wpe.weight": (LENGTH, WIDTH),
    **{f"transformer.h.{i}.{name}": shape for i in range(LAYERS) for name, shape in GPT2_BLOCK.items()},
    "transformer.ln_f.weight": (WIDTH,),
    "transformer.ln_f.bias": (WIDTH,),
}

BERT_SETTINGS = {
    "model_type": "bert",
    "vocab_size": VOCAB,
    "hidden_size": WIDTH,
    "num_attention_heads": HEADS,
    "num_hidden_layers": LAYERS,
    "intermediate_size": INNER,
    "max_position_embeddings": LENGTH,
    "type_vocab_size": 3,
    "pad_token_id": 0,
}
BERT_BLOCK = {
    "attention.self.query.weight": (WIDTH, WIDTH),
    "attention.self.query.bias": (WIDTH,),
    "attention.self.key.weight": (WIDTH, WIDTH),
    "attention.self.key.bias": (WIDTH,),
    "attention.self.value.weight": (WIDTH, WIDTH),
    "attention.self.value.bias": (WIDTH,),
    "attention.output.dense.weight": (WIDTH, WIDTH),
    "attention.output.dense.bias": (WIDTH,),
    "attention.output.LayerNorm.weight": (WIDTH,),
    "attention.output.LayerNorm.bias": (WIDTH,),
    "intermediate.dense.weight": (INNER, WIDTH),
    "intermediate.dense.bias": (INNER,),
    "output.dense.weight": (WIDTH, INNER),
    "output.dense.bias": (WIDTH,),
    "output.LayerNorm.weight": (WIDTH,),
    "output.LayerNorm.bias": (WIDTH,),
}
BERT_SHAPES = {
    "bert.embeddings.word_embeddings.weight": (VOCAB, WIDTH),
    "bert.embeddings.position_embeddings.weight": (LENGTH, WIDTH),
    "bert.embeddings.token_type_embeddings.weight": (3, WIDTH),
    "bert.embeddings.LayerNorm.weight": (WIDTH,),
    "bert.embeddings.LayerNorm.bias": (WIDTH,),
    **{f"bert.encoder.layer.{i}.{name}": shape for i in range(LAYERS) for name, shape in BERT_BLOCK.items()},
    "cls.predictions.transform.dense.weight": (WIDTH, WIDTH),
    "cls.predictions.transform.dense.bias": (WIDTH,),
    "cls.predictions.transform.LayerNorm.weight": (WIDTH,),
    "cls.predictions.transform.LayerNorm.bias": (WIDTH,),
    "cls.predictions.bias": (VOCAB,),
}
POOLER_SHAPES = {"bert.pooler.dense.weight": (WIDTH, WIDTH), "bert.pooler.dense.bias": (WIDTH,)}
PAIR_SHAPES = {"cls.seq_relationship.weight": (2, WIDTH), "cls.seq_relationship.bias": (2,)}

NARROW = 8
ALBERT_SETTINGS = {
    "model_type": "albert",
    "vocab_size": VOCAB,
    "embedding_size": NARROW,
    "hidden_size": WIDTH,
    "num_attention_heads": HEADS,
    "num_hidden_layers": LAYERS,
    "num_hidden_groups": 1,
    "intermediate_size": INNER,
    "max_position_embeddings": LENGTH,
    "type_vocab_size": 3,
    "hidden_act": "gelu_new",
    "pad_token_id": 0,
}
_ALBERT_LAYER = "albert.encoder.albert_layer_groups.0.albert_layers.0"
ALBERT_SHAPES = {
    "albert.embeddings.word_embeddings.weight": (VOCAB, NARROW),
    "albert.embeddings.position_embeddings.weight": (LENGTH, NARROW),
    "albert.embeddings.token_type_embeddings.weight": (3, NARROW),
    "albert.embeddings.LayerNorm.weight": (NARROW,),
    "albert.embeddings.LayerNorm.bias": (NARROW,),
    "albert.encoder.embedding_hidden_mapping_in.weight": (WIDTH, NARROW),
    "albert.encoder.embedding_hidden_mapping_in.bias": (WIDTH,),
    f"{_ALBERT_LAYER}.full_layer_layer_norm.weight": (WIDTH,),
    f"{_ALBERT_LAYER}.full_layer_layer_norm.bias": (WIDTH,),
    f"{_ALBERT_LAYER}.attention.query.weight": (WIDTH, WIDTH),
    f"{_ALBERT_LAYER}.attention.query.bias": (WIDTH,),
    f"{_ALBERT_LAYER}.attention.key.weight": (WIDTH, WIDTH),
    f"{_ALBERT_LAYER}.attention.key.bias": (WIDTH,),
    f"{_ALBERT_LAYER}.attention.value.weight": (WIDTH, WIDTH),
    f"{_ALBERT_LAYER}.attention.value.bias": (WIDTH,),
    f"{_ALBERT_LAYER}.attention.dense.weight": (WIDTH, WIDTH),
    f"{_ALBERT_LAYER}.attention.dense.bias": (WIDTH,),
    f"{_ALBERT_LAYER}.attention.LayerNorm.weight": (WIDTH,),
    f"{_ALBERT_LAYER}.attention.LayerNorm.bias": (WIDTH,),
    f"{_ALBERT_LAYER}.ffn.weight": (INNER, WIDTH),
    f"{_ALBERT_LAYER}.ffn.bias": (INNER,),
    f"{_ALBERT_LAYER}.ffn_output.weight": (WIDTH, INNER),
    f"{_ALBERT_LAYER}.ffn_output.bias": (WIDTH,),
    "predictions.dense.weight": (NARROW, WIDTH),
    "predictions.dense.bias": (NARROW,),
    "predictions.LayerNorm.weight": (NARROW,),
    "predictions.LayerNorm.bias": (NARROW,),
    "predictions.bias": (VOCAB,),
}
ALBERT_PAIR_SHAPES = {
    "albert.pooler.weight": (WIDTH, WIDTH),
    "albert.pooler.bias": (WIDTH,),
    "sop_classifier.classifier.weight": (2, WIDTH),
    "sop_classifier.classifier.bias": (2,),
}

GENERATOR_WIDTH, GENERATOR_INNER = 6, 10
_ELECTRA = {
    "model_type": "electra",
    "vocab_size": VOCAB,
    "embedding_size": WIDTH,
    "num_hidden_layers": LAYERS,
    "max_position_embeddings": LENGTH,
    "type_vocab_size": 3,
    "pad_token_id": 0,
}
GENERATOR_SETTINGS = _ELECTRA | {
    "hidden_size": GENERATOR_WIDTH,
    "num_attention_heads": 1,
    "intermediate_size": GENERATOR_INNER,
}
DISCRIMINATOR_SETTINGS = _ELECTRA | {
    "hidden_size": WIDTH,
    "num_attention_heads": HEADS,
    "intermediate_size": INNER,
}


def _resized(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The generator's shape for the discriminator's."""
    return tuple({WIDTH: GENERATOR_WIDTH, INNER: GENERATOR_INNER}[n] for n in shape)


_ELECTRA_EMBEDDINGS = {
    "electra.embeddings.word_embeddings.weight": (VOCAB, WIDTH),
    "electra.embeddings.position_embeddings.weight": (LENGTH, WIDTH),
    "electra.embeddings.token_type_embeddings.weight": (3, WIDTH),
    "electra.embeddings.LayerNorm.weight": (WIDTH,),
    "electra.embeddings.LayerNorm.bias": (WIDTH,),
}
DISCRIMINATOR_SHAPES = {  # as wide as the embedding, so without a projection
    **_ELECTRA_EMBEDDINGS,
    **{f"electra.encoder.layer.{i}.{name}": shape for i in range(LAYERS) for name, shape in BERT_BLOCK.items()},
    "discriminator_predictions.dense.weight": (WIDTH, WIDTH),
    "discriminator_predictions.dense.bias": (WIDTH,),
    "discriminator_predictions.dense_prediction.weight": (1, WIDTH),
    "discriminator_predictions.dense_prediction.bias": (1,),
}
GENERATOR_SHAPES = {
    **_ELECTRA_EMBEDDINGS,
    "electra.embeddings_project.weight": (GENERATOR_WIDTH, WIDTH),
    "electra.embeddings_project.bias": (GENERATOR_WIDTH,),
    **{
        f"electra.encoder.layer.{i}.{name}": _resized(shape)
        for i in range(LAYERS)
        for name, shape in BERT_BLOCK.items()
    },
    "generator_predictions.dense.weight": (WIDTH, GENERATOR_WIDTH),
    "generator_predictions.dense.bias": (WIDTH,),
    "generator_predictions.LayerNorm.weight": (WIDTH,),
    "generator_predictions.LayerNorm.bias": (WIDTH,),
    "generator_lm_head.bias": (VOCAB,),
}


def random_tensors(shapes: dict[str, tuple[int, ...]], seed: int = 0) -> dict[str, np.ndarray]:
    """Different numbers in every element of every tensor."""
    rng = np.random.default_rng(seed)
    return {name: rng.standard_normal(shape, np.float32) for name, shape in shapes.items()}
