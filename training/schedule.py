"""The learning rate as a pure function of the step, so that a resumed run needs no scheduler state."""

import math

from training.recipe import Optimisation


def learning_rate(optimisation: Optimisation, step: int, steps_per_epoch: int) -> float:
    """The learning rate of `step` (from 0). `multistep` changes after whole epochs, the others at every step."""
    peak = optimisation.learning_rate
    total = optimisation.epochs * steps_per_epoch
    if optimisation.schedule == "multistep":
        epoch = step // steps_per_epoch
        return peak * optimisation.decay ** sum(epoch >= milestone for milestone in optimisation.milestones)
    if optimisation.schedule == "cosine":
        return cosine(peak, step / total)
    rising = optimisation.warmup_fraction * total
    if step < rising:
        return peak * (0.04 + 0.96 * step / rising)  # from 1/25 of the peak, as one-cycle schedules begin
    return cosine(peak, (step - rising) / (total - rising))


def cosine(peak: float, share: float) -> float:
    """The rate when `share` of the decay from `peak` to 0, along half a cosine, is done."""
    return 0.5 * peak * (1 + math.cos(math.pi * share))
