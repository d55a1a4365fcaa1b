from ._cluster import LOCAL as LOCAL
from ._cluster import TaskFailed as TaskFailed
from ._cluster import connected as connected
from ._config import Cell as Cell
from ._config import Plane as Plane
from ._config import SweepConfig as SweepConfig
from ._config import config as config
from ._config import load_config as load_config
from ._report import print_table as print_table
from ._report import write_report as write_report
from ._run import Results as Results
from ._run import run as run
from ._sentences import advice_in_words as advice_in_words

__all__ = [
    "Cell",
    "Plane",
    "Results",
    "SweepConfig",
    "advice_in_words",
    "config",
    "load_config",
    "run",
]
