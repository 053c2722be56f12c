"""The documentation: Sphinx with Furo and MyST, warnings as errors (`make docs`)."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import prose

import batchlab
from batchlab.core.systems import systems
from batchlab.rules import learning_rate
from batchlab.rules.published import laws

project = "batchlab"
author = "the batchlab authors"
copyright = "the batchlab authors, Apache-2.0"
release = version = batchlab.__version__

RESULTS = Path(__file__).parents[1] / "benchmarks" / "results"
VERIFIED = sorted(RESULTS.glob("verify_*.json"))
FIVE_JOBS = {
    "job": "job",
    "seed": "seed",
    "metric": "metric",
    "target": "target",
    "predicted_b_crit": "predicted B_crit",
    "measured_b_crit": "measured B_crit",
    "ratio": "measured/predicted",
}
ESTIMATORS = {
    "job": "job",
    "method": "method",
    "micro_batches": "micro-batches",
    "projections": "projections",
    "bias": "over the truth",
    "spread": "spread",
    "covered": "covered",
    "repeats": "of",
    "cost": "cost",
    "mean_of_ratios": "mean of ratios",
}

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx_copybutton"]
exclude_patterns = ["_build"]
myst_enable_extensions = ["substitution"]
myst_heading_anchors = 3
myst_substitutions = {
    "regrets": prose.regret_table(RESULTS),
    "laws": prose.laws_table(laws().values()),
    "rate_rules": prose.rate_rules_table({name: learning_rate.reason(name) for name in learning_rate.RULES}),
    "systems": prose.systems_table(systems()),
    "benchmarks": prose.benchmark_tables(RESULTS),
    "five_jobs": prose.result_table((p for p in VERIFIED if not p.stem.endswith("_plain")), FIVE_JOBS),
    "five_jobs_plain": prose.result_table((p for p in VERIFIED if p.stem.endswith("_plain")), FIVE_JOBS),
    "optimizers": prose.optimizer_tables(RESULTS / "optimizers.json"),
    "optimizer_steps": prose.step_table(RESULTS / "optimizer_step.json"),
    "optimizer_steps_gpu": prose.step_table(RESULTS / "optimizer_step_gpu.json"),
    "estimators": prose.result_table(RESULTS.glob("estimators.json"), ESTIMATORS),
}

html_theme = "furo"
html_title = "batchlab"
html_static_path = []
html_copy_source = False
copybutton_exclude = ".linenos, .gp"

autodoc_default_options = {"members": True, "member-order": "bysource"}
autodoc_typehints = "signature"
autodoc_class_signature = "mixed"
python_use_unqualified_type_names = True


def setup(app):
    """Docstrings are plain sentences; Sphinx reads reStructuredText."""
    app.connect("autodoc-process-docstring", prose.process)
