"""The vLLM engine at length: families, versions, several servers, and what ends a server."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from flax import nnx

from jaxrft import RLTrainer
from jaxrft.config import ConfigError, ModelConfig, RolloutConfig, VLLMConfig
from jaxrft.rollout import EngineError, Request, SamplingParams
from jaxrft.rollout.server_side.jaxrft_watch import start_time
from jaxrft.rollout.vllm.options import ServerOptions, write_model_folder
from jaxrft.rollout.vllm.process import ServerProcess, free_port
from tests.rollout.servers import SPEC, connect, group_members, models, running, vllm_python
from tests.rollout.tiny import forward_logprobs, prompts_of, tokens_of
from tests.training.tiny import digits, tiny_config

pytestmark = [pytest.mark.soak, pytest.mark.timeout(1800)]

ROOT = Path(__file__).resolve().parents[2]
ROWS = [{"prompt": f"{a}+{b}=", "answer": str(a + b)} for a in range(6) for b in range(6)]
SHAPE = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
}
FAMILIES = {
    "qwen2 tied": {"model_type": "qwen2", "tie_word_embeddings": True},
    "qwen3": {"model_type": "qwen3", "tie_word_embeddings": False},
    "llama": {"model_type": "llama", "tie_word_embeddings": False, "attention_bias": True},
    "mistral": {"model_type": "mistral", "tie_word_embeddings": False, "sliding_window": None},
}
CASES = [(None, family) for family in FAMILIES] + [("0.24.0", "qwen2 tied"), ("0.24.0", "llama")]


@pytest.mark.parametrize(("version", "family"), CASES)
def test_after_each_step_the_server_has_the_trainers_weights(tmp_path, version, family):
    """A run that starts its server; parity is looked at after every optimizer step."""
    python = vllm_python(version)
    scratch = {**SHAPE, **FAMILIES[family]}
    config = tiny_config(
        tmp_path / "run",
        model=ModelConfig(scratch=scratch, tokenizer="characters:0123456789+="),
        rollout=RolloutConfig(engine="vllm", parity="always", vllm=VLLMConfig(python=python, checksum=True)),
        max_steps=4,
        max_prompt_length=8,
        max_completion_length=8,
    )
    trainer = RLTrainer(config=config, reward_funcs=digits, train_dataset=ROWS)
    gaps, versions = [], []
    compare = trainer.check_parity

    def recorded():
        gaps.append(compare())
        versions.append(trainer.engine.version)
        return gaps[-1]

    trainer.check_parity = recorded
    before = np.concatenate([np.ravel(x) for x in nnx.state(trainer.model).flat_state().leaves])
    try:
        trainer.train()
        after = np.concatenate([np.ravel(x) for x in nnx.state(trainer.model).flat_state().leaves])
        assert versions == [0, 1, 2, 3, 4]
        assert max(gaps) < 1e-4
        assert np.abs(after - before).max() > 1e-2
        found = trainer.engine.generate([Request(prompt_ids=[3, 4])], SamplingParams(max_tokens=3))
        assert found[0].versions == ((0, 4),)
        assert not any(c.logprobs is None for c in found)
    finally:
        trainer.close()


def test_two_servers_at_once(tmp_path):
    """At a temperature of 0.7, with log-probabilities after temperature and truncation; one of them then dies."""
    model = models(1)[0]
    with (
        running(tmp_path, model, python=vllm_python(), count=2, logprobs_mode="processed_logprobs") as processes,
        connect(processes, model, max_sequences=16) as engine,
    ):
        engine.update_weights(nnx.state(model), 7)
        asked = [Request(prompt_ids=[3 + i % 9, 5], n=4, seed=i) for i in range(64)]
        served = {server.name: 0 for server in engine._servers}
        for server in engine._servers:
            server.generate = _counted(server, served)
        warm = SamplingParams(temperature=0.7, max_tokens=10, seed=1)
        engine.generate(asked, dataclasses.replace(warm, seed=2))
        served |= dict.fromkeys(served, 0)
        completions = engine.generate(asked, warm)
        assert sum(served.values()) == 64
        assert min(served.values()) >= 16
        assert {c.versions for c in completions} == {((0, 7),)}
        assert _gap(model, asked, completions, 0.7) < 1e-4
        assert all(np.array_equal(c.logprobs, c.sampled_logprobs) for c in completions)
        # Whichever server answers, a request's seed decides.
        assert tokens_of(engine.generate(asked, warm)) == tokens_of(completions)
        fire = dataclasses.replace(warm, first_token_temperature=1.6)
        assert _gap(model, asked, engine.generate(asked, fire), (1.6, 0.7)) < 1e-4
        _check_truncated(model, asked, engine.generate(asked, dataclasses.replace(warm, top_p=0.6)), 0.7, 0.6)
        os.killpg(processes[1].pid, signal.SIGKILL)
        with pytest.raises(EngineError, match=r"server 1: .* does it still run"):
            engine.generate(asked, warm)


def _counted(server, served):
    generate = server.generate

    def counted(payload):
        served[server.name] += 1
        return generate(payload)

    return counted


def _gap(model, asked, completions, temperature) -> float:
    expected = forward_logprobs(model, prompts_of(asked), completions, temperature)
    return max(float(np.abs(e - c.logprobs).max()) for e, c in zip(expected, completions) if len(e))


def _check_truncated(model, asked, completions, temperature, top_p):
    """What it drew from is the nucleus, renormalised; without truncation it does not know the log-probabilities."""
    for prompt, completion in list(zip(prompts_of(asked), completions))[:40]:
        assert completion.logprobs is None
        row = np.array([prompt + completion.token_ids])
        logits = np.asarray(model(row), np.float64)[0, len(prompt) - 1 : -1] / temperature
        for scores, token, given in zip(logits, completion.token_ids, completion.sampled_logprobs):
            p = np.exp(scores - scores.max())
            p /= p.sum()
            order = np.argsort(-p)
            kept = order[: int(np.searchsorted(np.cumsum(p[order]), top_p)) + 1]
            assert token in kept
            assert abs(np.log(p[token] / p[kept].sum()) - given) < 1e-3


@pytest.mark.parametrize("ends", ["SIGKILL", "SIGINT", "exception"])
def test_no_server_outlives_its_trainer(tmp_path, ends):
    (tmp_path / "rewards.py").write_text(
        "import os\ndef reward(completions, **_):\n"
        f"    if {ends == 'exception'} and os.path.exists({str(tmp_path / 'now')!r}):\n"
        "        raise RuntimeError('no')\n"
        "    return [float(len(c)) for c in completions]\n"
    )
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in ROWS))
    scratch = {**SHAPE, **FAMILIES["qwen2 tied"]}
    arguments = [
        f"output_dir={tmp_path}/run", f"model.scratch={json.dumps(scratch)}", "model.tokenizer=characters:0123456789+=",
        f"data.train={tmp_path}/rows.jsonl", f"rewards.functions=[{tmp_path}/rewards.py:reward]", "max_steps=100000",
        "num_generations=4", "per_device_train_batch_size=8", "max_prompt_length=8", "max_completion_length=8",
        "rollout.engine=vllm", f"rollout.vllm.python={vllm_python()}", "tracking.progress=false",
    ]  # fmt: skip
    (tmp_path / "run.yaml").write_text("seed: 1\n")
    command = [sys.executable, "-m", "jaxrft.train", str(tmp_path / "run.yaml"), *arguments]
    with (tmp_path / "printed").open("wb") as file:
        trainer = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, cwd=ROOT)
    try:
        printed = _wait(lambda: (tmp_path / "printed").read_text(), lambda text: "audit passed" in text, trainer)
        assert "vLLM" in printed
        servers = [int(p) for p in os.listdir("/proc") if p.isdigit() and _parent(int(p)) == trainer.pid]
        groups = [p for p in servers if os.getpgid(p) == p]
        assert len(groups) == 1
        (tmp_path / "now").touch()
        if ends != "exception":
            trainer.send_signal(getattr(signal, ends))
        code = trainer.wait(180)
    finally:
        trainer.kill()
    assert code == {"SIGKILL": -9, "SIGINT": 130, "exception": 2}[ends], (tmp_path / "printed").read_text()
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and (left := _members(groups[0])):
        time.sleep(0.5)
    assert not left
    if ends == "SIGINT":
        assert "saved at step" in (tmp_path / "printed").read_text()


def _wait(read, enough, process) -> str:
    deadline = time.monotonic() + 300
    while not enough(read()):
        assert process.poll() is None, read()
        assert time.monotonic() < deadline, read()
        time.sleep(0.5)
    return read()


def _parent(process: int) -> int:
    try:
        return int(Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return 0


def _members(group: int) -> list[int]:
    members = []
    for number in (int(entry) for entry in os.listdir("/proc") if entry.isdigit()):
        try:
            if os.getpgid(number) == group and start_time(number) is not None:
                members.append(number)
        except OSError:
            continue
    return members


def _options(folder: Path, **options) -> ServerOptions:
    return ServerOptions(
        model=folder, python=vllm_python(), port=free_port(), dtype="float32", max_sequences=8,
        logprobs_mode="raw_logprobs", tokenizer=False, **{"max_length": 32, **options},
    )  # fmt: skip


REFUSED = {
    "a family that vLLM lacks": (
        {"architectures": ["NobodysForCausalLM"], "model_type": "nobodys"},
        {},
        "nobodys|Nobodys",
    ),
    "a context that is too long": ({}, {"max_length": 65}, r"max_model_len.*65.*64"),
    "an option that it does not know": ({}, {"more": ("--no-such-option",)}, "no-such-option"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_served_is_one_clear_line(tmp_path, case):
    change, options, said = REFUSED[case]
    folder = tmp_path / "model"
    write_model_folder(folder, models(1)[0], None, "float32")
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    process = ServerProcess(_options(folder, **options), tmp_path / "log")
    with pytest.raises(ConfigError, match=said) as refusal:
        process.wait(300)
    assert len(str(refusal.value).splitlines()) == 1
    assert str(tmp_path / "log") in str(refusal.value)
    # What watches the server notices within a second that it is gone.
    deadline = time.monotonic() + 10
    while group_members(process):
        assert time.monotonic() < deadline
        time.sleep(0.2)


def test_bfloat16_and_two_workers(tmp_path):
    """A server whose model is shared by two workers, in bfloat16; log-probabilities within its tolerance."""
    import jax.numpy as jnp

    spec = dataclasses.replace(SPEC, num_kv_heads=2, tie_embeddings=False)
    old, new = models(2, spec, jnp.bfloat16)
    options = {"dtype": "bfloat16", "tensor_parallel": 2}
    with (
        running(tmp_path, old, python=vllm_python(), **options) as processes,
        connect(processes, old, bucket_bytes=2**15, checksum=True) as engine,
    ):
        assert len(engine._servers[0].workers) == 2
        asked = [Request(prompt_ids=[3 + i % 9, 5, 7], n=2, seed=i) for i in range(16)]
        for version, model in enumerate((old, new)):
            engine.update_weights(nnx.state(model), version)
            completions = engine.generate(asked, SamplingParams(max_tokens=12))
            expected = forward_logprobs(model, prompts_of(asked), completions, 1.0)
            gaps = np.concatenate([np.abs(e - c.logprobs) for e, c in zip(expected, completions)])
            assert gaps.mean() < 5e-2
            other = forward_logprobs((new, old)[version], prompts_of(asked), completions, 1.0)
            assert np.concatenate([np.abs(e - c.logprobs) for e, c in zip(other, completions)]).mean() > 0.5
