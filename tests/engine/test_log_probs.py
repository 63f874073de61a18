"""Log-probabilities and entropy against the dense log-softmax and autograd."""

from __future__ import annotations

import math

import pytest
import torch

from nemo_advrm.engine.log_probs import log_probs_and_entropy
from nemo_advrm.engine.runtime import Runtime


def _dense(logits_NV: torch.Tensor, targets_N: torch.Tensor, temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
    log_NV = torch.log_softmax(logits_NV / temperature, dim=-1)
    return log_NV.gather(-1, targets_N[:, None])[:, 0], -(log_NV.exp() * log_NV).sum(-1)


@pytest.mark.parametrize("temperature", [1.0, 0.5, 3.0])
def test_values_and_gradients_are_those_of_the_dense_log_softmax(single: Runtime, temperature: float) -> None:
    torch.manual_seed(0)
    targets_N = torch.randint(11, (6,))
    weights_N, entropy_weights_N = torch.randn(6), torch.randn(6)
    gradients = []
    start_NV = 4 * torch.randn(6, 11)
    for function in (log_probs_and_entropy, _dense):
        logits_NV = start_NV.clone().requires_grad_()
        log_probs_N, entropy_N = function(logits_NV, targets_N, temperature)
        (log_probs_N * weights_N + entropy_N * entropy_weights_N).sum().backward()
        gradients.append((log_probs_N.detach(), entropy_N.detach(), logits_NV.grad))
    for ours, dense in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, dense, rtol=1e-5, atol=1e-6)


def test_either_output_alone_has_its_own_gradient(single: Runtime) -> None:
    logits_NV = torch.randn(3, 5, dtype=torch.float64).float().requires_grad_()
    log_probs_and_entropy(logits_NV, torch.tensor([0, 1, 2]))[1].sum().backward()
    entropy_only = logits_NV.grad.clone()  # type: ignore[union-attr]
    reference_NV = logits_NV.detach().clone().requires_grad_()
    _dense(reference_NV, torch.tensor([0, 1, 2]), 1.0)[1].sum().backward()
    torch.testing.assert_close(entropy_only, reference_NV.grad, rtol=1e-5, atol=1e-6)


def test_two_equal_logits_have_probability_one_half(single: Runtime) -> None:
    log_probs_N, entropy_N = log_probs_and_entropy(torch.tensor([[7.0, 7.0]]), torch.tensor([1]))
    assert log_probs_N.item() == pytest.approx(-math.log(2))
    assert entropy_N.item() == pytest.approx(math.log(2))


def test_a_hidden_token_adds_nothing_to_the_entropy_or_its_gradient(single: Runtime) -> None:
    logits_NV = torch.tensor([[1.0, 2.0, -1e9]]).requires_grad_()
    log_probs_N, entropy_N = log_probs_and_entropy(logits_NV, torch.tensor([0]))
    (log_probs_N + entropy_N).sum().backward()
    expected = _dense(torch.tensor([[1.0, 2.0]]), torch.tensor([0]), 1.0)
    assert (log_probs_N.item(), entropy_N.item()) == pytest.approx((expected[0].item(), expected[1].item()), rel=1e-5)
    assert logits_NV.grad is not None and logits_NV.grad[0, 2] == 0 and logits_NV.grad.isfinite().all()


def test_huge_logits_stay_finite(single: Runtime) -> None:
    logits_NV = torch.tensor([[1e4, -1e4, 0.0]]).requires_grad_()
    log_probs_N, entropy_N = log_probs_and_entropy(logits_NV, torch.tensor([1]))
    (log_probs_N + entropy_N).sum().backward()
    assert log_probs_N.item() == pytest.approx(-2e4) and entropy_N.item() == 0
    assert logits_NV.grad is not None and logits_NV.grad.isfinite().all()


def test_no_tokens_give_empty_results(single: Runtime) -> None:
    logits_NV = torch.zeros(0, 5).requires_grad_()
    log_probs_N, entropy_N = log_probs_and_entropy(logits_NV, torch.zeros(0, dtype=torch.int64))
    (log_probs_N.sum() + entropy_N.sum()).backward()
    assert log_probs_N.shape == entropy_N.shape == (0,)


def test_bfloat16_logits_are_computed_in_fp32(single: Runtime) -> None:
    logits_NV = torch.randn(4, 9).bfloat16().requires_grad_()
    log_probs_N, _ = log_probs_and_entropy(logits_NV, torch.arange(4))
    log_probs_N.sum().backward()
    torch.testing.assert_close(log_probs_N, _dense(logits_NV.detach().float(), torch.arange(4), 1.0)[0])
    assert logits_NV.grad is not None and logits_NV.grad.dtype == torch.bfloat16
