import torch

from largescale.config import OptimizerConfig
from largescale.optim import build_optimizer


def run(steps: int, config: OptimizerConfig) -> tuple[list[torch.Tensor], torch.Tensor]:
    """The parameter before and after each step, and the EMA that the optimizer carries."""
    p = torch.nn.Parameter(torch.linspace(-1, 1, 7))
    optimizer = build_optimizer([p], config, "cpu")
    history = [p.detach().clone()]
    for step in range(steps):
        p.grad = torch.sin(torch.arange(7.0) + step) * p.detach()
        optimizer.step()
        history.append(p.detach().clone())
    return history, optimizer.state[p]["ema"]


def test_ema_is_the_textbooks() -> None:
    """ema_0 = w_0 and ema_k = d ema_{k-1} + (1 - d) w_k, as in DiT; in float64 here."""
    history, ema = run(20, OptimizerConfig(lr=0.1, ema_decay=0.9))
    expected = history[0].double()
    for w in history[1:]:
        expected = 0.9 * expected + 0.1 * w.double()
    torch.testing.assert_close(ema.double(), expected, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(ema, history[-1])


def test_the_update_is_adamws() -> None:
    config = OptimizerConfig(lr=0.1, betas=(0.8, 0.95), eps=1e-6, weight_decay=0.1)
    history, _ = run(5, config)
    p = torch.nn.Parameter(torch.linspace(-1, 1, 7))
    plain = torch.optim.AdamW([p], lr=0.1, betas=(0.8, 0.95), eps=1e-6, weight_decay=0.1)
    for step in range(5):
        p.grad = torch.sin(torch.arange(7.0) + step) * p.detach()
        plain.step()
        assert torch.equal(p, history[step + 1])
