"""A run that version 0.1.0 began goes on: its checkpoints know neither the stream of prompts nor credit."""

from jaxrft import RLTrainer
from jaxrft.data.order import PromptOrder
from jaxrft.training.checkpoint import Checkpoints
from tests.training.tiny import ROWS, digits, tiny_config


def test_its_checkpoints_go_on_where_they_stood(tmp_path, monkeypatch):
    save, take, starts = Checkpoints.save, PromptOrder.take, []

    def save_less(self, step, state, record, metrics):
        kept = {name: value for name, value in record.items() if name not in ("prompts", "credit", "audited")}
        save(self, step, state, kept, metrics)

    monkeypatch.setattr(Checkpoints, "save", save_less)
    RLTrainer(config=tiny_config(tmp_path, max_steps=2), reward_funcs=digits, train_dataset=ROWS).train()
    monkeypatch.setattr(
        PromptOrder, "take", lambda self, start, count: starts.append(start) or take(self, start, count)
    )
    config = tiny_config(tmp_path, max_steps=4, resume_from_checkpoint=True)
    RLTrainer(config=config, reward_funcs=digits, train_dataset=ROWS).train()
    assert starts == [4, 6], "two rollouts of two prompts each came before"
