"""MetaLSTM. Ravi, Larochelle: Optimization as a Model for Few-Shot Learning, ICLR 2017.

A task's parameters φ are the cell state of an LSTM whose gates a second, lower LSTM works out from the loss and its
gradient: a learned optimiser, started from a learned c_0. The weights of both are shared by all D coordinates of φ;
each coordinate has its own state.

1. c_0 = φ⁰, learned. h_0 = m_0 = 0 (the lower LSTM's output and cell), f̃_0 = ĩ_0 = 0.
2. For t = 1 … T, with L_t the mean support cross-entropy at c_{t−1} and g_t its gradient, both constants (no second
   derivatives; paper, section 3.4):
   x_t = [prep(L_t), prep(g_t)]                     preprocessed (section 3.2 and Andrychowicz et al. 2016, appendix A)
   h_t, m_t = LSTM(x_t; h_{t−1}, m_{t−1})
   f̃_t = W_F [h_t, c_{t−1}, f̃_{t−1}] + b_F         (eq. 2: values before the sigmoid are fed back)
   ĩ_t = W_I [h_t, c_{t−1}, ĩ_{t−1}] + b_I         (eq. 3)
   c_t = σ(f̃_t) ∘ c_{t−1} − σ(ĩ_t) ∘ g_t
3. φᵀ = c_T. θ = {c_0, LSTM, W_F, b_F, W_I, b_I} is judged by the query loss there.

Legend: D coordinates of φ, H hidden size. A coordinate is a column, (features, D), so that the gates are
contiguous. If many tasks are adapted at once, everything has a leading axis of tasks.
"""

import math

import torch
from torch import Tensor, nn

from metaheed.config import MetaLSTMConfig
from metaheed.learners.learner import NetworkLearner
from metaheed.learners.meta_lstm_update import State, by_formula, in_closed_form
from metaheed.networks.functional import ordinary_on_cpu
from metaheed.trees import below
from metaheed.types import Params


class MetaLSTM(NetworkLearner):
    """Learner whose θ are c_0, the lower LSTM and the two gates.

    Names: `initial.NAME` for each of the backbone's parameters NAME (c_0); `lstm.weight_ih` (4H, 4), `lstm.weight_hh`
    (4H, H), `lstm.bias_ih`, `lstm.bias_hh` (4H,), in the layout and gate order (input, forget, cell, output) of
    torch.nn.LSTMCell, its input the two preprocessed values of the loss, then the two of the gradient;
    `forget_gate.weight` (1, H+2) over [h, c, f̃], `forget_gate.bias` (1,); `input_gate.weight` (1, H+2) over [h, c, ĩ],
    `input_gate.bias` (1,).

    They start as U(−0.01, 0.01), the gates' biases as configured: keep nearly everything, take small steps.

    Deviations from the paper: each of the T steps sees the whole support set; batch norm uses batch statistics
    everywhere; the update of θ after every task is the rule `sequential`, not part of the learner.

    Args:
        backbone: any network from images to logits; see `Backbone` for what is converted and refused.
        adaptation_steps: T.
        hidden_size: H.
        forget_bias: bounds of the uniform draw of b_F.
        input_bias: bounds of the uniform draw of b_I.
        recompute: keep memory flat in T, for more time; the results are the same.

    Raises:
        ConfigError: a setting out of its bounds, or a backbone that cannot be adapted.
    """

    elementwise = True

    def __init__(
        self,
        backbone: nn.Module,
        adaptation_steps: int = MetaLSTMConfig.adaptation_steps,
        hidden_size: int = MetaLSTMConfig.hidden_size,
        forget_bias: tuple[float, float] = MetaLSTMConfig.forget_bias,
        input_bias: tuple[float, float] = MetaLSTMConfig.input_bias,
        recompute: bool = MetaLSTMConfig.recompute,
    ) -> None:
        MetaLSTMConfig(
            adaptation_steps=adaptation_steps, hidden_size=hidden_size, forget_bias=forget_bias, input_bias=input_bias
        )
        super().__init__(backbone, adaptation_steps, recompute)
        self.hidden_size = hidden_size
        self.forget_bias = forget_bias
        self.input_bias = input_bias

    @property
    def has_exact_gradient(self) -> bool:
        """False: losses and gradients enter the learned update as constants."""
        return False

    def init(self, generator: torch.Generator) -> Params:
        """θ: c_0 as MAML's θ at the same seed; the rest is drawn as the class describes."""
        start = super().init(generator)
        like, H = next(iter(start.values())), self.hidden_size

        def uniform(low: float, high: float, *shape: int) -> Tensor:
            return like.new_empty(shape).uniform_(low, high, generator=generator)

        small = (-0.01, 0.01)
        return {f"initial.{n}": p for n, p in start.items()} | {
            "lstm.weight_ih": uniform(*small, 4 * H, 4),
            "lstm.weight_hh": uniform(*small, 4 * H, H),
            "lstm.bias_ih": uniform(*small, 4 * H),
            "lstm.bias_hh": uniform(*small, 4 * H),
            "forget_gate.weight": uniform(*small, 1, H + 2),
            "forget_gate.bias": uniform(*self.forget_bias, 1),
            "input_gate.weight": uniform(*small, 1, H + 2),
            "input_gate.bias": uniform(*self.input_bias, 1),
        }

    def initial(self, meta: Params) -> Params:
        """φ⁰ = c_0."""
        return below("initial.", meta)

    def adapt(self, meta: Params, support_x: Tensor, support_y: Tensor) -> Params:
        """φᵀ = c_T after T steps of the learned optimiser on the support set."""
        c = _flat(self.initial(meta), support_y)  # (1, D)
        nothing = c.new_zeros(*c.shape[:-2], self.hidden_size, c.shape[-1])
        state = State(c, nothing, nothing, torch.zeros_like(c), torch.zeros_like(c))
        after = self.steps(self._step, meta, state._asdict(), support_x, support_y)
        return _unflat(after["c"], self.initial(meta))

    def _step(self, meta: Params, state: Params, support_x: Tensor, support_y: Tensor) -> Params:
        at = _unflat(state["c"].detach(), self.initial(meta))
        gradient, loss, _ = self.loss_gradient(at, support_x, support_y)
        g, loss = _flat(gradient, support_y).detach(), loss.detach()[..., None, None]
        update = in_closed_form if ordinary_on_cpu([g, loss, *meta.values(), *state.values()]) else by_formula
        return update(meta, loss, g, State(**state))._asdict()


def _flat(tree: Params, support_y: Tensor) -> Tensor:
    """All leaves end to end, as a row (1, D); with tasks (B, 1, D)."""
    tasks = support_y.shape[:-1]
    return torch.cat([leaf.reshape(*tasks, -1) for leaf in tree.values()], -1).unsqueeze(-2)


def _unflat(row: Tensor, like: Params) -> Params:
    """The inverse of `_flat`: a row as a tree with the names and shapes of `like`."""
    parts = torch.split(row.squeeze(-2), [math.prod(leaf.shape[row.dim() - 2 :]) for leaf in like.values()], -1)
    return {name: part.reshape(leaf.shape) for part, (name, leaf) in zip(parts, like.items(), strict=True)}
