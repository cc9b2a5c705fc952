"""What the fields of model types, meshes and memory change: in parameters, placements and programs."""

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from jaxrft.config import ConfigError, MemoryConfig, ModelConfig, RLConfig
from jaxrft.config.parse import from_dict
from jaxrft.training import parts
from tests.training.learners import learner_of, make_model, make_samples, update
from tests.training.tiny import SCRATCH

TOKENIZER = "characters:0123456789+="


def model_of(**values):
    """A model of two layers, made as a config says."""
    scratch = SCRATCH | {"num_hidden_layers": 2}
    model = {"scratch": scratch, "tokenizer": TOKENIZER} | values.pop("model", {})
    lengths = {"max_prompt_length": 8, "max_completion_length": 8}
    config = from_dict({"model": model, "memory": {"remat": "none"}} | lengths | values)
    return parts.build_model(config, None, parts.build_tokenizer(config, None, None), None, config.memory.remat)


def test_param_dtype():
    for param_dtype in ("float32", "bfloat16"):
        model = model_of(model={"dtype": "bfloat16", "param_dtype": param_dtype})
        assert model.output_kernel.dtype == param_dtype
        assert model.dtype == jnp.bfloat16


def test_loss_scale():
    """The first factor, and after how many steps it is doubled; in other types there is none."""
    assert learner_of(make_model(), 4).state.loss_scale is None
    for loss_scale, loss_scale_steps in ((8.0, 1), (16.0, 3), (None, None)):
        model = ModelConfig(dtype="float16", loss_scale=loss_scale, loss_scale_steps=loss_scale_steps)
        learner = learner_of(make_model(), 4, model=model, beta=0.0)
        scales = [stats["loss_scale"] for _ in range(4) for stats in update(learner, make_samples(4))]
        first, every = loss_scale or 65536.0, loss_scale_steps or 2000
        assert scales == [first * 2 ** (step // every) for step in range(4)]


LAYOUTS = [  # Values of parallel -> axes that cut a kernel's parameter, gradient and moments, and the batch's tokens.
    ({"fsdp": 2}, ("fsdp", "fsdp", "fsdp", "fsdp")),
    ({"fsdp": 2, "strategy": "zero1"}, ("", "", "fsdp", "fsdp")),
    ({"fsdp": 2, "strategy": "zero2"}, ("", "fsdp", "fsdp", "fsdp")),
    ({"fsdp": 2, "strategy": "zero3"}, ("fsdp", "fsdp", "fsdp", "fsdp")),
    ({"fsdp": 2, "replica": 2}, ("fsdp", "fsdp", "fsdp", "replica fsdp")),
    ({"replica": 2}, ("", "", "", "replica")),
    ({"tensor": 2}, ("tensor", "tensor", "tensor", "")),
    ({"tensor": 2, "fsdp": 4}, ("fsdp tensor", "fsdp tensor", "fsdp tensor", "fsdp")),
    ({"sequence": 2}, ("sequence", "sequence", "sequence", "sequence")),
    ({"sequence": 2, "strategy": "ddp"}, ("", "", "", "sequence")),
]

PLACES = """
from jaxrft.config import ParallelConfig
from jaxrft.parallel import mesh_axes
from tests.config.test_effects_on_devices import LAYOUTS
from tests.training.learners import learner_of, make_model, make_samples

for values, _ in LAYOUTS:
    parallel = ParallelConfig(**values)
    learner = learner_of(make_model(), 4, beta=0.0, parallel=parallel)
    trees = (learner.state.params, learner.state.opt_state[0].mu)
    kernels = (tree["layers"][0]["mlp"]["gate"]["kernel"].get_value() for tree in trees)
    params, moments = (mesh_axes(kernel.sharding.spec) for kernel in kernels)
    gradients = mesh_axes(learner.layout.parameter("gradients", ("embed", "mlp"), (16, 24)))
    tokens = mesh_axes(learner.prepare(make_samples(4 * parallel.data_devices), score_old=False).tokens.sharding.spec)
    print(*(" ".join(axes) for axes in (params, gradients, moments, tokens)), sep=",")
"""


def test_layouts(run_python):
    found = [tuple(line.split(",")) for line in run_python(PLACES, devices=8).stdout.splitlines()]
    assert found == [expected for _, expected in LAYOUTS]


def program(attention="auto", **memory):
    """The program of a gradient, as text."""
    graphdef, params = nnx.split(model_of(model={"attention": attention}, memory={"remat": "none"} | memory))

    def loss(params):
        return jnp.sum(nnx.merge(graphdef, params).hidden(jnp.ones((2, 8), jnp.int32)))

    return str(jax.make_jaxpr(jax.grad(loss))(params))


def test_remat():
    """``auto`` becomes one of the others in the memory plan."""
    programs = {remat: program(remat=remat) for remat in ("none", "full", "save", "offload")}
    assert "prevent_cse" not in programs["none"]
    assert all("prevent_cse" in programs[remat] for remat in ("full", "save", "offload"))
    # What is computed again stands there twice.
    assert programs["save"].count("dot_general") < programs["full"].count("dot_general")
    assert {remat for remat, text in programs.items() if "host" in text.lower()} == {"offload"}


def test_remat_names():
    products = [
        program(remat="save", remat_names=names).count("dot_general")
        for names in ([], ["query"], ["query", "key", "value"], ["query", "key", "value", "gate", "up"])
    ]
    assert products == sorted(products, reverse=True)
    assert len(set(products)) == 4
    with pytest.raises(ConfigError, match=r"^memory\.remat_names: got \['scores'\], takes a list of layer_input, .*"):
        model_of(memory={"remat": "save", "remat_names": ["scores"]})


def test_attention():
    """Whole scores, or blocks of them in a loop; kernels of a GPU are refused without one."""
    whole, blocks = program(attention="dense"), program(attention="chunked")
    assert "while[" in blocks
    assert "while[" not in whole
    assert program(attention="auto") == whole
    for kernel in ("cudnn", "triton"):
        with pytest.raises(ValueError, match=f"got '{kernel}', which needs an NVIDIA GPU"):
            program(attention=kernel)


def test_scan_layers():
    scanned, unrolled = program(scan_layers=True), program(scan_layers=False)
    assert "scan[" in scanned
    assert "scan[" not in unrolled
    assert scanned.count("dot_general") < unrolled.count("dot_general")


def test_offload():
    """``offload_optimizer`` and ``offload_reference``: what lies in the host's memory between steps."""

    def kinds(tree):
        return {leaf.sharding.memory_kind for leaf in jax.tree.leaves(tree) if leaf.ndim}

    own = jax.devices()[0].default_memory().kind
    for optimizer, reference in ((True, False), (False, True)):
        memory = MemoryConfig(offload_optimizer=optimizer, offload_reference=reference)
        learner = learner_of(make_model(), 4, memory=memory)
        learner.keep_reference()
        update(learner, make_samples(4))
        assert kinds(learner.state.params) == {own}
        assert kinds(learner.state.opt_state) == {"pinned_host" if optimizer else own}
        assert kinds(learner.reference) == {"pinned_host" if reference else own}


REFUSED = [
    ({"parallel": {"strategy": "ddp", "fsdp": 2}}, r"parallel\.strategy: ddp keeps whole copies .* set replica"),
    ({"parallel": {"strategy": "zero1"}}, r"parallel\.strategy: zero1 shards over fsdp and sequence devices, .*one"),
    ({"parallel": {"strategy": "hsdp", "replica": 2}}, r"parallel\.strategy: hsdp shards over fsdp and sequence"),
    (
        {"parallel": {"strategy": "zero3", "fsdp": 2, "replica": 2}},
        r"parallel\.strategy: zero3 has no .*hsdp",
    ),
    ({"parallel": {"strategy": "hsdp", "fsdp": 2}}, r"parallel\.strategy: hsdp shards within .* set replica, or"),
    ({"model": {"path": "a", "scratch": {}}}, r"model\.path: set with scratch"),
    ({"model": {"scratch": {}}}, r"model\.tokenizer: got None, a model made from scratch needs one"),
    (
        {"model": {"param_dtype": "bfloat16"}},
        r"model\.param_dtype: got bfloat16, which needs dtype bf.*, not float32",
    ),
    ({"model": {"loss_scale": 2.0}}, r"model\.loss_scale: set with dtype float32; only float16"),
    (
        {"model": {"loss_scale_steps": 2, "dtype": "bfloat16"}},
        r"model\.loss_scale_steps: set with dtype bfloat16;",
    ),
]


@pytest.mark.parametrize(("values", "message"), REFUSED)
def test_what_does_not_go_together_is_refused(values, message):
    with pytest.raises(ConfigError, match=f"^{message}"):
        from_dict(values)


@pytest.mark.parametrize(
    ("scratch", "tensor", "message"),
    [
        ({}, 3, r"got 3, which does not divide the model's 2 attention heads; takes 2"),
        ({"num_attention_heads": 4}, 4, None),
        ({"num_attention_heads": 6, "hidden_size": 48}, 6, r"got 6, .* 32 feed-forward channels; takes 2"),
    ],
)
def test_devices_that_do_not_divide_heads_are_refused(scratch, tensor, message):
    model = {"scratch": SCRATCH | scratch, "tokenizer": TOKENIZER}
    values = {"model": model, "parallel": {"tensor": tensor}, "max_prompt_length": 8, "max_completion_length": 8}
    config = from_dict(values)
    tokenizer = parts.build_tokenizer(config, None, None)
    if message is None:
        assert parts.model_spec(config, None, tokenizer).num_heads == tensor
        return
    with pytest.raises(ConfigError, match=rf"^parallel\.tensor: {message}"):
        parts.model_spec(config, None, tokenizer)


def test_more_devices_than_there_are_are_refused():
    for values, named in (({"replica": 3}, "replica"), ({"replica": 2, "fsdp": 4}, "fsdp"), ({"tensor": 2}, "tensor")):
        with pytest.raises(ConfigError, match=rf"^parallel\.{named}: .* takes \d devices, but JAX sees 1 cpu device"):
            parts.build_layout(RLConfig(parallel=from_dict({"parallel": values}).parallel, num_generations=1))
