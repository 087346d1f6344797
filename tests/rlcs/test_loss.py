"""The loss against its definition in plain loops, its gradient, and the sum over micro-steps."""

import math

import pytest
import torch

from rlcs.loss import LossSettings, policy_loss

LENGTHS = [3, 5, 2, 7]


def batch(seed=0):
    generator = torch.Generator().manual_seed(seed)
    tokens = sum(LENGTHS)
    new, old, behaviour, reference = -torch.rand(4, tokens, generator=generator, dtype=torch.float64)
    trained = torch.rand(tokens, generator=generator) < 0.7
    advantages = torch.tensor([1.0, -1.0, 0.5, -2.0], dtype=torch.float64)
    cu_seqlens = torch.tensor([0, *LENGTHS]).cumsum(0).int()
    return new.requires_grad_(), old, behaviour, reference, trained, advantages, cu_seqlens


def definition(new, old, behaviour, reference, trained, advantages, cu_seqlens, settings):
    new, means, every = new.detach(), [], []
    for i, a in enumerate(advantages.tolist()):
        losses = []
        for t in range(int(cu_seqlens[i]), int(cu_seqlens[i + 1])):
            if not trained[t]:
                continue
            ratio = math.exp(new[t] - old[t])
            loss = -min(ratio * a, min(max(ratio, 1 - settings.clip_low), 1 + settings.clip_high) * a)
            if behaviour is not None:
                loss *= min(math.exp(old[t] - behaviour[t]), settings.truncate_importance)
            if settings.kl:
                gap = float(reference[t] - new[t])
                loss += settings.kl * (math.exp(gap) - gap - 1)
            losses.append(loss)
        means.append(sum(losses) / max(1, len(losses)))
        every += losses
    return sum(means) / len(means) if settings.mean == "sample" else sum(every) / max(1, len(every))


@pytest.mark.parametrize("mean", ["sample", "token"])
@pytest.mark.parametrize("kl", [0.0, 0.1])
@pytest.mark.parametrize("corrected", [False, True])
def test_definition(mean, kl, corrected):
    settings = LossSettings(kl=kl, mean=mean, truncate_importance=1.1)
    new, old, behaviour, reference, trained, advantages, cu_seqlens = batch()
    behaviour = behaviour if corrected else None
    loss, facts = policy_loss(new, old, advantages, trained, cu_seqlens, settings, behaviour, reference)
    expected = definition(new, old, behaviour, reference, trained, advantages, cu_seqlens, settings)
    assert float(loss) == pytest.approx(expected, rel=1e-12)
    assert 0 <= facts["clip_high"] <= 1 and 0 <= facts["clip_low"] <= 1


def test_gradient():
    new, old, _, _, trained, advantages, cu_seqlens = batch()
    assert torch.autograd.gradcheck(
        lambda x: policy_loss(x, old, advantages, trained, cu_seqlens, LossSettings())[0], (new,), atol=1e-6
    )


def test_what_is_not_trained_on_counts_nowhere():
    new, old, _, _, trained, advantages, cu_seqlens = batch()
    loss = policy_loss(new, old, advantages, trained, cu_seqlens, LossSettings())[0]
    poisoned = torch.where(trained, old, torch.tensor(-math.inf, dtype=torch.float64))
    again = policy_loss(new, poisoned, advantages, trained, cu_seqlens, LossSettings())[0]
    assert torch.equal(loss, again)
    (gradient,) = torch.autograd.grad(again, new)
    assert gradient.isfinite().all() and not gradient[~trained].any()


def test_micro_steps_add_up_to_the_whole_batch():
    new, old, _, _, trained, advantages, cu_seqlens = batch()
    whole = torch.autograd.grad(policy_loss(new, old, advantages, trained, cu_seqlens, LossSettings())[0], new)[0]
    total = torch.zeros_like(new)
    for first, last in ((0, 1), (1, 4)):
        begin, end = int(cu_seqlens[first]), int(cu_seqlens[last])
        part, _ = policy_loss(
            new[begin:end], old[begin:end], advantages[first:last], trained[begin:end],
            cu_seqlens[first : last + 1] - begin, LossSettings(),
        )  # fmt: skip
        total += torch.autograd.grad(part * (last - first) / len(LENGTHS), new)[0]
    assert torch.allclose(total, whole, rtol=0, atol=1e-15)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("mean", ["sample", "token"])
def test_long_answers_count_whole_in_any_type(mean, dtype):
    length = 70_000  # beyond what either type counts to
    new = torch.full((length,), -1.0, dtype=dtype, requires_grad=True)
    everything, ends = torch.ones(length, dtype=torch.bool), torch.tensor([0, length])
    loss, facts = policy_loss(
        new, new.detach(), torch.ones(1), everything, ends, LossSettings(mean=mean), behaviour=new.detach() - 1
    )
    assert loss.item() == pytest.approx(-2.0) and facts["ratio"] == facts["mismatch"] == 1
    assert torch.autograd.grad(loss, new)[0].dtype == dtype


def test_the_upper_clip_is_higher():
    ratio = torch.tensor([1.25, 1.35, 0.75, 0.85], dtype=torch.float64)
    new = ratio.log().requires_grad_()
    for advantage, moves in ((1.0, [True, False, True, True]), (-1.0, [True, True, False, True])):
        a, everything = torch.full((4,), advantage, dtype=torch.float64), torch.ones(4, dtype=torch.bool)
        loss, _ = policy_loss(new, torch.zeros_like(new), a, everything, torch.arange(5), LossSettings())
        assert (torch.autograd.grad(loss, new)[0] != 0).tolist() == moves


def test_errors():
    with pytest.raises(ValueError, match="mean must be sample or token, got 'batch'"):
        LossSettings(mean="batch")
    new, old, _, _, trained, advantages, cu_seqlens = batch()
    with pytest.raises(ValueError, match="reference must be given"):
        policy_loss(new, old, advantages, trained, cu_seqlens, LossSettings(kl=0.1))
