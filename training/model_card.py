"""The README.md of a bundle: what the network is, how it was made, how good it is, and where it ends."""

from math import sqrt
from typing import Any

from training.calibration import CalibrationRecord
from training.evaluation import Evaluation
from training.recipe import Recipe

CIFAR100 = """CIFAR-100: 60,000 colour images of 32 x 32 pixels in 100 classes. It comes without a formal licence; cite
Alex Krizhevsky, *Learning Multiple Layers of Features from Tiny Images*, technical report, University of Toronto, 2009.
As published, ten test images also stand in its training part. The bundle holds no images."""
OWN_IMAGES = "The images are the trainer's own; ask them for their terms. The bundle holds no images."

CARD = """# {name}

{description}.

An image classifier with {n_exits} exits, {n_classes} classes and {parameters_m:.2f} million parameters, for images of
{size} x {size} pixels. Every image runs stage by stage and leaves at the first exit that is sure; the server regroups
those that go on.
{partial}
    python -m service --bundle {name}    # from the folder that holds this one

## Accuracy

Measured on the {n_test:,} test images, which decided nothing: neither weights, epoch, thresholds nor score. The last
epoch is reported, not the best. One standard error is about {error:.1f} points. Costs are millions of multiply-adds an
image, up to and including the exit: *published* as the early-exit literature counts them, *executed* as the stages
really run, which is what the server charges.

| exit | published M | executed M | top-1 % | top-5 % | confidence off by, points |
| ---: | ---: | ---: | ---: | ---: | ---: |
{exit_rows}

The last column is the expected calibration error: the mean distance between confidence and the share that is right.

Each image leaving when sure, thresholds from {n_heldout:,} held-out images:

| budget M (executed) | spent M | top-1 % | leaving at exit 1 to {n_exits}, % |
| ---: | ---: | ---: | --- |
{budget_rows}

A budget above the last is not spent: going deeper brought nothing on the held-out images.

![Accuracy over mean cost](frontier.png)

The exit score is `{score}` with `{family}` thresholds, {chosen} by cross-fitting: its lead
there over max softmax with geometric thresholds, the published policy, is {crossfit_lead} points of top-1 on average
over all budgets. On the test images at {n_costs} equal measured costs it is {test_lead} (95 %: {test_interval}), and
{worst_lead} at the worst of them.

## Training

{objective}
{epochs:.4g} epochs on {n_train:,} images in {duration} on {machine}{processes}; seed {seed}, torch {torch},
Python {python}, commit `{commit}`.

    {command}
{before}
{optimisation} All of the recipe is in `manifest.json` under `training`.

## Images

{images}

The held-out images were drawn from the training part by one seeded permutation and never trained on; the split's
digest is `{split}`. They were read without augmentation.

## Limits

* It knows its {n_classes} classes and no others: an image of something else gets one of them all the same.
* Images of another size are resized to {size} x {size}; images that look unlike the training images (other framing,
  other resolution) are answered worse than the table says, and more of them go deep.
{confidence}
* One training run with one seed; how much results vary between seeds was not measured here.
"""


def model_card(
    name: str,
    description: str,
    recipe: Recipe,
    record: CalibrationRecord,
    evaluation: Evaluation,
    training: dict[str, Any],
    images: str | None = None,
) -> str:
    """The model card as markdown; every number in it comes from the run's own files.

    Args:
        images: what the images are and their terms; what is known of them by default.
    """
    last = evaluation.exits[-1]
    exit_rows = (
        f"| {r.exit} | {r.published_mflops:.2f} | {r.executed_mflops:.2f} "
        f"| {100 * r.test_accuracy:.2f} | {100 * r.test_top5_accuracy:.2f} | {100 * r.test_calibration_error:.1f} |"
        for r in evaluation.exits
    )
    budget_rows = (
        f"| {p.budget_mflops:.2f} | {p.test_executed_mflops:.2f} | {100 * p.test_accuracy:.2f} "
        f"| {' '.join(f'{100 * share:.0f}' for share in p.test_shares)} |"
        for p in evaluation.chosen.shown()
    )
    compared = evaluation.comparison.of(evaluation.policy)
    worst = min(compared.lead, key=lambda lead: lead.mean)
    epochs = recipe.optimisation.epochs
    partial = f"\n**Partly trained: {record.epochs:.4g} of {epochs} epochs.**\n" if record.epochs < epochs else ""
    return CARD.format(
        name=name,
        description=description,
        n_exits=len(evaluation.exits),
        n_classes=len(record.class_names),
        parameters_m=last.parameters / 1e6,
        size=record.image_size_px,
        partial=partial,
        n_test=record.test_images,
        error=100 * sqrt(max(0.25 / 25, last.test_accuracy * (1 - last.test_accuracy)) / record.test_images),
        exit_rows="\n".join(exit_rows),
        n_heldout=record.heldout_images,
        budget_rows="\n".join(budget_rows),
        score=evaluation.policy.score,
        family=evaluation.policy.family,
        chosen="which were chosen on the held-out images" if "gates" in training else "chosen on the held-out images",
        crossfit_lead=_points(evaluation.chosen.crossfit_lead, evaluation.chosen.crossfit_lead_error),
        n_costs=len(compared.lead),
        test_lead=_points(compared.mean_lead.mean, compared.mean_lead.error),
        test_interval=f"{100 * compared.mean_lead.low:+.2f} to {100 * compared.mean_lead.high:+.2f}",
        worst_lead=_points(worst.mean, worst.error),
        objective=_objective(recipe, record, training.get("gates")),
        confidence=_confidence(record),
        epochs=record.epochs,
        n_train=record.train_images,
        duration=_duration(training["seconds"]),
        machine=training["machine"],
        processes=f" ({training['processes']} processes)" if training["processes"] > 1 else "",
        seed=training["seed"],
        torch=training["torch"],
        python=training["python"],
        commit=training["commit"] or "unknown",
        command=training["command"],
        before=_before(training),
        optimisation=_optimisation(recipe, training.get("precision", recipe.numerics.precision)),
        images=images or (CIFAR100 if record.data_name == "cifar100" else OWN_IMAGES),
        split=record.split_sha256,
    )


def _duration(seconds: float) -> str:
    hours = seconds / 3600
    return f"{hours:.1f} hours" if hours >= 1 else f"{60 * hours:.1f} minutes"


def _points(mean: float, error: float) -> str:
    return f"{100 * mean:+.2f} ± {100 * error:.2f}"


def _objective(recipe: Recipe, record: CalibrationRecord, gates: dict[str, Any] | None) -> str:
    if recipe.objective.name == "joint":
        text = "Plain joint training: the sum of every exit's cross-entropy, without a boosted ensemble."
    elif recipe.objective.name == "weighted":
        text = (
            "Weighted joint training (L2W-DEN, ECCV 2022): every image's cross-entropies at the exits, weighted by a\n"
            "network that learned beside this one which of them matter; gradient rescaling: "
            f"{recipe.objective.gradient_rescaling}."
        )
    else:
        temperatures = ", ".join(f"{t:g}" for t in recipe.objective.temperatures)
        if recipe.objective.temperatures_move:
            way = "learned" if recipe.objective.learned_temperatures else "moved on a line"
            temperatures += f", {way} to {', '.join(f'{t:.2f}' for t in record.temperatures[1:])} from exit 2 on"
        text = (
            "Boosted training (BoostNet, AAAI 2023): each head learns what the heads before it got wrong,\n"
            f"F_n = t F_(n-1) + f_n with t = {temperatures}; gradient rescaling: {recipe.objective.gradient_rescaling}."
        )
    if record.ensemble is not None:
        fitted = (
            " ".join(f"{x:.2f}" for x in values)
            for values in (record.ensemble.temperatures[1:], record.ensemble.head_scales)
        )
        text += (
            "\nThen, with the heads as trained, F_n = t_n F_(n-1) + s_n f_n was fitted to the held-out images, one\n"
            "exit after the other: t from exit 2 on {}; s {}.".format(*fitted)
        )
    return text + _gates(gates)


def _gates(gates: dict[str, Any] | None) -> str:
    """How a network was gated after it was trained, and what the published decision comes to."""
    if gates is None:
        return ""
    heads = "the heads as they were" if gates["heads"] == "kept" else "the last layers of the heads trained with them"
    test = gates["published_decision"]["test"]
    return (
        f"\nThen gates were fitted as JEI-DNN (ICLR 2024) does, all else frozen, {heads}: trade-off "
        f"{gates['trade_off']:g}.\nImages leave by their gates, with thresholds for the budget. At the published "
        f"decision (pi of one half)\nthe test images spend {test['executed_mflops']:.2f} M and are answered right in "
        f"{100 * test['accuracy']:.2f} % of cases."
    )


def _before(training: dict[str, Any]) -> str:
    """What the network had learned before this run, the last run first."""
    text = ""
    while "before" in training:
        start, training = training["from"], training["before"]
        text += (
            f"\nIt went on from the weights of `{start}`: {training['epochs']:.4g} epochs in "
            f"{_duration(training['seconds'])}, seed {training['seed']}, commit\n"
            f"`{training['commit'] or 'unknown'}`.\n\n    {training['command']}\n"
        )
    return text


def _confidence(record: CalibrationRecord) -> str:
    if record.ensemble is None:
        return "* Confidence is the largest softmax output, not calibrated to be a probability of being right."
    return (
        "* Confidence is the largest softmax output, calibrated on held-out images like those it was trained on; for\n"
        "  images that look otherwise it says little."
    )


def _optimisation(recipe: Recipe, precision: str) -> str:
    o, objective = recipe.optimisation, recipe.objective
    extras = {
        f"average of the weights with decay {o.ema_decay:g}": o.ema_decay,
        f"label smoothing {objective.label_smoothing:g}": objective.label_smoothing,
        f"distillation from the last exit with weight {objective.distillation:g}": objective.distillation,
    }
    return (
        f"SGD, {o.schedule.replace('_', ' ')} schedule with a peak rate of {o.learning_rate:g}, "
        f"batches of {o.batch_rows}, momentum {o.momentum:g}{' (Nesterov)' if o.nesterov else ''},\n"
        f"weight decay {o.weight_decay:g}, {precision}; "
        + "; ".join([*(text for text, on in extras.items() if on), _augmentation(recipe)])
    )


def _augmentation(recipe: Recipe) -> str:
    a = recipe.augmentation
    crops = f"random crops with {a.crop_padding_px} px of padding"
    if a.crop_area is not None:
        crops = f"random crops of {a.crop_area[0]:.0%} to {a.crop_area[1]:.0%} of the area"
        if a.sizes_px:
            crops += f", resized to {', '.join(map(str, a.sizes_px))} px in turn"
    cutout = f", squares of {a.cutout_px} px cut out" if a.cutout_px else ""
    return f"{crops}{cutout}, and horizontal flips."
