"""GGUF files: what they hold, how large they are, what is refused; copies rounded alike."""

from __future__ import annotations

import copy

import gguf
import numpy as np
import pytest
import torch
from helpers import CONFIGS, full_disk, random_model, random_plan
from tokenizer_kinds import KINDS as TOKENIZERS
from tokenizer_kinds import model_of, tokenizer_of
from transformers import AutoModelForCausalLM, PhiConfig, Qwen3Config

import minigpt_lab as lab
from minigpt_lab.export import KINDS, gguf_file
from minigpt_lab.models import Anatomy, add_bias, keep_all


@pytest.fixture(scope="module")
def uneven(tiny, tiny_statistics):
    """The tiny model with another FFN width in every layer, no multiple of 32."""
    units = {"ffn": [384] * 4}
    keep = {"ffn": [[*range(n)] for n in (100, 37, 384, 31)]}
    return lab.shrink(tiny[0], lab.PruningPlan(tiny_statistics.model_hash, units, keep))


def stored(path) -> dict[str, gguf.ReaderTensor]:
    return {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}


def values(tensor: gguf.ReaderTensor) -> np.ndarray:
    return gguf.quants.dequantize(tensor.data, tensor.tensor_type)


def array(module: torch.nn.Module) -> np.ndarray:
    return module.weight.detach().numpy()


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_holds_the_rounded_copy_and_has_the_size_predicted(kind, uneven, tiny, tmp_path):
    path = lab.export_gguf(uneven, tiny[1], tmp_path / "mini.gguf", kind=kind)
    assert path.stat().st_size == lab.gguf_size(uneven, tiny[1], kind=kind)
    rounded, tensors = lab.quantised(uneven, kind), stored(path)
    held = {name: values(tensor) for name, tensor in tensors.items()}
    embedding = "Q8_0" if kind[:2] in ("Q4", "Q5") else kind
    assert tensors["token_embd.weight"].tensor_type.name == embedding
    assert np.array_equal(held["token_embd.weight"], array(rounded.get_input_embeddings()))
    for layer, block in enumerate(rounded.model.layers):
        width = block.mlp.down_proj.in_features
        down, up, value = (
            held[f"blk.{layer}.{n}.weight"] for n in ("ffn_down", "ffn_up", "attn_v")
        )
        assert tensors[f"blk.{layer}.ffn_down.weight"].tensor_type.name == kind
        assert down.shape[1] == len(up) == (-(-width // 32) * 32 if kind[0] == "Q" else width)
        assert np.array_equal(down[:, :width], array(block.mlp.down_proj))
        assert np.array_equal(up[:width], array(block.mlp.up_proj))
        assert not up[width:].any()  # so channels that were added are 0
        assert np.array_equal(value, array(block.self_attn.v_proj))


def test_embedding_has_a_type_of_its_own(tiny, tmp_path):
    path = lab.export_gguf(*tiny, tmp_path / "a.gguf", kind="Q8_0", embedding="Q4_0")
    assert stored(path)["token_embd.weight"].tensor_type.name == "Q4_0"
    assert path.stat().st_size == lab.gguf_size(*tiny, kind="Q8_0", embedding="Q4_0")
    copies = lab.quantised(tiny[0], "Q8_0", embedding="Q4_0"), lab.quantised(tiny[0], "Q8_0")
    tokens = [each.get_input_embeddings().weight for each in copies]
    assert not torch.equal(*tokens)
    layers = [each.model.layers[0].mlp.up_proj.weight for each in copies]
    assert torch.equal(*layers)


def test_a_family_of_one_width_is_padded(tmp_path):
    model, tokenizer = lab.load_model("tiny-gpt2", device="cpu")
    plan = random_plan(model, 2, vocabulary=False)
    mini = lab.shrink(model, plan)
    with pytest.warns(
        UserWarning, match=r"\d+ FFN channels of zeros are added: gpt2 takes layers of"
    ):
        path = lab.export_gguf(mini, tokenizer, tmp_path / "a.gguf", kind="F32")
    assert path.stat().st_size == lab.gguf_size(mini, tokenizer, kind="F32")
    field = gguf.GGUFReader(path).fields["gpt2.feed_forward_length"].contents()
    assert field == max(map(len, plan.keep["ffn"]))
    assert Anatomy(mini).units("ffn") == [*map(len, plan.keep["ffn"])]  # the model stays as it was


def test_rows_that_no_block_fills_are_float16(tiny, tmp_path):
    """Queries of 4 heads of 6 features are 24 wide; the hidden size is 32."""
    tokenizer, config = tiny[1], copy.deepcopy(CONFIGS["llama"])
    config.vocab_size, config.head_dim = len(tokenizer), 6
    model = AutoModelForCausalLM.from_config(config)
    with pytest.warns(
        UserWarning, match="matrices are stored as F16: rows of Q4_0 are whole blocks"
    ):
        path = lab.export_gguf(model, tokenizer, tmp_path / "a.gguf", kind="Q4_0")
    kinds = {name: tensor.tensor_type.name for name, tensor in stored(path).items()}
    assert kinds["blk.0.attn_output.weight"] == "F16" != kinds["blk.0.attn_q.weight"]


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_a_model_cast_to_bfloat16_keeps_its_rotation(family, tiny, tmp_path):
    model = model_of(tiny[1]) if family == "llama" else random_model(family).bfloat16()
    model.resize_token_embeddings(1024)
    path = lab.export_gguf(model.bfloat16(), tiny[1], tmp_path / "a.gguf", kind="BF16")
    assert f"{family}.rope.freq_base".encode() in path.read_bytes()
    assert "rope_freqs.weight" not in stored(path)


def test_metadata(uneven, tiny, tmp_path):
    fields = gguf.GGUFReader(lab.export_gguf(uneven, tiny[1], tmp_path / "a.gguf")).fields
    found = {key: field.contents() for key, field in fields.items()}
    assert found["general.architecture"] == "deci"
    assert found["general.license"] == "Apache-2.0"
    assert found["deci.feed_forward_length"] == [100, 37, 384, 31]
    assert found["deci.attention.head_count_kv"] == [2, 2, 2, 2]
    assert found["deci.attention.key_length"] == found["deci.rope.dimension_count"] == 32
    assert found["tokenizer.ggml.pre"] == "gpt-2"
    assert len(found["tokenizer.ggml.tokens"]) == 1024
    assert found["tokenizer.ggml.eos_token_id"] == tiny[1].eos_token_id


@pytest.mark.parametrize("family", CONFIGS)
def test_every_family_is_rounded(family, probe):
    """A block of 32 has one scale: 4 bits change the logits, and the model given is left alone."""
    model = random_model(family)
    before = copy.deepcopy(model.state_dict())
    exact, fine, coarse = (lab.quantised(model, kind) for kind in ("F32", "Q8_0", "Q4_0"))
    errors = []
    with torch.no_grad():
        wanted = model(input_ids=probe).logits
        assert torch.equal(exact(input_ids=probe).logits, wanted)
        for each in (fine, coarse):
            errors.append((each(input_ids=probe).logits - wanted).norm() / wanted.norm())
    assert 0 < errors[0] < errors[1]
    assert all(torch.equal(model.state_dict()[name], value) for name, value in before.items())
    anatomy = Anatomy(model)
    keep = {"ffn": [[], *keep_all(anatomy)["ffn"][1:]]}
    mini = lab.shrink(model, lab.PruningPlan("", {"ffn": anatomy.units("ffn")}, keep))
    expected = mini(input_ids=probe).logits
    assert lab.quantised(mini, "F32")(input_ids=probe).logits.equal(expected)
    error = lab.quantised(mini, "Q8_0")(input_ids=probe).logits - expected
    assert 0 < error.norm() < 0.1 * expected.norm()
    down = Anatomy(coarse).module(0, Anatomy(coarse).family.consumes["ffn"])
    rows = down.weight.movedim(0, -1) if "gpt2" in family else down.weight
    assert len({*rows[0, :20].tolist()}) <= 16


def test_a_model_in_bfloat16_is_rounded_once(tiny):
    model = copy.deepcopy(tiny[0]).bfloat16()
    rounded = lab.quantised(model, "Q8_0")
    same = lab.quantised(copy.deepcopy(model).float(), "Q8_0")
    assert all(map(torch.equal, rounded.parameters(), same.parameters()))


def test_a_rounded_copy_is_the_file_where_the_graph_pads_heads(tiny, tmp_path):
    """Phi's heads of 80 features: one of two is kept, and the file has both."""
    shape = {"hidden_size": 160, "num_attention_heads": 2, "num_key_value_heads": 2}
    shape |= {"intermediate_size": 64, "vocab_size": len(tiny[1]), "num_hidden_layers": 2}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(PhiConfig(**shape))
    plan = lab.PruningPlan("", {"attention": [2, 2]}, {"attention": [[0], [0]]})
    mini = lab.shrink(model, plan)
    path = lab.export_gguf(mini, tiny[1], tmp_path / "mini.gguf", kind="Q4_0")
    written = stored(path)["blk.0.attn_output.weight"]
    rounded = lab.quantised(mini, "Q4_0").model.layers[0].self_attn.dense
    assert written.tensor_type.name == "Q4_0"
    assert np.array_equal(values(written)[:, :80], array(rounded))


@pytest.mark.parametrize("head_dim", [16, 32, 80])
def test_a_rounded_copy_is_the_file_where_groups_are_padded(head_dim, tiny, tmp_path):
    """Zeros of a removed query head stand inside a row: between two groups, within a block."""
    shape = {"hidden_size": 64, "num_attention_heads": 8, "num_key_value_heads": 2}
    shape |= {"intermediate_size": 64, "vocab_size": len(tiny[1]), "num_hidden_layers": 2}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(Qwen3Config(**shape, head_dim=head_dim))
    keep = {"balanced_heads": [[0, 1, 2], [0, 1, 2, 3]]}
    mini = lab.shrink(model, lab.PruningPlan("", {"balanced_heads": [4, 4]}, keep))
    path = lab.export_gguf(mini, tiny[1], tmp_path / "mini.gguf", kind="Q4_0")
    written = stored(path)["blk.0.attn_output.weight"]
    rounded = lab.quantised(mini, "Q4_0").model.layers[0].self_attn.o_proj
    in_groups = values(written).reshape(64, 2, 4, head_dim)  # [hidden, group, head, feature]
    assert written.tensor_type.name == "Q4_0"
    assert np.array_equal(in_groups[:, :, :3].reshape(64, -1), array(rounded))


# --- what is refused ---------------------------------------------------------------------------


def refused(message: str, model, tokenizer, folder, **options) -> None:
    with pytest.raises(ValueError, match=message):
        lab.export_gguf(model, tokenizer, folder / "mini.gguf", **options)
    assert not [*folder.iterdir()]


@pytest.mark.parametrize("family", ["opt", "phi3"])
def test_a_family_without_a_graph(family, tiny, tmp_path):
    words = "expected one of llama, mistral, .*; save it with lab.save_model"
    refused(words, random_model(family), tiny[1], tmp_path)


def test_biases_that_a_graph_lacks(tmp_path):
    model = random_model("qwen3")
    add_bias(model.model.layers[1].mlp.down_proj)
    refused("biases of the projections o and down", model, tokenizer_of("byte-level"), tmp_path)


def test_attention_that_a_graph_lacks(tmp_path):
    tokenizer, words = tokenizer_of("byte-level"), "full in one layer of {}, .* {}set"
    model = random_model("gemma3")  # full attention in every second layer
    refused(words.format(6, "not "), model, tokenizer, tmp_path)
    for field, value in {"attn_logit_softcapping": None, "query_pre_attn_scalar": 7}.items():
        model = random_model("gemma2")
        setattr(model.config, field, value)
        refused(words.format(2, ""), model, tokenizer, tmp_path)


def test_a_rotation_that_no_factor_describes(tiny, tmp_path):
    config = copy.deepcopy(tiny[0].config)
    config.rope_parameters = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}
    model = AutoModelForCausalLM.from_config(config)
    refused("rotary embedding is of type 'yarn'", model, tiny[1], tmp_path)


def test_rotations_of_gemma_3_that_its_graph_lacks(tmp_path):
    config = copy.deepcopy(CONFIGS["gemma3"])
    config.rope_parameters = {
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
    }
    model = AutoModelForCausalLM.from_config(config)
    words = "rotary embedding is of type 'linear' in some layers"
    refused(words, model, tokenizer_of("byte-level"), tmp_path)


def test_another_activation(tiny, tmp_path):
    config = copy.deepcopy(tiny[0].config)
    config.hidden_act = "gelu"
    model = AutoModelForCausalLM.from_config(config)
    refused("hidden_act is 'gelu', where .* 'llama' has 'silu'", model, tiny[1], tmp_path)


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_tokenizers_that_are_not_described(kind, tmp_path):
    tokenizer = tokenizer_of(kind)
    reason = "without a token that ends" if kind == "byte-level" else "tokenizer is one"
    refused(reason, model_of(tokenizer), tokenizer, tmp_path)


def test_masks_and_offloaded_weights(tiny, tmp_path):
    model = copy.deepcopy(tiny[0])
    for vocabulary in (False, True):
        with lab.masked(model, random_plan(model, 0, vocabulary=vocabulary)):
            refused("under a mask", model, tiny[1], tmp_path)
            with pytest.raises(ValueError, match="under a mask"):
                lab.quantised(model, "Q8_0")


def test_weights_beyond_float16(tiny, tmp_path):
    model = copy.deepcopy(tiny[0])
    model.model.layers[1].mlp.up_proj.weight.data[0, 0] = 1e5
    refused("beyond the range of F16; choose kind 'BF16'", model, tiny[1], tmp_path)
    lab.export_gguf(model, tiny[1], tmp_path / "mini.gguf", kind="BF16")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_damaged_weights(value, tiny, tmp_path):
    model = copy.deepcopy(tiny[0])
    model.model.layers[1].mlp.up_proj.weight.data[0, 0] = value
    reason = r"NaN or infinite weights in model.layers.1.mlp.up_proj.weight \(1 tensors\)"
    refused(reason, model, tiny[1], tmp_path, kind="F32")
    with pytest.raises(ValueError, match=reason):
        lab.quantised(model, "Q8_0")


def test_an_empty_chat_template_is_none(tiny, tmp_path):
    tokenizer = copy.deepcopy(tiny[1])
    tokenizer.chat_template = ""
    path = lab.export_gguf(tiny[0], tokenizer, tmp_path / "mini.gguf")
    assert "tokenizer.chat_template" not in gguf.GGUFReader(path).fields


def test_kinds_and_paths(tiny, tmp_path):
    refused("kind is 'Q4_2'; expected one of", *tiny, tmp_path, kind="Q4_2")
    path = tmp_path / "mini.gguf"
    path.write_text("mine")
    with pytest.raises(FileExistsError, match="exists; choose another path"):
        lab.export_gguf(*tiny, path)
    assert path.read_text() == "mine"


@pytest.mark.parametrize("most", [64, 500_000])
def test_a_full_disk_leaves_nothing(most, tiny, tmp_path):
    with full_disk(most), pytest.raises(OSError, match="could not be written"):
        lab.export_gguf(*tiny, tmp_path / "mini.gguf")
    assert not [*tmp_path.iterdir()]


def test_a_file_that_differs_gets_no_name(tiny, tmp_path, monkeypatch):
    """A disk that stores something else is noticed before the file has its name."""
    real = gguf_file.encode
    written = []

    def wrong(values, kind):
        written.append(values)
        encoded = real(values, kind)
        return encoded + 1 if len(written) == 5 else encoded

    monkeypatch.setattr(gguf_file, "encode", wrong)
    with pytest.raises(RuntimeError, match="the file's tensor .* differs"):
        lab.export_gguf(*tiny, tmp_path / "mini.gguf")
    assert not [*tmp_path.iterdir()]


def test_a_licence_is_written_only_if_it_is_known(tiny, tmp_path):
    """A model of the hub whose card states none is exported without."""
    model, field = copy.deepcopy(tiny[0]), "general.license"
    for number, (origin, licence) in enumerate(
        ((None, None), ({"hub": "someone/model"}, None), ({"licence": "MIT"}, "MIT"))
    ):
        model.config.minigpt_lab_origin = origin
        path = lab.export_gguf(model, tiny[1], tmp_path / f"{number}.gguf")
        fields = gguf.GGUFReader(path).fields
        assert (fields[field].contents() if field in fields else None) == licence
