"""Phase times, compile counts and peak memory, against clocks and programs known beforehand."""

from __future__ import annotations

import gc
import logging
import resource
import time
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrft.tracking import CompileCounter, PhaseTimer, peak_memory_bytes, timing


def test_phases_add_up_nest_and_survive_exceptions(monkeypatch):
    now = [10.0]
    monkeypatch.setattr(timing.time, "perf_counter", lambda: now[0])
    timer = PhaseTimer()
    for _ in range(2):
        with timer.phase("rollout"):
            now[0] += 1.5
            with timer.phase("rewards"):
                now[0] += 0.25
            with timer.phase("rollout"):  # itself once more: its time counts once
                now[0] += 1.0

    def failing():
        with timer.phase("training"):
            now[0] += 4.0
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        failing()
    assert timer.take() == {"time/rollout": 5.5, "time/rewards": 0.5, "time/training": 4.0}
    assert timer.take() == {}
    with timer.phase("training"):
        now[0] += 1.0
    timer.add("training", 0.5)
    timer.add("beside", 2.0)
    assert timer.take() == {"time/training": 1.5, "time/beside": 2.0}


def test_each_new_program_is_counted_and_logged(caplog):
    counter, other = CompileCounter(), CompileCounter()

    @jax.jit
    def doubled(x):
        return 2 * x + jnp.sin(x)

    x, y = np.ones(7, np.float32), np.ones(9, np.float32)
    counter.take()
    caplog.set_level(logging.DEBUG, logger="jaxrft.tracking.timing")
    start = time.perf_counter()
    jax.block_until_ready((doubled(x), doubled(x), doubled(y)))
    elapsed = time.perf_counter() - start
    taken = counter.take()
    assert taken["compiles"] == 2
    assert 0 < taken["time/compile"] <= elapsed
    assert [r.message.split(" in ")[0] for r in caplog.records] == ["compiled jit(doubled)"] * 2
    doubled(x)
    assert counter.take() == {"compiles": 0, "time/compile": 0.0}
    assert other.take()["compiles"] >= 2
    gone = weakref.ref(other)
    del other
    gc.collect()
    assert gone() is None  # JAX's listener does not keep counters alive


def test_a_program_from_the_cache_is_not_a_compile(tmp_path, caplog):
    from jax.experimental.compilation_cache import compilation_cache

    options = {"jax_compilation_cache_dir": str(tmp_path), "jax_persistent_cache_min_compile_time_secs": 0.0}
    before = {name: getattr(jax.config, name) for name in options}
    caplog.set_level(logging.DEBUG, logger="jaxrft.tracking.timing")
    counter, x = CompileCounter(), np.ones(11, np.float32)
    try:
        for name, value in options.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()
        jax.block_until_ready(jax.jit(lambda x: x * 3 + 1)(x))
        assert counter.take()["compiles"] == 1
        jax.clear_caches()
        jax.block_until_ready(jax.jit(lambda x: x * 3 + 1)(x))
        taken = counter.take()
    finally:
        for name, value in before.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()
    assert taken["compiles"] == 0
    assert taken["time/compile"] > 0
    assert caplog.records[-1].message.startswith("read ")


def test_peak_memory_of_a_process_without_gpu_is_its_resident_set():
    start = peak_memory_bytes()
    block = np.ones(60_000_000, np.uint8)
    grown = peak_memory_bytes()
    assert grown >= start
    assert grown == pytest.approx(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, rel=0.01)
    assert grown >= block.nbytes


def test_peak_memory_of_gpus_is_that_of_the_fullest(monkeypatch):
    class Device:
        def __init__(self, peak):
            self.peak = peak

        def memory_stats(self):
            return {"bytes_in_use": 1, "peak_bytes_in_use": self.peak}

    monkeypatch.setattr(jax, "local_devices", lambda: [Device(5), Device(9), Device(7)])
    assert peak_memory_bytes() == 9
