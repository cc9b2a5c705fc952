"""What benchmarks/run.py runs: one entry a process, with its options on a CPU and on a GPU.

An entry's result is NAME_SUITE.json. On a GPU each is meant to take a few minutes at most, so that a machine that is
lent for ten minutes at a time can run the suite in parts.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

PEERS = ("trl", "tunix", "vllm")


@dataclasses.dataclass(frozen=True)
class Entry:
    """One process of a suite.

    Attributes:
        name: of the entry, and of its result.
        script: in this folder, without its ending.
        options: on its command line.
        peers: that it takes, by the option of that name, where the caller has them.
    """

    name: str
    script: str
    options: str = ""
    peers: tuple[str, ...] = ()


def entries(suite: str) -> tuple[Entry, ...]:
    """The entries of ``cpu`` or ``gpu``, in the order in which they run: what matters most comes first."""
    return _CPU if suite == "cpu" else (*_FIRST, *_GPU, *_train_steps())


_MODEL = "--hidden-size 512 --heads 8 --layers 8 --intermediate-size 1536 --vocab-size 8192"
_ROLLOUT = f"{_MODEL} --concurrency 1 16 64 --prompt-length 64 --response-length 64"
_CPU = (
    # A server of vLLM's is never quite idle on a CPU: beside it the others are slower.
    Entry("grpo_step", "grpo_step", "--cases hidden256 quarter --starts 2", ("trl", "tunix")),
    Entry("grpo_step_vllm", "grpo_step", "--cases hidden256", ("vllm",)),
    Entry("train_step", "train_step", "--steps 9"),
    Entry("logprobs", "train_step", "--pass logprobs --remat none --steps 9"),
    Entry("rollout", "rollout", _ROLLOUT),
    Entry("rollout_lengths", "rollout", f"{_MODEL} --concurrency 16 --prompt-length 16 256 --response-length 32 256"),
    # A prompt is read once for its group.
    Entry("rollout_groups", "rollout", f"{_MODEL} --concurrency 64 --group 8 --prompt-length 256 --response-length 64"),
    Entry("rollout_vllm", "rollout", f"{_ROLLOUT} --no-peer", ("vllm",)),
    Entry("reward_overlap", "reward_overlap"),
    Entry("weight_transfer", "weight_transfer", "--sizes small 0.5B", ("vllm",)),
    Entry("attention", "attention"),
    Entry("projection", "projection"),
    Entry("loading", "loading"),
)

_BF16 = "--dtype bfloat16 --param-dtype bfloat16"
_ATTENTION = "--shapes 1.5B --lengths 8192 --tokens 16384 --dense-limit 2048 --repeats 7"
_TILES = "--tiles 64x8x3 64x4x2 64x4x3 32x4x2 32x4x3 32x4x4 32x8x3 16x4x6 128x8x2 32x2x3"
_PACKED = "--remat none --batching packed --steps 3 --warm-up 1"
# What the goals speak of, one case each: about a minute of an H200, of which half is compilation; but two for rollouts
# beside transformers', and the GRPO step, with cold and warm starts and TRL's rollouts by transformers' generate, had
# not ended after 200 s beside other programs.
_FIRST = (
    Entry("train_step_1.5B_8192", "train_step", f"--models 1.5B --lengths 8192 --tokens 8192 {_PACKED}"),
    Entry("rollout_1.5B_64_256", "rollout", f"--shape 1.5B {_BF16} --concurrency 256 64 --prompt-length 128 "
          "--response-length 256 --repeats 3"),
    Entry("rollout_1.5B_alone", "rollout", f"--shape 1.5B {_BF16} --no-peer --concurrency 256 64 --prompt-length 128 "
          "--response-length 256 --repeats 3"),
    Entry("train_step_0.6B_16384", "train_step", f"--models 0.6B --lengths 16384 --tokens 16384 {_PACKED} --no-peer"),
    Entry("attention", "attention", f"{_ATTENTION} --kernels cudnn triton --tiles 128x128x8x3:128x64x8x4:128x64x8x4 "
          "64x64x4x3:64x64x4x3:64x64x4x3 128x64x4x3:128x32x4x4:128x32x4x4 128x64x8x4:64x128x8x2:64x128x8x2"),
    Entry("projection", "projection", "--tokens 8192 --hidden 1536 --kernels tied"),
    Entry("grpo_step", "grpo_step", "--cases 0.5B --repeats 2", ("trl",)),
    Entry("logprobs_1.5B_16384", "train_step", "--pass logprobs --models 1.5B --lengths 16384 --tokens 16384 "
          f"{_PACKED} --no-peer"),
)  # fmt: skip
_GPU = (
    # TRL's weights as its users with less memory have them, and rollouts on a server.
    Entry("grpo_step_bfloat16", "grpo_step", "--cases 0.5B --repeats 2 --trl-param-dtype bfloat16", ("trl", "vllm")),
    Entry("decode_attention", "decode_attention", "--shapes 0.5B 1.5B --slots 16 64 256"),
    Entry("decode_attention_4096", "decode_attention", "--shapes 1.5B --keys 4096 --filled 3072 --slots 4 16"),
    Entry("attention_lengths", "attention"),
    Entry(
        "attention_packed",
        "attention",
        f"{_ATTENTION} --kernels triton --masks packed --tiles 64x64x4x3:128x64x8x4:128x64x8x4 "
        "64x128x4x2:128x64x8x2:128x64x8x2 128x128x8x2:64x64x4x4:64x64x4x4",
    ),
    Entry("projection_sizes", "projection"),
    # Twice as much work at a time where the floor is to be seen: short and long responses, one and many completions.
    Entry(
        "rollout_0.5B",
        "rollout",
        f"--shape 0.5B {_BF16} --concurrency 1 64 256 --prompt-length 128 --response-length 512 --repeats 3",
        ("vllm",),
    ),
    Entry(
        "rollout_1.5B",
        "rollout",
        f"--shape 1.5B {_BF16} --concurrency 64 256 512 --prompt-length 128 --response-length 256 --repeats 3",
        ("vllm",),
    ),
    Entry(
        "rollout_lengths",
        "rollout",
        f"--shape 1.5B {_BF16} --concurrency 64 --prompt-length 512 2048 --response-length 128 1024 --repeats 2 "
        "--no-peer",
    ),
    # A prompt is read once for its group.
    Entry(
        "rollout_groups",
        "rollout",
        f"--shape 1.5B {_BF16} --concurrency 256 --group 8 --prompt-length 1024 --response-length 256 --repeats 2",
        ("vllm",),
    ),
    Entry(
        "rollout_fp8",
        "rollout",
        f"--shape 1.5B {_BF16} --fp8 --concurrency 1 16 64 256 --prompt-length 128 --response-length 256 --repeats 3 "
        "--no-peer",
    ),
    Entry(
        "reward_overlap",
        "reward_overlap",
        f"--shape 0.5B {_BF16} --prompts 64 --slots 128 --prompt-length 128 --response-length 256 --at-a-time 64",
    ),
    Entry("weight_transfer", "weight_transfer", "--sizes 0.5B 1.5B", ("vllm",)),
    Entry("loading", "loading"),
    # How the decode kernel was cut: tiles of keys, warps and stages, and instances for a slot's keys.
    Entry("decode_attention_0.5B", "decode_attention", f"--shapes 0.5B --slots 256 {_TILES} --repeats 3"),
    Entry(
        "decode_attention_1.5B", "decode_attention", f"--shapes 1.5B --slots 256 64 {_TILES} --splits 1 2 --repeats 3"
    ),
    Entry(
        "decode_attention_1.5B_splits",
        "decode_attention",
        "--shapes 1.5B --slots 64 16 --tiles 32x4x3 32x2x3 64x4x3 --splits 1 2 4 --repeats 3",
    ),
)


def _train_steps() -> Iterator[Entry]:
    """A process a shape and length: a long one's compilation would take another's minutes."""
    for shape in ("0.5B", "1.5B"):
        for length in (2048, 8192, 16384):
            options = f"--models {shape} --lengths {length}"
            if shape == "1.5B":
                # torch's side has to fit beside ours: with 8192 tokens a micro-batch 44 GiB, torch's 63, of which two
                # thirds are for the tokens.
                options += " --tokens 8192" if length <= 8192 else " --no-peer"
            yield Entry(f"train_step_{shape}_{length}_kinds", "train_step", options)
        # One sample a micro-batch. Activations are some 1 MB a token of 0.5B, 2 of 1.5B: these need rematerialisation.
        remat = "none full" if shape == "0.5B" else "full"
        long = f"--models {shape} --lengths 65536 --tokens 65536 --micro-batches 1 --remat {remat} --batching packed"
        yield Entry(f"train_step_{shape}_65536", "train_step", f"{long} --no-peer")
    seven = "--models 7B --dtypes bfloat16 --param-dtype bfloat16 --no-peer"
    step = f"{seven} --offload-optimizer --micro-batches 1 --steps 3"
    yield Entry("train_step_7B_2048", "train_step", f"{step} --lengths 2048 --tokens 8192 --remat none full")
    for length in (8192, 16384, 65536):
        options = f"{step} --lengths {length} --tokens {length} --batching packed --remat full"
        yield Entry(f"train_step_7B_{length}", "train_step", options)
    yield Entry("logprobs_0.5B", "train_step", "--pass logprobs --models 0.5B --lengths 2048 16384 --remat none")
    yield Entry("logprobs_1.5B", "train_step", "--pass logprobs --models 1.5B --lengths 2048 16384 --remat none")
    yield Entry(
        "logprobs_7B", "train_step", f"--pass logprobs {seven} --remat none --lengths 2048 16384 --batching packed"
    )
