"""Emu3-8B, stage 1, on 16 nodes of eight H200, on GKE or Slurm.

    python -m launch.submit --job=launch/jobs/emu3_8b_h200.py --to=gke --dry-run
    python -m launch.submit --job=launch/jobs/emu3_8b_h200.py:slurm --to=slurm --dry-run

Starts configs/emu3_8b_stage1.py on 128 GPUs, restarted until its steps are done. Before: push a
CUDA image of launch/Dockerfile, copy stores/ to the bucket (Slurm: the repository with its
environment and stores/ to the shared file system), and put the names of your project, bucket and
queue here or on the command line. Not run yet.
"""

from launch.spec import Gke, Job, Queue, Slurm, Storage

GIB = 2**30
XLA_FLAGS = (  # as MaxText has them: overlap of communication, few and large collectives
    "--xla_gpu_enable_latency_hiding_scheduler=true",
    "--xla_gpu_enable_triton_gemm=false",
    "--xla_gpu_enable_while_loop_double_buffering=true",
    f"--xla_gpu_all_reduce_combine_threshold_bytes={2 * GIB}",
    f"--xla_gpu_all_gather_combine_threshold_bytes={2 * GIB}",
    f"--xla_gpu_reduce_scatter_combine_threshold_bytes={GIB // 64}",
)
RUN = "emu3_8b_stage1"
STORAGE = dict(
    gke=Storage(run_dir=f"/gcs/runs/{RUN}", bucket="BUCKET", xla_cache="/gcs/xla_cache"),
    slurm=Storage(run_dir=f"/shared/runs/{RUN}", xla_cache="/shared/xla_cache"),
)


def get_job(where: str = "gke") -> Job:
    """128 H200."""
    if where not in STORAGE:
        raise ValueError(f"no storage for {where!r}; take one of {', '.join(STORAGE)}")
    return Job(
        name="emu3-8b-h200",
        config="configs/emu3_8b_stage1.py",
        accelerator="h200",
        nodes=16,
        image="us-docker.pkg.dev/PROJECT/emu3/train-cuda:latest",
        env=dict(
            CUDA_DEVICE_MAX_CONNECTIONS="1",
            NCCL_DEBUG="WARN",
            XLA_FLAGS=" ".join(XLA_FLAGS),
            XLA_PYTHON_CLIENT_MEM_FRACTION="0.92",
        ),
        storage=STORAGE[where],
        queue=Queue(local_queue="gpu-queue"),
        gke=Gke(service_account="emu3-train"),
        slurm=Slurm(
            partition="h200", directory="/shared/emu3_jax", setup=("source .venv/bin/activate",)
        ),
    )
