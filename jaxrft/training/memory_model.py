"""What each device holds in the course of a run, counted from shapes alone.

State is exact: it follows from shapes and shardings. What a program holds while it runs is counted from what its
backward pass keeps, at the three moments of an optimizer step that may take most. Against the compiler's own account
of the compiled step (float32 on the CPU; none, save and full; one device, and eight under ddp, fsdp, hsdp, zero2 and
tensor) the sum is within 20%, where it is above 50 MiB. Of GPU programs two were compared, on packed rows: of 1.5
billion parameters and 8192 tokens a step took 43.9 GiB of an H200, of which 43.5 are counted; of 0.6 billion (Qwen3)
and 16384 tokens 31.9, of which 31.0. Logits that are reduced with their product, as on such a GPU since, take half a
GiB less as compiled.
"""

from __future__ import annotations

import math

from jaxrft.data.batching import halvings
from jaxrft.models.attention.choice import ACCELERATOR_DENSE_KEYS, DENSE_KEYS
from jaxrft.models.logit_chunks import ALIGNMENT, logits_elements
from jaxrft.rollout.buckets import PREFILL_TOKENS, SMALLEST_BUCKET, PromptShapes, slots_for, startable, whole_cache
from jaxrft.training.memory_sizes import FLOAT32, Sizes

Items = dict[str, float]


def state_items(sizes: Sizes, reference: bool) -> Items:
    """What stays on the devices through all phases."""
    memory, apart = sizes.config.memory, sizes.host_is_apart
    return {
        "parameters": sizes.state.param_bytes,
        "optimizer moments": 0 if memory.offload_optimizer and apart else sizes.state.moment_bytes,
        "reference": sizes.state.param_bytes if reference and not (memory.offload_reference and apart) else 0,
    }


def update_items(sizes: Sizes, reference: bool) -> Items:
    """What an update holds beside the state, at the moment at which it holds most."""
    state, memory, config = sizes.state, sizes.config.memory, sizes.config
    # What the loss reads: mask, advantages, places of the tokens, the engine's, the old and the reference's
    # log-probabilities of a rollout, as long as a response may be, whole on each device. Packed micro-batches have as
    # many places as the one of most samples, which depends on their lengths: these are at least as many.
    read = (6 if reference else 5) * FLOAT32
    samples: Items = {"samples": config.rollout_samples * config.max_completion_length * read}
    always = dict(samples)
    if sizes.config.gradient_accumulation_steps > 1 or sizes.config.batching.pack:
        always["sum of gradients"] = state.gradient_bytes
    if sizes.platform == "cpu":
        # XLA's CPU compiler reads moments in one loop and writes them in another: it copies them first.
        always["copies of moments"] = state.moment_bytes
    moments = [_layers(sizes), _projection(sizes), _optimizer(sizes)]
    found = always | max(moments, key=lambda items: sum(items.values()))
    if reference and memory.offload_reference and sizes.host_is_apart:
        scoring = samples | {
            "reference": state.param_bytes,
            "scoring": sizes.whole_layer + max(_logits(sizes), _reduced(sizes)),
        }
        found = max(found, scoring, key=lambda items: sum(items.values()))
    return found


def _activations(sizes: Sizes) -> Items:
    items = {"activations kept": sizes.spec.num_layers * sizes.kept_layer}
    if sizes.scan:
        items["layers stacked"] = sizes.of_layers("param_bytes")
    if sizes.shares_params or sizes.casts:
        # Not computed again: the compiler finds that backward and forward pass cast the same. Where they gather too, a
        # barrier is between them, but on a CPU.
        kept = sizes.platform == "cpu" or not sizes.shares_params
        shared = kept and sizes.remat == "none" and not sizes.scan
        items["parameters in use"] = (sizes.spec.num_layers if shared else 1) * sizes.layer_elements * sizes.itemsize
    return items


def _layers(sizes: Sizes) -> Items:
    """When the backward pass enters the layers."""
    # The table's gradient is there; in a loop, room for those of all layers.
    gradients = sizes.state.gradient_bytes - sizes.of_layers("gradient_bytes")
    if sizes.scan:
        gradients += sizes.of_layers("gradient_bytes")
    if sizes.shares_params and sizes.scan:
        # One layer's before they are reduced to their shares.
        gradients += sizes.layer_elements * FLOAT32
    elif sizes.shares_params and sizes.platform == "cpu" and sizes.layout.mesh.shape["replica"] > 1:
        # XLA's CPU compiler sums them whole over the replicas, all at once.
        gradients += sizes.spec.num_layers * sizes.layer_elements * FLOAT32
    elif sizes.shares_params:
        # One matrix's: then the gathered matrix is no longer needed.
        gradients += sizes.spec.hidden_size * sizes.spec.intermediate_size / sizes.tensor * FLOAT32
    return _activations(sizes) | {"gradients": gradients, "activations of one layer": sizes.working_layer}


def _projection(sizes: Sizes) -> Items:
    """When the output projection is differentiated."""
    # The kernel's gradient; and the kernel, where it is used in another type or place than it is kept.
    kernel = sizes.table_elements * (FLOAT32 + (sizes.itemsize if sizes.casts or sizes.shares_params else 0))
    # What is projected: gathered, masked, and their cotangents, of which one is a sum over chunks in float32.
    hidden = sizes.rows * sizes.picks * sizes.spec.hidden_size * (4 * sizes.itemsize + FLOAT32)
    return _activations(sizes) | {"output projection": kernel + hidden + max(2 * _logits(sizes), _reduced(sizes))}


def _logits(sizes: Sizes) -> float:
    return FLOAT32 * logits_elements(round(sizes.rows * sizes.picks), round(sizes.vocab), sizes.platform)


def _reduced(sizes: Sizes) -> float:
    """What a kernel that reduces logits with their product leaves: four numbers a token for each 128 words."""
    if sizes.platform == "cpu" or sizes.itemsize != 2:
        return 0
    return 4 * FLOAT32 * round(sizes.rows * sizes.picks) * math.ceil(sizes.vocab / ALIGNMENT)


def _optimizer(sizes: Sizes) -> Items:
    """When parameters are changed: activations are gone."""
    state = sizes.state
    items: Items = {"gradients": state.gradient_bytes}
    if sizes.config.gradient_accumulation_steps > 1 or sizes.config.batching.pack:
        items["gradients"] = 0  # They are in the sum.
    if sizes.scan:
        items["gradients"] = sizes.of_layers("gradient_bytes")
    elif sizes.platform == "cpu" and sizes.layout.shards("gradients"):
        # XLA's CPU compiler sums whole gradients over the devices, and cuts them where they are used.
        items["gradients"] = sizes.whole.gradient_bytes
    if sizes.shares_state and not sizes.layout.shards("params"):
        # Each device changes its share, and the whole is gathered from these.
        items["parameters changed"] = state.param_bytes
    if sizes.config.memory.offload_optimizer and sizes.host_is_apart:
        items["moments from the host"] = state.moment_bytes
    return items


def rollout_items(sizes: Sizes) -> Items:
    """What the engine holds beside the state while it generates."""
    config, spec = sizes.config, sizes.spec
    if config.rollout.engine == "vllm":
        # A server's memory is its own; a bucket is packed while the one before it is read. It is no smaller than the
        # largest part of a layer.
        unit = spec.hidden_size * max(spec.vocab_size, 3 * spec.intermediate_size) * sizes.itemsize
        bucket = min(config.rollout.vllm.bucket_mib * 2**20, sizes.whole.param_bytes)
        return {"weights on their way": 2 * max(bucket, unit)}
    kv_heads = spec.num_kv_heads / (sizes.tensor if spec.num_kv_heads % sizes.tensor == 0 else 1)
    entry = 2 * kv_heads * spec.head_dim * sizes.itemsize
    # Of rollouts and evaluations, what takes more.
    answered = max((_answering(sizes, entry, *call) for call in sizes.calls), key=lambda items: sum(items.values()))
    return {
        "engine's parameters": sizes.whole.param_bytes if sizes.shares_params else 0,
        "parameters in use": _own_copy(sizes),
    } | answered


def _answering(sizes: Sizes, entry: float, prompts: int, n: int) -> Items:
    """While the native engine answers ``n`` times to each of some prompts; ``entry``: bytes of a token, a layer."""
    config, spec, devices = sizes.config, sizes.spec, sizes.layout.slot_devices
    slots = slots_for(prompts * n, config.rollout.max_slots, devices)
    shapes = PromptShapes.of(startable(prompts, n, slots), config.max_prompt_length, PREFILL_TOKENS)
    longest = config.max_prompt_length + config.max_completion_length
    longest = halvings(longest, SMALLEST_BUCKET)[-1] if sizes.platform == "cpu" else whole_cache(longest)
    logits = spec.vocab_size * FLOAT32
    blocks, kept = _share(shapes.blocks, devices) * shapes.block, _share(shapes.rows, devices)
    # First prompts are run, with one layer's activations and their logits; then each slot gets its prompt's.
    running = _running(sizes, shapes, devices) + kept * logits
    return {
        # One layer is there twice while caches grow.
        "caches": slots / devices * longest * entry * (spec.num_layers + 1),
        "prompts and logits": blocks * entry * spec.num_layers
        + kept * logits
        + max(running, 3 * slots / devices * logits),
    }


def _share(count: int, devices: int) -> float:
    """Of an axis on each device: the whole where they do not divide it."""
    return count / devices if count % devices == 0 else count


def _own_copy(sizes: Sizes) -> float:
    """What the native engine casts, joins or quantises once for a rollout."""
    spec, layers = sizes.spec, sizes.spec.num_layers
    whole = sizes.whole.param_bytes / sizes.param_itemsize
    heads = spec.head_dim * (spec.num_heads + 2 * spec.num_kv_heads)
    if sizes.config.rollout.quantization == "none":
        joins = sizes.platform != "cpu" and sizes.tensor == 1
        joined = layers * spec.hidden_size * (heads + 2 * spec.intermediate_size) if joins else 0.0
        return (whole if sizes.casts else joined) * sizes.itemsize
    kernels = layers * sizes.layer_elements
    scales = layers * (2 * spec.hidden_size + (heads + 2 * spec.intermediate_size) / sizes.tensor)
    # Kernels are converted where they are used; XLA's CPU compiler does so with all of them first.
    largest = spec.hidden_size * spec.intermediate_size / sizes.tensor
    converted = kernels if sizes.platform == "cpu" else largest
    others = (whole - kernels) * sizes.itemsize if sizes.casts else 0.0
    return kernels + scales * FLOAT32 + converted * sizes.itemsize + others


def _running(sizes: Sizes, shapes: PromptShapes, devices: int) -> float:
    """One layer's activations of the prompts that are run at once."""
    config, spec = sizes.config, sizes.spec
    time = shapes.each(config.max_prompt_length) * shapes.block
    whole = time <= DENSE_KEYS.get(sizes.platform, ACCELERATOR_DENSE_KEYS)
    scores = 2 * FLOAT32 * time * spec.num_heads / sizes.tensor if whole else 0.0
    layer = (4 * spec.hidden_size + 3 * spec.intermediate_size / sizes.tensor) * sizes.itemsize + scores
    return _share(shapes.most(config.max_prompt_length), devices) * time * layer
