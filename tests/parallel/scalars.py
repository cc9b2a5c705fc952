"""Updates of a value network and of a reward model by strategy: ``python -m tests.parallel.scalars`` prints JSON."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from jaxrft import algorithms as alg
from jaxrft.models import ScalarModel
from jaxrft.models.stack import Remat
from jaxrft.parallel import describe
from jaxrft.training.parts import build_layout
from jaxrft.training.state import Placement, TrainState, apply_gradients, init_state, under
from tests.parallel import updates
from tests.parallel.placement import held
from tests.training.learners import difference, host

CASES = [
    updates.Case("ddp", 2, 1),
    updates.Case("zero1", 1, 2, "full", scan=True),
    updates.Case("zero2", 2, 2),
    updates.Case("zero3", 2, 2, "save"),
    updates.Case("hsdp", 2, 1, offload=True),
]


def run(case: updates.Case) -> dict[str, Any]:
    """Parameters before and after three updates of each network, and what each device holds."""
    config = dataclasses.replace(updates.learner_of(updates.Case(alone=True)).config, parallel=case.parallel)
    layout = build_layout(config)
    placement = Placement(layout, case.offload)
    model = ScalarModel(updates.SPEC, rngs=nnx.Rngs(0))
    model.decoder.remat, model.decoder.scan_layers = Remat(case.remat), case.scan
    graphdef, params = nnx.split(model)
    optimizer = optax.scale_by_adam(eps=1.0)
    state = init_state(params, optimizer)
    shardings = placement.shardings(state)
    rng = np.random.default_rng(0)
    tokens, lengths = rng.integers(0, updates.VOCAB, (8, 12)), rng.integers(3, 13, 8)
    mask = (np.arange(12) < lengths[:, None]).astype(np.float32)
    returns, old = rng.normal(size=(2, 8, 12)).astype(np.float32)

    def value(params: Any) -> Any:
        values = nnx.merge(graphdef, params).values(tokens, lengths)
        return alg.value_loss(values, old, returns, mask)[0]

    def reward(params: Any) -> Any:
        # Bradley-Terry: the first half of the rows is preferred to the second.
        better, worse = jnp.split(nnx.merge(graphdef, params).scores(tokens, lengths), 2)
        return -jnp.mean(jax.nn.log_sigmoid(better - worse))

    found = {"before": host(state.params), "bytes": held(jax.device_put(state, shardings))}
    found["described"] = describe(params, layout)
    for name, loss in {"value": value, "reward": reward}.items():

        @under(layout)
        def step(state: TrainState, loss: Any = loss) -> TrainState:
            gradients = placement.lay("gradients", jax.grad(loss)(state.params))
            moved = apply_gradients(state, optimizer, gradients, 0.5, True, placement, jax.random.key(0))
            return dataclasses.replace(state, params=moved[0], opt_state=moved[1])

        program, now = jax.jit(step, out_shardings=shardings), jax.device_put(state, shardings)
        for _ in range(3):
            now = program(now)
        found[name] = host(now.params)
    return found


def main() -> None:
    """A record for each case."""
    alone = run(updates.Case(alone=True))
    for case in CASES:
        found = run(case)
        described = found["described"]
        record = {
            "case": str(case),
            **{name: difference(found[name], alone[name], alone["before"]) for name in ("value", "reward")},
            "bytes": found["bytes"],
            # Counters: the step, the skipped ones, the optimizer's.
            "expected": described.param_bytes + described.moment_bytes + 12,
            "whole": described.whole,
        }
        print(json.dumps(record), flush=True)


if __name__ == "__main__":
    main()
