"""Few-shot prompts: what they look like, how they are made to fit, and where an answer ends."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from toy_models import TableModel

from lmobj.data import SentencePieceConfig, Tokenizer
from lmobj.data._tokenizer import train_tokenizer
from lmobj.errors import UserError
from lmobj.evaluate import Continuation, FewShot, SamplingConfig, Shot, answer_queries, choose_shots, continue_text
from lmobj.models import DecoderConfig, GRUConfig

FRENCH = [Shot("sea otter", "loutre de mer"), Shot("peppermint", "menthe poivrée"), Shot("giraffe", "girafe")]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer(SentencePieceConfig(vocab_size=330), ["the quick brown fox sees the quiet river\n" * 4])


def test_a_prompt_looks_like_the_papers() -> None:
    # Brown et al. 2020, figure 2.1.
    task = FewShot(instruction="Translate English to French:")
    assert task.prompt(FRENCH, "cheese") == (
        "Translate English to French:\nsea otter => loutre de mer\npeppermint => menthe poivrée\ngiraffe => girafe\n"
        "cheese =>"
    )
    assert FewShot().prompt([], "cheese") == "cheese =>"


def test_a_template_is_no_program() -> None:
    """Braces and fields in the texts, and other braces in the template, are what they are."""
    task = FewShot("{0} {{Q: {input}}}\nA: {output} %s", separator="\n--\n")
    shots = [Shot("what is {output}?", "{input} {}")]
    assert task.prompt(shots, "{input}") == "{0} {{Q: what is {output}?}}\nA: {input} {} %s\n--\n{0} {{Q: {input}}}\nA:"


@pytest.mark.parametrize("template", ["", "{input}", "{output}", "{output} {input}", "{input}{input}{output}"])
def test_templates_without_their_two_fields_are_refused(template: str) -> None:
    with pytest.raises(UserError, match="once after it"):
        FewShot(template)


def test_shots_farthest_from_the_query_are_left_out_until_it_fits() -> None:
    task = FewShot(separator="|", instruction="go")
    shots = [Shot(str(i), "x") for i in range(5)]  # "i => x|" has 7 characters, "go|" 3, "q =>" 4
    for room, kept in ((None, 5), (42, 5), (41, 4), (14, 1), (13, 0), (7, 0)):
        prompt, shown = task.fit(shots, "q", room, len)
        assert shown == kept
        assert prompt == "|".join(["go", *[f"{i} => x" for i in range(5 - kept, 5)], "q =>"])
        assert room is None or len(prompt) <= room < len(prompt) + 7
    with pytest.raises(UserError, match=r"'q' takes 7 tokens .* room for 6"):
        task.fit(shots, "q", 6, len)


def test_shots_are_drawn_for_each_query_alike_each_time() -> None:
    shots = [Shot(str(i), "") for i in range(8)]
    assert choose_shots(shots, None, seed=0, query=0) == shots
    drawn = [choose_shots(shots, 3, seed=0, query=query) for query in range(400)]
    assert drawn[7] == choose_shots(shots, 3, seed=0, query=7)
    assert drawn[:5] != [choose_shots(shots, 3, seed=-1, query=query) for query in range(5)]
    assert all(len(set(some)) == 3 for some in drawn)
    # Each of 8 is in 3/8 of the draws: 150 of 400, with a standard deviation of sqrt(400 * 3/8 * 5/8) = 9.7.
    counts = [sum(shot in some for some in drawn) for shot in shots]
    assert all(abs(count - 150) < 45 for count in counts)
    with pytest.raises(UserError, match="is 9, and there are 8 examples"):
        choose_shots(shots, 9, seed=0, query=0)


def test_an_answer_ends_at_the_separator_and_its_tokens_with_it(tokenizer: Tokenizer) -> None:
    tokens = tokenizer.encode(" the fox\nthe river\n")
    written = Continuation(tokenizer.decode(tokens), tokens, np.arange(len(tokens), dtype=float))
    answer = FewShot().answer(written, tokenizer)
    assert answer.text == " the fox"
    assert tokenizer.decode(answer.tokens) == " the fox\n"
    assert len(answer.log_probs) == len(answer.tokens) < len(tokens)
    assert FewShot("{input}: {output} river.").answer(written, tokenizer) is written
    # The template's own end, where it has one, is the end of an answer.
    assert FewShot("<{input}={output}>", separator="\n").stop == ">"


def test_queries_are_answered_within_what_the_model_reads(tokenizer: Tokenizer) -> None:
    """A model that goes on from "=>" to " fox", to a line break, to " fox" ..., and reads 20 tokens."""
    size = tokenizer.vocabulary.size
    arrow, fox, end = (int(tokenizer.encode(text)[-1]) for text in ("=>", " fox", "\n"))
    assert tokenizer.encode(" fox").tolist() == [fox]
    p = np.full((size, size), 1e-3 / size)
    p[arrow, fox] = p[fox, end] = p[end, fox] = 1.0
    model: Any = TableModel(p)
    model.config = DecoderConfig(max_length=20)
    settings = SamplingConfig(max_new_tokens=5, temperature=0.0)
    shots = [Shot("the", "fox"), Shot("quick", "fox"), Shot("brown", "fox")]
    count = lambda text: len(tokenizer.encode(text))  # noqa: E731
    answers = answer_queries(model, tokenizer, FewShot(), shots, ["the", "quiet river"], settings)
    assert [text.text for (text,) in answers.texts] == [" fox", " fox"]
    assert answers.asked == [3, 3]
    for query, shown in zip(["the", "quiet river"], answers.shown, strict=True):
        # Four of the five new tokens are read again: 16 for the prompt, filled as far as whole examples go.
        sizes = [count(FewShot().prompt(shots[3 - n :], query)) for n in range(4)]
        assert shown == max(n for n in range(4) if sizes[n] <= 16) < 3
    # Whatever a prompt ends with, the tokens that follow it decide.
    assert continue_text(model, tokenizer, ["the quiet"], settings, suffix=(arrow,))[0][0].tokens[0] == fox
    model.config = GRUConfig()  # reads any number
    assert answer_queries(model, tokenizer, FewShot(), shots, ["the"], settings).shown == [3]
