"""Learners: how one task is adapted."""

from metaheed.config import LearnerConfig, MAMLConfig
from metaheed.errors import ConfigError
from metaheed.learners.backbones import BACKBONES, Conv4, ImageShape, build_backbone, find_backbone
from metaheed.learners.base import Backbone, Learner, task_loss
from metaheed.learners.maml import MAML

__all__ = [
    "BACKBONES",
    "MAML",
    "Backbone",
    "Conv4",
    "Learner",
    "build_backbone",
    "build_learner",
    "find_backbone",
    "task_loss",
]


def build_learner(config: LearnerConfig, ways: int, image_shape: ImageShape, seed: int) -> Learner:
    """The learner that a config describes, on a backbone for this many ways and this shape of images.

    Raises:
        ConfigError: the backbone cannot be built or adapted.
    """
    backbone = build_backbone(config.backbone, ways, image_shape, seed, config.backbone_path)
    if isinstance(config, MAMLConfig):
        return MAML(backbone, config.adaptation_steps, config.fast_lr, config.first_order)
    raise ConfigError(f"no learner is built from {type(config).__name__}")
