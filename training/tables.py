"""Results as tables on the terminal."""

from rich.console import Console
from rich.table import Table

from training.evaluation import Evaluation


def print_evaluation(evaluation: Evaluation, console: Console) -> None:
    """Print accuracy per exit, the scores compared, and the budget curve of the score chosen."""
    anytime = Table(title="Every image at one exit (M = million multiply-adds an image)", title_justify="left")
    for heading in ("exit", "published M", "executed M", "held-out top-1", "test top-1", "test top-5"):
        anytime.add_column(heading, justify="right")
    for result in evaluation.exits:
        anytime.add_row(
            str(result.exit),
            f"{result.published_mflops:.2f}",
            f"{result.executed_mflops:.2f}",
            _percent(result.heldout_accuracy),
            _percent(result.test_accuracy),
            _percent(result.test_top5_accuracy),
        )
    console.print(anytime)

    scores = Table(title="Exit scores on held-out images, thresholds cross-fitted", title_justify="left")
    for heading in ("score", "mean top-1 over budgets", "behind the best", "exit shares", ""):
        scores.add_column(heading, justify="left" if heading in ("score", "exit shares", "") else "right")
    for score in evaluation.scores:
        is_chosen = score.score == evaluation.score
        behind = "" if is_chosen else f"{100 * score.crossfit_behind:.2f} ± {100 * score.crossfit_behind_error:.2f}"
        mean = f"{100 * score.crossfit_accuracy:.2f} %"
        scores.add_row(score.score, mean, behind, score.family, "chosen" if is_chosen else "")
    console.print(scores)

    budgeted = Table(
        title=f"Each image leaves when sure ({evaluation.score}), measured on test images",
        title_justify="left",
    )
    for heading in ("budget M", "executed M", "published M", "top-1", "leaving at exit 1, 2, ... %"):
        budgeted.add_column(heading, justify="right")
    for point in evaluation.chosen.shown():
        budgeted.add_row(
            f"{point.budget_mflops:.2f}",
            f"{point.test_executed_mflops:.2f}",
            f"{point.test_published_mflops:.2f}",
            _percent(point.test_accuracy),
            " ".join(f"{100 * share:.0f}" for share in point.test_shares),
        )
    console.print(budgeted)


def _percent(share: float) -> str:
    return f"{100 * share:.2f} %"
