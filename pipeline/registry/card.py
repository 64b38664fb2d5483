"""Model cards: the descriptions of a registered model and of its versions, in Markdown.

A card ends in a line with a fingerprint of what stands above it. So one that somebody has edited is told from ours,
and left alone.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pipeline import storage
from pipeline.artifacts.manifests import (
    ClipManifest,
    EvaluationManifest,
    RunManifest,
    TargetManifest,
)
from pipeline.config import Config
from pipeline.evaluate.records import METHODS, Evaluation, find_records
from pipeline.evaluate.scoring import SCORES, TITLES
from pipeline.evaluate.table import percent, plural
from pipeline.models.build import backbone_config
from pipeline.tracking.client import optional

EXPORTED_TAG = "exported"  # of a version that needs nothing of ours: its exported form's file
_MAX_LETTERS = 5000  # of a description, in MLflow's database
_SIGNATURE = re.compile(
    r"\n\n\*Kept up to date by slotmatch until somebody edits it \(([0-9a-f]{16})\)\.\*\Z"
)
_Scores = Sequence[tuple[str, Mapping[str, float]]]


@dataclass(frozen=True)
class Facts:
    """What a card says of a version; None where it is not known any more."""

    name: str
    tags: Mapping[str, str]  # of the training run
    run: str  # its fingerprint
    settings: Mapping[str, Any]
    clips: ClipManifest | None
    targets: TargetManifest | None
    evaluation: EvaluationManifest | None
    scores: _Scores  # of the model and, beside it, of others under the same rules on the same videos
    licence: str
    backbone_licence: (
        str  # a sentence on that of a frozen backbone which was published under one; may be empty
    )

    @property
    def taught(self) -> bool:
        return self.tags.get("method", "no_kd") not in ("no_kd", "teacher")


def gather(
    config: Config, manifest: RunManifest, evaluation: Evaluation | None, known_uri: str | None
) -> Facts:
    """What there is to say of a student, or of a teacher that was trained here; what can't be read is left out.

    Args:
        evaluation: its scores, where they are at hand.
        known_uri: the evaluation's folder that the registry names, where they are not.
    """
    uri = evaluation.uri if evaluation else known_uri
    scored = _read(EvaluationManifest, uri)
    if scored is not None and evaluation is not None:  # which says more than a folder of an earlier version
        scored = scored.model_copy(update={"protocol": evaluation.protocol})
    elif evaluation is not None:
        scored = EvaluationManifest(
            scores=evaluation.scores, protocol=evaluation.protocol, videos=evaluation.videos
        )
    section, training = (
        (config.teacher, config.teacher.train)
        if manifest.kind == "teacher"
        else (config.student, config.distill)
    )
    backbone = section.backbone if manifest.kind == "student" or config.teacher.has_backbone else None
    named = backbone if isinstance(backbone, str) else "a ViT of its own"
    return Facts(
        name=METHODS.get(manifest.tags.get("method", ""), "Student"),
        tags=manifest.tags,
        run=manifest.fingerprint,
        settings={
            "steps": manifest.tags.get("steps") or manifest.steps,
            "batch size": training.batch_size,
            "learning rate": training.learning_rate,
            "views": config.targets.views,
            "backbone": "none" if backbone is None else named + backbone_config(section).cut,
            "input": f"{section.image_size} pixels",
        },
        clips=_read(ClipManifest, manifest.clips_uri),
        targets=_read(TargetManifest, manifest.targets_uri) if "targets" in manifest.tags else None,
        evaluation=scored,
        scores=_beside(config, scored) if scored else (),
        licence=config.mlflow.weights_licence,
        backbone_licence=_backbone_licence(backbone)
        if isinstance(backbone, str) and section.backbone_weights == "timm"
        else "",
    )


def _read(kind: type[Any], uri: str | None) -> Any:
    """A folder's manifest; None where it can't be had, which the lineage says."""
    try:
        return kind.read(uri) if uri else None
    except (storage.IncompleteError, OSError, ValueError, ImportError):
        return None


def _beside(config: Config, scored: EvaluationManifest) -> _Scores:
    """The model's scores, then those of teachers and trivial baselines that MLflow has of the same evaluation."""
    others: dict[str, Mapping[str, float]] = {}
    with optional("scores to stand beside the model's", "read"):
        for record in find_records(config, scored.clips_uri or None):
            same = record.protocol.fingerprint == scored.protocol.fingerprint
            if same and record.method in ("teacher", "baseline"):
                others.setdefault(record.name, record.scores)
    return [("**this model**", scored.scores), *others.items()]


# --- the text -------------------------------------------------------------------------------------


def version_card(facts: Facts, model: str, version: str, *, exported: bool) -> str:
    """The description of a version; `exported`: whether it has its exported form."""
    uri = f"models:/{model}/{version}"
    parts = [
        _what(facts),
        _made_from(facts),
        _score_table(facts),
        _loading(uri, exported),
        _licence(facts),
        _limits(facts),
    ]
    return signed("\n\n".join(part for part in parts if part))


def model_card(model: str, version: str, description: str) -> str:
    """The description of a registered model: its champion's."""
    first = f"Version {version} is the champion, `models:/{model}@champion`, and this is what it is:"
    return signed(f"{first}\n\n{_SIGNATURE.sub('', description)}")


def hub_card(repository: str, description: str) -> str:
    """The `README.md` of a repository on the Hugging Face Hub: how to load it, and a version's description."""
    return f"""---
pipeline_tag: image-segmentation
tags: [object-centric-learning, slot-attention, video-segmentation]
---

# {repository.rpartition("/")[2]}

```python
from pipeline.models import SlotModel

model = SlotModel.from_pretrained("{repository}")
```

{_SIGNATURE.sub("", description).strip()}
"""


def signed(text: str) -> str:
    """A card with its last line; what MLflow's database can't hold is cut off."""
    room = _MAX_LETTERS - 100
    body = text if len(text) <= room else f"{text[: room - 2].rstrip()} …"
    return f"{body}\n\n*Kept up to date by slotmatch until somebody edits it ({storage.fingerprint(body)}).*"


def may_write(description: str | None) -> bool:
    """Whether a description is empty, or a card of ours that nobody has edited."""
    if not (description or "").strip():
        return True
    found = _SIGNATURE.search(description or "")
    return found is not None and found[1] == storage.fingerprint(_SIGNATURE.sub("", description or ""))


def _what(facts: Facts) -> str:
    tags = facts.tags
    lines = [
        f"# {facts.name}",
        "A slot model: it divides each frame of a video into regions, one a slot, and follows them from frame to "
        "frame. It learned that without labels.",
    ]
    if facts.taught:
        lines.append(f"Distilled from the teacher {_inline(tags.get('teacher', 'of an unknown name'))}.")
    return "\n\n".join(lines)


def _made_from(facts: Facts) -> str:
    tags = facts.tags
    lines = ["## Made from", f"- videos: {_videos(facts.clips, tags.get('clips', ''))}"]
    if facts.taught and facts.targets is None:
        lines.append(f"- teacher: {_inline(tags.get('teacher', 'of an unknown name'))}")
    if facts.targets:
        hashes = ", ".join(f"`{one}`" for one in facts.targets.teacher.get("files", ()))
        lines.append(
            f"- teacher: {_inline(tags.get('teacher', ''))}, weights {hashes or 'of unknown hashes'}"
        )
        lines.append(f"- targets: {plural(facts.targets.rows, 'row')} (`{facts.targets.fingerprint}`)")
    named = {**{key: tags[key] for key in ("method", "beta", "seed") if key in tags}, **facts.settings}
    lines.append(f"- training: {', '.join(f'{key} {_inline(str(value))}' for key, value in named.items())}")
    revision = tags.get("git_revision", "unknown")
    lines.append(f"- run `{facts.run}`, code at revision {_inline(revision)}")
    return "\n".join([lines[0], "", *lines[1:]])


def _videos(clips: ClipManifest | None, fingerprint: str) -> str:
    if clips is None:
        return f"clips `{fingerprint}`, of which no more is known here"
    name = _inline(clips.dataset.name) if clips.dataset else "a data set that was not recorded"
    split = f", split {_inline(clips.split)}" if clips.split else ""
    counts = ", ".join(
        plural(count, noun)
        for count, noun in ((clips.videos, "video"), (clips.clips, "clip"), (clips.frames, "frame"))
        if count  # earlier versions did not count all
    )
    return f"{name}{split}: {counts} (clips `{clips.fingerprint}`)"


def _score_table(facts: Facts) -> str:
    if facts.evaluation is None:
        return "## Scores\n\nNone: it was registered without an evaluation."
    rules = facts.evaluation.protocol
    head = ["", *(TITLES[score] for score in SCORES)]
    rows = [
        [
            name if name.startswith("**") else _inline(name),
            *(percent(scores.get(score, math.nan)) for score in SCORES),
        ]
        for name, scores in facts.scores
    ]
    lines = [f"| {' | '.join(cells)} |" for cells in (head, ["---"] + ["---:"] * len(SCORES), *rows)]
    where = f"clips `{rules.clips}`, " if rules.clips else ""
    note = (
        f"In percent, on {plural(facts.evaluation.videos, 'video')} that it did not train on ({where}evaluation "
        f"`{rules.fingerprint}`). Protocol {_inline(rules.name)}{f': {rules.in_words}' if rules.in_words else ''}."
    )
    note = " ".join([note, *rules.warnings])
    if len(rows) == 1:
        note += " No trivial baseline was scored beside it."
    return "\n".join(["## Scores", "", *lines, "", note])


def _loading(uri: str, exported: bool) -> str:
    if exported:
        needs = "In Python it needs MLflow, numpy and onnxruntime."
        files = "safetensors, a config, model.onnx"
    else:
        needs = (
            "In Python it needs MLflow, PyTorch, timm and safetensors. The code that runs it is stored with it, as the "
            "package `pipeline`: no other module of that name may be on the path."
        )
        files = "safetensors, a config"
    return f"""## Load it

{needs} URI is this registry's.

```python
import mlflow

mlflow.set_tracking_uri("URI")
labels = mlflow.pyfunc.load_model("{uri}").predict(frames)  # (T, H, W, 3) uint8 -> (T, H, W) uint8
```

```sh
slotmatch pull {uri} DIR mlflow.tracking_uri=URI    # {files}
slotmatch segment VIDEO model={uri} out=DIR mlflow.tracking_uri=URI    # an overlay video, label maps
```"""


def _licence(facts: Facts) -> str:
    stated = _inline(facts.licence) or "Not stated (the setting `mlflow.weights_licence` states it)"
    text = f"## Licence of the weights\n\n{stated}."
    if facts.taught:
        text += " The licence of the teacher that they were distilled from is not known here."
    return f"{text} {facts.backbone_licence}".strip()


def _backbone_licence(name: str) -> str:
    licences = {"dinov2": ("DINOv2", "Apache-2.0"), "dinov3": ("DINOv3", "its DINOv3 licence")}
    kind, licence = next((value for key, value in licences.items() if key in name), ("", ""))
    return kind and f"They hold a frozen {kind} backbone, which Meta published under {licence}."


def _limits(facts: Facts) -> str:
    return (
        "## Use and limits\n\nFor finding and following objects in videos like those that it was trained on. Slots "
        "have no names, other videos may be divided badly, and there are never more regions in a video than slots."
    )


def _inline(text: str) -> str:
    """A user's text within a line of Markdown, and within a cell of a table."""
    return re.sub(r"([\\|`*_<>\[\]])", r"\\\1", " ".join(text.split()))[:120]


# --- in the registry ------------------------------------------------------------------------------


def describe_version(client: Any, name: str, version: str, facts: Facts) -> None:
    """Writes a version's card, unless somebody has written something else."""
    registered = client.get_model_version(name, version)
    text = version_card(facts, name, version, exported=EXPORTED_TAG in registered.tags)
    known = registered.description
    if may_write(known) and text != known:
        client.update_model_version(name, version, text)


def describe_model(client: Any, name: str, alias: str) -> None:
    """Makes the champion's card that of the registered model, unless somebody has written something else."""
    model = client.get_registered_model(name)
    if alias not in model.aliases or not may_write(model.description):
        return
    holder = str(model.aliases[alias])
    described = client.get_model_version(name, holder).description
    if described and (text := model_card(name, holder, described)) != model.description:
        client.update_registered_model(name, text)
