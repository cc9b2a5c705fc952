"""Checkpoints and configs that cannot be used: each ends with one line that names what is wrong."""

import resource
import shutil

import pytest
import torch

from jaxrft import models
from jaxrft.config import ConfigError
from tests.models.configs import CASES, SHAPE
from tests.models.test_checkpoint import FILE, SCRATCH, copy_with

LAYER = "model.layers.0.self_attn."


def refused(folder, *parts: str) -> None:
    with pytest.raises(ConfigError) as caught:
        models.load(folder)
    message = str(caught.value)
    assert "\n" not in message
    for part in parts:
        assert part in message


@pytest.fixture(scope="module")
def source(made_case):
    return made_case("qwen2").folder


def test_tensors_that_do_not_fit(source, tmp_path):
    def missing(tensors):
        del tensors["model.layers.1.mlp.up_proj.weight"], tensors["lm_head.weight"]

    def misnamed(tensors):
        tensors[f"{LAYER}query.weight"] = tensors.pop(f"{LAYER}q_proj.weight")

    def misshapen(tensors):
        tensors[f"{LAYER}o_proj.weight"] = torch.zeros(48, 47)
        tensors[f"{LAYER}k_proj.bias"] = torch.zeros(16, 1)

    def integers(tensors):
        tensors["model.norm.weight"] = torch.ones(48, dtype=torch.int8)

    fit = "do not fit config.json"
    folder = tmp_path / "changed"
    refused(
        copy_with(source, folder, missing),
        fit,
        "model.layers.1.mlp.up_proj.weight is missing",
        "lm_head.weight is missing",
    )
    refused(
        copy_with(source, folder, misnamed), f"{LAYER}q_proj.weight is missing", f"{LAYER}query.weight is unexpected"
    )
    shapes = f"{LAYER}o_proj.weight has shape [48, 47] instead of [48, 48]", f"{LAYER}k_proj.bias has shape [16, 1]"
    refused(copy_with(source, folder, misshapen), *shapes)
    refused(copy_with(source, folder, integers), "model.norm.weight has type I8, takes F32, BF16, F16")
    refused(
        copy_with(source, folder, config={"num_hidden_layers": 1, "layer_types": ["full_attention"]}),
        "model.layers.1.input_layernorm.weight is unexpected",
    )
    refused(copy_with(source, folder, lambda tensors: {"other": tensors["lm_head.weight"]}), "; and 18 more")


def test_tied_embeddings_and_harmless_extras(made_case, tmp_path):
    """lm_head.weight may stand in a tied model's file when it says the same; rotary buffers always may."""
    source = made_case("qwen2-windows").folder

    def extras(tensors):
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
        tensors[f"{LAYER}rotary_emb.inv_freq"] = torch.ones(4)
        tensors["model.rotary_emb.inv_freq"] = torch.ones(4)

    def different(tensors):
        extras(tensors)
        tensors["lm_head.weight"][3, 3] += 1

    models.load(copy_with(source, tmp_path / "same", extras))
    refused(copy_with(source, tmp_path / "different", different), "lm_head.weight differs from", "tie_word_embeddings")


def test_damaged_files(source, tmp_path):
    for name, cut in (("truncated", slice(None, -5)), ("header", slice(None, 100)), ("empty", slice(0))):
        folder = shutil.copytree(source, tmp_path / name)
        (folder / FILE).write_bytes((source / FILE).read_bytes()[cut])
        refused(folder, str(folder / FILE), "the file is damaged: fetch or export it again")
    folder = shutil.copytree(source, tmp_path / "config")
    (folder / "config.json").write_text('{"model_type": ')
    refused(folder, str(folder / "config.json"), "cannot be read")
    (folder / "config.json").write_text("[]")
    refused(folder, "holds list instead of an object")
    (folder / "config.json").unlink()
    refused(folder, "config.json", "cannot be read")


def test_shards_and_index(source, tmp_path):
    models.save(models.load(source), tmp_path, shard_bytes=20_000)
    index, weights = tmp_path / f"{FILE}.index.json", sorted(tmp_path.glob("*.safetensors"))
    assert len(weights) > 2
    models.load(tmp_path)
    weights[1].rename(tmp_path / "away")
    refused(tmp_path, "names files that are missing", weights[1].name)
    (tmp_path / "away").rename(weights[1])
    weights[1].write_bytes(weights[1].read_bytes()[:-1])
    refused(tmp_path, weights[1].name, "damaged")
    index.write_text('{"metadata": {}}')
    refused(tmp_path, index.name, "cannot be read", "weight_map")
    index.unlink()
    refused(tmp_path, "holds neither model.safetensors nor model.safetensors.index.json")


def test_folders_and_names(source, tmp_path):
    refused(tmp_path / "nowhere", "no such folder")
    refused(source / FILE, "is a file")
    refused("./nowhere", "no such folder")
    refused("nobody/nothing", "neither a folder here nor a model that can be fetched")
    refused("nobody/nothing/much", "no such folder")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model_type": "gpt2"}, "model_type: got 'gpt2', takes one of llama, mistral, qwen2, qwen3"),
        ({"model_type": None}, "model_type: got None, takes one of"),
        ({"hidden_act": "gelu"}, "hidden_act: got 'gelu', takes one of silu, swish"),
        (
            {"rope_scaling": {"type": "yarn", "factor": 4.0}},
            "rope_type: got 'yarn', takes one of default, linear, llama3",
        ),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 4.0}}, "Missing required keys"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor: got 0.5, takes 1"),
        ({"num_key_value_heads": 2}, "num_key_value_heads: got 2, takes a divisor of num_attention_heads, 3"),
        ({"head_dim": 7}, "even"),
        ({"hidden_size": "large"}, "hidden_size"),
        ({"layer_types": ["full_attention", "linear_attention"]}, "layer_types: got 'linear_attention', takes"),
        ({"quantization_config": {"quant_method": "awq"}}, "quantization_config: got method 'awq'"),
    ],
)
def test_configs(source, tmp_path, fields, message):
    """From a folder and from scratch; what transformers would default to is not our default."""
    refused(copy_with(source, tmp_path / "changed", config=fields), message)
    if not {"quantization_config", "partial_rotary_factor"} & set(fields):
        with pytest.raises(ConfigError) as caught:
            models.from_config({**SCRATCH, **fields})
        assert message in str(caught.value)


def test_from_config_refuses_unknown_fields():
    with pytest.raises(
        ConfigError, match=r"hiden_size: the config of a qwen2 model has no such field; did you mean hidden_"
    ):
        models.from_config({**SCRATCH, "hiden_size": 3})
    with pytest.raises(ConfigError, match="sliding_window: the config of a llama model has no such field"):
        models.from_config({**SHAPE, **CASES["llama"], "sliding_window": 3})
    with pytest.raises(ConfigError, match=r"attention_dropout: got 0\.1, takes 0"):
        models.from_config({**SCRATCH, "attention_dropout": 0.1})


def test_types(source, tmp_path):
    with pytest.raises(ConfigError, match="^dtype: got 'float64', takes one of float32, bfloat16, float16$"):
        models.load(source, dtype="float64")
    with pytest.raises(ConfigError, match="^param_dtype: got 'float16', takes one of float32, bfloat16$"):
        models.load(source, param_dtype="float16")
    with pytest.raises(ConfigError, match="dtype: got 'int8', takes one of float32, bfloat16, float16"):
        models.save(models.load(source), tmp_path, dtype="int8")


def test_folders_that_cannot_be_written(source, tmp_path):
    model = models.load(source)
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="cannot be made"):
        models.save(model, tmp_path / "file")
    # A full disk, as a limit on the size of a file: what was there before stays.
    models.save(model, tmp_path / "export", dtype="bfloat16")
    before = {path.name: path.read_bytes() for path in (tmp_path / "export").iterdir()}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))
    try:
        with pytest.raises(OSError, match=r"model\.safetensors: could not be written .* free space or choose another"):
            models.save(model, tmp_path / "export")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert {path.name: path.read_bytes() for path in (tmp_path / "export").iterdir()} == before


def test_hub_names(source, tmp_path, monkeypatch):
    """From the local cache without the network; an incomplete copy there is completed, not used."""
    import huggingface_hub
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    repository, revision = tmp_path / "models--nobody--tiny", "0" * 40
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(revision)
    snapshot = repository / "snapshots" / revision
    shutil.copytree(source, snapshot)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert models.load("nobody/tiny").spec == models.load(source).spec

    real, calls = huggingface_hub.snapshot_download, []

    def fetched(name, **options):
        if options.get("local_files_only"):
            return real(name, **options)
        calls.append((name, options))
        shutil.copy(source / FILE, snapshot / FILE)
        return str(snapshot)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetched)
    models.load("nobody/tiny")
    assert not calls
    (snapshot / FILE).unlink()
    models.load("nobody/tiny")
    [(name, options)] = calls
    assert name == "nobody/tiny"
    assert {"config.json", "model*.safetensors"} <= set(options["allow_patterns"])
