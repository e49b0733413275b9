"""The windows that excite a neuron most, against looking at every activation."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers import random_model

import minigpt_lab as lab
from minigpt_lab.models import Anatomy


def batches_of(seed: int, windows: int = 7) -> list[dict]:
    ids = torch.randint(3, 97, (windows, 9), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones_like(ids)
    mask[0, :4] = 0  # a padded batch is read window by window
    return [
        {"input_ids": ids[:3], "attention_mask": mask[:3]},
        {"input_ids": ids[3:], "attention_mask": mask[3:]},
    ]


def peaks(model, batches) -> tuple[np.ndarray, np.ndarray]:
    """Largest |activation| and the token that it is at, by ``[neuron, window]``."""
    anatomy, values, tokens, seen = Anatomy(model), [], [], []
    consumer = anatomy.family.consumes["ffn"]
    for layer in range(len(anatomy.layers)):
        anatomy.module(layer, consumer).register_forward_pre_hook(
            lambda _module, args: seen.append(args[0].detach().flatten(0, -2).abs())
        )
    for batch in batches:
        for padded, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True):
            seen.clear()
            ids = padded[mask.bool()]
            model(ids[None], use_cache=False)
            value, place = torch.cat(seen, 1)[1:].max(
                0
            )  # [neuron of all layers], not the first token
            values.append(value.numpy())
            tokens.append(ids[1:][place].numpy())
    return np.stack(values, 1), np.stack(tokens, 1)


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
def test_the_largest_of_each_window_are_kept(family):
    model, batches = random_model(family), batches_of(0)
    found = lab.collect_statistics(model, batches, examples=3, progress=False).examples
    values, tokens = peaks(model, batches)
    order = np.argsort(-values, axis=1)[:, :3]
    values, tokens = (np.take_along_axis(table, order, 1) for table in (values, tokens))
    np.testing.assert_allclose(found.values, values, rtol=1e-5)
    live = values > 0  # where ReLU gives 0 to all of a window, no token is the most exciting one
    assert live.any() and (found.tokens[found.places][live] == tokens[live]).all()


def test_examples_add_up_and_come_back_from_a_file(tmp_path):
    model = random_model("llama")
    first, second = batches_of(1), batches_of(2)
    path = tmp_path / "statistics.safetensors"
    one = lab.collect_statistics(model, first, examples=4, path=path, progress=False)
    other = lab.collect_statistics(model, second, examples=4, progress=False)
    whole = lab.collect_statistics(model, first + second, examples=4, progress=False).examples
    both = (one + other).examples
    np.testing.assert_allclose(both.values, whole.values, rtol=1e-6)
    assert both.tokens[both.places].tolist() == whole.tokens[whole.places].tolist()
    again = lab.Statistics.load(path)
    assert again.examples.places.tolist() == one.examples.places.tolist()
    assert (one + replace(other, examples=None)).examples is None


def test_a_file_without_enough_examples_is_collected_anew(tmp_path):
    model, batches, path = random_model("llama"), batches_of(3), tmp_path / "s.safetensors"
    assert lab.collect_statistics(model, batches, path=path, progress=False).examples is None
    assert lab.collect_statistics(model, batches, path=path, examples=2, progress=False).examples
    assert lab.collect_statistics(model, batches, path=path, progress=False).examples.count == 2
    more = lab.collect_statistics(model, batches, path=path, examples=9, progress=False).examples
    assert more.count == 9 and (more.values[:, 7:] == -1).all()  # there are seven windows
    with pytest.raises(ValueError, match="examples is -1; expected"):
        lab.collect_statistics(model, batches, examples=-1)
