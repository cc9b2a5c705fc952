"""The memory plan: against the compiler's own account, and what it advises against itself."""

import dataclasses
import functools
import json
import math
import re
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import yaml
from flax import nnx

from jaxrft import RLTrainer
from jaxrft.config import ConfigError
from jaxrft.config.parse import from_dict, to_dict
from jaxrft.models import Decoder
from jaxrft.models.attention import causal_mask
from jaxrft.models.attention.triton import attend_triton
from jaxrft.models.joined import JoinedKernel
from jaxrft.models.logit_product import reduce_product
from jaxrft.models.spec import DecoderSpec
from jaxrft.parallel import Layout, make_mesh
from jaxrft.rollout import NativeEngine, Request, SamplingParams
from jaxrft.rollout.buckets import PREFILL_TOKENS, PromptShapes
from jaxrft.rollout.programs import Programs
from jaxrft.training import memory_model
from jaxrft.training import plan as planning
from jaxrft.training.batch import Sample
from jaxrft.training.learner import make_rows
from jaxrft.training.memory_sizes import Sizes
from jaxrft.training.plan import GIB, MIB, Plan, check_plan, make_plan, usable_bytes
from tests.jaxprs import equations
from tests.rollout.tiny import own_leaves
from tests.training.compiled import step_bytes
from tests.training.tiny import ROWS, SCRATCH, digits, tiny_config

# How far the plan of an update may be from what the compiler says, as a share of that.
TOLERANCE = 0.2


def spec_of(width=256, layers=3, heads=4, vocab=1000, inner=3, tie=True):
    return DecoderSpec(
        vocab_size=vocab,
        hidden_size=width,
        intermediate_size=inner * width,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=max(heads // 2, 1),
        head_dim=width // heads,
        max_positions=1 << 16,
        tie_embeddings=tie,
    )


def config_of(rows=8, length=256, parts=1, **values):
    half = {"max_prompt_length": length // 2, "max_completion_length": length // 2, "num_generations": 1}
    return from_dict(half | {"per_device_train_batch_size": rows, "gradient_accumulation_steps": parts} | values)


def sizes_of(spec, rows, length, tensor=1):
    """What is counted of packed rows by Triton's kernel on GPUs that share out the heads."""
    model = {"dtype": "bfloat16", "attention": "triton"}
    config = config_of(rows=rows, length=length, model=model, batching={"pack": True})
    mesh = jax.sharding.AbstractMesh((1, 1, 1, tensor), make_mesh().axis_names)
    return Sizes(config, spec, Layout(mesh, config.parallel.chosen_strategy), "none", "gpu")


def plan_of(config, spec, limit=None, reference=False, platform="gpu", **options):
    layout = Layout(make_mesh(), config.parallel.chosen_strategy)
    return make_plan(config, spec, layout, reference=reference, limit=limit, platform=platform, **options)


def test_what_reduced_logits_take_is_planned():
    """Of a long row it is more than chunks of logits are: the kernel's results, by their shapes."""
    spec = spec_of(vocab=151936)
    sizes = sizes_of(spec, rows=1, length=131072)
    tokens = round(sizes.rows * sizes.picks)
    states, kernel = ((n, spec.hidden_size) for n in (tokens, spec.vocab_size))
    shapes = (jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in (states, kernel))
    row, places = (jax.ShapeDtypeStruct((tokens,), dtype) for dtype in (jnp.float32, jnp.int32))
    parts = jax.eval_shape(functools.partial(reduce_product, transposed=True), *shapes, places, row)
    taken = sum(part.size * part.dtype.itemsize for part in parts)
    assert taken > 2**30
    for items in (memory_model.update_items(sizes, False), memory_model._projection(sizes)):
        assert items["output projection"] > taken
    without = memory_model._projection(sizes)["output projection"]
    with mock.patch.object(memory_model, "_reduced", return_value=0.0):
        assert memory_model._projection(sizes)["output projection"] < without
    assert memory_model._reduced(sizes) == taken


SCAN = {"scan_layers": True}
# Without a loop, the CPU's compiler ignores rematerialisation: policies are compared in loops.
COMPILED = {
    "narrow": (spec_of(), config_of(memory={"remat": "none"})),
    "none": (spec_of(), config_of(memory=SCAN | {"remat": "none"})),
    "save": (spec_of(), config_of(memory=SCAN | {"remat": "save"})),
    "full": (spec_of(), config_of(memory=SCAN | {"remat": "full"})),
    "wide, short": (spec_of(width=1024, heads=8), config_of(rows=1, length=64, memory={"remat": "none"})),
    "long": (spec_of(width=128), config_of(rows=1, length=1024, memory={"remat": "none"})),
    "vocabulary": (spec_of(width=128, vocab=50000, tie=False), config_of(rows=4, memory={"remat": "none"})),
    "micro-batches": (spec_of(), config_of(rows=4, parts=2, memory=SCAN | {"remat": "save"})),
    "packed": (spec_of(), config_of(rows=4, memory={"remat": "none"}, batching={"pack": True, "row_length": 512})),
    # As Qwen3 has them: heads that are wider than the stream, and normed.
    "normed heads": (
        dataclasses.replace(spec_of(width=128, heads=8, inner=1), head_dim=128, qk_norm=True),
        config_of(rows=16, length=64, memory={"remat": "none"}),
    ),
}


@pytest.mark.parametrize("name", COMPILED)
def test_an_update_takes_what_the_compiler_says(name):
    spec, config = COMPILED[name]
    compiled = step_bytes(config, spec, config.memory.remat)
    planned = sum(plan_of(config, spec, platform=None).update.values())
    assert compiled > 50 * MIB
    assert abs(planned / compiled - 1) < TOLERANCE, (planned / MIB, compiled / MIB)


MESHES = """
import dataclasses
from jaxrft.training.parts import build_layout
from jaxrft.training.plan import MIB, make_plan
from tests.training.compiled import step_bytes
from tests.training.test_plan import SCAN, config_of, spec_of

wide = spec_of(width=768, heads=8, layers=2)
for parallel, memory in (
    ({"replica": 8}, {"remat": "none"}),
    ({"fsdp": 8}, {"remat": "none"}),
    ({"fsdp": 8}, SCAN | {"remat": "full"}),
    ({"fsdp": 2, "tensor": 4}, {"remat": "none"}),
    ({"fsdp": 8, "strategy": "zero2"}, {"remat": "none"}),
    ({"replica": 2, "fsdp": 4}, {"remat": "none"}),
):
    config = config_of(rows=1, length=128, memory=memory, parallel=parallel)
    layout = build_layout(config)
    planned = sum(make_plan(config, wide, layout, reference=False, limit=None).update.values())
    print(parallel, planned / step_bytes(config, wide, config.memory.remat, layout), sep="=")
"""


def test_an_update_on_eight_devices_takes_what_the_compiler_says(run_python):
    ratios = [float(line.rpartition("=")[2]) for line in run_python(MESHES, devices=8).stdout.splitlines()]
    assert len(ratios) == 6
    assert max(abs(ratio - 1) for ratio in ratios) < TOLERANCE, ratios


LARGE = spec_of(width=2048, layers=24, heads=16, vocab=100_000)


def total(plan):
    return sum(plan.update.values())


def test_auto_keeps_as_much_as_fits():
    config = config_of(length=2048, rollout={"max_slots": 1})
    peaks = {}
    for remat in ("none", "save", "full"):
        changed = dataclasses.replace(config, memory=dataclasses.replace(config.memory, remat=remat))
        peaks[remat] = plan_of(changed, LARGE).peak
    assert peaks["none"] > peaks["save"] > peaks["full"]
    for remat, peak in peaks.items():
        plan = plan_of(config, LARGE, limit=peak)
        assert (plan.remat, plan.fits) == (remat, True)
    plan = plan_of(config, LARGE, limit=peaks["full"] - 1)
    assert (plan.remat, plan.fits) == ("full", False)


REFUSED = {
    "rows and optimizer": config_of(rows=12, length=2048, rollout={"max_slots": 4}),
    "remat": config_of(rows=12, length=2048, memory={"remat": "none"}),
    "slots": config_of(rows=1, length=2048, rollout={"max_slots": 128}, generation_batch_size=128),
    "packed": config_of(length=2048, batching={"pack": True, "tokens_per_device": 20_000}),
    "two steps": config_of(rows=8, length=2048, parts=2, steps_per_generation=4),
    "given rollout": config_of(rows=8, length=2048, parts=2, generation_batch_size=32),
}
KINDS = {  # Every kind of setting that a refusal names.
    "memory.remat=full", "memory.offload_reference=true", "memory.offload_optimizer=true", "rollout.max_slots=",
    "per_device_train_batch_size=", "batching.tokens_per_device=", "memory.scan_layers=true",
}  # fmt: skip


def with_advice(config, line):
    """The config with the settings that a line of advice names."""
    data = to_dict(config)
    for path, value in re.findall(r"([\w.]+)=(\w+)", line):
        section, _, name = path.rpartition(".")
        (data[section] if section else data)[name] = yaml.safe_load(value)
    return from_dict(data)


def test_what_a_refusal_names_does_fit():
    named, together = set(), 0
    for config in REFUSED.values():
        for platform in ("gpu", "cpu"):
            peak = plan_of(config, LARGE, reference=True, platform=platform).peak
            for share in (0.95, 0.8, 0.6, 0.45, 0.3, 0.15):
                plan = plan_of(config, LARGE, limit=share * peak, reference=True, platform=platform)
                for line in () if plan.fits else plan.advice:
                    changed = with_advice(config, line)
                    assert changed.rollout_samples == config.rollout_samples
                    assert changed.updates_per_rollout == config.updates_per_rollout
                    assert plan_of(changed, LARGE, limit=share * peak, reference=True, platform=platform).fits, line
                    named |= {kind for kind in KINDS if kind in line}
                    together += "together" in line
    assert named == KINDS
    assert together


def test_a_refusal_says_what_takes_most_and_what_fits():
    config = config_of(rows=12, length=2048, rollout={"max_slots": 1}, memory={"remat": "none"})
    limit = 0.8 * plan_of(config, LARGE).peak
    message = r"^memory: an update takes [\d.]+ GiB of each device, of which .* are usable; .*fits"
    with pytest.raises(ConfigError, match=message):
        check_plan(plan_of(config, LARGE, limit=limit))
    with pytest.raises(ConfigError, match="no setting of this run would: take more devices or a smaller model"):
        check_plan(plan_of(config, LARGE, limit=GIB))
    with pytest.raises(ConfigError, match="^memory: a rollout takes"):
        check_plan(Plan(update={"a": 1}, rollout={"a": 3}, limit=2, remat="none"))
    for limit in (None, 1e15):
        check_plan(plan_of(config, LARGE, limit=limit))


def test_smaller_micro_batches_hold_whole_groups():
    config = config_of(rows=12, length=2048, rollout={"max_slots": 1}, memory={"remat": "none"})
    limit = 0.7 * plan_of(config, LARGE).peak
    for group in (1, 2, 3):
        advice = " ".join(plan_of(config, LARGE, limit=limit, group=group).advice)
        found = re.search(r"per_device_train_batch_size=(\d+)", advice)
        assert found, advice
        assert int(found[1]) % group == 0
    assert "per_device" not in " ".join(plan_of(config, LARGE, limit=limit, group=12).advice)


def test_room_is_true_and_the_largest():
    config = config_of(rows=1, parts=24, length=2048, memory={"remat": "full"}, rollout={"max_slots": 1})

    def rows(n):
        changed = {"per_device_train_batch_size": n, "gradient_accumulation_steps": 24 // n}
        return dataclasses.replace(config, **changed)

    for best, beyond in ((4, 6), (8, 12)):
        plan = plan_of(config, LARGE, limit=plan_of(rows(best), LARGE).peak)
        assert plan_of(rows(beyond), LARGE).peak > plan.limit
        expected = f"has room for per_device_train_batch_size={best} with gradient_accumulation_steps={24 // best}"
        assert plan.advice == (expected,)
    assert plan_of(config, LARGE, limit=plan_of(config, LARGE).peak).advice == ()
    assert plan_of(rows(24), LARGE, limit=1e15).advice == ()


def test_rows_of_packed_micro_batches():
    """A micro-batch takes what its tokens say, not what its samples do."""

    def activations(**batching):
        config = config_of(rows=64, length=1000, memory={"remat": "full"}, batching=batching)
        return plan_of(config, LARGE).update["activations kept"]

    assert activations(pack=True) == activations() == activations(pack=True, tokens_per_device=64 * 1000)
    assert activations(pack=True, tokens_per_device=32 * 1000) == activations() / 2
    # Whole rows: 15 of 2500 tokens.
    found = activations(pack=True, tokens_per_device=39_000, row_length=2500)
    assert found == pytest.approx(activations() * 15 * 2500 / (64 * 1000))


def test_packed_rows_by_cudnn():
    """It keeps a number for each segment that a row may have, and its arguments and result once more."""

    def kept(kernel, **memory):
        model = {"dtype": "bfloat16", "attention": kernel}
        config = config_of(rows=4, length=4096, model=model, memory=memory, batching={"pack": True})
        return plan_of(config, LARGE).update["activations kept"]

    tokens, layers, heads, kv_heads, head_dim = 4 * 4096, 24, 16, 8, 128
    segments = 4 * heads * (head_dim // 2 - 1)
    again = 2 * (4 * heads + 2 * kv_heads) * head_dim
    gap = kept("cudnn", remat="none") - kept("triton", remat="none")
    assert gap == pytest.approx(tokens * layers * (segments + again))
    # Of what has a name, nothing more.
    assert kept("cudnn", remat="save") <= kept("triton", remat="save")


@pytest.mark.parametrize("kv_heads", [2, 4])
def test_what_tritons_gradient_holds(kv_heads):
    """Of keys and values for each head of the queries, where several share one: what its kernels put out."""
    spec = dataclasses.replace(spec_of(), num_kv_heads=kv_heads)
    sizes = sizes_of(spec, 1, 1024)
    shapes = [(1, 1024, 4, 64), *[(1, kv_heads, 1024, 64)] * 2]
    arrays = [jnp.zeros(shape, jnp.bfloat16) for shape in shapes]
    loss = lambda *a: attend_triton(*a, causal_mask(1024), interpret=True).astype(jnp.float32).sum()  # noqa: E731
    trace = jax.make_jaxpr(jax.grad(loss, argnums=(0, 1, 2)))(*arrays)
    made = [out.aval for eqn, _ in equations(trace.jaxpr) if eqn.primitive.name == "pallas_call" for out in eqn.outvars]
    parts = sum(a.size * 4 for a in made if a.dtype == jnp.float32 and a.ndim == 4)
    kept, held = sizes.blocked_attention
    assert held - kept == parts
    assert (parts > 0) == (kv_heads < 4)
    # A device with one head of the queries has its key head, repeated where there are too few; one with two shares it.
    for tensor, share in ((2, kv_heads < 4), (4, False)):
        kept, held = sizes_of(spec, 1, 1024, tensor).blocked_attention
        assert held - kept == (2 * 4 * 1024 * 64 * 4 / tensor if share else 0)


def test_types():
    """Halves of parameters, activations and caches; moments and gradients stay float32."""

    def items(**model):
        plan = plan_of(config_of(rows=32, length=1024, model=model, memory={"remat": "full"}), LARGE, reference=True)
        return plan.update | {f"rollout {name}": size for name, size in plan.rollout.items()}

    single, double = items(dtype="bfloat16", param_dtype="bfloat16"), items()
    for name in ("parameters", "reference", "activations kept", "rollout caches"):
        assert double[name] == 2 * single[name], name
    assert double["optimizer moments"] == single["optimizer moments"]
    mixed = items(dtype="bfloat16")
    assert mixed["parameters"] == double["parameters"]
    assert mixed["parameters in use"] > 0 == single.get("parameters in use", 0)
    assert items(dtype="float16") == mixed


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("tie", [True, False])
def test_quantized_copy_is_what_the_engine_makes(dtype, tie):
    """But for vectors, which it shares with the trainer, and the one kernel that is being converted."""
    spec = spec_of(tie=tie)
    config = config_of(rollout={"quantization": "fp8"}, model={"dtype": dtype})
    planned = plan_of(config, spec).rollout["parameters in use"]
    with NativeEngine(Decoder(spec, dtype=jnp.dtype(dtype), rngs=nnx.Rngs(0)), quantization="fp8") as engine:
        given = {id(leaf) for leaf in engine._leaves}
        own = jax.tree.leaves(own_leaves(engine._programs, engine._leaves, dtype))
    made = sum(leaf.nbytes for leaf in own if id(leaf) not in given)
    converted = spec.hidden_size * spec.intermediate_size * jnp.dtype(dtype).itemsize
    assert planned - converted == pytest.approx(made, rel=0.01)


def test_joined_copy_is_what_the_engine_makes():
    """On a GPU, of parameters that need no cast: a copy of five of a layer's seven kernels; on a CPU none."""
    spec, config = spec_of(), config_of(model={"dtype": "bfloat16", "param_dtype": "bfloat16"})
    planned = {
        name: plan_of(config, spec, platform=name).rollout.get("parameters in use", 0) for name in ("gpu", "cpu")
    }
    graphdef, params = nnx.split(Decoder(spec, dtype=jnp.bfloat16, rngs=nnx.Rngs(0)))
    leaves, treedef = jax.tree.flatten(jax.tree.map(lambda a: a.astype(jnp.bfloat16), params))
    own = own_leaves(Programs(graphdef, treedef, None, joins=True), leaves, "bfloat16")
    joined = sum(leaf.kernel.nbytes for leaf in own if isinstance(leaf, JoinedKernel))
    assert planned == {"gpu": joined, "cpu": 0}
    assert joined > 0


@pytest.mark.parametrize(("longest", "prompts"), [(512, 4), (700, 64), (9000, 3)])
def test_prompts_are_what_the_engine_makes_of_them(longest, prompts):
    """What a layer more keeps of the prompts that are run together, whatever fits."""
    planned, made = [], []
    for layers in (1, 2):
        spec, config = spec_of(layers=layers), config_of(rows=prompts, max_prompt_length=longest)
        assert config.rollout_prompts == prompts
        planned.append(plan_of(config, spec).rollout["prompts and logits"])
        graphdef, params = nnx.split(nnx.eval_shape(lambda spec=spec: Decoder(spec, rngs=nnx.Rngs(0))))
        leaves, treedef = jax.tree.flatten(params)
        shapes = PromptShapes.of(prompts, longest, PREFILL_TOKENS)
        tokens = np.zeros((shapes.most(longest), shapes.each(longest) * shapes.block), np.int32)
        run = functools.partial(Programs(graphdef, treedef, None)._prefill_impl, shapes=shapes)
        left = jax.eval_shape(run, tuple(leaves), tokens, np.ones(len(tokens), np.int32))
        made.append(sum(math.prod(a.shape) * a.dtype.itemsize for a in jax.tree.leaves(left)))
        assert planned[-1] > made[-1]
    assert planned[1] - planned[0] == made[1] - made[0]


def test_what_the_loss_reads_is_planned():
    """As long as a response may be, however short they are."""
    config = config_of(rows=4, parts=3)
    sample = Sample(prompt_ids=[1], response_ids=[2], logprobs=np.zeros(1, np.float32))
    rows = make_rows(config, [sample] * config.rollout_samples)
    read = [rows.mask, rows.advantages, rows.sampler_logprobs, rows.sources, rows.old_logprobs]
    assert sum(array.nbytes for array in read) == plan_of(config, spec_of()).update["samples"]
    config = dataclasses.replace(config, memory=dataclasses.replace(config.memory, offload_reference=True))
    assert plan_of(config, spec_of(vocab=100_000), reference=True).update["samples"] == 6 * rows.mask.nbytes


@pytest.mark.parametrize(("held_out", "n", "most"), [(64, 1, 64), (5, 3, 64), (264, 1, 300), (2, 1, 1)])
def test_an_evaluation_is_planned_as_the_engine_makes_it(held_out, n, most):
    """The default rollout has 8 completions: held-out prompts may need more slots, and are run more at a time."""
    spec = spec_of(width=16, layers=1, heads=2, vocab=20)
    config = config_of(
        length=32,
        num_generations=8,
        num_generations_eval=n,
        rollout={"max_slots": most},
        evaluation={"temperature": 1.0},
    )
    planned = plan_of(config, spec, platform="cpu", held_out=held_out).rollout
    engine = NativeEngine(
        Decoder(spec, rngs=nnx.Rngs(0)), max_slots=most, max_length=32, max_prompt_length=16, eos_token_ids=[]
    )
    made = []
    for prompts, count in ((1, 8), (held_out, n)):
        engine._programs.compiled.clear()
        engine.generate([Request(prompt_ids=[1] * 16, n=count)] * prompts, SamplingParams(max_tokens=1))
        (begin,) = (key for key in engine._programs.compiled if key[0] == "begin")
        prefill = max(key for key in engine._programs.compiled if key[0] == "prefill")
        # A token's keys and values: one head of eight channels, in float32.
        made.append((begin[1] * begin[2] * 64 * 2, prefill[4] * prefill[5] * 64))
    (slots, blocks), (eval_slots, eval_blocks) = made
    assert planned["caches"] == max(slots, eval_slots)
    assert planned["prompts and logits"] > max(blocks, eval_blocks)


def test_prompts_that_devices_do_not_divide_are_whole_on_each():
    """What a layer more keeps: one prompt takes as much on each of eight devices as on one, eight are shared out."""

    def layer(devices, rows):
        config = config_of(rows=rows, length=32, num_generations=8, parallel={"fsdp": devices})
        mesh = jax.sharding.AbstractMesh((1, devices, 1, 1), make_mesh().axis_names)
        layout = Layout(mesh, config.parallel.chosen_strategy)
        specs = (spec_of(width=16, layers=layers, heads=2, vocab=20) for layers in (1, 2))
        plans = [make_plan(config, spec, layout, reference=False, limit=None, platform="gpu") for spec in specs]
        return plans[1].rollout["prompts and logits"] - plans[0].rollout["prompts and logits"]

    # A block of 16 tokens.
    assert layer(8, 1) == layer(1, 8) == 16 * 64
    assert layer(8, 8) == layer(1, 64) / 8 == 16 * 64


def test_answers_one_by_one_are_planned():
    """A greedy baseline, and a warm start's looks, ask for one completion of each prompt: more prompts run together."""
    spec, n = spec_of(width=16, layers=1, heads=2, vocab=20), {"num_generations": 8, "num_generations_eval": 8}
    config = config_of(rows=64, length=32, rollout={"max_slots": 16}, evaluation={"temperature": 1.0}, **n)

    def prompts(config, **calls):
        return plan_of(config, spec, **calls).rollout["prompts and logits"]

    plain = prompts(config, held_out=64)
    assert prompts(config, held_out=64, greedy=True) > plain
    looks = from_dict(to_dict(config) | {"warm_start": {"max_steps": 1}})
    assert prompts(looks, held_out=64) > plain
    assert prompts(looks) == prompts(config)


@pytest.mark.parametrize(("devices", "most", "slots"), [(8, 100, 96), (8, 2, 8), (3, 64, 63), (3, 2, 3), (1, 40, 40)])
def test_slots_are_shared_out(devices, most, slots):
    """In equal parts, of 64 tokens at least, as a GPU's are: what devices do not divide would be whole on each."""
    spec = spec_of(width=16, layers=1, heads=2, vocab=20)
    config = config_of(rows=64, length=32, rollout={"max_slots": most}, parallel={"fsdp": devices})
    mesh = jax.sharding.AbstractMesh((1, devices, 1, 1), make_mesh().axis_names)
    layout = Layout(mesh, config.parallel.chosen_strategy)
    items = make_plan(config, spec, layout, reference=False, limit=None, platform="gpu").rollout
    assert items["caches"] == slots / devices * 64 * 64 * 2


def test_offloaded_state():
    """Moments come back for the update, the reference while it scores; on a CPU nothing is elsewhere."""

    def plan(platform="gpu", **memory):
        return plan_of(config_of(length=1024, memory={"remat": "none"} | memory), LARGE, None, True, platform)

    none, both = plan(), plan(offload_optimizer=True, offload_reference=True)
    assert none.update["optimizer moments"] > 0 < none.update["reference"]
    assert both.update["optimizer moments"] == 0 == both.update.get("reference", 0)
    assert both.rollout["optimizer moments"] == 0 == both.rollout["reference"]
    assert total(both) == total(none) - none.update["optimizer moments"] - none.update["reference"]
    small = plan_of(config_of(rows=1, length=16, memory={"offload_optimizer": True}), LARGE)
    assert small.update["moments from the host"] == none.update["optimizer moments"]
    assert plan("cpu", offload_optimizer=True, offload_reference=True) == plan("cpu")


def test_limits(monkeypatch):
    class Device:
        platform = "gpu"

        def __init__(self, stats):
            self.memory_stats = lambda: stats

    config = config_of()
    assert usable_bytes(config_of(memory={"device_gib": 0.5}), jax.devices()[0]) == 0.5 * GIB
    assert usable_bytes(config, Device({"bytes_limit": 100})) == pytest.approx(92)
    assert usable_bytes(config, Device(None)) is None
    monkeypatch.setattr(planning.psutil, "virtual_memory", lambda: type("Memory", (), {"total": 1000}))
    monkeypatch.setattr(planning.jax, "local_device_count", lambda: 4)
    assert usable_bytes(config, jax.devices()[0]) == pytest.approx(230)


def test_engine_share():
    config = config_of(length=2048, rollout={"max_slots": 64}, generation_batch_size=64)
    plan = plan_of(config, LARGE, limit=1e12)
    state = sum(plan.rollout[name] for name in ("parameters", "optimizer moments", "reference"))
    assert plan.engine_share == pytest.approx((sum(plan.rollout.values()) - state) / 1e12)
    assert plan_of(config, LARGE).engine_share is None
    half = dataclasses.replace(config, rollout=dataclasses.replace(config.rollout, max_slots=32))
    assert plan.rollout["caches"] == 2 * plan_of(half, LARGE).rollout["caches"]


@pytest.mark.parametrize(
    ("spec", "config", "unit"),
    [(spec_of(width=16, layers=1, heads=2, vocab=20), config_of(length=16), "MiB"), (LARGE, config_of(), "GiB")],
)
def test_it_is_short_and_in_readable_units(spec, config, unit):
    lines = str(plan_of(config, spec, limit=200 * GIB)).splitlines()
    assert unit in lines[0]
    assert len(lines) < 14
    assert all(len(line) <= 100 for line in lines)
    assert not re.search(r" 0\.00\b", "\n".join(lines))
    assert "unknown" in str(plan_of(config, spec))


def test_it_comes_before_the_weights(tmp_path, capsys):
    """A model whose weights are not there is refused for its size, after the plan was shown."""
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(SCRATCH | {"vocab_size": 50_000, "hidden_size": 512}))
    tokenizer = "characters:0123456789+="
    values = {"model": {"path": str(folder), "tokenizer": tokenizer}, "memory": {"device_gib": 0.1}}
    config = dataclasses.replace(tiny_config(tmp_path / "run"), **{k: getattr(from_dict(values), k) for k in values})
    with pytest.raises(ConfigError, match=r"^memory: an update takes .* MiB of each device, of which 102\.40 MiB are"):
        RLTrainer(config=config, reward_funcs=digits, train_dataset=ROWS)
    assert capsys.readouterr().out.startswith("memory of each device, MiB")
    assert not (tmp_path / "run").exists()
    with pytest.raises(ConfigError, match="^model.path"):
        RLTrainer(
            config=dataclasses.replace(config, memory=from_dict({}).memory), reward_funcs=digits, train_dataset=ROWS
        )
