"""Distillation: the loss is the paper's, pulls a model to its teacher, and refuses bad teachers."""

from __future__ import annotations

import copy
import dataclasses
import math

import pandas as pd
import pytest
import torch
from accelerate import cpu_offload

import minigpt_lab as lab
from minigpt_lab.models import TrimmedVocabulary, precision
from minigpt_lab.recovery import distillation
from minigpt_lab.recovery.distillation import DistillationLoss, Teacher
from minigpt_lab.recovery.texts import training_windows, validation_texts

SMALL = {
    "seq_len": 64, "eval_every": 1024, "max_tokens": 4096, "eval_characters": 3000,
    "learning_rate": 1e-3, "progress": False,
}  # fmt: skip


@pytest.fixture(scope="module")
def pruned(tiny, tiny_domain):
    """The less active half of the channels gone."""
    return shrunk(tiny, tiny_domain, 0.5)


@pytest.fixture
def mini(pruned):
    return copy.deepcopy(pruned)


@pytest.fixture(scope="module")
def trimmed(tiny, tiny_domain):
    """A quarter of the channels gone, and the tokens that a short text does not use."""
    model, tokenizer = tiny
    batches = lab.tokenize(tiny_domain.calibration, tokenizer, seq_len=64, max_tokens=1024)
    statistics = lab.collect_statistics(model, batches, progress=False)
    plan = lab.contextual_plan(
        model, statistics, quantile={"activation": 0.5}, epsilon_embedding=0.0
    )
    return lab.shrink(model, plan)


def shrunk(tiny, domain, quantile: float):
    model, tokenizer = tiny
    batches = lab.tokenize(domain.calibration, tokenizer, seq_len=64, max_tokens=1024)
    statistics = lab.collect_statistics(model, batches, progress=False)
    plan = lab.contextual_plan(model, statistics, quantile={"activation": quantile})
    return lab.shrink(model, plan)


def kl(model, tiny, domain) -> float:
    return lab.divergence(model, tiny[0], tiny[1], domain.test, max_tokens=2048).kl


def windows(domain, tokenizer, count: int = 3) -> torch.Tensor:
    batches = lab.tokenize(domain.train, tokenizer, seq_len=64, max_tokens=64 * count)
    return torch.cat([batch["input_ids"] for batch in batches])


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("mix", [1.0, 0.3])
def test_the_loss_is_that_of_the_paper(mini, tiny, tiny_domain, temperature, mix):
    """(1 - m) CE + m T² KL, written out in float64."""
    ids = windows(tiny_domain, tiny[1])
    teacher = Teacher(tiny[0], mini, temperature)
    with torch.no_grad():
        outputs = mini(input_ids=ids)
        loss = DistillationLoss(teacher, mix)(outputs, ids)
        half = DistillationLoss(teacher, mix)(outputs, ids, num_items_in_batch=2 * 3 * 63)
        q, p = (m(input_ids=ids).logits[:, :-1].double() for m in (mini, tiny[0]))
    p_T, q_T = (torch.softmax(x / temperature, -1) for x in (p, q))
    divergence = (p_T * (p_T.log() - q_T.log())).sum(-1).mean()
    label = -torch.softmax(q, -1).log().gather(-1, ids[:, 1:, None]).mean()
    expected = mix * temperature**2 * divergence + (1 - mix) * label
    assert float(loss) == pytest.approx(float(expected), rel=1e-5)
    assert float(half) == pytest.approx(float(expected) / 2, rel=1e-5)


class Known:
    """Stands for a teacher: logits, or tokens sampled from them."""

    def __init__(self, temperature, logits, tokens=None):
        self.temperature, self.samples = temperature, None if tokens is None else tokens.shape[2]
        self.logits, self.sampled = lambda _: logits, lambda _: tokens


def written_out(z, labels, known: Known, m):
    """The loss by autograd, as the paper has it."""
    T, log_q = known.temperature, (z[:, :-1] / known.temperature).log_softmax(-1)
    if known.samples:
        divergence = -log_q.gather(-1, known.sampled(labels)).mean(-1)
    else:
        log_p = (known.logits(labels)[:, :-1] / T).log_softmax(-1)
        divergence = (log_p.exp() * (log_p - log_q)).sum(-1)
    label = -z[:, :-1].log_softmax(-1).gather(-1, labels[:, 1:, None])[..., 0]
    return (m * T**2 * divergence + (1 - m) * label).mean()


@pytest.mark.parametrize("sampled", [False, True])
@pytest.mark.parametrize(("temperature", "mix"), [(1.0, 1.0), (1.0, 0.4), (2.5, 0.4)])
def test_its_gradient_is_the_derivative(monkeypatch, temperature, mix, sampled):
    """By finite differences in float64, and by autograd in the logits' own type."""
    monkeypatch.setattr(distillation, "BLOCK", 3 * 11)  # blocks of three positions and of one
    torch.manual_seed(0)
    z, t = torch.randn(2, 2, 5, 11, dtype=torch.float64)
    labels, tokens = torch.randint(11, (2, 5)), torch.randint(11, (2, 4, 6)) if sampled else None

    def loss(z, known):
        return DistillationLoss(known, mix)({"logits": z}, labels)

    assert torch.autograd.gradcheck(loss, (z.requires_grad_(), Known(temperature, t, tokens)))
    for dtype, digits in ((torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 1e-2)):
        ours, theirs = (z.detach().to(dtype).requires_grad_() for _ in range(2))
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            value = loss(ours, Known(temperature, t.to(dtype), tokens))
        wide = Known(temperature, t.to(dtype).double(), tokens)
        expected = written_out(theirs.double(), labels, wide, mix)
        for each in (value, expected):
            (2 * each).backward()
        assert float(value.detach()) == pytest.approx(float(expected.detach()), rel=1e-5)
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=digits, atol=digits / 100)
        assert not ours.grad[:, -1].any()


def test_sampled_predictions_have_the_gradient_of_all_of_them(mini, tiny, tiny_domain):
    """Exactly in expectation: many samples come close."""
    ids = windows(tiny_domain, tiny[1], 1)
    weight = mini.model.norm.weight.requires_grad_()

    def gradient(samples):
        loss = DistillationLoss(Teacher(tiny[0], mini, samples=samples), 1.0)
        return torch.autograd.grad(loss(mini(input_ids=ids), ids), weight)[0]

    whole = gradient(None)
    errors = [float((gradient(n) - whole).norm() / whole.norm()) for n in (16, 256, 16_384)]
    assert errors == sorted(errors, reverse=True) and errors[-1] < 0.1


def test_sampled_tokens_are_drawn_once_and_alike(mini, tiny, tiny_domain, monkeypatch):
    ids = windows(tiny_domain, tiny[1])
    first, second = (Teacher(tiny[0], mini, samples=4) for _ in range(2))
    tokens = first.sampled(ids)
    assert tokens.shape == (3, 63, 4) and torch.equal(second.sampled(ids.flip(0)).flip(0), tokens)
    monkeypatch.setattr(first, "logits", None)
    assert torch.equal(first.sampled(ids[1:]), tokens[1:])


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        {"loss": "mix", "mix": 0.8},
        {"loss": "kl", "temperature": 2.0},
        {"loss": "kl", "method": "lora", "learning_rate": 5e-3},
        {"loss": "kl", "teacher_samples": 64, "epochs": 2},
    ],
    ids=str,
)
def test_distillation_pulls_the_divergence_down(mini, tiny, tiny_domain, options):
    dense = tiny[0]
    weights, flags = (
        copy.deepcopy(dense.state_dict()),
        [p.requires_grad for p in dense.parameters()],
    )
    before = kl(mini, tiny, tiny_domain)
    history = lab.recover(mini, tiny[1], tiny_domain, teacher=dense, **{**SMALL, **options})
    assert kl(mini, tiny, tiny_domain) < 0.95 * before
    assert history["perplexity"].min() < history["perplexity"][0]
    # the teacher is as it was
    assert all(torch.equal(value, weights[name]) for name, value in dense.state_dict().items())
    assert flags == [p.requires_grad for p in dense.parameters()] and not dense.training
    assert all(p.grad is None for p in dense.parameters())


@pytest.mark.slow
def test_labels_adapt_and_a_teacher_restores(pruned, tiny, tiny_domain):
    adapted, restored = copy.deepcopy(pruned), copy.deepcopy(pruned)
    lab.recover(adapted, tiny[1], tiny_domain, **SMALL)
    lab.recover(restored, tiny[1], tiny_domain, teacher=tiny[0], loss="kl", **SMALL)
    assert kl(restored, tiny, tiny_domain) < kl(adapted, tiny, tiny_domain)


def test_a_trimmed_student_learns_of_the_tokens_it_kept(trimmed, tiny, tiny_domain):
    """The teacher's probabilities of the kept tokens, normalised over them."""
    student = copy.deepcopy(trimmed)
    words = lab.tokenizer_for(student, tiny[1])
    ids, rows = windows(tiny_domain, words), torch.tensor(TrimmedVocabulary.of(student).rows)
    assert len(rows) < tiny[0].config.vocab_size

    def divergence() -> float:
        with torch.no_grad():
            p = tiny[0](input_ids=rows[ids]).logits[:, :-1, rows].double().log_softmax(-1)
            q = student(input_ids=ids).logits[:, :-1].double().log_softmax(-1)
        return float((p.exp() * (p - q)).sum(-1).mean())

    teacher = Teacher(tiny[0], student)
    with torch.no_grad():
        loss = DistillationLoss(teacher, 1.0)(student(input_ids=ids), ids)
    before = divergence()
    assert float(loss) == pytest.approx(before, rel=1e-4)
    history = lab.recover(student, tiny[1], tiny_domain, teacher=tiny[0], loss="kl", **SMALL)
    assert divergence() < 0.9 * before and history["perplexity"].min() < history["perplexity"][0]
    # the same model as its own reference: trimmed alike, no rows to pick
    assert Teacher(copy.deepcopy(trimmed), student).rows is None
    with pytest.raises(ValueError, match="not all of them the teacher's; give a teacher with"):
        lab.recover(copy.deepcopy(tiny[0]), tiny[1], tiny_domain, teacher=trimmed, loss="kl")
    with pytest.raises(ValueError, match="stop_at is 'teacher', who has more tokens than this tok"):
        lab.recover(student, words, tiny_domain, teacher=tiny[0], stop_at="teacher")


def test_a_trimmed_model_stops_at_the_loss_of_the_teacher(trimmed, tiny, tiny_domain):
    """Per token of its own: then it is as good on the text."""
    text = lab.excerpt(tiny_domain.validation, max_characters=SMALL["eval_characters"])
    teacher = shrunk(tiny, tiny_domain, 0.8)
    dense = lab.perplexity(teacher, tiny[1], text, seq_len=64)
    own = lab.perplexity(trimmed, tiny[1], text, seq_len=64)
    level = math.exp(dense.passages[:, 0].sum() / own.tokens)
    assert own.tokens > dense.tokens and level < own.value < dense.value
    options = {**SMALL, "epochs": 2, "teacher": teacher, "stop_at": "teacher"}
    history = lab.recover(copy.deepcopy(trimmed), tiny[1], tiny_domain, **options)
    assert history.attrs["stopped"] == "recovered"
    assert history["perplexity"].iloc[-1] <= level < history["perplexity"].iloc[-2]


def test_a_padded_teacher_has_the_level_of_the_model_itself(mini, tiny, tiny_domain):
    padded = copy.deepcopy(mini)
    padded.resize_token_embeddings(tiny[0].config.vocab_size + 64, mean_resizing=False)
    with torch.no_grad():  # never the likeliest tokens
        padded.get_output_embeddings().weight[tiny[0].config.vocab_size :] = 0
    options = {**SMALL, "max_tokens": 1024, "teacher": padded, "stop_at": "teacher"}
    history = lab.recover(mini, tiny[1], tiny_domain, **options)
    assert history.attrs["stopped"] == "recovered" and len(history) == 1


def test_it_stops_at_the_level_of_the_teacher(mini, tiny, tiny_domain, tmp_path):
    text = lab.excerpt(tiny_domain.validation, max_characters=SMALL["eval_characters"])
    teacher = shrunk(tiny, tiny_domain, 0.25)
    level = lab.perplexity(teacher, tiny[1], text, seq_len=64).value
    options = {**SMALL, "epochs": 4, "teacher": teacher, "stop_at": "teacher"}
    again = copy.deepcopy(mini)
    history = lab.recover(mini, tiny[1], tiny_domain, out_dir=tmp_path, **options)
    assert history.attrs["stopped"] == "recovered"
    assert history["perplexity"].iloc[-1] <= level < history["perplexity"].iloc[-2]
    found = lab.recover(again, tiny[1], tiny_domain, out_dir=tmp_path, **options)
    pd.testing.assert_frame_equal(found, history)
    assert found.attrs == history.attrs


@pytest.mark.slow
def test_general_text_takes_its_share_of_the_windows(mini, tiny, tiny_domain, monkeypatch):
    general = lab.load_domain("tiny-games")
    own, mixed_in = (windows(each, tiny[1], 64) for each in (tiny_domain, general))
    for share, tokens, parts in (
        (0.25, 4096, (48, 16)),
        (0.5, 1280, (10, 10)),
        (0.0, 640, (10, 0)),
        (0.01, 640, (9, 1)),
    ):
        found = training_windows(tiny[1], tiny_domain, general, share, 64, tokens)
        assert torch.equal(found, torch.cat([own[: parts[0]], mixed_in[: parts[1]]]))
    whole = training_windows(tiny[1], tiny_domain, general, 0.1, 64, None)
    alone = training_windows(tiny[1], tiny_domain, None, 0.1, 64, None)
    assert len(whole) == len(alone) + round(len(alone) / 9)
    with pytest.raises(ValueError, match=r"a share of 0.9 .* lower generality or max_tokens"):
        lab.recover(mini, tiny[1], tiny_domain, general=general, generality=0.9, seq_len=64)
    # its validation text is followed, and less of it is forgotten
    histories = [
        lab.recover(copy.deepcopy(mini), tiny[1], tiny_domain, **SMALL, **options)
        for options in ({"other": general}, {"general": general, "generality": 0.5})
    ]
    alone, mixed = (history["other_perplexity"].iloc[-1] for history in histories)
    assert mixed < alone


@pytest.mark.parametrize("limit", [None, 900])
def test_other_text_that_decides_nothing_is_no_longer_than_what_does(tiny_domain, limit):
    general = lab.load_domain("tiny-games")
    longer = dataclasses.replace(
        general, validation=lab.Part("tiny-games", "validation", general.validation.passages * 9)
    )
    texts = validation_texts(tiny_domain, longer, limit)
    assert texts["perplexity"] == lab.excerpt(tiny_domain.validation, max_characters=limit)
    own, other = (len("\n\n".join(text)) for text in texts.values())
    assert other <= (limit or own) < other + max(map(len, longer.validation)) + 2


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"generality": 0.9}, "generality is 0.9 and max_tokens is 512: .* gets 51 tokens, less"),
        ({"max_tokens": 50}, "generality is 0.3 and max_tokens is 50: .* window of seq_len=64"),
        ({"general": "tiny-law"}, "general is 'tiny-law', whose text is that of domain; give"),
    ],
)
def test_general_text_that_does_not_fit_is_named(mini, tiny, tiny_domain, options, words):
    options = {**SMALL, "max_tokens": 512, "general": "tiny-games", **options}
    options["general"] = lab.load_domain(options["general"])
    with pytest.raises(ValueError, match=words):
        lab.recover(mini, tiny[1], tiny_domain, **options)


def test_a_run_with_another_teacher_or_loss_is_refused(tmp_path, pruned, tiny, tiny_domain):
    same = {**SMALL, "teacher": tiny[0], "loss": "kl", "out_dir": tmp_path}
    lab.recover(copy.deepcopy(pruned), tiny[1], tiny_domain, **same)
    tuned = copy.deepcopy(tiny[0])
    with torch.no_grad():
        tuned.model.norm.weight += 0.01
    for change, words in (
        ({"teacher": tuned}, "another teacher"),
        ({"loss": "mix"}, "another loss"),
        ({"temperature": 2.0}, "another temperature"),
        ({"teacher_samples": 8}, "another teacher_samples"),
    ):
        with pytest.raises(ValueError, match=words):
            lab.recover(copy.deepcopy(pruned), tiny[1], tiny_domain, **{**same, **change})


def test_teachers_that_cannot_teach_are_refused(mini, tiny, tiny_domain):
    broken, other = copy.deepcopy(tiny[0]), copy.deepcopy(tiny[0])
    with torch.no_grad():
        broken.model.norm.weight[0] = float("nan")
    other.resize_token_embeddings(tiny[0].config.vocab_size - 8)
    scrambled, brief = copy.deepcopy(tiny[0]), copy.deepcopy(tiny[0])
    with torch.no_grad():  # as of another tokenizer of as many tokens
        rows = scrambled.get_input_embeddings().weight
        rows.copy_(rows.roll(100, 0))
        scrambled.lm_head.weight.mul_(3)
    brief.config.max_position_embeddings = 32
    shared = copy.deepcopy(tiny[0])
    shared.model.norm.weight = mini.model.norm.weight
    before = copy.deepcopy(mini.state_dict())
    for options, words in (
        ({"loss": "kl"}, "loss='kl' needs a teacher: pass the dense model"),
        ({"stop_at": "teacher"}, "stop_at='teacher' needs a teacher"),
        ({"stop_at": "student"}, "stop_at is 'student'; expected"),
        ({"teacher": tiny[0]}, "teacher is given, but loss='label' does not use it"),
        ({"teacher": mini, "loss": "kl"}, "the teacher is the student, or shares weights"),
        ({"teacher": shared, "loss": "kl"}, "the teacher is the student, or shares weights"),
        ({"teacher": other, "loss": "kl"}, "give a teacher with the same tokenizer"),
        ({"teacher": scrambled, "loss": "kl"}, "more than a guess among its .* another tokenizer"),
        ({"teacher": brief, "loss": "kl"}, "windows of 64 tokens are longer than the teacher's 32"),
        ({"teacher": broken, "loss": "kl"}, "the teacher's predictions are NaN; check its weights"),
        ({"teacher": broken, "loss": "mix", "stop_at": "teacher"}, "the teacher's predictions are"),
        ({"teacher": broken, "loss": "kl", "teacher_samples": 2}, "predictions are NaN"),
        ({"teacher": tiny[0], "loss": "KL"}, "loss is 'KL'; expected one of"),
        ({"teacher": tiny[0], "loss": "kl", "temperature": 0}, "temperature is 0; expected a"),
        (
            {"teacher": tiny[0], "loss": "kl", "temperature": 1e-9},
            "expected a number of at least 0.01",
        ),
        ({"teacher": tiny[0], "loss": "kl", "temperature": 1e9}, "0.01 and of at most 100"),
        ({"teacher": tiny[0], "loss": "mix", "mix": 1.0}, "mix is 1.0; expected a number"),
        ({"teacher": tiny[0], "loss": "kl", "teacher_samples": 0}, "teacher_samples is 0"),
        ({"general": tiny_domain, "generality": 1.0}, "generality is 1.0; expected a number"),
    ):
        with pytest.raises(ValueError, match=words):
            lab.recover(mini, tiny[1], tiny_domain, **{**SMALL, **options})
        assert all(torch.equal(value, mini.state_dict()[name]) for name, value in before.items())
    with pytest.raises(TypeError, match="teacher is 'dense'; expected a"):
        lab.recover(mini, tiny[1], tiny_domain, teacher="dense", loss="kl")


@pytest.fixture
def short(tiny, monkeypatch):
    """A teacher stored in float16, which "auto" reads as it is."""
    monkeypatch.delenv(precision.PRECISION_VARIABLE, raising=False)
    monkeypatch.setattr(precision, "has_fast_bfloat16", lambda _: False)
    return copy.deepcopy(tiny[0]).half()


def spoil(teacher, *dtypes, after: int = 6) -> None:
    """After so many calls, predictions in these types are NaN."""
    calls = []

    def hook(module, args, output):
        calls.append(1)
        if len(calls) > after and output.logits.dtype in dtypes:
            output.logits[0, 3] = float("nan")

    teacher.register_forward_hook(hook)


@pytest.mark.parametrize("samples", [None, 4])
def test_a_batch_that_overflows_is_read_again_in_float32(
    mini, tiny, tiny_domain, short, recwarn, samples
):
    options = {**SMALL, "loss": "kl", "teacher_samples": samples, "max_tokens": 2048}
    wide, weights = copy.deepcopy(short).float(), copy.deepcopy(short.state_dict())
    expected = lab.recover(copy.deepcopy(mini), tiny[1], tiny_domain, teacher=wide, **options)
    spoil(short, torch.float16)
    found = lab.recover(mini, tiny[1], tiny_domain, teacher=short, **options)
    assert found.attrs["stopped"] == "finished"
    assert found["perplexity"].tolist() == pytest.approx(expected["perplexity"].tolist(), rel=0.02)
    told = [str(w.message) for w in recwarn if "teacher" in str(w.message)]
    assert len(told) == 1 and "on some of the training text in float16; such batches" in told[0]
    assert all(torch.equal(value, weights[name]) for name, value in short.state_dict().items())


@pytest.mark.parametrize("samples", [None, 4])
def test_a_teacher_that_breaks_later_loses_no_training(mini, tiny, tiny_domain, short, samples):
    spoil(short, torch.float16, torch.float32, after=20 if samples else 6)  # each window, or batch
    before, options = copy.deepcopy(mini), {**SMALL, "loss": "kl", "teacher_samples": samples}
    with pytest.warns(UserWarning, match="stopped: the teacher's predictions are NaN on the train"):
        history = lab.recover(mini, tiny[1], tiny_domain, teacher=short, **options)
    assert history.attrs["stopped"] == "diverged" and len(history) == 2
    assert history.attrs["best_step"] == history["step"].iloc[1]
    assert not torch.equal(mini.model.norm.weight, before.model.norm.weight)
    assert {p.dtype for p in short.parameters()} == {torch.float16} and not short.training


@pytest.mark.parametrize("T", [0.01, 1.0, 100.0])
def test_tokens_that_a_teacher_rules_out_count_nothing(T):
    """0 log 0 is 0, as in the written-out sum over the other tokens."""
    torch.manual_seed(0)
    z, t = torch.randn(2, 1, 4, 9, dtype=torch.float64)
    labels = torch.randint(9, (1, 4))
    ruled_out = t.clone()
    ruled_out[..., 6:] = -torch.inf
    z.requires_grad_()
    loss = DistillationLoss(Known(T, ruled_out), 1.0)({"logits": z}, labels)
    log_q, log_p = ((each[:, :-1] / T).log_softmax(-1) for each in (z.detach(), t[..., :6]))
    expected = T**2 * (log_p.exp() * (log_p - log_q[..., :6])).sum(-1).mean()
    loss.backward()
    assert float(loss.detach()) == pytest.approx(float(expected)) and z.grad.isfinite().all()


def test_an_offloaded_teacher_teaches_and_one_without_weights_is_refused(mini, tiny, tiny_domain):
    options = {**SMALL, "max_tokens": 512, "eval_every": 512, "loss": "kl"}
    offloaded = cpu_offload(copy.deepcopy(tiny[0]), torch.device("cpu"))
    expected, found = (
        lab.recover(copy.deepcopy(mini), tiny[1], tiny_domain, teacher=teacher, **options)
        for teacher in (tiny[0], offloaded)
    )
    assert found["perplexity"].tolist() == expected["perplexity"].tolist()
    with pytest.raises(
        ValueError, match="stop_at is 'teacher', and the teacher is offloaded; load"
    ):
        lab.recover(mini, tiny[1], tiny_domain, teacher=offloaded, stop_at="teacher", **options)
    nowhere = copy.deepcopy(tiny[0]).to("meta")
    with pytest.raises(ValueError, match="the teacher has no weights .*; load them"):
        lab.recover(mini, tiny[1], tiny_domain, teacher=nowhere, **options)


def test_a_padded_teacher_and_one_with_dropped_blocks_teach(tiny, tiny_domain):
    batches = lab.tokenize(tiny_domain.calibration, tiny[1], seq_len=64, max_tokens=512)
    influence = lab.block_influence(tiny[0], batches)
    plan = lab.plan_dropping(tiny[0], influence, ratio=0.3)
    padded, options = copy.deepcopy(tiny[0]), {**SMALL, "max_tokens": 512, "eval_every": 512}
    padded.resize_token_embeddings(tiny[0].config.vocab_size + 64, mean_resizing=False)
    curves = []
    for teacher in (tiny[0], padded, lab.shrink(tiny[0], plan)):
        student = lab.shrink(tiny[0], plan)
        history = lab.recover(student, tiny[1], tiny_domain, teacher=teacher, loss="kl", **options)
        curves.append(history["perplexity"].iloc[-1])
    assert curves[0] == pytest.approx(curves[1], rel=1e-4) and curves[2] < 1000


def test_a_masked_model_teaches_unless_its_vocabulary_is(mini, tiny, tiny_domain):
    teacher, options = copy.deepcopy(tiny[0]), {**SMALL, "max_tokens": 512, "eval_every": 512}
    scores = lab.score(teacher, "magnitude", sites=("ffn",))
    plan = lab.plan_from_scores(teacher, scores, ratio=0.25)
    with lab.masked(teacher, plan):
        lab.recover(mini, tiny[1], tiny_domain, teacher=teacher, loss="kl", **options)
    batches = lab.tokenize(tiny_domain.calibration, tiny[1], seq_len=64, max_tokens=1024)
    statistics = lab.collect_statistics(teacher, batches, progress=False)
    plan = lab.contextual_plan(teacher, statistics, epsilon_embedding=0.0)
    with lab.masked(teacher, plan), pytest.raises(ValueError, match="vocabulary is masked: it"):
        lab.recover(mini, tiny[1], tiny_domain, teacher=teacher, loss="kl", **options)


@pytest.mark.parametrize("method", ["full", "lora"])
def test_settings_that_transformers_does_not_save_do_not_stop_it(mini, tiny, tiny_domain, method):
    mini.generation_config.temperature = 0.3  # unused without do_sample, so refused
    mini.requires_grad_(False)  # as a merged adapter's weights are
    history = lab.recover(mini, tiny[1], tiny_domain, method=method, **SMALL)
    assert history["perplexity"].min() < history["perplexity"][0]
    assert mini.generation_config.temperature == 0.3
    assert not any(p.requires_grad for p in mini.parameters())
