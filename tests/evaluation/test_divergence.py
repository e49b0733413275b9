"""Divergence from a reference, against a direct computation."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch

import minigpt_lab as lab


@pytest.fixture(scope="module")
def pair(tiny):
    """The tiny model, and a copy of it with noise on its weights."""
    noisy = copy.deepcopy(tiny[0])
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in noisy.model.layers.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.02)
    return noisy, tiny[0], tiny[1]


def test_one_pass_equals_softmax_over_all_logits(pair, tiny_domain):
    noisy, dense, tokenizer = pair
    options = {"seq_len": 64, "max_tokens": 1000, "progress": False}
    found = lab.divergence(noisy, dense, tokenizer, tiny_domain.test, **options)
    # windows of 64 tokens of the running text; the first token of each has no prediction
    text = "\n\n".join(lab.excerpt(tiny_domain.test, tokenizer, max_tokens=1000))
    ids = torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"])
    kl, same, n = 0.0, 0, 0
    with torch.no_grad():
        for window in ids.split(64):
            q, p = (m(input_ids=window[None]).logits[0, :-1].double() for m in (noisy, dense))
            log_q, log_p = q.log_softmax(-1), p.log_softmax(-1)
            kl += float((log_p.exp() * (log_p - log_q)).sum())
            same += int((q.argmax(-1) == p.argmax(-1)).sum())
            n += len(q)
    assert found.kl == pytest.approx(kl / n, rel=1e-4)
    assert found.agreement == pytest.approx(same / n, abs=2 / n)
    assert found.kl_low < found.kl < found.kl_high
    assert found.agreement_low < found.agreement < found.agreement_high
    for model, own in ((noisy, found.model), (dense, found.reference)):
        alone = lab.perplexity(model, tokenizer, tiny_domain.test, **options)
        assert own.value == pytest.approx(alone.value, rel=1e-5)
        assert (own.protocol, own.content) == (alone.protocol, alone.content)
        assert (own.low, own.high) == pytest.approx((alone.low, alone.high), rel=1e-5)
    assert found.perplexity_ratio == pytest.approx(found.model.value / found.reference.value)
    assert found.to_frame()["kl"].item() == found.kl


def test_a_model_does_not_diverge_from_itself(tiny, tiny_domain):
    model, tokenizer = tiny
    found = lab.divergence(model, model, tokenizer, tiny_domain.test, max_tokens=500,
                           progress=False)  # fmt: skip
    assert found.kl == pytest.approx(0, abs=1e-6)
    assert (found.agreement, found.perplexity_ratio) == (1, 1)


def test_vocabularies_that_differ_are_refused(tiny, tiny_domain, tiny_statistics):
    model, tokenizer = tiny
    plan = lab.contextual_plan(model, tiny_statistics, tokenizer=tokenizer, epsilon_embedding=0)
    small = lab.shrink(model, plan)
    with pytest.raises(ValueError, match="cannot be compared token by token"):
        lab.divergence(small, model, tokenizer, tiny_domain.test)


def test_as_many_other_tokens_are_refused(tiny, tiny_domain, tiny_statistics):
    """Under a mask, and of two trims of one size, a text has other tokens than the reference's."""
    model, tokenizer = tiny
    plan = lab.contextual_plan(model, tiny_statistics, epsilon_embedding=0)
    subject, refused = copy.deepcopy(model), pytest.raises(ValueError, match="not the same ones")
    with lab.masked(subject, plan), refused:
        lab.divergence(subject, model, tokenizer, tiny_domain.test)
    first, second = (lab.shrink(model, plan) for _ in range(2))
    how = {"seq_len": 64, "max_tokens": 200, "progress": False}
    assert lab.divergence(first, second, tokenizer, tiny_domain.test, **how).kl == 0
    rows = [*range(first.trimmed_vocabulary.size)][-len(plan.vocabulary) :]
    second.trimmed_vocabulary = dataclasses.replace(
        second.trimmed_vocabulary, rows=tuple(rows), allowed=tuple(rows)
    )
    with pytest.raises(ValueError, match="not the same ones"):
        lab.divergence(first, second, tokenizer, tiny_domain.test, **how)


def test_tokens_that_both_rule_out_add_nothing(tiny, tiny_domain):
    """0 log 0 = 0; two models masked alike diverge as before, on the tokens that are left."""
    model, tokenizer = copy.deepcopy(tiny[0]), tiny[1]
    seen = torch.tensor([*{*tokenizer("\n\n".join(tiny_domain.test[:2]))["input_ids"]}])
    ruled_out = torch.tensor([token for token in range(1024) if token not in seen])

    def mask(_module, _inputs, output):
        return output.index_fill(-1, ruled_out, -torch.inf)

    model.lm_head.register_forward_hook(mask)
    other = copy.deepcopy(model)
    other.model.layers[0].mlp.down_proj.weight.data *= 0.5
    how = {"seq_len": 64, "progress": False}
    found = lab.divergence(other, model, tokenizer, tiny_domain.test[:2], **how)
    assert 0 < found.kl < 5
    assert lab.divergence(model, model, tokenizer, tiny_domain.test[:2], **how).kl == 0
