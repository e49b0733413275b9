"""Answers against the definitions of their scores, on every family, and the statistics on them."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest
import torch
from helpers import random_model, random_plan

import minigpt_lab as lab
from minigpt_lab.domains import split_words
from minigpt_lab.evaluation import answers, continuations
from minigpt_lab.evaluation.answers import Answers, _newcombe
from minigpt_lab.evaluation.continuations import branch_losses, longest, pack

ITEMS = tuple(
    lab.Question(f"The {noun} said that the case was", choices, i % len(choices))
    for i, (noun, choices) in enumerate(
        [
            ("judge", ("closed.", "a matter for the jury to decide.", "open")),
            ("defendant's own lawyer", ("lost", "won on appeal")),
            ("court", ("heard", "dismissed", "settled out of court", "a tort, not a crime")),
        ]
    )
)


@pytest.fixture
def few(tiny):
    """A tokenizer of 97 tokens, to go with the random models."""
    kept = lab.trim_tokenizer(tiny[1], sorted(range(259)))
    return lab.trim_tokenizer(kept, range(97))


def plain(model, ids) -> np.ndarray:
    """Losses of tokens 1… of one row, by themselves."""
    ids = torch.tensor([ids])
    with torch.no_grad():
        logits = model(input_ids=ids).logits[0, :-1].float()
    return torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="none").numpy()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shrunk", [False, True])
def test_side_by_side_equals_one_by_one(model, few, shrunk, dtype):
    if shrunk:
        model = lab.shrink(model, random_plan(model, 5, vocabulary=False))
    model = model.to(dtype)
    texts = [("the court", ["a", "closed it", "o o o o"]), ("it", ["was", "is so"])]
    group = [pack(*entry, few, longest(model, None)) for entry in texts]
    assert len({len(entry.ids) for entry in group}) == 2  # one of them is padded
    with torch.no_grad():
        found = branch_losses(model, group)
    loose = {"atol": 1e-4, "rtol": 1e-4} if dtype == torch.float32 else {"atol": 0.3, "rtol": 0.1}
    for entry, losses in zip(group, found, strict=True):
        for branch in entry.branches:
            wanted = plain(model, entry.ids[: entry.shared] + entry.ids[branch])
            got = np.append(losses[: entry.shared - 1], losses[branch.start - 1 : branch.stop - 1])
            np.testing.assert_allclose(got, wanted, **loose)


@pytest.mark.parametrize("style", answers.STYLES)
def test_scores_by_hand(tiny, style):
    model, tokenizer = tiny
    found = {
        s: lab.answer_questions(model, tokenizer, ITEMS, score=s, style=style)
        for s in answers.SCORES
    }
    for number, question in enumerate(ITEMS):
        mine = {s: f.frame[f.frame["question"] == number] for s, f in found.items()}
        prompt, follows = question.question, question.choices
        if style == "letters":
            listed = [f"{x}. {c}" for x, c in zip("ABCD", question.choices, strict=False)]
            prompt = "\n".join([prompt, *listed, "Answer:"])
            follows = "ABCD"[: len(question.choices)]
        hand = {score: [] for score in answers.SCORES}
        for follow in follows:
            text = f"{prompt} {follow}"
            ids = tokenizer(text)["input_ids"]
            losses = plain(model, ids)
            start = len(tokenizer(prompt)["input_ids"])
            hand["perplexity"].append(math.exp(losses[start - 1 :].mean()))
            hand["logprob"].append(-losses[start - 1 :].sum())
            hand["paper"].append(math.exp(losses.mean()) / len(ids))
        for score, values in hand.items():
            rows = mine[score]
            np.testing.assert_allclose(rows["score"], values, rtol=1e-4)
            best = np.argmax(values) if score == "logprob" else np.argmin(values)
            assert rows["picked"].tolist() == [i == best for i in range(len(values))]
            assert rows["is_answer"].to_numpy().argmax() == question.answer


def test_what_is_reported(tiny, tiny_domain):
    found = lab.answer_questions(*tiny, tiny_domain.questions, batch_size=3)
    assert found.n == len(tiny_domain.questions) == len(found.correct)
    assert found.accuracy == float(found) == found.correct.mean() == found.row()["accuracy"]
    assert found.low < found.accuracy < found.high and found.chance == 0.25
    assert f"of {found.n} items, chance 25.0%, score=perplexity, cloze" in str(found)
    assert found.frame.groupby("question")["picked"].sum().eq(1).all()
    assert found.accuracy > found.chance  # a model trained on this domain, not on this text
    again = lab.answer_questions(*tiny, tiny_domain.questions, batch_size=8)
    np.testing.assert_allclose(again.frame["score"], found.frame["score"], rtol=1e-4)


def test_the_order_of_the_choices_does_not_matter_in_cloze(tiny, tiny_domain):
    table = lab.position_bias(*tiny, tiny_domain.questions[:12], style="cloze")
    straight = lab.answer_questions(*tiny, tiny_domain.questions[:12])
    np.testing.assert_allclose(table["accuracy"], straight.accuracy)
    np.testing.assert_allclose(table["picked"], table["unbiased"])
    assert (table["mean_accuracy"] == straight.accuracy).all()


def test_letters_rotate(tiny, monkeypatch):
    def always_first(model, group):
        return [np.arange(len(entry.ids) - 1.0) for entry in group]

    monkeypatch.setattr(answers, "branch_losses", always_first)  # the first listed scores lowest
    table = lab.position_bias(*tiny, ITEMS)
    assert table["position"].tolist() == [0, 1, 2, 3]
    assert table["picked"].tolist() == [1, 0, 0, 0]
    assert table["accuracy"].tolist() == [1, 0, 0, 0]
    assert table["asked"].tolist() == [9, 9, 7, 4]
    assert table.loc[0, "unbiased"] == pytest.approx(3 / 9)
    assert table.loc[0, "mean_accuracy"] == pytest.approx(3 / 9)


def test_equal_scores_favour_no_place(tiny, monkeypatch):
    def equal(model, group):
        return [np.ones(len(entry.ids) - 1) for entry in group]

    monkeypatch.setattr(answers, "branch_losses", equal)
    table = lab.position_bias(*tiny, ITEMS[2:])
    assert table["picked"].tolist() == [0.25] * 4


def test_a_trimmed_model_answers_with_its_original_tokenizer(tiny, tiny_domain, tmp_path):
    model, tokenizer = tiny
    batches = lab.tokenize(tiny_domain.calibration, tokenizer, seq_len=64, max_tokens=512)
    found = lab.collect_statistics(model, batches, progress=False)
    plan = lab.contextual_plan(model, found, epsilon_embedding=0.0, quantile=0.1)
    asked = tiny_domain.questions[:8]
    with lab.masked(model, plan):
        masked = lab.answer_questions(model, tokenizer, asked)
    mini = lab.shrink(model, plan)
    shrunk = lab.answer_questions(mini, tokenizer, asked)
    reloaded = lab.load_model(lab.save_model(mini, tokenizer, tmp_path / "mini"), device="cpu")
    assert len(reloaded[1]) < len(tokenizer)
    for other in (masked, lab.answer_questions(*reloaded, asked)):
        np.testing.assert_allclose(other.frame["score"], shrunk.frame["score"], rtol=1e-4)
    assert shrunk.frame["tokens"].sum() > lab.answer_questions(*tiny, asked).frame["tokens"].sum()


def test_long_questions_lose_their_beginning(tiny):
    model, tokenizer = tiny
    question = lab.Question("It fell. " * 200, ITEMS[0].choices, 0)
    found = lab.answer_questions(model, tokenizer, [question, ITEMS[0]])
    cut = found.frame.groupby("question")["truncated"].first()
    assert cut[0] > 0 == cut[1]
    assert found.frame["whole_tokens"].max() == model.config.max_position_embeddings
    short = lab.answer_questions(model, tokenizer, [question], seq_len=32)
    assert short.frame["whole_tokens"].max() == 32
    row = short.frame.iloc[1]
    ids = tokenizer(f"{question.question} {question.choices[1]}")["input_ids"]
    wanted = plain(model, ids[row["truncated"] :])[-row["tokens"] :].sum()
    assert row["nll"] == pytest.approx(wanted, rel=1e-4)
    wide = lab.Question("Which?", tuple(f"{word} of it" * 9 for word in "abcdefghijklmnop"), 0)
    side = lab.answer_questions(model, tokenizer, [wide])  # together longer than the model takes
    assert side.frame["tokens"].sum() > 256 and side.frame["truncated"].eq(0).all()


def test_text_before_every_token_is_kept_whole(tiny):
    """A tokenizer that begins texts with a token of its own: it stays when the prompt is cut."""
    model, tokenizer = tiny
    begin = continuations.window_prefix(tokenizer)
    packed = pack("It fell. " * 30, ["down", "up and up"], tokenizer, 24)
    assert packed.ids[: len(begin)] == begin and packed.truncated > 0


def test_bad_input_is_named(tiny, tiny_domain, monkeypatch):
    model, tokenizer = tiny
    for arguments, words in (
        ({"score": "ppl"}, "score is 'ppl'; expected one of 'perplexity', 'logprob', 'paper'"),
        ({"style": "letter"}, "style is 'letter'; .*did you mean 'letters'"),
        ({"questions": ()}, r"questions is \(\); expected .* at least 1"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"batch_size": None}, "batch_size is None"),
        ({"seq_len": -1}, "seq_len is -1"),
        ({"progress": 1}, "progress is 1; expected True or False"),
        ({"seq_len": 3}, "question 0 .*no token is left before its choices.*limit 3"),
    ):
        with pytest.raises(ValueError, match=words):
            lab.answer_questions(model, tokenizer, **{"questions": ITEMS, **arguments})
    with pytest.raises(TypeError, match=r"questions\[0\] is 'Why.'; expected a Question"):
        lab.answer_questions(model, tokenizer, ["Why?"])
    for wrong in (tiny_domain, ITEMS[0]):
        with pytest.raises(TypeError, match="pass e.g. domain.questions"):
            lab.answer_questions(model, tokenizer, wrong)
        with pytest.raises(TypeError, match="pass e.g. domain.questions"):
            lab.position_bias(model, tokenizer, wrong)
    with pytest.raises(TypeError, match="second is 0.5; expected an Answers; answer_questions"):
        lab.compare_answers(answered([True]), 0.5)
    many = lab.Question("Which?", tuple(map(str, range(30))), 0)
    with pytest.raises(ValueError, match="30 choices, more than letters"):
        lab.answer_questions(model, tokenizer, [many], style="letters")
    with pytest.raises(ValueError, match="do not belong together"):
        lab.answer_questions(random_model("llama"), tokenizer, ITEMS)

    def no_tokens(text, **_):
        return {"input_ids": [5, 6]}

    monkeypatch.setattr(continuations, "window_prefix", lambda tokenizer: [])
    with pytest.raises(ValueError, match="choice 'a' has no tokens"):
        pack("It", ["a", "b"], no_tokens, 99)


def test_nan_is_an_error(tiny, monkeypatch):
    def nan(model, group):
        return [np.full(len(entry.ids) - 1, np.nan) for entry in group]

    monkeypatch.setattr(answers, "branch_losses", nan)
    with pytest.raises(ValueError, match=r"gives NaN on question 0 \('The judge"):
        lab.answer_questions(*tiny, ITEMS)


def answered(right: list[bool]) -> Answers:
    """Answers to numbered questions, right or wrong as told."""
    asked = tuple(lab.Question(f"{i}?", ("a", "b"), 0) for i in range(len(right)))
    frame = pd.DataFrame({"is_answer": [True] * len(right), "picked": right, "truncated": 0})
    return Answers(frame, asked, "perplexity", "cloze")


def test_wilson_interval():
    found = answered([True] * 62 + [False] * 138)
    assert (found.low, found.high) == pytest.approx((0.2500, 0.3772), abs=1e-4)
    assert answered([False] * 10).low == 0.0
    assert answered([False] * 10).high == pytest.approx(0.2775, abs=1e-4)


def test_mcnemar_and_the_paired_interval():
    first = answered([True] * 8 + [False] * 13)  # 1 both, 7 first only, 1 second only, 12 neither
    second = answered([True] + [False] * 7 + [True] + [False] * 12)
    found = lab.compare_answers(first, second)
    assert (found.first_only, found.second_only, found.items) == (7, 1, 21)
    assert found.p == pytest.approx(2 * (1 + 8) / 2**8)
    assert found.difference == pytest.approx(-6 / 21)
    # Fagerland, Lydersen and Laake (2014), Newcombe's square-and-add interval of these counts
    assert (found.low, found.high) == pytest.approx((-0.507, -0.026), abs=5e-4)
    back = lab.compare_answers(second, first)
    assert (back.low, back.high, back.p) == pytest.approx((-found.high, -found.low, found.p))
    assert "-28.6%" in str(found) and "exact McNemar" in str(found)
    assert _newcombe(36, 12, 2, 50) == pytest.approx((0.0569, 0.3404), abs=1e-4)  # Newcombe (1998)
    same = lab.compare_answers(first, first)
    assert same.p == 1.0 and same.difference == 0.0 and same.low < 0 < same.high


def test_only_the_same_questions_are_compared():
    with pytest.raises(ValueError, match="different questions .2 and 3, the first .* number 2"):
        lab.compare_answers(answered([True] * 2), answered([True] * 3))


def test_written_together_or_one_by_one(model, few):
    words = model.generation_config
    found = [lab.write_answers(model, few, ITEMS, batch_size=size) for size in (1, 3)]
    assert found[0].frame.equals(found[1].frame)
    assert len(set(found[0].frame["written"])) > 1
    assert model.generation_config is words


def test_the_choice_that_was_written(tiny):
    model, tokenizer = tiny
    prompts = ["The court", "It is said that the judge of the case", "A lawyer may"]
    texts = [lab.generate(model, tokenizer, prompt, max_new_tokens=8) for prompt in prompts]
    first, second, third = (split_words(text) for text in texts)
    asked = (
        lab.Question(prompts[0], ("xylophone", f"{first[0].upper()}!"), 1),
        lab.Question(prompts[1], (" ".join(second[:2]), second[0], "xylophone"), 1),
        lab.Question(prompts[2], ("xylophone", third[0][:1] + "xyz"), 0),
    )
    before = {name: value.clone() for name, value in model.state_dict().items()}
    given = lab.write_answers(model, tokenizer, asked, precision="float32")
    assert all(value.equal(before[name]) for name, value in model.state_dict().items())
    assert [*given.correct] == [True, False, False]  # the longer choice was written; none was
    assert [*given.frame.groupby("question")["picked"].sum()] == [1, 1, 0]
    assert [text.strip() for text in given.sheet()["picked"]] == [text.strip() for text in texts]
    assert given.accuracy == pytest.approx(1 / 3) and given.chance == 0 and given.low > 0
    chosen = lab.answer_questions(model, tokenizer, asked, precision="float32")
    assert lab.compare({"chosen": chosen, "written": given})["unit"][0] == "accuracy"
    assert lab.compare_answers(given, given).p == 1
    for other in ({"style": "letters"}, {"score": "logprob"}):
        asked_otherwise = lab.answer_questions(
            model, tokenizer, asked, precision="float32", **other
        )
        with pytest.raises(ValueError, match=f"differ in {[*other][0]}"):
            lab.compare_answers(chosen, asked_otherwise)
    shared = (lab.Question(prompts[0], (first[0], f"{first[0]}."), 0),)
    assert not lab.write_answers(model, tokenizer, shared).correct.any()


def test_what_cannot_be_written_is_refused(tiny, few):
    model, tokenizer = tiny
    with pytest.raises(ValueError, match="max_new_tokens is 256, of 256 tokens .* none is left"):
        lab.write_answers(model, tokenizer, ITEMS, max_new_tokens=256)
    long = (lab.Question("The court held. " * 200, ("a", "b"), 0),)
    assert lab.write_answers(model, tokenizer, long).frame["truncated"].min() > 0
    broken = random_model("llama")
    broken.lm_head.weight.data[3] = float("nan")
    with pytest.raises(ValueError, match="NaN on question 0"):
        lab.write_answers(broken, few, ITEMS)


def test_answers_to_questions_cut_otherwise_are_not_compared(tiny):
    """A shorter limit matters only where it cuts; a longer answer may meet more choices."""
    whole, cut, same = (
        lab.answer_questions(*tiny, ITEMS, seq_len=length, progress=False)
        for length in (200, 12, 12)
    )
    assert cut.frame["truncated"].any() and not whole.frame["truncated"].any()
    with pytest.raises(ValueError, match="differ in seq_len: 200 and 12; measure both"):
        lab.compare({"whole": whole, "cut": cut})
    assert lab.compare_answers(cut, same).p == 1
    longer = lab.answer_questions(*tiny, ITEMS, progress=False)
    assert lab.compare_answers(whole, longer).p == 1  # neither was cut
    short, long = (
        lab.write_answers(*tiny, ITEMS, max_new_tokens=n, progress=False) for n in (2, 8)
    )
    with pytest.raises(ValueError, match="differ in max_new_tokens: 2 and 8"):
        lab.compare_answers(short, long)
