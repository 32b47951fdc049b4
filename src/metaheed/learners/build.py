"""Learners from their configs."""

from metaheed.config import (
    ANILConfig,
    BOILConfig,
    LearnerConfig,
    MAMLConfig,
    MetaLSTMConfig,
    MetaSGDConfig,
    ProtoNetConfig,
    ReptileConfig,
)
from metaheed.errors import ConfigError
from metaheed.learners.anil_boil import ANIL, BOIL
from metaheed.learners.learner import Learner
from metaheed.learners.maml import MAML
from metaheed.learners.meta_lstm import MetaLSTM
from metaheed.learners.meta_sgd import MetaSGD
from metaheed.learners.protonet import ProtoNet
from metaheed.learners.reptile import Reptile
from metaheed.networks.conv4 import ImageShape, build_backbone

_CLASSES = {
    MAMLConfig: MAML,
    ANILConfig: ANIL,
    BOILConfig: BOIL,
    MetaSGDConfig: MetaSGD,
    MetaLSTMConfig: MetaLSTM,
    ProtoNetConfig: ProtoNet,
    ReptileConfig: Reptile,
}


def build_learner(config: LearnerConfig, ways: int, image_shape: ImageShape, seed: int) -> Learner:
    """The learner that a config describes, on a backbone for this many ways and images of this shape.

    Args:
        config: the learner's config.
        ways: N, the number of logits.
        image_shape: (channels, height, width).
        seed: decides the random draws that building the network makes.

    Raises:
        ConfigError: the backbone cannot be built or adapted.
    """
    backbone = build_backbone(config.backbone, ways, image_shape, seed, config.backbone_path)
    if type(config) not in _CLASSES:
        raise ConfigError(f"no learner is built from {type(config).__name__}")
    # The fields of a learner's config are the learner's keyword arguments; a test checks that they agree.
    learner: Learner = _CLASSES[type(config)](backbone, **config.own_settings())
    return learner
