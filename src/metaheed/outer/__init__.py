"""The public names of the outer level: per-task gradients, executions, batch rules, attention and outer optimisers."""

from metaheed.engine.captured import Buffered
from metaheed.engine.choose import (
    build_execution,
    build_steps,
    closing_workers,
    describe_execution,
    pick_execution,
    pick_for_run,
    tasks_at_once,
)
from metaheed.engine.estimate import (
    evaluate_adapted,
    evaluate_initial,
    gradient_without_initial_loss,
    initial_gradient,
    task_gradient,
)
from metaheed.engine.executions.basic import (
    Execution,
    looped,
    map_looped,
    map_threaded,
    map_together,
    map_vectorized,
    threaded,
    vectorized,
)
from metaheed.engine.executions.im2col import map_im2col
from metaheed.engine.executions.streams import map_streamed
from metaheed.engine.self_check import check_gradient, explain_failure
from metaheed.engine.steps import OneByOne, Steps, Streams
from metaheed.rules.attended import attended
from metaheed.rules.attention import (
    FEATURES,
    TaskAttention,
    attention_features,
    stack_gradients,
    weight_gradient,
    weighted_sum,
)
from metaheed.rules.build import build_optimizer, build_rule
from metaheed.rules.controls import loss_softmax, replayed, uniform_2b
from metaheed.rules.equity import equity
from metaheed.rules.inequality import equity_coefficients, inequality
from metaheed.rules.optimizers import OptState, OuterOptimizer, adam, clipped, sgd
from metaheed.rules.rule import OuterState, Rule, StepRecord, Tools
from metaheed.rules.sequential import sequential
from metaheed.rules.uniform import uniform
from metaheed.rules.worst_case import worst_case

__all__ = [
    "FEATURES",
    "Buffered",
    "Execution",
    "OneByOne",
    "OptState",
    "OuterOptimizer",
    "OuterState",
    "Rule",
    "StepRecord",
    "Steps",
    "Streams",
    "TaskAttention",
    "Tools",
    "adam",
    "attended",
    "attention_features",
    "build_execution",
    "build_optimizer",
    "build_rule",
    "build_steps",
    "check_gradient",
    "clipped",
    "closing_workers",
    "describe_execution",
    "equity",
    "equity_coefficients",
    "evaluate_adapted",
    "evaluate_initial",
    "explain_failure",
    "gradient_without_initial_loss",
    "inequality",
    "initial_gradient",
    "looped",
    "loss_softmax",
    "map_im2col",
    "map_looped",
    "map_streamed",
    "map_threaded",
    "map_together",
    "map_vectorized",
    "pick_execution",
    "pick_for_run",
    "replayed",
    "sequential",
    "sgd",
    "stack_gradients",
    "task_gradient",
    "tasks_at_once",
    "threaded",
    "uniform",
    "uniform_2b",
    "vectorized",
    "weight_gradient",
    "weighted_sum",
    "worst_case",
]
