"""Weights of tokens that a sampler drew with probabilities of its own; figures of a step from its micro-batches."""

import math
import pickle
import sys
from types import SimpleNamespace

import pytest
import torch
import trl

from opensloth.training.grpo import plain_trl
from opensloth.training.grpo.importance import ALIKE, CAP, Gaps, corrected, weights
from opensloth.training.grpo.micro_batches import StepFigures


def test_a_weight_is_the_ratio_of_probabilities_up_to_the_cap():
    policy = torch.tensor([-1.0, -1.0, -1.0, -1.0, 0.0])
    sampler = torch.tensor([-1.0 - math.log(1.5), -0.5, -9.0, -1.0 + ALIKE / 2, 0.0])
    assert weights(policy, sampler).tolist() == pytest.approx([1.5, math.exp(-0.5), CAP, 1.0, 1.0])
    assert weights(policy, sampler)[3] == 1  # bit for bit: what is computed alike is left alone


def test_the_mean_of_what_is_drawn_comes_right():
    """Draws of one distribution, weighted, have the mean under another: what the correction is for."""
    chooser = torch.Generator().manual_seed(0)
    sampler, policy = (torch.tensor(p).log() for p in ([0.5, 0.3, 0.2], [0.4, 0.25, 0.35]))
    drawn = torch.multinomial(sampler.exp(), 200_000, replacement=True, generator=chooser)
    values = torch.tensor([1.0, 2.0, 5.0])
    found = (values[drawn] * weights(policy[drawn], sampler[drawn])).mean()
    assert found.item() == pytest.approx(float((values * policy.exp()).sum()), rel=0.01)


def test_gaps_and_advantages_are_of_tokens():
    part = {
        "completion_mask": torch.tensor([[1, 1, 0], [1, 0, 0]]),
        "sampling_per_token_logps": torch.tensor([[-1.0, -2.0, 0.0], [-9.0, 0.0, 0.0]]),
        "advantages": torch.tensor([1.0, -2.0]),
    }
    policy = torch.tensor([[-1.0, -2.5, 0.0], [-3.0, 0.0, 0.0]])
    half = math.exp(-0.5)
    torch.testing.assert_close(corrected(part, policy), torch.tensor([[1.0, half, 1.0], [-4.0, -2.0, -2.0]]))
    gaps = Gaps(torch.device("cpu"))
    gaps.add(policy, part)
    assert gaps.figures() == pytest.approx(
        {
            "logp_gap/mean": 6.5 / 3,
            "logp_gap/max": 6.0,
            "importance/mean": (1 + half + 2) / 3,
            "importance/capped": 1 / 3,
        }
    )


def test_a_micro_batch_without_a_token_that_counts_adds_nothing():
    gaps = Gaps(torch.device("cpu"))
    part = {"sampling_per_token_logps": torch.tensor([[-9.0, float("nan")]]), "completion_mask": torch.zeros(1, 2)}
    gaps.add(torch.zeros(1, 2), part)
    assert set(gaps.figures().values()) == {0.0}
    gaps.add(torch.zeros(1, 2), part | {"completion_mask": torch.tensor([[1, 0]])})
    assert gaps.figures() == {
        "logp_gap/mean": 9.0,
        "logp_gap/max": 9.0,
        "importance/mean": 2.0,
        "importance/capped": 1.0,
    }


def test_arguments_are_trls_own_where_unsloth_has_put_others_in_their_place(monkeypatch, tmp_path):
    """Which leave out of the loss what was cut, whatever they are asked."""
    from trl.trainer import grpo_config

    class Rewritten(grpo_config.GRPOConfig):
        def __init__(self, **given):
            super().__init__(**given | {"mask_truncated_completions": True, "epsilon_high": 0.28})

    for module in (trl, trl.trainer, grpo_config):
        monkeypatch.setattr(module, "GRPOConfig", Rewritten)
    monkeypatch.setitem(sys.modules, "unsloth", sys)
    monkeypatch.delitem(sys.modules, "trl.trainer.grpo_config_of_trl", raising=False)
    found = plain_trl.grpo_config()(output_dir=str(tmp_path), epsilon=0.1, bf16=False, report_to="none")
    assert (found.mask_truncated_completions, found.epsilon_high) == (False, None)
    assert pickle.loads(pickle.dumps(found)).epsilon == 0.1
    monkeypatch.undo()
    assert plain_trl.grpo_config() is trl.GRPOConfig


def test_a_step_has_one_figure_whatever_its_micro_batches():
    """As TRL logs them: a mean over the tokens of each, and the least of each. The third has no weight here."""
    metrics = {"entropy": [7.0], "reward": [1.0]}
    accelerator = SimpleNamespace(gather=lambda x: x, reduce=lambda x, reduction: x)
    before = vars(accelerator).copy()
    with StepFigures(accelerator, metrics, 4) as figures:
        for weight, total, tokens in ((1.0, 30.0, 10.0), (1.0, 1.0, 2.0), (0.0, 50.0, 5.0)):
            figures.begin(weight)
            found = accelerator.reduce(torch.tensor([total, tokens]), reduction="sum")
            metrics["entropy"].append(float(found[0] / found[1].clamp(min=1)))
            metrics.setdefault("clip_ratio/low_min", []).append(
                float(accelerator.gather(torch.tensor([total, 9.0])).nanmean())
            )
    assert metrics == {"entropy": [7.0, pytest.approx(31 / 12)], "reward": [1.0], "clip_ratio/low_min": [1.0]}
    assert vars(accelerator) == before
