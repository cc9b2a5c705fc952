"""Checkpoints in and out: bit by bit, and with transformers on the other side."""

import json

import jax
import numpy as np
import pytest
import torch
from flax import nnx
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from jaxrft import models
from jaxrft.config import ConfigError
from jaxrft.models.checkpoint import named_tensors
from jaxrft.models.decoder import Decoder
from jaxrft.models.spec import DecoderSpec
from tests.models.configs import SHAPE, VOCAB, random_tokens

TOKENS = random_tokens((2, 9))
FILE = "model.safetensors"
SCRATCH = {**SHAPE, "model_type": "qwen2", "num_attention_heads": 3, "num_key_value_heads": 1}


def parameters(model) -> dict[str, np.ndarray]:
    return {t.name: np.asarray(a.T if t.transposed else a) for t, a in named_tensors(model)}


def assert_same_bits(ours: dict, theirs: dict) -> None:
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        assert np.array_equal(value, theirs[name]), name


def copy_with(source, folder, change=None, config=None):
    """The checkpoint ``source`` in ``folder``, after ``change`` of its tensors and with further config fields."""
    folder.mkdir(exist_ok=True)
    tensors = load_file(source / FILE)
    tensors = change(tensors) or tensors if change else tensors
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / FILE, metadata={"format": "pt"})
    fields = {**json.loads((source / "config.json").read_text()), **(config or {})}
    (folder / "config.json").write_text(json.dumps(fields))
    return folder


def test_round_trip(case, tmp_path):
    """Load, export, load: the same bits; and transformers computes the same logits from our export."""
    models.save(case.model, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "generation_config.json", FILE]
    assert len({path.stat().st_mode for path in tmp_path.iterdir()}) == 1
    again = models.load(tmp_path)
    assert again.spec == case.model.spec
    assert_same_bits(parameters(again), parameters(case.model))
    reference = {name: value.detach().numpy() for name, value in case.torch_model.named_parameters()}
    assert_same_bits(parameters(case.model), reference)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert theirs.dtype == torch.float32
    assert type(theirs) is type(case.torch_model)
    with torch.no_grad():
        tokens = torch.tensor(TOKENS, dtype=torch.long)
        assert torch.equal(theirs(tokens).logits, case.torch_model(tokens).logits)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_files(made_case, tmp_path, dtype):
    """A half-precision file is read exactly, and exported in its type it is the same file again, also in shards."""
    source = made_case("llama3-bias").folder
    half = copy_with(source, tmp_path / "half", lambda t: {k: v.to(getattr(torch, dtype)) for k, v in t.items()})
    stored = load_file(half / FILE)
    model = models.load(half)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(nnx.state(model))} == {"float32"}
    assert_same_bits(parameters(model), {name: tensor.float().numpy() for name, tensor in stored.items()})

    models.save(model, tmp_path / "whole", dtype=dtype)
    models.save(model, tmp_path / "shards", dtype=dtype, shard_bytes=10_000)
    whole = load_file(tmp_path / "whole" / FILE)
    index = json.loads((tmp_path / "shards" / f"{FILE}.index.json").read_text())
    shards = {}
    for file in sorted(set(index["weight_map"].values())):
        shard = load_file(tmp_path / "shards" / file)
        assert {index["weight_map"][name] for name in shard} == {file}
        assert len(shard) == 1 or sum(t.nbytes for t in shard.values()) <= 10_000
        shards |= shard
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in stored.values())
    for exported in (whole, shards):
        assert exported.keys() == stored.keys()
        assert all(torch.equal(exported[name], tensor) for name, tensor in stored.items())
    assert_same_bits(parameters(models.load(tmp_path / "shards")), parameters(model))
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "shards").dtype == getattr(torch, dtype)
    assert json.loads((tmp_path / "shards" / "config.json").read_text())["torch_dtype"] == dtype
    # Exported over the shards in one piece, none of them is left.
    models.save(model, tmp_path / "shards", dtype=dtype)
    assert [path.name for path in (tmp_path / "shards").glob("model*")] == [FILE]


def test_fields_of_the_original_are_kept(made_case, tmp_path):
    fields = {"eos_token_id": [5, 7], "bos_token_id": 3, "rope_theta": 500.0, "a_new_field": {"deep": [1]}}
    source = copy_with(made_case("qwen2-windows").folder, tmp_path / "source", config=fields)
    generation = {"eos_token_id": [5, 7], "temperature": 0.6, "do_sample": True}
    (source / "generation_config.json").write_text(json.dumps(generation))
    model = nnx.clone(models.load(source))

    class Tokenizer:
        def save_pretrained(self, folder):
            (folder / "tokenizer.json").write_text("here")

    models.save(model, tmp_path / "export", tokenizer=Tokenizer())
    written = json.loads((tmp_path / "export" / "config.json").read_text())
    assert {**written, **fields} == written
    assert (written["dtype"], written["torch_dtype"]) == ("float32", "float32")
    assert json.loads((tmp_path / "export" / "generation_config.json").read_text()) == generation
    assert (tmp_path / "export" / "tokenizer.json").read_text() == "here"


def test_from_config(tmp_path):
    """Seeded; initialised as transformers does; trains under jit; is exported to what transformers loads."""
    fields = {**SCRATCH, "hidden_size": 192, "initializer_range": 0.1, "rope_theta": 123.0, "tie_word_embeddings": True}
    model, same, other = (models.from_config(fields, seed=seed) for seed in (1, 1, 2))
    assert_same_bits(parameters(model), parameters(same))
    values, others = parameters(model), parameters(other)
    for name, value in values.items():
        if name.endswith("bias"):
            assert not value.any()
        elif "norm" in name:
            assert (value == 1).all()
        else:
            assert abs(value.mean()) < 0.005
            assert value.std() == pytest.approx(0.1, rel=0.05)
            assert not np.array_equal(value, others[name])
    assert model.spec.rope.theta == 123.0

    graph, state = nnx.split(model)
    assert hash(graph) == hash(nnx.split(same)[0])
    logits = jax.jit(lambda state: nnx.merge(graph, state)(TOKENS))(state)
    models.save(model, tmp_path)
    with torch.no_grad():
        theirs = AutoModelForCausalLM.from_pretrained(tmp_path)(torch.tensor(TOKENS, dtype=torch.long)).logits
    np.testing.assert_allclose(logits, theirs, atol=1e-5)


def test_a_decoder_without_a_config(tmp_path):
    """Made from its spec alone, it is exported as the first family that can say what it is."""
    options = {
        "vocab_size": VOCAB,
        "hidden_size": 24,
        "intermediate_size": 16,
        "num_layers": 1,
        "num_heads": 3,
        "num_kv_heads": 1,
        "head_dim": 8,
        "max_positions": 64,
    }
    wanted = {
        "qwen2": {"qkv_bias": True},
        "qwen3": {"qk_norm": True, "sliding_windows": (7,)},
        "llama": {"mlp_bias": True},
        "mistral": {"sliding_windows": (7,)},
    }
    for model_type, further in wanted.items():
        model = Decoder(DecoderSpec(**options, **further), rngs=nnx.Rngs(0))
        models.save(model, tmp_path / model_type)
        assert json.loads((tmp_path / model_type / "config.json").read_text())["model_type"] == model_type
        assert models.load(tmp_path / model_type).spec == model.spec
    impossible = DecoderSpec(**options, qk_norm=True, mlp_bias=True)
    with pytest.raises(ConfigError, match="no family of llama, mistral, qwen2, qwen3 has a decoder with these options"):
        models.save(Decoder(impossible, rngs=nnx.Rngs(0)), tmp_path / "impossible")


def test_meshes_of_8_devices(made_case, run_python):
    """Each device holds its own part of the same numbers, in buffers of the model's own: donating harms nobody."""
    run_python(
        f"""
import jax, numpy as np
from flax import nnx
from jaxrft import models, parallel
layout = parallel.Layout(parallel.make_mesh(fsdp=4, tensor=2), "fsdp")
folder = {str(made_case("qwen2").folder)!r}
scratch = {SCRATCH!r}
for make in (lambda at: models.load(folder, layout=at), lambda at: models.from_config(scratch, seed=3, layout=at)):
    alone, model = nnx.state(make(None)), make(layout)
    graph, state = nnx.split(model)
    for one, leaf in zip(jax.tree.leaves(alone), jax.tree.leaves(state), strict=True):
        assert leaf.committed and (leaf.ndim < 2 or leaf.sharding.shard_shape(leaf.shape) != leaf.shape), leaf.sharding
        assert len({{shard.data.unsafe_buffer_pointer() for shard in leaf.addressable_shards}}) == 8
        assert all(np.array_equal(np.asarray(one)[shard.index], shard.data) for shard in leaf.addressable_shards)
    jax.jit(lambda s: nnx.merge(graph, s).hidden(np.ones((1, 4), np.int32)))(state)
    doubled = jax.jit(lambda s: jax.tree.map(lambda x: x * 2, s), donate_argnums=0)(state)
    for one, leaf in zip(jax.tree.leaves(alone), jax.tree.leaves(doubled), strict=True):
        assert np.array_equal(np.asarray(one) * 2, leaf)
""",
        devices=8,
    )
