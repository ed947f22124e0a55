"""Write the HTML report and the model card."""

from pathlib import Path

from stages.common import stage


@stage
def report() -> None:
    """Write report/index.html, a single self-contained page, and report/model-card.md."""
    from pipeline.core.config import load_config
    from pipeline.report import page
    from pipeline.report.results import Results
    from pipeline.training import determinism

    config = load_config()
    determinism.make_deterministic(1)  # more threads hardly pay for Grad-CAM of so few images
    page.write_report(Path("report"), Results(config))


if __name__ == "__main__":
    report()
