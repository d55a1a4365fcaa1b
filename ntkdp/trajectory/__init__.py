"""Records of predictions and runs: losses, accuracies, clip fractions and outputs over time."""

from ntkdp.trajectory._from_csv import has_times as has_times
from ntkdp.trajectory._moving_noise import check_noise_moves as check_noise_moves
from ntkdp.trajectory._outcome import Outcome
from ntkdp.trajectory._outcome import message as message
from ntkdp.trajectory._outcome import succeeded as succeeded
from ntkdp.trajectory._phase import Phase as Phase
from ntkdp.trajectory._phase import as_trainable as as_trainable
from ntkdp.trajectory._phase import check_phases as check_phases
from ntkdp.trajectory._phase import joined as joined
from ntkdp.trajectory._phase import steppings as steppings
from ntkdp.trajectory._public_rows import PublicRows as PublicRows
from ntkdp.trajectory._public_rows import check_public as check_public
from ntkdp.trajectory._seeds import Band as Band
from ntkdp.trajectory._seeds import band as band
from ntkdp.trajectory._seeds import last_value as last_value
from ntkdp.trajectory._seeds import mean_over_seeds as mean_over_seeds
from ntkdp.trajectory._stepping import MOST_STEPS as MOST_STEPS
from ntkdp.trajectory._stepping import Stepping as Stepping
from ntkdp.trajectory._stepping import check_learning_rate, recorded_steps, times_of_steps
from ntkdp.trajectory._stepping import check_steps as check_steps
from ntkdp.trajectory._training_set import HasTrainingSet as HasTrainingSet
from ntkdp.trajectory._training_set import Measurement
from ntkdp.trajectory._training_set import TrainingSet as TrainingSet
from ntkdp.trajectory._training_set import as_samples as as_samples
from ntkdp.trajectory._training_set import check_clipping as check_clipping
from ntkdp.trajectory._trajectory import Trajectory, from_measurements

__all__ = [
    "Measurement",
    "Outcome",
    "Trajectory",
    "check_learning_rate",
    "from_measurements",
    "recorded_steps",
    "times_of_steps",
]
