"""One of several workers of a training run, without Ray; see test_workers.py.

RANK WORLD_SIZE RENDEZVOUS FOLDER CONTRAST
"""

import json
import sys

import torch
import torch.distributed as dist
from training_runs import make_config, student_run

from pipeline.distill.trainer import Trainer


def main(rank, world_size, rendezvous, folder, contrast):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{rendezvous}", rank=rank, world_size=world_size)
    # The scale that the first worker measures is all workers', or their losses would differ.
    config = make_config(
        folder, f"distill.contrast={contrast}", "distill.alpha=1", "student.feature_scale=auto"
    )
    taught = {"teacher_uri": f"{folder}/teacher/model", "targets_uri": f"{folder}/targets"}
    run = student_run(config, f"{folder}/{contrast}{world_size}", f"{folder}/clips", **taught)
    outcome = Trainer(run, rank=rank, world_size=world_size).train()
    if rank == 0:
        print(json.dumps([[row[key] for key in ("total", "contrast", "slot_kd")] for row in outcome.history]))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), *sys.argv[3:])
