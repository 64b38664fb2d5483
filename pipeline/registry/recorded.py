"""What MLflow holds of a student beside its version: the training run's data sets, a logged model, a card.

Nothing of the registration depends on them: a server that has no such records, or fails in between, gets the version
without, and what lacks when the run is registered again.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pipeline import tracking
from pipeline.artifacts.manifests import RunManifest
from pipeline.config import Config
from pipeline.evaluate.records import Evaluation, link_evaluation
from pipeline.registry.card import Facts, describe_model, describe_version, gather
from pipeline.tracking.client import optional
from pipeline.tracking.datasets import log_training_data
from pipeline.tracking.logged import link_version, logged_model

MODEL_TAG = "logged_model"  # of a version: the id of its logged model


@dataclass(frozen=True)
class Recorded:
    """What goes with a version; None where it could not be recorded."""

    run_id: str
    model: Any | None  # the logged model
    facts: Facts | None

    @property
    def tags(self) -> dict[str, str]:
        """Of the version."""
        return {MODEL_TAG: self.model.model_id} if self.model is not None else {}


def record(
    config: Config,
    client: Any,
    run_id: str,
    manifest: RunManifest,
    evaluation: Evaluation | None,
    known_tags: dict[str, str],
) -> Recorded:
    """Records data sets, logged model and its scores, what there already is left alone, and gathers the card's facts.

    Args:
        run_id: of the training, in MLflow.
        known_tags: of the version, where there is one.
    """
    model = facts = None
    with optional("the data sets of the training run"):
        if manifest.clips_uri:  # earlier versions did not say
            run = client.get_run(run_id)
            log_training_data(client, run, manifest.clips_uri, manifest.targets_uri)
    with optional("the logged model of this student"):
        model = logged_model(client, client.get_run(run_id))
    if evaluation is not None:
        with optional("the scores of the logged model"):
            _link(config, client, evaluation)
    with optional("the model card"):
        facts = gather(config, manifest, evaluation, known_tags.get("evaluation_uri"))
    return Recorded(run_id, model, facts)


def _link(config: Config, client: Any, evaluation: Evaluation) -> None:
    """Links an evaluation to the logged model, which may not have been there when it was recorded."""
    found = client.search_runs(
        [tracking.experiment_id(config)], tracking.tag_filter(evaluation.uri), max_results=1
    )
    for run in found:
        tags = run.data.tags
        link_evaluation(client, run, tags["clips_uri"], tags.get("model_uri"), evaluation.scores)


def describe(client: Any, name: str, version: str, recorded: Recorded, alias: str) -> None:
    """Links a version and its logged model, and writes the cards of the version and of the registered model.

    Args:
        alias: of the version that the registered model is described by.
    """
    if recorded.model is not None:
        with optional("the logged model's version"):
            link_version(client, recorded.model, name, version)
    with optional("the model card"):
        if recorded.facts is not None:
            describe_version(client, name, version, recorded.facts)
        describe_model(client, name, alias)
