"""Learners: how one task is adapted."""

from metaheed.learners.anil_boil import ANIL, BOIL
from metaheed.learners.build import build_learner
from metaheed.learners.learner import Learner, NetworkLearner, place_constants, task_loss
from metaheed.learners.maml import MAML
from metaheed.learners.meta_lstm import MetaLSTM
from metaheed.learners.meta_sgd import MetaSGD
from metaheed.learners.protonet import ProtoNet
from metaheed.learners.reptile import Reptile
from metaheed.networks.conv4 import BACKBONES, Conv4, build_backbone, find_backbone
from metaheed.networks.functional import Backbone

__all__ = [
    "ANIL",
    "BACKBONES",
    "BOIL",
    "MAML",
    "Backbone",
    "Conv4",
    "Learner",
    "MetaLSTM",
    "MetaSGD",
    "NetworkLearner",
    "ProtoNet",
    "Reptile",
    "build_backbone",
    "build_learner",
    "find_backbone",
    "place_constants",
    "task_loss",
]
