from ._batches_and_noise import MechanismConfig as MechanismConfig
from ._config import Config as Config
from ._config import ConfigError as ConfigError
from ._config import config as config
from ._config import load_config as load_config
from ._features import fields_of_features as fields_of_features
from ._forecast import Forecast as Forecast
from ._forecast import forecast as forecast
from ._memory import require_memory as require_memory
from ._predictions import KERNEL_OF as KERNEL_OF
from ._predictions import LABELS as LABELS
from ._predictions import Kernel as Kernel
from ._predictions import compute_kernel as compute_kernel
from ._predictions import kernel_of as kernel_of
from ._predictions import least_noise as least_noise
from ._predictions import noise_free as noise_free
from ._problem import Problem as Problem
from ._problem import problem_of as problem_of
from ._problem import require_infinite_width as require_infinite_width
from ._problem import rules_of as rules_of
from ._problem_config import DataConfig as DataConfig
from ._problem_config import ModelConfig as ModelConfig
from ._problem_config import ProblemConfig as ProblemConfig
from ._recorded import read_recorded as read_recorded
from ._reporting.report import write_report as write_report
from ._reporting.tables import print_table as print_table
from ._run import Case as Case
from ._run import Prediction as Prediction
from ._run import Results as Results
from ._run import run as run
from ._steps import PublicConfig as PublicConfig

__all__ = [
    "KERNEL_OF",
    "LABELS",
    "Case",
    "Config",
    "ConfigError",
    "Forecast",
    "Kernel",
    "Prediction",
    "Problem",
    "Results",
    "config",
    "fields_of_features",
    "forecast",
    "kernel_of",
    "load_config",
    "noise_free",
    "problem_of",
    "rules_of",
    "run",
]
