from __future__ import annotations

import torch

from regate.scoring.difficulty import UNSEEN, VocabularyPrior, update


def test_moving_average_only_where_observed() -> None:
    m = torch.tensor([UNSEEN, UNSEEN, 2.0, 2.0, 2.0])
    loss = torch.tensor([1.0, 1.0, 4.0, 4.0, float("nan")])
    observed = torch.tensor([True, False, True, False, True])
    torch.testing.assert_close(update(m, loss, observed, decay=0.9), torch.tensor([1.0, UNSEEN, 2.2, 2.0, 2.0]))


def test_prior_knows_tokens_it_saw() -> None:
    prior = VocabularyPrior(decay=0.5)
    assert prior.expect(torch.tensor([0, 4])).tolist() == [0.0, 0.0]
    prior.observe(torch.tensor([1, 1, 2, 3]), torch.tensor([1.0, 3.0, 4.0, float("inf")]))
    assert prior.expect(torch.tensor([1, 2, 0, 3])).tolist() == [2.0, 4.0, 3.0, 3.0]
    prior.observe(torch.tensor([1]), torch.tensor([4.0]))
    assert prior.expect(torch.tensor([1])).tolist() == [3.0]
    other = VocabularyPrior(decay=0.5)
    other.load_state_dict(prior.state_dict())
    assert torch.equal(other.mean, prior.mean)
