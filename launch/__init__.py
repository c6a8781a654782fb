"""Where a run starts: the same job on GKE, XManager, Slurm, TPU VMs or this machine."""
