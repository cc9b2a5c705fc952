"""The benchmark of attention: its report, and Triton's kernels with tiles of the command line."""

import importlib
import json

import pytest

from tests.conftest import ROOT


def test_report_has_a_line_for_each_of_the_tiles(monkeypatch, tmp_path, capsys):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    output = tmp_path / "report.json"
    tiles = ["16x32x4x2:32x16x4x2:16x16x4x2", "32x16x4x3:16x16x4x2:32x16x8x3", "16x16"]
    command = "--lengths 40 --tokens 40 --masks packed --kernels dense triton --repeats 1 --no-peer --tiles"
    importlib.import_module("attention").main([*command.split(), *tiles, "--output", str(output)])
    cases = json.loads(output.read_text())["cases"]
    (found,) = (case["kernels"] for case in cases)
    assert list(found) == ["dense", "triton", *(f"triton {one}" for one in tiles)]
    assert "needs an NVIDIA GPU" in found["triton"]["error"]
    assert "TypeError" in found[f"triton {tiles[2]}"]["error"]
    for one in tiles[:2]:
        assert found[f"triton {one}"]["gap"] == pytest.approx(0.0, abs=1e-5)
        assert found[f"triton {one}"]["seconds"] > 0
    assert f"triton {tiles[0]}" in capsys.readouterr().out


def test_decoding_is_compared_with_all_keys_and_with_the_bytes_read(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    output = tmp_path / "report.json"
    command = "--shapes small --slots 3 --keys 48 --filled 32 --layers 2 --dtype float32 --repeats 1"
    command += f" --tiles 16x2x3 24x1x1 --splits 2 --output {output}"
    importlib.import_module("decode_attention").main(command.split())
    report = json.loads(output.read_text())
    [case] = report["cases"]
    kernels = case["kernels"]
    assert list(kernels) == ["dense", "usual", "16x2x3", "16x2x3/2", "24x1x1", "24x1x1/2"]
    assert all("takes a power of two" in kernels.pop(name)["error"] for name in ("24x1x1", "24x1x1/2"))
    # Keys and values of two heads of 64 float32 numbers, of 24 to 40 places a slot.
    assert 3 * 24 <= case["bytes"] / (2 * 2 * 64 * 4) <= 3 * 40
    for found in kernels.values():
        assert found["gap"] == pytest.approx(0.0, abs=1e-5)
        assert found["over_floor"] == pytest.approx(
            found["seconds"] * report["copy"]["bytes_per_second"] / case["bytes"]
        )


def test_a_kernel_that_does_not_write_has_no_gap_that_is_finite(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    benchmark = importlib.import_module("decode_attention")
    extend = benchmark.extend_triton_decode
    monkeypatch.setattr(benchmark, "extend_triton_decode", lambda *arguments: (extend(*arguments)[0], arguments[2]))
    command = "--shapes small --slots 3 --keys 48 --filled 32 --layers 2 --dtype float32 --repeats 1"
    [case] = benchmark.main(command.split())["cases"]
    assert case["kernels"]["usual"]["gap"] == float("inf")


@pytest.mark.parametrize(
    ("options", "message"), [("--tiles 16x2", "invalid tile"), ("--filled 3", "4 to 307"), ("--filled 308", "4 to 307")]
)
def test_what_cannot_be_measured_is_refused(monkeypatch, capsys, options, message):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    with pytest.raises(SystemExit):
        importlib.import_module("decode_attention").main(options.split())
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(("platform", "calls"), [("cpu", 1), ("gpu", 10)])
def test_bytes_per_second_are_those_of_one_copy(monkeypatch, platform, calls):
    """On a GPU ten are waited for at once."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    bandwidth = importlib.import_module("bandwidth")
    clock, waits = iter([0.0, 20.0, 0.0, 10.0]), []
    ready = bandwidth.jax.block_until_ready
    monkeypatch.setattr(bandwidth.jax, "default_backend", lambda: platform)
    monkeypatch.setattr(bandwidth.jax, "block_until_ready", lambda x: waits.append(int(x[0])) or ready(x))
    monkeypatch.setattr(bandwidth.time, "perf_counter", lambda: next(clock))
    found = bandwidth.copy_bandwidth(megabytes=1, repeats=2)
    assert waits == [1, 1 + calls, 1 + 2 * calls]
    assert found["bytes_per_second"] == pytest.approx(2 * 2**20 * calls / 10)


def test_a_turn_of_several_calls_is_timed_as_one_of_them(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    attention = importlib.import_module("attention")
    ran, clock = [], iter([3.0, 11.0])
    monkeypatch.setattr(attention, "settle", lambda: None)
    monkeypatch.setattr(attention.time, "perf_counter", lambda: next(clock))
    assert attention.timed(ran.append, 4) == 2.0
    assert ran == [4]
