# ruff: noqa: E402  the pipeline is imported once the device is there
"""Runs cases on the fake device and prints what came of each as JSON; see test_fake_cuda.py.

python cases.py FOLDER CASE… with device.cpp's library in LD_PRELOAD, and tests/ in PYTHONPATH.
"""

import json
import sys
import traceback
from dataclasses import replace
from pathlib import Path

import fake_device
import torch

LIBRARY = fake_device.install()
torch.set_num_threads(1)

import numpy as np
from clip_sets import make_clip_set, random_video
from tiny_models import tiny_model
from training_runs import make_config, make_targets, student_run

from pipeline import storage
from pipeline.clips.table import ClipSet
from pipeline.config.protocols import choose_protocol
from pipeline.distill.run import Run
from pipeline.distill.step import Batch
from pipeline.distill.trainer import Trainer
from pipeline.evaluate.stage import ROWS_FOLDER, ScoreTask
from pipeline.evaluate.subjects import Subject
from pipeline.models import SlotModel, save_public_checkpoint, save_slot_model
from pipeline.models.build import load_teacher
from pipeline.report.efficiency import measure_latencies
from pipeline.segment.stage import segment
from pipeline.targets.maker import TargetMaker

KINDS = {  # of teachers, by their designs
    "learned": {},
    "drawn": {"initializer": "random", "corrector_mlp": False},
    "mixer": {"initializer": "random", "decoder": "slot_mixer", "decoder_blocks": 1},
}
DRAWN = ("student.initial_slots=random", "student.corrector_mlp=false")
SIZE = ("student.image_size=24", "teacher.image_size=24")


class World:
    """Clips and teachers in a folder, and the cases that need them."""

    def __init__(self, root, device):
        self.root, self.device, self.runs = Path(root), device, 0
        rng = np.random.default_rng(0)
        self.clips = make_clip_set(
            self.root / "clips", {f"v{i}": random_video(rng, 4, (24, 24)) for i in range(3)}, clip_frames=2
        )
        for name, design in KINDS.items():
            save_slot_model(tiny_model(4, 16, image_size=24, hidden=(16, 16), **design), self.root / name)

    def config(self, *overrides):
        few = ("steps=4", "log_every=3", "checkpoint_every=4", "overlays=1", "batch_size=2", "warmup_steps=1")
        common = [f"{section}.{one}" for section in ("distill", "teacher.train") for one in few]
        return make_config(self.root, *SIZE, *common, "evaluate.split=x", *overrides)

    def student(self, *overrides, teacher="learned", cached=True, resumed=False):
        """Trains a student from cached targets or a live teacher; returns the trainer's summary."""
        self.runs += 1
        config, teacher = self.config(*overrides), str(self.root / teacher)
        uri = f"{self.root}/run{self.runs}"
        targets = make_targets(config, self.clips.uri, teacher, f"{uri}-targets") if cached else None
        run = student_run(config, uri, self.clips.uri, teacher_uri=teacher, targets_uri=targets)
        run = replace(run, validation_uri=self.clips.uri)
        outcome = self.train(run)
        if resumed:
            storage.delete(f"{uri}/checkpoints/step_00000004")
            outcome = self.train(run)
        return outcome

    def train(self, run):
        trainer = Counting(run, self.device)
        assert trainer.model.device == fake_device.CUDA
        outcome = trainer.train()
        self.device.waits = []
        waits = {step: lines for step, lines in trainer.waits.items() if lines}
        lost = [n for n, p in trainer.objective.named_parameters() if p.requires_grad and p.grad is None]
        return {"status": outcome.status, "step": outcome.step, "precision": outcome.precision} | {
            "logged": [row["step"] for row in outcome.history],
            "waits": waits,
            "without gradient": lost,
        }

    def teacher(self, *overrides):
        config = self.config(*overrides)
        self.runs += 1
        return self.train(Run.teacher(config, f"{self.root}/run{self.runs}", self.clips.uri))

    def evaluate(self, *overrides):
        """Models of every kind, as the actors of `evaluate` score them."""
        self.runs += 1
        subjects = [Subject(model_uri=str(self.root / kind)) for kind in KINDS]
        work = [(subject, f"{self.root}/scores{self.runs}-{i}") for i, subject in enumerate(subjects)]
        task = ScoreTask(self.clips.uri, work, choose_protocol(self.config(*overrides).evaluate))
        for index, (_, uri) in enumerate(work):
            for shard in task.by_shard:
                task({"subject": index, "shard": shard})
            assert storage.list_names(f"{uri}/{ROWS_FOLDER}") == list(task.by_shard)

    def verify(self, *overrides):
        config = self.config(*overrides)
        teacher, uri = str(self.root / "drawn"), f"{self.root}/verified"
        make_targets(config, self.clips.uri, teacher, uri)
        maker = TargetMaker(config, self.clips.uri, teacher)
        assert maker.teacher.device == fake_device.CUDA
        for shard in ClipSet(self.clips.uri).shards:
            assert maker.verify_shard(shard, uri, 1.0)["checked"] > 0

    def model(self, kind):
        return load_teacher(self.config(), str(self.root / kind)).to(fake_device.CUDA)

    def segment(self):
        from PIL import Image

        folder = self.root / "frames"
        folder.mkdir()
        for i in range(3):
            Image.new("RGB", (24, 24)).save(folder / f"{i}.png")
        assert segment(self.model("drawn"), str(folder), self.root / "segmented")["frames"] == 3

    def latencies(self):
        torch.cuda.synchronize = lambda *_: self.device.wait("synchronize")
        measure_latencies([self.model(kind) for kind in KINDS], 2, 1)
        assert self.device.waits.count("synchronize, report/efficiency.py:forward")

    def public_checkpoint(self):
        save_public_checkpoint(self.model("learned"), self.root / "public.ckpt")


class Counting(Trainer):
    """Keeps the waits of each step: from its batch to the next one's."""

    def __init__(self, run, device):
        super().__init__(run, device=fake_device.CUDA, draw=lambda frames, labels: _Picture())
        self.fake, self.waits = device, {}

    def batch(self, raw):
        self.fake.waits = self.waits[self.step + 1] = []
        return super().batch(raw)


class _Picture:
    def save(self, path):
        Path(path).write_bytes(b"")


LIVE = ("distill.live_teacher=true", "distill.fresh_views=true")


NO_KD = ("distill.method=no_kd", "distill.steps=2")
SHORT = ("distill.method=no_kd", "distill.steps=1")


def planted(fault, *overrides, **options):
    """A case that must fail: the pipeline with a mistake in it."""

    def case(world):
        place, name, wrong = fault
        right = getattr(place, name)
        setattr(place, name, wrong(right))
        try:
            return world.student(*overrides, **options)
        finally:
            setattr(place, name, right)

    return case


def leave_on_cpu(*names):
    def wrong(right):
        def to(batch, device):
            return replace(
                right(batch, device),
                **{name: torch.zeros_like(getattr(batch, name), device="cpu") for name in names},
            )

        return to

    return wrong


def cpu_noise(right):
    return lambda model, *arguments: right(model, *arguments).cpu()


def numpy_on_cuda(right):
    return lambda model, masks, size: masks.numpy()


def bf16_to_numpy(right):
    return lambda model, masks, size: masks.bfloat16().cpu().numpy()


def read_each_step(right):
    def train_step(trainer, *arguments):
        values = right(trainer, *arguments)
        float(values["total"])
        return values

    return train_step


def tensor_each_step(right):
    return lambda model, clips: right(model, clips) - torch.tensor([0.5], device=model.device)


ALONE = {"cached": False}
PLANTED = {
    "a CPU target": planted((Batch, "to", leave_on_cpu("target_slots")), "distill.steps=1"),
    "a batch that was not moved": planted((Batch, "to", leave_on_cpu("video")), *SHORT, **ALONE),
    "CPU noise": planted((SlotModel, "initial_slots", cpu_noise), *DRAWN, *LIVE, teacher="drawn", **ALONE),
    "numpy of a CUDA tensor": planted((SlotModel, "label_maps", numpy_on_cuda), *SHORT, **ALONE),
    "numpy of bf16": planted((SlotModel, "label_maps", bf16_to_numpy), *SHORT, **ALONE),
    "a number read in each step": planted((Trainer, "train_step", read_each_step), *NO_KD, **ALONE),
    "a tensor made in each step": planted((SlotModel, "prepare", tensor_each_step), *NO_KD, **ALONE),
}
VIDEOSAUR = (
    "decoder=slot_mixer",
    "initial_slots=random",
    "corrector_mlp=false",
    "train.similarity=0.1",
    "train.alpha=0",
)
CASES = {
    "slotmatch": lambda w: w.student(),
    "resumed": lambda w: w.student("distill.checkpoint_every=2", "distill.validate_every=4", resumed=True),
    "live teacher": lambda w: w.student(*LIVE, cached=False),
    "drawn slots": lambda w: w.student(*DRAWN, teacher="drawn"),
    "hungarian": lambda w: w.student("distill.method=slotmatch_hungarian"),
    "reconstruction KD": lambda w: w.student("distill.method=slotmatch_reconstruction_kd"),
    "verify": lambda w: w.verify("targets.student_features=true"),
    "evaluate": lambda w: w.evaluate(),
    "segment": lambda w: w.segment(),
    **PLANTED,
}
RARER = {
    "cached features": lambda w: w.student("targets.student_features=true", "targets.feature_dtype=float16"),
    "fp32": lambda w: w.student("distill.precision=fp32"),
    "plain decoder": lambda w: w.student("distill.fast_decoder=false"),
    "hungarian per frame": lambda w: w.student(
        "distill.method=slotmatch_hungarian", "distill.matching=frame"
    ),
    "bound": lambda w: w.student("distill.measure_bound_every=3"),
    "mse": lambda w: w.student("distill.method=slotmatch_mse"),
    "feature KD": lambda w: w.student("distill.method=feature_kd", "targets.feature_dtype=float16"),
    "feature KD, live": lambda w: w.student(
        "distill.method=feature_kd", *LIVE, "student.image_size=32", cached=False
    ),
    "slot map": lambda w: w.student("distill.slot_map=true", "student.slot_size=8"),
    "drawn slots, live": lambda w: w.student(*DRAWN, *LIVE, teacher="mixer", cached=False),
    "mixer student": lambda w: w.student(*DRAWN, "student.decoder=slot_mixer", teacher="mixer"),
    "cyclic": lambda w: w.student("targets.rollout=cyclic", "evaluate.rollout=cyclic"),
    "no KD": lambda w: w.student("distill.method=no_kd", cached=False),
    "SlotContrast teacher": lambda w: w.teacher(),
    "VideoSAUR teacher": lambda w: w.teacher(*(f"teacher.{one}" for one in VIDEOSAUR)),
    "evaluate, cyclic": lambda w: w.evaluate("evaluate.rollout=cyclic"),
    "evaluate, attention": lambda w: w.evaluate("evaluate.protocol=paper", "evaluate.masks=attention"),
    "latencies": lambda w: w.latencies(),
    "public checkpoint": lambda w: w.public_checkpoint(),
}


def main(root, *names):
    device, results = fake_device.FakeDevice(), {}
    world = World(root, device)
    for name in names:
        results[name] = {"error": None}
        try:
            with device:
                results[name] |= {**CASES, **RARER}[name](world) or {}
        except Exception as error:
            results[name]["error"] = f"{type(error).__name__}: {error}"
            traceback.print_exc()
    print(json.dumps(results))


if __name__ == "__main__":
    main(*sys.argv[1:])
