"""Contract tests for parts of your own: each checks an object against the promises of its base class.

>>> from ptp_lightning.models import BinaryFeatures
>>> check_features(BinaryFeatures(8))
"""

from ptp_lightning.testing.corrections import check_correction, check_student
from ptp_lightning.testing.data import check_corpus, check_rendering, check_row_source, check_series
from ptp_lightning.testing.features import check_features
from ptp_lightning.testing.losses import check_loss, check_position_weights
from ptp_lightning.testing.objectives import check_objective
from ptp_lightning.testing.windows import check_auxiliary_strategy, check_window_source

__all__ = [
    "check_auxiliary_strategy",
    "check_corpus",
    "check_correction",
    "check_features",
    "check_loss",
    "check_objective",
    "check_position_weights",
    "check_rendering",
    "check_row_source",
    "check_series",
    "check_student",
    "check_window_source",
]
