"""What a sweep trains: settings from the grid, a random search or named variants, each from every seed.

And what may be claimed of them in the stage `evidence`; and what the stage `rivals` trains.
"""

from __future__ import annotations

import difflib
import itertools
import math
import random
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel

from pipeline.config import Config, ConfigError, Sweep, with_overrides, with_presets

# Trials share their clips, are scored alike and are kept in one place.
FIXED = ("dataset", "clips", "evaluate", "storage", "mlflow", "ray", "sweep")
TEACHER = "teacher"  # in a claim, beside the settings
_TRIES = 1000  # of a random search to find a setting that it has not drawn yet


@dataclass(frozen=True)
class Setting:
    """A row of the sweep's table: what differs from the config, by its key."""

    name: str
    values: Mapping[str, Any]


@dataclass(frozen=True)
class Trial:
    """One student: a setting and a seed."""

    setting: Setting
    seed: int
    config: Config
    run_uri: str = ""  # its run folder, once the targets are there to know it by

    @property
    def title(self) -> str:
        return f"{self.setting.name}, seed {self.seed}"

    @property
    def key(self) -> str:
        """The run folder's fingerprint: unique in a sweep."""
        return self.run_uri.rsplit("/", 1)[-1]


def plan_trials(config: Config) -> list[Trial]:
    """The trials of a config in the order in which they begin: every setting from the first seed, then the next.

    Raises:
        ConfigError: with one line for everything that can't be run.
    """
    sweep = config.sweep
    if problems := [*_check_sweep(config), *_check_keys(sweep)]:
        raise ConfigError("\n".join(problems))
    if sweep.variants:
        drawn = [(name, dict(overrides)) for name, overrides in sweep.variants.items()]
    else:
        drawn = [("", overrides) for overrides in _draw(sweep)]
    names_of = _short_names([key for _, overrides in drawn for key in overrides])
    settings, configs, lines = [], {}, []
    for name, overrides in drawn:
        where = f"sweep.variants {name!r}" if name else "sweep.grid"
        try:
            changed = with_overrides(config, overrides)
        except ConfigError as error:
            lines += [f"{where}: {line}" for line in str(error).splitlines()]
            continue
        setting = _setting(name, changed, list(overrides), names_of)
        if sweep.asha:
            lines += [f"{where}: {line}" for line in _check_asha(changed)]
        settings.append(setting)
        configs[setting.name] = changed
    twice = [name for name, count in Counter(s.name for s in settings).items() if count > 1]
    lines += [f"sweep.grid: {name!r} is there twice" for name in twice]
    if not lines:
        lines = _check_seeds_of(sweep, [setting.name for setting in settings])
    if lines:
        raise ConfigError("\n".join(dict.fromkeys(lines)))
    # As if each were a run of its own: the sweep it is in decides nothing about a student.
    rest = {"sweep": Sweep()}
    seeds_of = {s.name: sweep.seeds_of.get(s.name, sweep.seeds) for s in settings}
    return [
        Trial(s, seed, with_overrides(configs[s.name].model_copy(update=rest), {"distill.seed": seed}))
        for seed in dict.fromkeys(seed for seeds in seeds_of.values() for seed in seeds)
        for s in settings
        if seed in seeds_of[s.name]
    ]


def _check_seeds_of(sweep: Sweep, names: Sequence[str]) -> list[str]:
    problems = []
    for name, seeds in sweep.seeds_of.items():
        if name not in names:
            near = difflib.get_close_matches(name, names, n=1, cutoff=0.0)[0]
            problems.append(f"sweep.seeds_of: {name!r} is no setting of this sweep; nearest: {near!r}")
        problems += _check_seeds(f"sweep.seeds_of.{name}", seeds)
    return problems


def _check_seeds(key: str, seeds: Sequence[int]) -> list[str]:
    if not seeds:
        return [f"{key}: is empty; nearest valid: [42]"]
    return [
        f"{key}: {seed} is there twice; nearest valid: {sorted(set(seeds))}"
        for seed, count in Counter(seeds).items()
        if count > 1
    ]


def parse_claim(claim: str) -> tuple[str, str]:
    """The two sides of `better > worse`.

    Raises:
        ValueError: not of this form.
    """
    sides = [side.strip() for side in claim.split(" > ")]
    if len(sides) != 2 or not all(sides):
        raise ValueError(f"{claim!r} is not of the form 'better > worse'")
    return sides[0], sides[1]


def check_evidence(config: Config) -> None:
    """Raises ConfigError for evidence that can't be had of this config; also in a dry run."""
    problems, names = [], {trial.setting.name for trial in plan_trials(config)} | {TEACHER}
    if config.evidence.split is None:
        problems.append("evidence.split: is not set; name the videos with masks that nothing was chosen on")
    elif config.evidence.split in (config.evaluate.split, config.dataset.split):
        problems.append(
            f"evidence.split: {config.evidence.split!r} was trained or chosen on (dataset.split, evaluate.split)"
        )
    problems += [
        f"evidence.pictures: {name!r} is no setting of this sweep ({', '.join(sorted(names - {TEACHER}))})"
        for name in config.evidence.pictures
        if name not in names - {TEACHER}
    ]
    for claim in config.evidence.claims:
        try:
            unknown = [side for side in parse_claim(claim) if side not in names]
        except ValueError as error:
            problems.append(f"evidence.claims: {error}")
            continue
        problems += [
            f"evidence.claims: {side!r} is no setting of this sweep ({', '.join(sorted(names))})"
            for side in unknown
        ]
    if problems:
        raise ConfigError("\n".join(problems))


def _check_sweep(config: Config) -> list[str]:
    sweep, evaluate, problems = config.sweep, config.evaluate, []
    if evaluate.split is None:
        problems.append("evaluate.split: is not set, and a sweep compares scores; name videos with masks")
    if evaluate.model is not None:
        problems.append(
            f"evaluate.model: {evaluate.model!r} is set, but a sweep scores its own students; use null"
        )
    problems += _check_seeds("sweep.seeds", sweep.seeds)
    if sweep.search == "random" and sweep.variants:
        problems.append(
            "sweep.search: 'random' draws from sweep.grid, but sweep.variants is set; nearest: grid"
        )
    return problems


def _check_asha(config: Config) -> list[str]:
    settings, grace = config.distill, grace_steps(config)
    problems = []
    if not settings.validate_every:
        problems.append(
            f"distill.validate_every: 0 validates never, and sweep.asha stops by validations; nearest valid: {grace}"
        )
    if grace >= settings.steps:
        problems.append(
            f"sweep.grace_steps: {grace} must be less than distill.steps ({settings.steps}); nearest valid: "
            f"{settings.steps - 1}"
        )
    return problems


def grace_steps(config: Config) -> int:
    """Steps that ASHA leaves to every trial."""
    return config.sweep.grace_steps or max(1, config.distill.steps // 4)


def _check_keys(sweep: Sweep) -> list[str]:
    problems = []
    if sweep.variants:
        for name, overrides in sweep.variants.items():
            problems += [f"sweep.variants {name!r}: {line}" for line in _check_key_names(list(overrides))]
        return problems
    leaves = list(_leaves(sweep.grid))
    problems += [f"sweep.grid: {line}" for line in _check_key_names([key for key, _ in leaves])]
    for key, values in leaves:
        if isinstance(values, dict):
            problems += [f"sweep.grid.{key}: {line}" for line in _check_range(values, sweep.search)]
        elif not isinstance(values, (list, tuple)) or not values:
            problems.append(
                f"sweep.grid.{key}: {values!r} is not a list of values; nearest valid: [{values}]"
            )
    return problems


def _check_key_names(keys: Sequence[str]) -> list[str]:
    problems = [f"{key!r} is there twice" for key, count in Counter(keys).items() if count > 1]
    for key in dict.fromkeys(keys):
        section = key.split(".")[0]
        if "." not in key:
            near = difflib.get_close_matches(section, list(Config.model_fields), n=1, cutoff=0.0)[0]
            problems.append(f"{key!r} is not of the form section.key; nearest: '{near}.…'")
        elif section in FIXED:
            problems.append(
                f"{key!r} can't differ between trials, which share clips, scoring and storage; set it for all "
                f"({key}=…); nearest: distill.…, student.…, targets.…"
            )
        elif key == "distill.seed":
            problems.append("'distill.seed' comes from sweep.seeds; name its values there")
    return problems


def _leaves(grid: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted keys with their lists or ranges: `grid: {distill.beta: …}` and `{distill: {beta: …}}` are the same."""
    for key, value in grid.items():
        if isinstance(value, dict) and not (value and value.keys() <= {"low", "high", "log"}):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _check_range(values: Mapping[str, Any], search: str) -> list[str]:
    if search == "grid":
        return [f"{dict(values)!r} is a range, which only sweep.search=random draws from; nearest: a list"]
    try:
        low, high = float(values["low"]), float(values["high"])
    except (KeyError, TypeError, ValueError):
        return [f"{dict(values)!r} is not a range of numbers; valid: {{low: 0.1, high: 0.8}}"]
    if not math.isfinite(high - low) or low >= high:
        return [f"low {low:g} must be less than high {high:g}"]
    if values.get("log") and low <= 0:
        return [f"low {low:g} must be more than 0 where log is true"]
    return []


def _draw(sweep: Sweep) -> list[dict[str, Any]]:
    """The overrides of each setting."""
    leaves = dict(_leaves(sweep.grid))
    if sweep.search == "grid":
        return [dict(zip(leaves, values, strict=True)) for values in itertools.product(*leaves.values())]
    ranges = any(isinstance(values, dict) for values in leaves.values())
    most = math.prod(len(values) for values in leaves.values()) if not ranges else None
    if most is not None and sweep.samples > most:
        raise ConfigError(
            f"sweep.samples: {sweep.samples}, but sweep.grid has only {most} combinations; nearest valid: {most}"
        )
    rng, drawn = random.Random(sweep.seed), dict[str, dict[str, Any]]()
    for _ in range(sweep.samples * _TRIES):
        one = {key: _draw_value(rng, values) for key, values in leaves.items()}
        drawn.setdefault(repr(one), one)
        if len(drawn) == sweep.samples:
            return list(drawn.values())
    raise ConfigError(
        f"sweep.samples: {sweep.samples}, but random draws give only {len(drawn)} different settings; nearest "
        f"valid: {len(drawn)}"
    )


def _draw_value(rng: random.Random, values: Any) -> Any:
    if not isinstance(values, dict):
        return rng.choice(list(values))
    low, high, log = values["low"], values["high"], values.get("log", False)
    whole = isinstance(low, int) and isinstance(high, int)
    low, high = float(low), float(high)
    if whole and not log:
        return rng.randint(int(low), int(high))
    value = math.exp(rng.uniform(math.log(low), math.log(high))) if log else rng.uniform(low, high)
    if whole:
        return round(value)
    # What is printed is what is run.
    return min(max(float(f"{value:.3g}"), low), high)


def _short_names(keys: Sequence[str]) -> dict[str, str]:
    """Each key's last part where it is no other key's."""
    unique = list(dict.fromkeys(keys))
    counts = Counter(key.rsplit(".", 1)[-1] for key in unique)
    return {k: k.rsplit(".", 1)[-1] if counts[k.rsplit(".", 1)[-1]] == 1 else k for k in unique}


def _setting(name: str, config: Config, keys: Sequence[str], names_of: Mapping[str, str]) -> Setting:
    # As the config understood them: YAML has text for 1e-3.
    values = {key: lookup(config, key) for key in keys}
    shown = [f"{names_of[key]} = {_shown(value)}" for key, value in values.items()]
    return Setting(name or ", ".join(shown) or "as configured", values)


def lookup(config: Config, key: str) -> Any:
    """The value under a dotted key, as plain data."""
    node: Any = config
    for part in key.split("."):
        node = node[part] if isinstance(node, dict) else getattr(node, part)
    return node.model_dump(mode="json") if isinstance(node, BaseModel) else node


def _shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:g}"
    return " ".join(f"{k}={_shown(v)}" for k, v in value.items()) if isinstance(value, dict) else str(value)


# --- rivals -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rival:
    """One training of a system: as which teacher of which config, from which seed, and whether it is wanted now."""

    system: str  # a key of `rivals.systems`
    seed: int
    config: Config
    wanted: bool

    @property
    def title(self) -> str:
        return f"{self.config.teacher.title}, seed {self.seed}"


def plan_rivals(config: Config) -> list[Rival]:
    """The trainings of `config.rivals` in the order in which they begin: every system from a seed, then from the next.

    Raises:
        ConfigError: with one line for everything that can't be run.
    """
    rivals, problems = config.rivals, _check_seeds("rivals.seeds", config.rivals.seeds)
    if not rivals.systems:
        problems.append("rivals.systems: is empty; nearest: the preset configs/systems/demo_rivals.yaml")
    if config.evaluate.split is None:
        problems.append("evaluate.split: is not set; name the videos with masks to score on")
    wanted = {(system, seed) for system in rivals.systems for seed in rivals.seeds}
    if rivals.train is not None:
        known = [*rivals.systems, *(f"{system}:{seed}" for system, seed in sorted(wanted))]
        unknown = [one for one in rivals.train if one not in known]
        problems += [f"rivals.train: {one!r} is none of {', '.join(known)}" for one in unknown]
        wanted = {(s, n) for s, n in wanted if s in rivals.train or f"{s}:{n}" in rivals.train}
    configs = {}
    for system, preset in rivals.systems.items():
        try:
            configs[system] = with_presets(config, preset)
        except ConfigError as error:
            problems += [f"rivals.systems.{system}: {line}" for line in str(error).splitlines()]
            continue
        if configs[system].teacher.checkpoint is not None:
            problems.append(
                f"rivals.systems.{system}: {preset} trains no teacher; nearest: checkpoint: null in it"
            )
    if problems:
        raise ConfigError("\n".join(problems))
    return [
        Rival(system, seed, with_overrides(of, {"teacher.train.seed": seed}), (system, seed) in wanted)
        for seed in rivals.seeds
        for system, of in configs.items()
    ]
