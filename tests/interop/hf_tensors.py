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


def random_tensors(shapes: dict[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    """Different numbers in every element of every tensor."""
    rng = np.random.default_rng(0)
    return {name: rng.standard_normal(shape, np.float32) for name, shape in shapes.items()}
