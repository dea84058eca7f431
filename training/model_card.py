"""The model card of a bundle (README.md): the network, its accuracy and cost, its training, its images and limits."""

from math import sqrt
from typing import Any

from training.calibration import CalibrationRecord
from training.evaluation import Evaluation
from training.policies import in_points
from training.recipe import Augmentation, Recipe

CIFAR100 = """CIFAR-100: 60,000 colour images of 32 x 32 pixels in 100 classes. It has no formal licence; cite
Alex Krizhevsky, *Learning Multiple Layers of Features from Tiny Images*, technical report, University of Toronto, 2009.
As published, ten of the test images are also in the training part. The bundle contains no images."""
OWN_IMAGES = "The images belong to whoever trained the network; ask them for the terms. The bundle contains no images."

CARD = """# {name}

{description}.

An image classifier with {n_exits} exits, {n_classes} classes and {parameters_m:.2f} million parameters, for images of
{size} x {size} pixels. An image runs stage by stage and leaves at the first exit whose score reaches its threshold. The
server regroups the images that continue.
{partial}
    python -m service --bundle {name}    # in the parent folder of this one

## Accuracy

Measured on the {n_test:,} test images, which were not used to choose weights, epoch, thresholds or score. The results
are those of the last epoch, not of the best. One standard error is about {error:.1f} points. Costs are millions of
multiply-adds per image, up to and including the exit: *published* as the early-exit literature counts them, *executed*
as the stages actually run them. The server charges the executed cost.

| exit | published M | executed M | top-1 % | top-5 % | calibration error, points |
| ---: | ---: | ---: | ---: | ---: | ---: |
{exit_rows}

The last column is the expected calibration error: the mean difference between confidence and accuracy.

With early exit, using thresholds chosen on {n_heldout:,} held-out images:

| budget M (executed) | spent M | top-1 % | leaving at exit 1 to {n_exits}, % |
| ---: | ---: | ---: | --- |
{budget_rows}

A budget above the last one listed is not spent: more compute did not raise the accuracy on the held-out images.

![Accuracy over mean cost](frontier.png)

The exit score is `{score}` with `{family}` thresholds, {chosen} by cross-fitting. There it is
{crossfit_lead} points of top-1 ahead of the published policy (max softmax with geometric thresholds), averaged over
all budgets. On the test images, at {n_costs} equal measured costs, the mean lead is {test_lead} points (95 % interval:
{test_interval}); at the cost where it is smallest, {worst_lead}.

## Training

{objective}
{epochs:.4g} epochs on {n_train:,} images in {duration} on {machine}{processes}; seed {seed}, torch {torch},
Python {python}, commit `{commit}`.

    {command}
{before}
{optimisation} The full recipe is in `manifest.json` under `training`.

## Images

{images}

The held-out images are a seeded random sample of the training part. They were never trained on, and were read without
augmentation. The SHA-256 of the split is `{split}`.

## Limits

* The network knows only its {n_classes} classes: an image of anything else is still assigned to one of them.
* Images of another size are resized to {size} x {size}. On images unlike the training images (in framing or
  resolution), accuracy is lower than in the tables, and more images reach the later exits.
{confidence}
* This is one training run with one seed. The variation between seeds was not measured here.
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
    """Return the model card as Markdown; every number in it comes from the run's own files.

    Args:
        images: text about the images and their terms of use; by default one chosen by the name of the image set.
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
        crossfit_lead=in_points(evaluation.chosen.crossfit_lead, evaluation.chosen.crossfit_lead_error),
        n_costs=len(compared.lead),
        test_lead=in_points(compared.mean_lead.mean, compared.mean_lead.error),
        test_interval=f"{100 * compared.mean_lead.low:+.2f} to {100 * compared.mean_lead.high:+.2f}",
        worst_lead=in_points(worst.mean, worst.error),
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


def _objective(recipe: Recipe, record: CalibrationRecord, gates: dict[str, Any] | None) -> str:
    if recipe.objective.name == "joint":
        text = "Plain joint training: the loss is the sum of the exits' cross-entropies, without a boosted ensemble."
    elif recipe.objective.name == "weighted":
        text = (
            "Weighted joint training (L2W-DEN, ECCV 2022): each image's cross-entropy at each exit is weighted by a\n"
            "second network, which was trained together with this one; gradient rescaling: "
            f"{recipe.objective.gradient_rescaling}."
        )
    else:
        temperatures = ", ".join(f"{t:g}" for t in recipe.objective.temperatures)
        if recipe.objective.temperatures_move:
            way = "learned" if recipe.objective.learned_temperatures else "moved linearly"
            temperatures += f", {way} to {', '.join(f'{t:.2f}' for t in record.temperatures[1:])} from exit 2 on"
        text = (
            "Boosted training (BoostNet, AAAI 2023): each head learns to correct the sum of the heads before it,\n"
            f"F_n = t F_(n-1) + f_n with t = {temperatures}; gradient rescaling: {recipe.objective.gradient_rescaling}."
        )
    if record.ensemble is not None:
        fitted = (
            " ".join(f"{x:.2f}" for x in values)
            for values in (record.ensemble.temperatures[1:], record.ensemble.head_scales)
        )
        text += (
            "\nAfter training, t_n and s_n in F_n = t_n F_(n-1) + s_n f_n were fitted to the held-out images, one\n"
            "exit after the other, with the heads f_n unchanged: t from exit 2 on {}; s {}.".format(*fitted)
        )
    return text + _gates(gates)


def _gates(gates: dict[str, Any] | None) -> str:
    """How gates were fitted after training, and the cost and accuracy of the published decision; "" without gates."""
    if gates is None:
        return ""
    heads = "the heads too" if gates["heads"] == "kept" else "except the last layers of the heads, trained with them"
    test = gates["published_decision"]["test"]
    return (
        f"\nThen gates were fitted as in JEI-DNN (ICLR 2024), with the network frozen ({heads}): trade-off "
        f"{gates['trade_off']:g}.\nThe gates' outputs are the exit score, with thresholds chosen by budget. With the "
        f"published decision\n(pi of one half), the test images cost {test['executed_mflops']:.2f} M on average, at an "
        f"accuracy of {100 * test['accuracy']:.2f} %."
    )


def _before(training: dict[str, Any]) -> str:
    """Describe the earlier runs whose weights this one started from, most recent first."""
    text = ""
    while "before" in training:
        start, training = training["from"], training["before"]
        text += (
            f"\nIt started from the weights of `{start}`: {training['epochs']:.4g} epochs in "
            f"{_duration(training['seconds'])}, seed {training['seed']}, commit\n"
            f"`{training['commit'] or 'unknown'}`.\n\n    {training['command']}\n"
        )
    return text


def _confidence(record: CalibrationRecord) -> str:
    if record.ensemble is None:
        return "* Confidence is the largest softmax output. It is not calibrated as a probability of being correct."
    return (
        "* Confidence is the largest softmax output, calibrated on held-out images like those it was trained on. On\n"
        "  images that look different it is unreliable."
    )


def _optimisation(recipe: Recipe, precision: str) -> str:
    o, objective = recipe.optimisation, recipe.objective
    extras = {
        f"moving average of the weights with decay {o.ema_decay:g}": o.ema_decay,
        f"label smoothing {objective.label_smoothing:g}": objective.label_smoothing,
        f"distillation from the last exit with weight {objective.distillation:g}": objective.distillation,
    }
    return (
        f"SGD, {o.schedule.replace('_', ' ')} schedule with a peak rate of {o.learning_rate:g}, "
        f"batches of {o.batch_rows}, momentum {o.momentum:g}{' (Nesterov)' if o.nesterov else ''},\n"
        f"weight decay {o.weight_decay:g}, {precision}; "
        + "; ".join([*(text for text, on in extras.items() if on), augmentation_text(recipe.augmentation)])
    )


def augmentation_text(a: Augmentation) -> str:
    """The augmentation of a recipe in words."""
    parts = []
    if a.crop_area is not None:
        parts.append(f"random crops of {a.crop_area[0]:.0%} to {a.crop_area[1]:.0%} of the area")
        if a.sizes_px:
            parts.append(f"resized to {', '.join(map(str, a.sizes_px))} px in equal parts of the run")
    elif a.crop_padding_px:
        parts.append(f"random crops with {a.crop_padding_px} px of padding")
    if a.cutout_px:
        parts.append(f"squares of {a.cutout_px} px cut out")
    if a.cutmix:
        parts.append(f"CutMix in {a.cutmix:.0%} of the batches")
    return ", ".join([*parts, "and horizontal flips." if parts else "horizontal flips."])
