"""Emu3-8B, stage 1, on two v5p slices of 64 chips, on GKE or TPU VMs.

    python -m launch.submit --job=launch/jobs/emu3_8b_stage1.py --to=gke --dry-run
    python -m launch.submit --job=launch/jobs/emu3_8b_stage1.py --to=tpu_vm --dry-run

Starts configs/emu3_8b_stage1.py on 32 hosts, data parallel over the slices, restarted until its
steps are done. Before: push an image of launch/Dockerfile, copy stores/ to the bucket, and put the
names of your project, bucket, queue and reservation here or on the command line (--job.image=...).
Not run yet.
"""

from launch.spec import Capacity, Gke, Job, Queue, Storage, TpuVm


def get_job() -> Job:
    """v5p-128, twice."""
    return Job(
        name="emu3-8b-stage1",
        config="configs/emu3_8b_stage1.py",
        overrides=("mesh.data=2",),
        accelerator="v5p",
        topology="4x4x4",
        slices=2,
        image="us-docker.pkg.dev/PROJECT/emu3/train:latest",
        capacity=Capacity("reserved", reservation="RESERVATION"),
        storage=Storage(
            run_dir="/gcs/runs/emu3_8b_stage1", bucket="BUCKET", xla_cache="/gcs/xla_cache"
        ),
        queue=Queue(local_queue="multislice-queue"),
        gke=Gke(service_account="emu3-train"),
        tpu_vm=TpuVm(project="PROJECT", zone="ZONE"),
    )
