"""Trains in a process that can import only what a GPU box with PyTorch and timm has; see test_trainer.py.

python train_bare.py FOLDER prints the histories of a teacher, of a student, and of the same student stopped and
resumed.
"""

import json
import sys
from dataclasses import replace

MISSING = ("ray", "mlflow", "matplotlib", "av", "botocore", "boto3", "google", "pandas", "requests")


class _Installed:
    """A finder that does not find those."""

    def __init__(self, finder):
        self.finder = finder

    def find_spec(self, name, path=None, target=None):
        return None if name.partition(".")[0] in MISSING else self.finder.find_spec(name, path, target)

    def __getattr__(self, name):
        return getattr(self.finder, name)


class Stopped(Exception):
    pass


def main(root):
    import torch
    from training_runs import make_clips, make_config, make_targets, student_run

    from pipeline.distill.run import Run
    from pipeline.distill.trainer import Hooks, Trainer
    from pipeline.models import load_slot_model

    torch.set_num_threads(1)
    clips = make_clips(f"{root}/clips")
    config = make_config(root, "evaluate.split=x", "distill.validate_every=10", "distill.checkpoint_every=6")
    teacher = Trainer(Run.teacher(config, f"{root}/teacher", clips)).train()
    teacher_uri = f"{root}/teacher/model"
    targets = make_targets(config, clips, teacher_uri, f"{root}/targets")

    def student(name):
        run = student_run(config, f"{root}/{name}", clips, teacher_uri=teacher_uri, targets_uri=targets)
        return replace(run, validation_uri=clips)

    def stop_at_12(step):
        if step == 12:
            raise Stopped

    unbroken = Trainer(student("unbroken")).train()
    try:
        Trainer(student("stopped"), hooks=Hooks(after_checkpoint=stop_at_12)).train()
    except Stopped:
        trainer = Trainer(student("stopped"))
        trainer.resume()
        going_on_from = trainer.step
        resumed = trainer.train()
    models = [load_slot_model(f"{root}/{name}/model") for name in ("unbroken", "stopped")]
    video = torch.rand(1, 2, 3, 32, 32)
    slots = [model(video).slots for model in models]
    print(
        json.dumps(
            {
                "teacher": teacher.history,
                "unbroken": unbroken.history,
                "resumed": resumed.history,
                "going_on_from": going_on_from,
                "shape": list(slots[0].shape),
                "same_model": torch.equal(*slots),
                "public": load_slot_model(f"{root}/teacher/teacher.ckpt", num_heads=2).config.num_slots,
                "imported": sorted(set(MISSING) & set(sys.modules)),
            }
        )
    )


if __name__ == "__main__":
    sys.meta_path[:] = [_Installed(finder) for finder in sys.meta_path]
    main(sys.argv[1])
