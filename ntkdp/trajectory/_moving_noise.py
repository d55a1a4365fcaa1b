"""What noise goes with a clipping norm or a noise multiplier that changes over the steps."""

from ntkdp._backend.schedules import is_schedule
from ntkdp.clipping import Adaptive, MovingNorm
from ntkdp.noise import Independent, Noise


def check_noise_moves(moving: MovingNorm | None, noise_multiplier: object, noise: Noise) -> None:
    """Raise unless the noise can follow what changes over the steps."""
    changes = is_schedule(noise_multiplier)
    if isinstance(moving, Adaptive) and changes:
        raise ValueError(
            "noise_multiplier must be one number with adaptive clipping, of which the count takes "
            "the same share in each step, got a schedule; set the clipping norm by clip_norm"
        )
    if isinstance(noise, Independent) or (moving is None and not changes):
        return
    what = "adaptive clipping" if isinstance(moving, Adaptive) else "a schedule of clip_norm"
    if moving is None:
        what = "a schedule of noise_multiplier"
    raise ValueError(
        f"noise must be independent with {what}, since later steps take back noise in proportion "
        f"to another size, got {type(noise).__name__}"
    )
